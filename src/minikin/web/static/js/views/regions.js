// @ts-check
// Regions: where in the image a concept is to be, as boxes drawn over it and written into the prompt.

import {capabilities, concepts} from "../api.js";
import {change, form} from "../form.js";
import {boxOf, namesIn, regionText, withRegion} from "../prompt.js";
import {computed, html, Icon, Select, signal, useRef, useState} from "../ui.js";

const STEP = 2; // percent that an arrow key moves
const LEAST = 8; // percent: a smaller box is a slip of the hand
const SNAP = 3; // percent: an edge so near to the image's edge or middle lies on it
const ARROWS = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
const PROPOSED = {2: ["left", "right"], 3: ["left", "middle", "right"]};
const CORNERS = [[0, 1], [2, 1], [0, 3], [2, 3]]; // the places in a box of the coordinates that a corner moves

/** The concept whose region is being drawn; "" for none. */
export const placing = signal("");
const boxes = () => capabilities.value?.regions ?? {};
const clamp = (v, least = 0, most = 100) => Math.min(most, Math.max(least, v));
const snap = v => [0, 50, 100].find(line => Math.abs(v - line) <= SNAP) ?? Math.round(v);
const boxIn = (prompt, name) => boxOf(prompt, name, boxes());

/** The concepts that the prompt names, in its order. */
export const inPrompt = computed(() => namesIn(form.value.prompt, concepts.value.map(c => c.name)));

const setRegion = (name, region) => change({prompt: withRegion(form.value.prompt, name, region)});
const setBox = (name, box) => setRegion(name, regionText(box, boxes()));

/** Several concepts without regions have theirs proposed. */
export function Proposal() {
  const names = inPrompt.value, words = PROPOSED[names.length];
  if (!words || names.some(name => boxIn(form.value.prompt, name))) return null;
  const accept = () => {
    change({prompt: names.reduce((prompt, name, k) => withRegion(prompt, name, words[k]), form.value.prompt)});
    placing.value = names[0];
  };
  return html`<div class="inline hint"><span>
    ${names.map((name, k) => `<${name}> ${words[k]}`).join(", ")}?</span>
    <button type="button" class="small" onClick=${accept}>Place them so</button></div>`;
}

/** The boxes over the image; a drag beside them draws one for the concept that is being placed. */
export function Regions() {
  const area = useRef(/** @type {any} */ (null));
  const [draft, setDraft] = useState(/** @type {number[] | null} */ (null)); // the box under the hand
  const name = placing.value;
  if (!inPrompt.value.includes(name)) return null;
  const at = e => {
    const {left, top, width, height} = area.current.getBoundingClientRect();
    return [clamp((e.clientX - left) / width * 100), clamp((e.clientY - top) / height * 100)];
  };
  /** Follow the pointer until it is lifted; `boxAt` is the box for where it is. */
  const drag = (e, owner, boxAt) => {
    e.preventDefault();
    e.stopPropagation();
    area.current.setPointerCapture(e.pointerId);
    placing.value = owner;
    let box = null;
    const move = event => setDraft(box = boxAt(at(event)));
    const end = event => {
      area.current.removeEventListener("pointermove", move);
      area.current.removeEventListener("pointerup", end);
      area.current.removeEventListener("pointercancel", end);
      setDraft(null);
      if (box && event.type === "pointerup" && isLarge(box)) setBox(owner, box);
    };
    area.current.addEventListener("pointermove", move);
    area.current.addEventListener("pointerup", end);
    area.current.addEventListener("pointercancel", end);
  };
  const isLarge = ([left, top, right, bottom]) => right - left >= LEAST && bottom - top >= LEAST;
  const draw = e => {
    const [x, y] = at(e);
    drag(e, name, ([u, v]) => [Math.min(x, u), Math.min(y, v), Math.max(x, u), Math.max(y, v)].map(snap));
  };
  return html`<div class="regions" ref=${area} onPointerDown=${draw}>
    ${inPrompt.value.map(owner => {
      const box = owner === name && draft || boxIn(form.value.prompt, owner);
      return box && html`<${Box} key=${owner} name=${owner} box=${box} at=${at} drag=${drag} />`;
    })}</div>`;
}

function Box({name, box, at, drag}) {
  const [left, top, right, bottom] = box;
  const move = e => {
    e.currentTarget.focus();
    const [x, y] = at(e);
    drag(e, name, ([u, v]) => moved(box, u - x, v - y));
  };
  const size = (/** @type {number[]} */ [i, j]) => e => drag(e, name, ([u, v]) => {
    const next = [...box];
    next[i] = i === 0 ? clamp(snap(u), 0, Math.max(0, right - LEAST)) : clamp(snap(u), left + LEAST);
    next[j] = j === 1 ? clamp(snap(v), 0, Math.max(0, bottom - LEAST)) : clamp(snap(v), top + LEAST);
    return next;
  });
  const keys = e => {
    const by = ARROWS[e.key];
    if (e.ctrlKey || e.metaKey || e.altKey) return; // the browser's
    if (by && e.shiftKey) {
      setBox(name, [left, top, clamp(right + by[0] * STEP, left + LEAST),
        clamp(bottom + by[1] * STEP, top + LEAST)]);
    } else if (by) setBox(name, moved(box, by[0] * STEP, by[1] * STEP, Math.round));
    else if (e.key === "Delete" || e.key === "Backspace") setRegion(name, "");
    else return;
    e.preventDefault();
  };
  const style = {left: `${left}%`, top: `${top}%`, width: `${right - left}%`, height: `${bottom - top}%`};
  const label = `Region of ${name}, ${words(box)}. Arrows move it, with Shift they size it, Delete removes it`;
  return html`<div class=${placing.value === name ? "region on" : "region"} style=${style} tabindex="0"
      role="application" aria-label=${label}
      onPointerDown=${move} onKeyDown=${keys} onFocus=${() => { placing.value = name; }}>
    <span>${name}</span>
    ${CORNERS.map(corner => html`<i key=${corner.join()} class="corner" aria-hidden="true"
      style=${{left: corner[0] ? "100%" : "0", top: corner[1] === 3 ? "100%" : "0"}}
      onPointerDown=${size(corner)} />`)}</div>`;
}
/** The box moved, and not beyond the image. */
function moved([left, top, right, bottom], dx, dy, round = snap) {
  const x = clamp(round(left + dx), 0, 100 - (right - left));
  const y = clamp(round(top + dy), 0, 100 - (bottom - top));
  return [x, y, x + right - left, y + bottom - top];
}
const words = ([left, top, right, bottom]) =>
  `${Math.round(left)} to ${Math.round(right)} % across, ${Math.round(top)} to ${Math.round(bottom)} % down`;

/** Under the image while a region is drawn: its name, to choose another, and its numbers, read out. */
export function RegionBar() {
  const name = placing.value;
  if (!inPrompt.value.includes(name)) return null;
  const box = boxIn(form.value.prompt, name), region = box ? regionText(box, boxes()) : "";
  const options = [["", "anywhere"], ...Object.keys(boxes()).map(word => [word, word.replace("-", " ")]),
    ...(region && !Object.hasOwn(boxes(), region) ? [[region, "as drawn"]] : [])];
  return html`<div class="actions region-bar">
    <${Select} label=${`Place of <${name}>`} value=${region} options=${options}
      onInput=${word => setRegion(name, word)} />
    <p class="hint" role="status">${box ? words(box) : "Drag a box over the image, or choose a place."}</p>
    <button type="button" onClick=${() => { placing.value = ""; }}>Done</button></div>`;
}

/** The button of a concept's chip. */
export const PlaceButton = ({name}) => {
  const isOn = placing.value === name, box = boxIn(form.value.prompt, name);
  return html`<button type="button" class=${box ? "bare has" : "bare"} aria-pressed=${isOn}
    aria-label=${`Place ${name} in the image`} title=${box ? `Placed: ${words(box)}` : "Place it in the image"}
    onClick=${() => { placing.value = isOn ? "" : name; }}>
    <${Icon} name="place" /></button>`;
};
