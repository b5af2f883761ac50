// @ts-check
// Strokes of a brush on a canvas: the mask of Inpaint.

import {html, useEffect, useRef, useState} from "../ui.js";

/** @typedef {{points: number[][], width: number, erase: boolean}} Stroke  in pixels of the image */

const LABEL = "Mask: draw with the mouse or a finger; with the keyboard, arrows move the brush, space paints";
const COLOUR = "rgb(194, 65, 12)";
const ARROWS = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};

/** @param {HTMLCanvasElement} canvas  @param {Stroke[]} strokes  @param {string} ground  colour of the rest */
function draw(canvas, strokes, colour, ground = "") {
  const g = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  g.globalCompositeOperation = "source-over";
  g.clearRect(0, 0, canvas.width, canvas.height);
  g.lineCap = g.lineJoin = "round";
  g.strokeStyle = colour;
  for (const stroke of strokes) {
    g.globalCompositeOperation = stroke.erase ? "destination-out" : "source-over";
    g.lineWidth = stroke.width;
    g.beginPath();
    g.moveTo(stroke.points[0][0], stroke.points[0][1]);
    for (const [x, y] of stroke.points) g.lineTo(x + 0.01, y);
    g.stroke();
  }
  if (!ground) return;
  g.globalCompositeOperation = "destination-over";
  g.fillStyle = ground;
  g.fillRect(0, 0, canvas.width, canvas.height);
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
/** The mask as a PNG, white where to paint; null where nothing is. */
export async function maskOf(strokes, [width, height]) {
  if (!strokes.some(s => !s.erase)) return null;
  const canvas = Object.assign(document.createElement("canvas"), {width, height});
  draw(canvas, strokes, "white", "black");
  return new Promise(done => canvas.toBlob(done, "image/png"));
}

/** The canvas over an image: strokes by mouse, finger or keyboard. */
export function Mask({size: [width, height], strokes, setStrokes, brush, erase}) {
  const canvas = useRef(/** @type {any} */ (null)), stroke = useRef(/** @type {Stroke | null} */ (null));
  const [cursor, setCursor] = useState(/** @type {[number, number] | null} */ (null));
  const thickness = brush / 128 * Math.max(8, width); // the same share of every image, whatever its size
  const paint = () => {
    draw(canvas.current, strokes, COLOUR);
    if (cursor && !stroke.current) drawCursor(canvas.current, cursor, thickness);
  };
  useEffect(paint, [strokes, cursor, width, height, thickness]);
  const at = e => {
    const box = canvas.current.getBoundingClientRect();
    return [(e.clientX - box.left) * width / box.width, (e.clientY - box.top) * height / box.height];
  };
  const down = e => {
    canvas.current.setPointerCapture(e.pointerId);
    e.preventDefault();
    canvas.current.focus();
    stroke.current = {points: [at(e)], width: thickness, erase};
    setStrokes([...strokes, stroke.current]);
  };
  const move = e => {
    if (!stroke.current) return;
    stroke.current.points.push(at(e));
    setStrokes([...strokes]);
  };
  const up = () => { stroke.current = null; };
  const keys = e => {
    const isUndo = e.key === "z" && (e.ctrlKey || e.metaKey) && !e.altKey;
    if ((e.ctrlKey || e.metaKey || e.altKey) && !isUndo) return; // the browser's
    const by = ARROWS[e.key], place = cursor ?? [width / 2, height / 2];
    const clamp = (v, most) => Math.min(most, Math.max(0, v));
    const half = thickness / 2;
    const [x, y] = place;
    if (by) setCursor([clamp(x + by[0] * half, width), clamp(y + by[1] * half, height)]);
    else if (e.key === " ") setStrokes([...strokes, {points: [place], width: thickness, erase}]);
    else if (isUndo) setStrokes(strokes.slice(0, -1));
    else return;
    e.preventDefault();
  };
  return html`<canvas ref=${canvas} width=${width} height=${height} tabindex="0" role="application"
    aria-label=${LABEL}
    onPointerDown=${down} onPointerMove=${move} onPointerUp=${up} onPointerCancel=${up} onKeyDown=${keys}
    onFocus=${() => setCursor(before => before ?? [width / 2, height / 2])} onBlur=${() => setCursor(null)} />`;
}
