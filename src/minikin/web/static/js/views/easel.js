// @ts-check
// The canvas of Change: the image with its mask, zoomed and moved; its edges are dragged to extend it.

import {html, signal, useEffect, useRef, usePan, ZOOMS} from "../ui.js";
import {drawn, image, margins, maskByWord, setMargin, SIDES, size, unshown, word, work} from "../change.js";
import {brush, Mask, Tools} from "./mask.js";

const GRID = 8; // px: an extension by dragging is a multiple
const MOST = 1024;
const OUTWARD = {left: [-1, 0], right: [1, 0], up: [0, -1], down: [0, 1]};
const zoom = signal(0); // an index of ZOOMS

export function Easel() {
  const area = useRef(/** @type {any} */ (null));
  usePan(area, brush.value.tool === "move");
  useEffect(() => {
    const wheel = e => {
      if (!e.ctrlKey) return; // it scrolls
      e.preventDefault();
      zoom.value = Math.min(ZOOMS.length - 1, Math.max(0, zoom.value + (e.deltaY < 0 ? 1 : -1)));
    };
    area.current.addEventListener("wheel", wheel, {passive: false});
    return () => area.current?.removeEventListener("wheel", wheel);
  }, []);
  const setDrawn = strokes => { drawn.value = strokes; }, factor = ZOOMS[zoom.value];
  return html`<div class="easel">
    <${Tools} drawn=${drawn.value} setDrawn=${setDrawn} />
    <div class="bar tight"><${ByWord} />
      <div class="inline"><button type="button" aria-label=${`Zoom, now ${factor} times`}
          onClick=${() => { zoom.value = (zoom.value + 1) % ZOOMS.length; }}>Zoom ${factor}×</button>
        <button type="button" onClick=${() => { image.value = null; }}>Another image</button></div></div>
    <div class="easel-view" ref=${area} tabindex="0" role="group" aria-label="The canvas"><${Frame} /></div>
    <p class="hint">What you paint over is painted anew; not a pixel outside it moves. With nothing painted
      over, the whole image is refined. Drag its edges to extend it.</p></div>`;
}

/** The mask of what a word names. */
function ByWord() {
  const keys = e => { if (e.key === "Enter") { e.preventDefault(); e.stopPropagation(); maskByWord(); } };
  return html`<div class="inline"><label for="mask-word">Mask what is a</label>
    <input id="mask-word" type="text" class="short" placeholder="cat" value=${word.value} onKeyDown=${keys}
      onInput=${e => { word.value = e.target.value; }} />
    <button type="button" disabled=${work.busy.value} onClick=${maskByWord}>Find it</button></div>`;
}

function Frame() {
  const frame = useRef(/** @type {any} */ (null));
  const {left, right, up, down} = margins.value, [w, h] = size.value ?? [1, 1];
  const [wide, high] = [w + left + right, h + up + down], factor = ZOOMS[zoom.value];
  const loaded = e => { size.value = [e.target.naturalWidth, e.target.naturalHeight]; };
  const percent = (part, all) => `${part / all * 100}%`;
  const width = `min(${factor * 100}%, ${factor * 62 * wide / high}vh)`;
  const fit = {width, aspectRatio: `${wide} / ${high}`};
  const inner = {
    left: percent(left, wide), top: percent(up, high), width: percent(w, wide), height: percent(h, high),
  };
  const extend = side => e => {
    e.preventDefault();
    e.stopPropagation();
    const handle = e.currentTarget, [dx, dy] = OUTWARD[side], before = margins.value[side];
    const scale = wide / frame.current.getBoundingClientRect().width; // at its beginning: the frame grows
    handle.setPointerCapture(e.pointerId);
    handle.onpointermove = event => {
      const by = ((event.clientX - e.clientX) * dx + (event.clientY - e.clientY) * dy) * scale;
      setMargin(side, Math.min(MOST, Math.max(0, Math.round((before + by) / GRID) * GRID)));
    };
    handle.onlostpointercapture = () => { handle.onpointermove = null; };
  };
  return html`<div class="frame" ref=${frame} style=${size.value ? fit : {}}>
    <div class="canvas" style=${size.value ? inner : {}}>
      <img src=${image.value?.url} alt="The image to change" draggable=${false} onLoad=${loaded}
        onError=${unshown} />
      ${size.value && html`<${Mask} size=${size.value} drawn=${drawn.value}
        setDrawn=${strokes => { drawn.value = strokes; }} />`}</div>
    ${size.value && SIDES.map(side => html`<i key=${side} class=${`edge ${side}`} aria-hidden="true"
      title="Drag to extend" onPointerDown=${extend(side)} />`)}</div>`;
}
