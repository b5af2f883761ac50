// @ts-check
// Teach: photos with their masks, a name, and samples while it learns.

import {ask, blobOf, loadConcepts, plain, upload} from "../api.js";
import {Drop, IMAGES, useFiles} from "../files.js";
import {Message, Progress, Work} from "../jobs.js";
import {addPhotos, photos, setMasks, whole} from "../photos.js";
import {computed, Field, html, jpeg, number, signal, submits} from "../ui.js";
import {use} from "./concepts.js";
import {PhotoCard} from "./photo-card.js";
import {Sheet} from "./sheet.js";

const NAME = "[a-z][a-z0-9_\\-]{0,39}";
const fields = signal({name: "", category: "", steps: "", every: "50"});
const film = signal(/** @type {{data: string, label: string, step: number}[]} */ ([]));
/** Subject fidelity of the samples, of the whole teaching, also after a reload. */
const scores = signal(/** @type {{step: number, subject_fidelity: number}[]} */ ([]));
const taught = signal(""); // the name of the concept that this view taught last
const work = new Work((data, job) => {
  if (job.samples.length !== scores.value.length) scores.value = job.samples;
  if (film.value[film.value.length - 1]?.data === data) return; // the same sample
  const {stage, step} = job.progress;
  film.value = [...film.value, {data, step, label: stage === "teaching" ? String(step) : "masks"}];
});
const teaching = computed(() => Object.values(work.jobs.value).find(job => job.kind === "teach")?.id);

function add(files) {
  const others = addPhotos(files).map(f => f.name).join(", ");
  work.say(others && `Left out, because they are not JPEG, PNG, WebP, AVIF or HEIC: ${others}.`, "note");
}

// ---- masks

/** Have masks proposed by the base's attention, for photos without one that was drawn by hand. */
async function findMasks() {
  const category = fields.value.category.trim();
  if (!photos.value.length) { work.say("Drop some photos first."); return; }
  if (!category) { work.say("Say what it is first, for example cat: the masks show where that is."); return; }
  const asked = photos.value.filter(p => !p.drawn);
  if (!asked.length) { work.say("Every mask here was drawn by hand; these stay.", "note"); return; }
  const end = await work.run(() =>
    upload("/api/masks", [...asked.map(p => ["photos", p.file]), ["category", category]]));
  if (!end) return;
  try {
    await setMasks(await Promise.all(end.results.map(async ({url}, k) => [asked[k].url, await blobOf(url)])));
  } catch (e) { work.say(e.message); }
}

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
  if (photos.value.some(p => p.caption.trim())) {
    parts.push(["photo_captions", JSON.stringify(photos.value.map(p => p.caption.trim()))]);
  }
  const steps = number(fields.value.steps);
  const recipe = {name, category, sample_every: number(fields.value.every) ?? 0, ...(steps ? {steps} : {})};
  await follow(() => upload("/api/concepts/teach", [...parts, ["recipe", JSON.stringify(recipe)]]));
}
/** Show a teaching to its end; `send` resolves with its job. */
async function follow(send) {
  film.value = [];
  scores.value = [];
  taught.value = "";
  const end = await work.run(send);
  if (!end) return;
  scores.value = end.samples;
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
    </form>
    <div class="stage">
      ${taught.value && html`<${Sheet} key=${taught.value} name=${taught.value} use=${use} />`}
      <${Drop} accept=${IMAGES} multiple take=${add}>
        <b>Drop three to six photos</b> of one thing, or choose files. They stay on this machine.<//>
      <div class="photos">${photos.value.map((p, k) =>
        html`<${PhotoCard} key=${p.url} photo=${p} number=${k + 1} name=${fields.value.name.trim()}
          category=${fields.value.category.trim()} />`)}</div>
      ${photos.value.some(p => p.mask) && html`<p class="hint">
        What is dimmed is not learned. Correct a mask that is wrong, or untick it: the whole photo counts
        then.</p>`}
      ${film.value.length > 0 && html`<${Film} samples=${film.value} />`}
      ${scores.value.length > 1 && html`<${Fidelity} rows=${scores.value} />`}
    </div></div>`;
}
const Film = ({samples}) => html`<div class="film" role="group" aria-label="Samples" tabindex="0">
  ${samples.map(({data, step, label}) => html`<figure>
    <img src=${jpeg(data)} alt=${`Sample after ${step} steps`} />
    <figcaption>${[label, scoreAt(step)].filter(Boolean).join(" · ")}</figcaption></figure>`)}</div>`;
const scoreAt = step => scores.value.find(row => row.step === step)?.subject_fidelity.toFixed(2);

const WIDTH = 640, HEIGHT = 90, EDGE = 8;
/** How near the samples are to the photos, over the steps; the scale is from 0 to 1. */
function Fidelity({rows}) {
  const last = rows[rows.length - 1];
  const at = ({step, subject_fidelity: value}) => [
    EDGE + step / last.step * (WIDTH - 2 * EDGE), HEIGHT - EDGE - Math.max(0, value) * (HEIGHT - 2 * EDGE),
  ];
  const text = rows.map(row => `${row.subject_fidelity.toFixed(2)} at step ${row.step}`).join(", ");
  return html`<figure class="fidelity"><svg viewBox=${`0 0 ${WIDTH} ${HEIGHT}`} role="img"
      aria-label=${`Subject fidelity: ${text}`}>
    <path class="axis" d=${`M${EDGE} ${EDGE}V${HEIGHT - EDGE}H${WIDTH - EDGE}`} />
    <path class="front" d=${`M${rows.map(row => at(row).join()).join("L")}`} />
    ${rows.map(row => html`<circle class="dot point" cx=${at(row)[0]} cy=${at(row)[1]} r="3" />`)}</svg>
    <figcaption>Subject fidelity of the samples over the steps, now ${last.subject_fidelity.toFixed(2)}:
      the mean cosine to the photos, 1 is the same</figcaption></figure>`;
}
const Input = ({name, label, ...input}) => html`<${Field} label=${label}>
  <input type="text" value=${fields.value[name]} ...${input}
    onInput=${e => { fields.value = {...fields.value, [name]: e.target.value}; }} /><//>`;
