// @ts-check
// A photo of Teach: its mask, its caption, what may be wrong with it; and the dialog that corrects its mask.

import {changePhoto, measure, photos, setMasks, warning} from "../photos.js";
import {EMPTY, maskOf, strokeOf} from "../strokes.js";
import {Check, html, Icon, useEffect, useRef, useState} from "../ui.js";
import {Mask, Tools} from "./mask.js";

export function PhotoCard({photo, number: k, name, category}) {
  const [hidden, setHidden] = useState(false); // HEIC: sent, though not shown
  const [isOpen, setOpen] = useState(false);
  const mask = photo.mask && photo.accepted && `url(${photo.overlay})`;
  const problem = warning(photo, name, category);
  return html`<figure>
    <div class="photo">
      ${hidden ? html`<span class="unshown">${photo.file.name}</span>`
        : html`<img src=${photo.url} alt=${`Photo ${k}`} onLoad=${e => measure(photo.url, e.target)}
          onError=${() => setHidden(true)} />`}
      ${mask && html`<div class="mask" style=${{maskImage: mask, webkitMaskImage: mask}} />`}</div>
    <div class="inline">
      ${photo.mask && html`<${Check} label="mask" checked=${photo.accepted}
        onChange=${accepted => changePhoto(photo.url, {accepted})} />`}
      ${photo.size && html`<button type="button" class="small" aria-label=${`Draw the mask of photo ${k}`}
        onClick=${() => setOpen(true)}>${photo.mask ? "Correct" : "Draw a mask"}</button>`}
      <button type="button" class="bare" aria-label=${`Leave out photo ${k}`}
        onClick=${() => { photos.value = photos.value.filter(p => p !== photo); }}>×</button></div>
    <input type="text" class="caption" aria-label=${`Caption of photo ${k}`}
      placeholder=${`a ${category || "cat"} on a chair`} title="What the photo shows, if you like"
      maxlength="500" value=${photo.caption}
      onInput=${e => changePhoto(photo.url, {caption: e.target.value})} />
    ${problem && html`<p class="hint warning">${problem}</p>`}
    ${isOpen && html`<${MaskDialog} photo=${photo} number=${k} close=${() => setOpen(false)} />`}</figure>`;
}

/** The photo large, with its mask to draw on. */
function MaskDialog({photo, number, close}) {
  const dialog = useRef(/** @type {any} */ (null));
  const [drawn, setDrawn] = useState(EMPTY), [problem, setProblem] = useState("");
  useEffect(() => {
    dialog.current.showModal();
    if (photo.mask) strokeOf(photo.mask).then(stroke => setDrawn(({strokes}) =>
      ({strokes: [stroke, ...strokes], undone: []})), e => setProblem(e.message));
  }, []);
  const width = `min(100%, ${60 * photo.size[0] / photo.size[1]}vh)`;
  const done = async () => {
    try {
      await setMasks([[photo.url, await maskOf(drawn, photo.size)]], true);
      dialog.current?.close();
    } catch (e) { setProblem(e.message); }
  };
  return html`<dialog ref=${dialog} class="viewer" aria-label=${`The mask of photo ${number}`} onClose=${close}>
    <div class="bar"><p class="hint">Paint over what is to be learned.</p>
      <button type="button" class="square" aria-label="Close" onClick=${() => dialog.current?.close()}>
        <${Icon} name="close" /></button></div>
    <div class="easel"><${Tools} drawn=${drawn} setDrawn=${setDrawn} canMove=${false} />
      <div class="mask-photo" style=${{width}}><img src=${photo.url} alt="" />
        <${Mask} size=${photo.size} drawn=${drawn} setDrawn=${setDrawn} canMove=${false} /></div>
      <div class="actions">
        <button type="button" class="main" onClick=${done}>Take this mask</button></div></div>
    <p class="message" role="status">${problem}</p>
  </dialog>`;
}
