// @ts-check
// Files that are chosen, dropped or pasted. A view says what it takes; a file dropped beside its place, where a
// browser would open it, and one that is pasted go to the open view.

import {html, signal, useEffect, useState} from "./ui.js";

export const IMAGES = "image/png,image/jpeg,image/webp,image/avif,image/heic,image/heif,.heic,.heif,.avif";
/** A sentence for everybody to read, above the view. */
export const notice = signal("");

const takers = new Set(/** @type {{accept: string, take: (files: File[]) => void}[]} */ ([]));
const accepts = (accept, file) => accept.split(",").some(a =>
  a.startsWith(".") ? file.name.toLowerCase().endsWith(a) : file.type === a);

/** The view that calls this takes such files while it is open. */
export function useFiles(accept, take) {
  useEffect(() => {
    const taker = {accept, take};
    takers.add(taker);
    return () => { takers.delete(taker); };
  });
}
function arrived(files) {
  const taker = [...takers].find(t => files.every(f => accepts(t.accept, f)));
  notice.value = taker ? "" : "Files can be dropped and pasted in Change, Concepts, Teach and Recipe.";
  taker?.take(files);
  return Boolean(taker);
}
addEventListener("dragover", e => { if (e.dataTransfer?.types.includes("Files")) e.preventDefault(); });
addEventListener("drop", e => {
  if (!e.dataTransfer?.files.length) return;
  e.preventDefault();
  arrived([...e.dataTransfer.files]);
});
addEventListener("paste", e => {
  if (e.clipboardData?.files.length && arrived([...e.clipboardData.files])) e.preventDefault();
});

/** The input behind a label; take hears the chosen files. */
export const FileInput = ({accept, take, multiple = false}) => {
  const chosen = e => {
    const files = [...e.target.files];
    e.target.value = "";
    if (files.length) take(files);
  };
  return html`<input type="file" class="unseen" accept=${accept} multiple=${multiple} onChange=${chosen} />`;
};

/** A large place to drop files on. */
export function Drop({accept, take, multiple = false, children}) {
  const [over, setOver] = useState(false);
  const dropped = e => {
    setOver(false);
    e.preventDefault();
    e.stopPropagation(); // it has its place, whatever its type: the server says what it is
    if (e.dataTransfer.files.length) take([...e.dataTransfer.files]);
  };
  return html`<label class=${over ? "drop over" : "drop"} onDragEnter=${() => setOver(true)}
    onDragLeave=${() => setOver(false)} onDragOver=${e => e.preventDefault()} onDrop=${dropped}>
    <${FileInput} accept=${accept} take=${take} multiple=${multiple} /><span>${children}</span></label>`;
}
/** A button that opens files. */
export const FileButton = ({accept, take, label}) =>
  html`<label class="button"><${FileInput} accept=${accept} take=${take} />${label}</label>`;
