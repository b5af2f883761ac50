// @ts-check
// The mask over an image, drawn with brush, eraser and lasso, by mouse, finger or keyboard; and its tools.

import {added, draw, EMPTY, redo, undo} from "../strokes.js";
import {html, signal, useEffect, useRef, useState} from "../ui.js";

const LABEL = "Mask: draw with the mouse or a finger; with the keyboard, arrows move the brush, space paints, "
  + "and with the lasso sets a corner; Enter closes it";
const ARROWS = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
const LEAST = 2, MOST = 64; // of the brush
const TOOLS = {brush: "b", erase: "e", lasso: "l", move: "h"};
const TITLES = {brush: "Brush", erase: "Erase", lasso: "Lasso", move: "Move"};

/** size: its width, on an image of 128 px; tool: what a drag does. */
export const brush = signal({size: 16, tool: "brush"});
const setBrush = more => { brush.value = {...brush.value, ...more}; };
const clamp = (v, least, most) => Math.min(most, Math.max(least, v));

/** What a key means for every tool; whether it meant something. drawn: a Strokes. */
function toolKey(e, drawn, setDrawn) {
  const key = e.key.toLowerCase(), command = e.ctrlKey || e.metaKey;
  if (command && !e.altKey && (key === "z" || key === "y")) {
    setDrawn(key === "y" || e.shiftKey ? redo(drawn) : undo(drawn));
    return true;
  }
  if (command || e.altKey) return false; // the browser's
  const tool = Object.keys(TOOLS).find(name => TOOLS[name] === key);
  if (tool) setBrush({tool});
  else if (key === "[" || key === "]") {
    setBrush({size: clamp(brush.value.size + (key === "[" ? -2 : 2), LEAST, MOST)});
  } else return false;
  return true;
}

/** The tools in a row; canMove: whether there is something to move. */
export function Tools({drawn, setDrawn, canMove = true}) {
  const {size, tool} = brush.value;
  const act = (label, list, next) => html`<button type="button" disabled=${!list.length}
    onClick=${() => setDrawn(next())}>${label}</button>`;
  const names = Object.keys(TOOLS).filter(name => canMove || name !== "move");
  return html`<div class="inline" role="group" aria-label="Brush">
    <span class="joined">${names.map(name => html`
      <button key=${name} type="button" aria-pressed=${tool === name}
        title=${`${TITLES[name]} (${TOOLS[name]})`} onClick=${() => setBrush({tool: name})}>
        ${TITLES[name]}</button>`)}</span>
    <label class="check">Size <input type="range" min=${LEAST} max=${MOST} value=${size}
      title="Size of the brush ([ and ])" onInput=${e => setBrush({size: Number(e.target.value)})} /></label>
    <span class="joined">
      ${act("Undo", drawn.strokes, () => undo(drawn))}
      ${act("Redo", drawn.undone, () => redo(drawn))}
      ${act("Clear", drawn.strokes, () => added(drawn, {kind: "clear"}))}</span></div>`;
}

/** The canvas over an image of size [width, height]. drawn: its Strokes. */
export function Mask({size: [width, height], drawn = EMPTY, setDrawn, canMove = true}) {
  const canvas = useRef(/** @type {any} */ (null)), stroke = useRef(/** @type {any} */ (null));
  const [cursor, setCursor] = useState(/** @type {[number, number] | null} */ (null));
  const {size, tool} = brush.value;
  const thickness = size / 128 * Math.max(8, width); // the same share of every image, whatever its size
  const paint = () => {
    const open = stroke.current;
    draw(canvas.current, open ? [...drawn.strokes, open] : drawn.strokes);
    const isLasso = tool === "lasso";
    if (cursor && (!open || isLasso)) drawCursor(canvas.current, cursor, isLasso ? width / 32 : thickness);
  };
  useEffect(paint, [drawn, cursor, width, height, thickness, tool]);
  const begin = point => ({points: [point], erase: tool === "erase",
    ...(tool === "lasso" ? {kind: "lasso"} : {kind: "brush", width: thickness})});
  const end = () => {
    if (stroke.current) setDrawn(added(drawn, stroke.current));
    stroke.current = null;
  };
  const at = e => {
    const box = canvas.current.getBoundingClientRect();
    return [(e.clientX - box.left) * width / box.width, (e.clientY - box.top) * height / box.height];
  };
  const down = e => {
    if (e.button > 0) return; // moves the image
    canvas.current.setPointerCapture(e.pointerId);
    e.preventDefault();
    e.stopPropagation();
    canvas.current.focus();
    stroke.current = begin(at(e));
    paint();
  };
  const move = e => {
    if (!stroke.current || !canvas.current.hasPointerCapture(e.pointerId)) return;
    stroke.current.points.push(at(e));
    paint();
  };
  const keys = e => {
    if (toolKey(e, drawn, setDrawn)) { e.preventDefault(); return; }
    if (e.ctrlKey || e.metaKey || e.altKey) return;
    const by = ARROWS[e.key], place = cursor ?? [width / 2, height / 2], half = thickness / 2;
    if (by) setCursor([clamp(place[0] + by[0] * half, 0, width), clamp(place[1] + by[1] * half, 0, height)]);
    else if (e.key === " " && tool === "lasso") {
      if (stroke.current) stroke.current.points.push(place);
      else stroke.current = begin(place);
      paint();
    } else if (e.key === " ") setDrawn(added(drawn, begin(place)));
    else if (e.key === "Enter" && stroke.current) end();
    else return;
    e.preventDefault();
  };
  return html`<canvas ref=${canvas} width=${width} height=${height} tabindex="0" role="application"
    aria-label=${LABEL} class=${canMove && tool === "move" ? "passive" : ""}
    onPointerDown=${down} onPointerMove=${move} onPointerUp=${end} onPointerCancel=${end} onKeyDown=${keys}
    onFocus=${() => setCursor(before => before ?? [width / 2, height / 2])} onBlur=${() => setCursor(null)} />`;
}
function drawCursor(canvas, [x, y], width) {
  const g = canvas.getContext("2d");
  g.globalCompositeOperation = "source-over";
  g.strokeStyle = "white";
  g.lineWidth = Math.max(1, canvas.width / 200);
  g.beginPath();
  g.arc(x, y, width / 2, 0, 7);
  g.stroke();
}
