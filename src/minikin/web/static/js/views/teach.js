// @ts-check
// Teach: photos with their masks, a name, and samples while it learns.

import {ask, loadConcepts, plain, upload} from "../api.js";
import {Drop, IMAGES, useFiles} from "../files.js";
import {Message, Progress, Work} from "../jobs.js";
import {Check, computed, Field, html, jpeg, number, signal, submits, useState} from "../ui.js";
import {use} from "./concepts.js";

// by type, or by name where the system knows no type
const PHOTO = /^image\/(png|jpeg|webp|avif|hei[cf])$|\.(hei[cf]|avif)$/i;
const NAME = "[a-z][a-z0-9_\\-]{0,39}";
const fields = signal({name: "", category: "", steps: "", every: "50"});
/** @typedef {{file: File, url: string, mask: Blob | null, overlay: string, accepted: boolean}} Photo */
const photos = signal(/** @type {Photo[]} */ ([]));
const film = signal(/** @type {{data: string, label: string, step: number}[]} */ ([]));
const taught = signal(""); // the name of the concept that this view taught last
const work = new Work((data, job) => {
  if (film.value[film.value.length - 1]?.data === data) return; // the same sample
  const {stage, step} = job.progress;
  film.value = [...film.value, {data, step, label: stage === "teaching" ? String(step) : "masks"}];
});
const teaching = computed(() => Object.values(work.jobs.value).find(job => job.kind === "teach")?.id);

function add(files) {
  const isPhoto = f => PHOTO.test(f.type) || PHOTO.test(f.name);
  const fresh = files.filter(isPhoto).map(file =>
    ({file, url: URL.createObjectURL(file), mask: null, overlay: "", accepted: false}));
  photos.value = [...photos.value, ...fresh];
  const others = files.filter(f => !isPhoto(f)).map(f => f.name).join(", ");
  work.say(others && `Left out, because they are not JPEG, PNG, WebP, AVIF or HEIC: ${others}.`, "note");
}

// ---- masks

/** Have masks proposed by the base's attention. */
async function findMasks() {
  const category = fields.value.category.trim();
  if (!photos.value.length) { work.say("Drop some photos first."); return; }
  if (!category) { work.say("Say what it is first, for example cat: the masks show where that is."); return; }
  const asked = photos.value;
  const end = await work.run(() =>
    upload("/api/masks", [...asked.map(p => ["photos", p.file]), ["category", category]]));
  if (!end) return;
  const masks = await Promise.all(end.results.map(async r => (await fetch(r.url)).blob()));
  const overlays = await Promise.all(masks.map(inverted));
  photos.value = photos.value.map(p => {
    const k = asked.indexOf(p);
    return k < 0 ? p : {...p, mask: masks[k], overlay: overlays[k], accepted: true};
  });
}
/** A canvas of this size and what is drawn on it. */
function canvasOf(width, height, paint) {
  const canvas = Object.assign(document.createElement("canvas"), {width, height});
  paint(/** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d")));
  return canvas;
}
/** The inverted mask as transparency, to dim what is not learned. */
async function inverted(blob) {
  const image = await createImageBitmap(blob);
  return canvasOf(image.width, image.height, g => {
    g.drawImage(image, 0, 0);
    const data = g.getImageData(0, 0, image.width, image.height);
    for (let i = 0; i < data.data.length; i += 4) data.data[i + 3] = 255 - data.data[i];
    g.putImageData(data, 0, 0);
  }).toDataURL();
}
/** The whole photo: for one whose mask was not accepted, beside others that were. */
const whole = () => new Promise(done => canvasOf(64, 64, g => {
  g.fillStyle = "white";
  g.fillRect(0, 0, 64, 64);
}).toBlob(done, "image/png"));

// ---- the job

async function teach() {
  const name = fields.value.name.trim(), category = fields.value.category.trim();
  if (!photos.value.length) { work.say("Drop three to six photos first."); return; }
  if (!name || !category) {
    work.say("Give it a name, for example tom, and say what it is, for example cat.");
    return;
  }
  const parts = photos.value.map(p => ["photos", p.file]);
  if (photos.value.some(p => p.mask)) {
    for (const {mask, accepted} of photos.value) {
      parts.push(["masks", mask && accepted ? mask : await whole(), "mask.png"]);
    }
  }
  const steps = number(fields.value.steps);
  const recipe = {name, category, sample_every: number(fields.value.every) ?? 0, ...(steps ? {steps} : {})};
  await follow(() => upload("/api/concepts/teach", [...parts, ["recipe", JSON.stringify(recipe)]]));
}
/** Show a teaching to its end; `send` resolves with its job. */
async function follow(send) {
  film.value = [];
  taught.value = "";
  const end = await work.run(send);
  if (!end) return;
  const {name, bytes} = end.result.concept;
  const size = `${(bytes / 1000).toFixed(1)} KB`;
  work.say([`<${name}> is taught: ${size}.`, ...end.warnings.map(plain)].join(" "), "good");
  taught.value = name;
  await loadConcepts().catch(e =>
    work.say(`<${name}> is taught, but the list of concepts did not come: ${e.message}`));
}
/** Go on showing a teaching that had begun before this page was loaded. */
export async function resume() {
  const {jobs} = await ask("/api/jobs?unfinished=true");
  const job = jobs.find(j => j.kind === "teach");
  if (job) await follow(async () => job);
}
const stop = () => ask(`/api/jobs/${teaching.value}/stop`, {method: "POST"}).catch(e => work.say(e.message));

// ---- the view

export function Teach() {
  useFiles(IMAGES, add);
  return html`<div class="split teach">
    <form class="panel" aria-label="Teach" autocomplete="off" onSubmit=${submits(teach)} noValidate>
      <div class="fields">
        <${Input} name="name" label="Name" placeholder="tom" pattern=${NAME}
          title="A small letter first, then small letters, digits, _ and -; 40 at most" />
        <${Input} name="category" label="What it is" placeholder="cat" />
        <${Input} name="steps" label="Steps" type="number" min="1" max="20000" placeholder="as usual" />
        <${Input} name="every" label="A sample every" type="number" min="1" max="1000" />
      </div>
      <div class="actions">
        <button type="button" disabled=${work.busy.value} onClick=${findMasks}>Show masks</button>
        <button class="main" disabled=${work.busy.value}>Teach</button>
        ${teaching.value && html`<button type="button" onClick=${stop}>Stop and keep</button>`}
      </div>
      <${Progress} work=${work} />
      <${Message} work=${work} />
      ${taught.value && html`<div class="actions"><button type="button" class="main"
        onClick=${() => use(taught.value)}>${`Paint <${taught.value}>`}</button></div>`}
    </form>
    <div class="stage">
      <${Drop} accept=${IMAGES} multiple take=${add}>
        <b>Drop three to six photos</b> of one thing, or choose files. They stay on this machine.<//>
      <div class="photos">${photos.value.map((p, k) =>
        html`<${PhotoCard} key=${p.url} photo=${p} number=${k + 1} />`)}</div>
      ${photos.value.some(p => p.mask) && html`<p class="hint">
        What is dimmed is not learned. Untick a mask that is wrong: the whole photo counts then.</p>`}
      ${film.value.length > 0 && html`<${Film} samples=${film.value} />`}
    </div></div>`;
}
const Film = ({samples}) => html`<div class="film" role="group" aria-label="Samples" tabindex="0">
  ${samples.map(({data, step, label}) => html`<figure>
    <img src=${jpeg(data)} alt=${`Sample after ${step} steps`} />
    <figcaption>${label}</figcaption></figure>`)}</div>`;
const Input = ({name, label, ...input}) => html`<${Field} label=${label}>
  <input type="text" value=${fields.value[name]} ...${input}
    onInput=${e => { fields.value = {...fields.value, [name]: e.target.value}; }} /><//>`;

function PhotoCard({photo, number: k}) {
  const [hidden, setHidden] = useState(false); // HEIC: sent, though not shown
  const replace = more => { photos.value = photos.value.map(p => (p === photo ? {...p, ...more} : p)); };
  const mask = photo.mask && photo.accepted && `url(${photo.overlay})`;
  return html`<figure>
    <div class="photo">
      ${hidden ? html`<span class="unshown">${photo.file.name}</span>`
        : html`<img src=${photo.url} alt=${`Photo ${k}`} onError=${() => setHidden(true)} />`}
      ${mask && html`<div class="mask" style=${{maskImage: mask, webkitMaskImage: mask}} />`}</div>
    <div class="inline">
      ${photo.mask && html`<${Check} label="mask" checked=${photo.accepted}
        onChange=${accepted => replace({accepted})} />`}
      <button type="button" class="bare" aria-label=${`Leave out photo ${k}`}
        onClick=${() => { photos.value = photos.value.filter(p => p !== photo); }}>×</button></div></figure>`;
}
