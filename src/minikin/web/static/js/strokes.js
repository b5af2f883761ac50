// @ts-check
// A mask as the strokes that it was drawn with, so that each can be undone; and the mask as an image.

/**
 * In pixels of the image.
 * @typedef {{kind: "brush", points: number[][], width: number, erase: boolean}
 *   | {kind: "lasso", points: number[][], erase: boolean}
 *   | {kind: "mask", alpha: HTMLCanvasElement}
 *   | {kind: "clear"}} Stroke
 * @typedef {{strokes: Stroke[], undone: Stroke[]}} Strokes  undone: the latest last
 */

const COLOUR = "rgb(194, 65, 12)"; // of a mask over its image
const TOO_LARGE = "This image is too large to draw on in this browser. Make it smaller first.";

/** @type {Strokes} */
export const EMPTY = {strokes: [], undone: []};
/** @returns {Strokes} */
export const added = ({strokes}, stroke) => ({strokes: [...strokes, stroke], undone: []});
/** @returns {Strokes} */
export const undo = ({strokes, undone}) =>
  ({strokes: strokes.slice(0, -1), undone: [...undone, ...strokes.slice(-1)]});
/** @returns {Strokes} */
export const redo = ({strokes, undone}) =>
  ({strokes: [...strokes, ...undone.slice(-1)], undone: undone.slice(0, -1)});
/** Whether anything is drawn. */
export function isDrawn({strokes}) {
  const since = strokes.slice(strokes.findLastIndex(s => s.kind === "clear") + 1);
  return since.some(s => !s.erase);
}

/** A canvas of this size and what is drawn on it. */
export function canvasOf(width, height, paint) {
  const canvas = Object.assign(document.createElement("canvas"), {width, height});
  paint(/** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d")));
  return canvas;
}
/** Draw strokes on a canvas, in COLOUR on none. */
export function draw(canvas, strokes) {
  const g = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  g.globalCompositeOperation = "source-over";
  g.clearRect(0, 0, canvas.width, canvas.height);
  g.lineCap = g.lineJoin = "round";
  g.strokeStyle = g.fillStyle = COLOUR;
  for (const stroke of strokes) drawStroke(g, stroke);
}
function drawStroke(g, stroke) {
  const {width, height} = g.canvas;
  g.globalCompositeOperation = stroke.erase ? "destination-out" : "source-over";
  if (stroke.kind === "clear") g.clearRect(0, 0, width, height);
  else if (stroke.kind === "mask") g.drawImage(stroke.alpha, 0, 0, width, height);
  else {
    g.beginPath();
    g.moveTo(stroke.points[0][0], stroke.points[0][1]);
    for (const [x, y] of stroke.points) g.lineTo(x + 0.01, y); // a single point is a dot
    if (stroke.kind === "lasso") g.fill();
    else { g.lineWidth = stroke.width; g.stroke(); }
  }
}

/** The mask as a PNG, white where it is drawn; null where nothing is, or all of it was erased. */
export async function maskOf(drawn, [width, height]) {
  if (!isDrawn(drawn)) return null;
  let isWhite = false;
  const canvas = canvasOf(width, height, g => {
    draw(g.canvas, drawn.strokes);
    fill(g, "source-in", "white");
    fill(g, "destination-over", "black");
    isWhite = pixelsOf(g).data.some((v, i) => v > 127 && i % 4 === 0);
  });
  if (!isWhite) return null;
  return new Promise((done, failed) =>
    canvas.toBlob(blob => (blob ? done(blob) : failed(new Error(TOO_LARGE))), "image/png"));
}
/** Fill a canvas under a mode of compositing. */
function fill(g, mode, colour) {
  g.globalCompositeOperation = mode;
  g.fillStyle = colour;
  g.fillRect(0, 0, g.canvas.width, g.canvas.height);
}
/** The pixels of a canvas; an Error where it is larger than this browser's canvases can be. */
function pixelsOf(g) {
  let pixels = /** @type {ImageData | null} */ (null);
  try { pixels = g.getImageData(0, 0, g.canvas.width, g.canvas.height); } catch { /* it is too large */ }
  if (!pixels?.data[3]) throw new Error(TOO_LARGE); // on such a canvas nothing is drawn, not the ground either
  return pixels;
}
/** A mask's image as a stroke, in COLOUR. @returns {Promise<Stroke>} */
export async function strokeOf(blob) {
  const image = await createImageBitmap(blob);
  const alpha = canvasOf(image.width, image.height, g => {
    g.drawImage(image, 0, 0);
    const pixels = pixelsOf(g), {data} = pixels;
    for (let i = 0; i < data.length; i += 4) data[i + 3] = data[i]; // white is opaque
    g.putImageData(pixels, 0, 0);
    fill(g, "source-in", COLOUR);
  });
  return {kind: "mask", alpha};
}
