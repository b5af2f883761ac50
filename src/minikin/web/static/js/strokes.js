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
/** Draw strokes on a canvas; on a ground of another colour, by default on none. */
export function draw(canvas, strokes, colour, ground = "") {
  const g = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  g.globalCompositeOperation = "source-over";
  g.clearRect(0, 0, canvas.width, canvas.height);
  g.lineCap = g.lineJoin = "round";
  g.strokeStyle = g.fillStyle = colour;
  for (const stroke of strokes) drawStroke(g, stroke, colour);
  if (!ground) return;
  g.globalCompositeOperation = "destination-over";
  g.fillStyle = ground;
  g.fillRect(0, 0, canvas.width, canvas.height);
}
function drawStroke(g, stroke, colour) {
  const {width, height} = g.canvas;
  g.globalCompositeOperation = stroke.erase ? "destination-out" : "source-over";
  if (stroke.kind === "clear") g.clearRect(0, 0, width, height);
  else if (stroke.kind === "mask") g.drawImage(tinted(stroke.alpha, colour), 0, 0, width, height);
  else {
    g.beginPath();
    g.moveTo(stroke.points[0][0], stroke.points[0][1]);
    for (const [x, y] of stroke.points) g.lineTo(x + 0.01, y); // a single point is a dot
    if (stroke.kind === "lasso") g.fill();
    else { g.lineWidth = stroke.width; g.stroke(); }
  }
}
const tinted = (alpha, colour) => canvasOf(alpha.width, alpha.height, g => {
  g.drawImage(alpha, 0, 0);
  g.globalCompositeOperation = "source-in";
  g.fillStyle = colour;
  g.fillRect(0, 0, alpha.width, alpha.height);
});

/** The mask as a PNG, white where it is drawn; null where nothing is. */
export async function maskOf(drawn, [width, height]) {
  if (!isDrawn(drawn)) return null;
  const canvas = Object.assign(document.createElement("canvas"), {width, height});
  draw(canvas, drawn.strokes, "white", "black");
  return new Promise(done => canvas.toBlob(done, "image/png"));
}
/** A mask's image as a stroke. @returns {Promise<Stroke>} */
export async function strokeOf(blob) {
  const image = await createImageBitmap(blob);
  const alpha = canvasOf(image.width, image.height, g => {
    g.drawImage(image, 0, 0);
    const data = g.getImageData(0, 0, image.width, image.height);
    for (let i = 0; i < data.data.length; i += 4) data.data[i + 3] = data.data[i]; // white is opaque
    g.putImageData(data, 0, 0);
  });
  return {kind: "mask", alpha};
}
