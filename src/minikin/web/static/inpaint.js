import {$, Work, base64, filled, hear, jpeg, number, post, presets, randomSeed, sends, takes, tell, told} from "./minikin.js";

const SIDES = ["left", "right", "up", "down"];
let work, image = null, strokes = [], stroke = null, erasing = false, cursor = null, result = null;

export async function start() {
  work = new Work("inpaint", {preview: p => show(jpeg(p), "")});
  told($("inpaint-strength"));
  sends($("inpaint-form"));
  $("inpaint-form").addEventListener("submit", e => { e.preventDefault(); go(); });
  takes($("inpaint-drop"), $("inpaint-file"), ([file]) => begin({url: URL.createObjectURL(file), file}));
  $("inpaint-other").addEventListener("click", () => { image = null; views(); });
  $("brush-clear").addEventListener("click", () => { strokes = []; draw(); });
  $("brush-undo").addEventListener("click", () => { strokes.pop(); draw(); });
  $("brush-erase").addEventListener("click", () => { erasing = !erasing; $("brush-erase").setAttribute("aria-pressed", erasing); });
  $("inpaint-on").addEventListener("click", () => begin({url: result.url, id: result.id}));
  brush($("inpaint-mask"));
  hear("inpaint", begin);
  try { await presets($("inpaint-preset")); } catch (e) { work.say(e.message); }
}

function begin(given) {
  image = given;
  strokes = [];
  $("inpaint-result").hidden = $("inpaint-tools").hidden = true;
  const under = $("inpaint-under");
  under.onload = () => { $("inpaint-mask").width = under.naturalWidth; $("inpaint-mask").height = under.naturalHeight; draw(); };
  under.onerror = () => { image = null; views(); work.say("This browser cannot show this file, so nothing can be drawn over it. Use JPEG, PNG or WebP."); };
  under.src = given.url;
  work.say("");
  views();
}
function views() {
  $("inpaint-easel").hidden = !image;
  $("inpaint-drop").hidden = Boolean(image);
}

// ---- the brush

function brush(canvas) {
  const at = e => {
    const box = canvas.getBoundingClientRect();
    return [(e.clientX - box.left) * canvas.width / box.width, (e.clientY - box.top) * canvas.height / box.height];
  };
  canvas.addEventListener("pointerdown", e => {
    canvas.setPointerCapture(e.pointerId);
    stroke = {points: [at(e)], width: width(), erase: erasing};
    strokes.push(stroke);
    draw();
    e.preventDefault();
    canvas.focus();
  });
  canvas.addEventListener("pointermove", e => { if (stroke) { stroke.points.push(at(e)); draw(); } });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { stroke = null; });
  canvas.addEventListener("focus", () => { cursor ??= [canvas.width / 2, canvas.height / 2]; draw(); });
  canvas.addEventListener("blur", () => { cursor = null; draw(); });
  canvas.addEventListener("keydown", e => {
    const by = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[e.key];
    if (by) cursor = cursor.map((c, k) => Math.min([canvas.width, canvas.height][k], Math.max(0, c + by[k] * width() / 2)));
    else if (e.key === " ") strokes.push({points: [cursor], width: width(), erase: erasing});
    else if (e.key === "z" && (e.ctrlKey || e.metaKey)) strokes.pop();
    else return;
    e.preventDefault();
    draw();
  });
}
/** Brush width in image pixels: the same share of every image, whatever its size. */
const width = () => Number($("brush-size").value) / 128 * Math.max(8, $("inpaint-mask").width);

function draw(canvas = $("inpaint-mask"), colour = "rgba(194, 65, 12, 1)", ground = null) {
  const g = canvas.getContext("2d");
  g.globalCompositeOperation = "source-over";
  g.clearRect(0, 0, canvas.width, canvas.height);
  g.lineCap = g.lineJoin = "round";
  for (const one of strokes) {
    g.globalCompositeOperation = one.erase ? "destination-out" : "source-over";
    g.strokeStyle = g.fillStyle = colour;
    g.lineWidth = one.width;
    g.beginPath();
    g.moveTo(...one.points[0]);
    for (const p of one.points) g.lineTo(p[0] + 0.01, p[1]);
    g.stroke();
  }
  if (ground) { g.globalCompositeOperation = "destination-over"; g.fillStyle = ground; g.fillRect(0, 0, canvas.width, canvas.height); }
  else if (cursor && document.activeElement === canvas && !stroke) {
    g.globalCompositeOperation = "source-over";
    g.strokeStyle = "white";
    g.lineWidth = Math.max(1, canvas.width / 200);
    g.beginPath();
    g.arc(...cursor, width() / 2, 0, 7);
    g.stroke();
  }
}
/** White where to paint; null when nothing is. */
async function mask() {
  if (!strokes.some(s => !s.erase)) return null;
  const copy = Object.assign(document.createElement("canvas"), {width: $("inpaint-mask").width, height: $("inpaint-mask").height});
  draw(copy, "white", "black");
  return base64(await new Promise(done => copy.toBlob(done, "image/png")));
}

// ---- the job

async function go() {
  if (!image) { work.say("Choose an image first: drop one here, or press Inpaint under a draft."); return; }
  const cover = await mask();
  const extend = SIDES.map(s => [s, number(`extend-${s}`) ?? 0]).filter(([, v]) => v > 0).map(p => p.join("=")).join();
  if (!cover && !extend) { work.say("Draw over what should be generated again, or extend the image."); return; }
  $("inpaint-go").disabled = true;
  const end = await work.run(async () => post("/api/inpaint", filled({
    image: image.id ? `result:${image.id}` : await base64(image.file), mask: cover, extend,
    prompt: $("inpaint-prompt").value.trim(), preset: $("inpaint-preset").value, strength: number("inpaint-strength"),
    seed: number("inpaint-seed") ?? randomSeed(), feather: number("inpaint-feather"), only_masked: $("inpaint-only").checked})));
  $("inpaint-go").disabled = false;
  if (!end) return;
  [result] = end.results;
  show(result.url, `seed ${result.seed} · ${result.width}x${result.height}`);
  $("inpaint-tools").hidden = false;
  $("inpaint-download").href = result.url;
  $("inpaint-download").download = result.name;
  tell("made", end);
}
function show(src, caption) {
  $("inpaint-result").hidden = false;
  $("inpaint-shown").src = src;
  $("inpaint-shown").alt = $("inpaint-prompt").value || "The inpainted image";
  $("inpaint-caption").textContent = caption;
}
