// @ts-check
// Preact, htm and signals under one name, and the small components that every view uses.

import {useEffect, useId} from "../vendor/hooks.mjs";
import {cloneElement, h} from "../vendor/preact.mjs";
import htm from "../vendor/htm.mjs";

export {render} from "../vendor/preact.mjs";
export {useEffect, useLayoutEffect, useRef, useState} from "../vendor/hooks.mjs";
export {batch, computed, effect, signal} from "../vendor/signals.mjs";
/** Markup as a tagged template, without a build step and without eval. */
export const html = htm.bind(h);

/** A label above its field, which is the only child; note: what stands beside the label. */
export function Field({label, note = "", children}) {
  const id = useId();
  return html`<div class="field">
    <span class="label"><label for=${id}>${label}</label> <output>${note}</output></span>
    ${cloneElement(children, {id})}</div>`;
}

export const Check = ({label, checked, onChange}) =>
  html`<label class="check"><input type="checkbox" checked=${checked}
    onChange=${e => onChange(e.target.checked)} />${label}</label>`;

/** A slider whose value stands beside its label. */
export const Range = ({label, value, onInput, ...range}) =>
  html`<${Field} label=${label} note=${Number(value)}>
    <input type="range" value=${value} onInput=${e => onInput(Number(e.target.value))} ...${range} /><//>`;

/** options: value, text, and whether it is disabled. */
export const Select = ({label, value, options, onInput}) =>
  html`<${Field} label=${label}><select value=${value} onInput=${e => onInput(e.target.value)}>
    ${options.map(([name, text, disabled]) =>
      html`<option value=${name} selected=${name === value} disabled=${disabled}>${text}</option>`)}
  </select><//>`;

/** A button that asks once more, on the same place, before it acts. */
export function Sure({label, name = label, onClick}) {
  const ask = e => {
    const button = e.currentTarget;
    if (button.classList.contains("sure")) { onClick(); return; }
    const says = (text, spoken) => { button.textContent = text; button.setAttribute("aria-label", spoken); };
    says("Really?", `Really? ${name}`);
    button.classList.add("sure");
    setTimeout(() => { says(label, name); button.classList.remove("sure"); }, 3000);
  };
  return html`<button type="button" class="small" aria-label=${name} onClick=${ask}>${label}</button>`;
}

/** How many times an image is enlarged, from one press to the next. */
export const ZOOMS = [1, 2, 4];
/** A drag moves what scrolls in an element; where `anyButton` is false, with the middle button alone. */
export function usePan(area, anyButton = true) {
  useEffect(() => {
    const element = area.current;
    const down = e => {
      const isMeant = e.button === 1 || anyButton && e.button === 0;
      if (!isMeant || e.pointerType === "touch") return; // a finger scrolls as it is
      e.preventDefault();
      const [x, y] = [element.scrollLeft + e.clientX, element.scrollTop + e.clientY];
      const move = event => {
        if (Math.hypot(event.clientX - e.clientX, event.clientY - e.clientY) > 4) {
          element.setPointerCapture(e.pointerId); // not before: a click is the button's below it
        }
        element.scrollTo(x - event.clientX, y - event.clientY);
      };
      const ends = new AbortController();
      element.addEventListener("pointermove", move, ends);
      for (const end of ["pointerup", "pointercancel"]) addEventListener(end, () => ends.abort(), ends);
    };
    element.addEventListener("pointerdown", down);
    return () => element.removeEventListener("pointerdown", down);
  }, [anyButton]);
}

/** An icon of 24 x 24 units, drawn in the colour of the text. */
export const Icon = ({name}) =>
  html`<svg class="icon" viewBox="0 0 24 24" aria-hidden="true"><path d=${ICONS[name]} /></svg>`;

const ICONS = {
  paint: "M4 20c3 0 5-1 5-4a2.5 2.5 0 0 1 5 0M9 13 19 3l2 2-10 10",
  change: "M3 3h5M12 3h4M3 12v-4M3 16v5h5M21 8v4M16 21h-4M14 21l7-7M21 21h-1",
  concepts: "M12 3l2.6 5.6 6.1.7-4.5 4.2 1.2 6L12 16.5 6.6 19.5l1.2-6L3.3 9.3l6.1-.7z",
  teach: "M3 8h4l2-3h6l2 3h4v11H3zM12 17a4 4 0 1 0 0-8 4 4 0 0 0 0 8",
  recipe: "M6 3h9l4 4v14H6zM14 3v5h5M9 12h7M9 16h7",
  gallery: "M4 4h7v7H4zM13 4h7v7h-7zM4 13h7v7H4zM13 13h7v7h-7z",
  dice: "M5 5h14v14H5zM9 9h.01M15 15h.01M12 12h.01M15 9h.01M9 15h.01",
  locked: "M6 11h12v9H6zM8 11V8a4 4 0 0 1 8 0v3",
  open: "M6 11h12v9H6zM8 11V8a4 4 0 0 1 7.5-2",
  heart: "M12 20S4 14.5 4 9.2A4.2 4.2 0 0 1 12 7.5 4.2 4.2 0 0 1 20 9.2C20 14.5 12 20 12 20z",
  theme: "M12 4a8 8 0 1 0 0 16zM12 4a8 8 0 0 1 0 16",
  place: "M4 8V4h4M16 4h4v4M20 16v4h-4M8 20H4v-4M9 9h6v6H9z",
  close: "M6 6l12 12M18 6 6 18",
};

/** Ctrl+Enter anywhere in a form sends it; Enter alone does not, but on its buttons. */
export function sendsWithKeys(e) {
  if (e.key !== "Enter") return;
  if (e.ctrlKey || e.metaKey) { e.preventDefault(); e.currentTarget.requestSubmit(); }
  else if (e.target.tagName === "INPUT") e.preventDefault();
}
export const submits = run => e => { e.preventDefault(); run(); };
export const randomSeed = () => Math.floor(Math.random() * 1e9);
/** A field's text as a number; null where it is empty. */
export const number = text => (String(text).trim() === "" ? null : Number(text));
export const jpeg = data => `data:image/jpeg;base64,${data}`;
