import {$, Work, ask, concepts, jpeg, make, number, open, plain, takes, tell} from "./minikin.js";

const PHOTO = /^image\/(png|jpeg|webp|avif|hei[cf])$|\.(hei[cf]|avif)$/i; // by type, or by name where the system knows no type
let work, photos = [], job = null, film = "";

export function start() {
  work = new Work("teach", {preview: frame});
  takes($("teach-drop"), $("teach-files"), add);
  $("teach-look").addEventListener("click", look);
  $("teach-form").addEventListener("submit", e => { e.preventDefault(); teach(); });
  $("teach-stop").addEventListener("click", () => ask(`/api/jobs/${job}/stop`, {method: "POST"}).catch(e => work.say(e.message)));
  $("teach-paint").addEventListener("click", () => { tell("name", $("teach-paint").dataset.name); open("Paint"); });
  goOn();
}
/** A teaching that was begun before this page was loaded: shown as if it had been begun here. */
async function goOn() {
  try {
    const {jobs} = await ask("/api/jobs?unfinished=true");
    const begun = jobs.find(j => j.kind === "teach");
    if (begun) await follow(async () => begun);
  } catch (e) { work.say(e.message); }
}

function add(files) {
  const isPhoto = f => PHOTO.test(f.type) || PHOTO.test(f.name);
  photos.push(...files.filter(isPhoto).map(file => ({file, url: URL.createObjectURL(file), mask: null, accepted: true})));
  const others = files.filter(f => !isPhoto(f)).map(f => f.name);
  work.say(others.length ? `Left out, because they are not JPEG, PNG, WebP, AVIF or HEIC: ${others.join(", ")}.` : "", "note");
  list();
}
function list() {
  $("teach-masks-hint").hidden = !photos.some(p => p.mask);
  $("teach-photos").replaceChildren(...photos.map((p, k) => {
    const shown = make("div", {class: "mk-photo"}, make("img", {src: p.url, alt: `Photo ${k + 1}`,
      onerror: e => e.target.replaceWith(make("span", {class: "mk-unshown", text: p.file.name})) /* HEIC: sent, though not shown */}));
    if (p.mask && p.accepted) {
      const overlay = make("div", {class: "mk-mask"});
      overlay.style.maskImage = overlay.style.webkitMaskImage = `url(${p.overlay})`;
      shown.append(overlay);
    }
    const under = make("div", {class: "mk-inline"});
    if (p.mask) under.append(make("label", {class: "mk-check"}, make("input", {type: "checkbox", checked: p.accepted, onchange: e => { p.accepted = e.target.checked; list(); }}), "mask"));
    under.append(make("button", {type: "button", class: "mk-small", "aria-label": `Leave out photo ${k + 1}`, text: "×", onclick: () => { photos.splice(k, 1); list(); }}));
    return make("figure", {}, shown, under);
  }));
}

/** Masks proposed by the base's attention: shown as what is dimmed. */
async function look() {
  if (!photos.length) { work.say("Drop some photos first."); return; }
  const body = new FormData();
  photos.forEach(p => body.append("photos", p.file));
  body.append("category", $("teach-category").value.trim());
  if (!$("teach-category").value.trim()) { work.say("Say what it is first, for example cat: the masks show where that is."); return; }
  const end = await work.run(() => ask("/api/masks", {method: "POST", body}));
  if (!end) return;
  for (const [k, r] of end.results.entries()) {
    photos[k].mask = await (await fetch(r.url)).blob();
    photos[k].overlay = await inverted(photos[k].mask);
    photos[k].accepted = true;
  }
  list();
}
/** The inverted mask as transparency, to dim what is not learned. */
async function inverted(blob) {
  const image = await createImageBitmap(blob);
  const canvas = Object.assign(document.createElement("canvas"), {width: image.width, height: image.height});
  const g = canvas.getContext("2d");
  g.drawImage(image, 0, 0);
  const data = g.getImageData(0, 0, image.width, image.height);
  for (let i = 0; i < data.data.length; i += 4) data.data[i + 3] = 255 - data.data[i];
  g.putImageData(data, 0, 0);
  return canvas.toDataURL();
}
/** The whole photo: for one whose mask was not accepted, beside others that were. */
async function whole() {
  const canvas = Object.assign(document.createElement("canvas"), {width: 64, height: 64});
  const g = canvas.getContext("2d");
  g.fillStyle = "white";
  g.fillRect(0, 0, 64, 64);
  return new Promise(done => canvas.toBlob(done, "image/png"));
}

async function teach() {
  const name = $("teach-name").value.trim(), category = $("teach-category").value.trim();
  if (!photos.length) { work.say("Drop three to six photos first."); return; }
  if (!name || !category) { work.say("Give it a name, for example tom, and say what it is, for example cat."); return; }
  const body = new FormData();
  for (const p of photos) body.append("photos", p.file);
  if (photos.some(p => p.mask)) for (const p of photos) body.append("masks", p.mask && p.accepted ? p.mask : await whole(), "mask.png");
  const recipe = {name, category, sample_every: number("teach-every") ?? 0};
  if (number("teach-steps")) recipe.steps = number("teach-steps");
  body.append("recipe", JSON.stringify(recipe));
  await follow(() => ask("/api/concepts/teach", {method: "POST", body}));
}
/** Show a teaching to its end; `send` resolves with its job. */
async function follow(send) {
  film = "";
  $("teach-film").replaceChildren();
  $("teach-film").hidden = true;
  $("teach-done").hidden = true;
  $("teach-go").disabled = true;
  const end = await work.run(async () => {
    const begun = await send();
    job = begun.id;
    $("teach-stop").hidden = false;
    return begun;
  });
  $("teach-go").disabled = false;
  $("teach-stop").hidden = true;
  if (!end) return;
  const made = end.result.concept;
  work.say([`<${made.name}> is taught: ${(made.bytes / 1000).toFixed(1)} KB.`, ...end.warnings.map(plain)].join(" "), "good");
  $("teach-done").hidden = false;
  $("teach-paint").dataset.name = made.name;
  $("teach-paint").textContent = `Paint <${made.name}>`;
  try { await concepts(true); } catch (e) { work.say(`<${made.name}> is taught, but the list of concepts did not come: ${e.message}`); return; }
  tell("concepts");
}
/** One more frame of the strip when the sample is another one. */
function frame(data, now) {
  if (data === film) return;
  film = data;
  $("teach-film").hidden = false;
  $("teach-film").append(make("figure", {}, make("img", {src: jpeg(data), alt: `Sample after ${now.progress.step} steps`}), make("figcaption", {text: now.progress.stage === "teaching" ? `${now.progress.step}` : "masks"})));
}
