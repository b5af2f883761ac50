import {$, Work, ask, capabilities, concepts, filled, hear, jpeg, make, number, open, plain, post, presets, randomSeed, sends, strengthOf, tell, told, withStrength} from "./minikin.js";
import {Live} from "./live.js";
import {busy} from "./now.js";

const KEPT = ["prompt", "negative", "preset", "steps", "seed", "n", "guidance", "size", "scheduler", "schedule", "clip_skip"];
const BEHIND = {negative: "keep out", guidance: "guidance", size: "size", scheduler: "sampler", schedule: "schedule", clip_skip: "clip skip"}; // under More, where one may not look
const SHOWN = "minikin.shown";
const MANY = 40; // jobs that are listed at once
const DID = {paint: "", refine: "refined ", inpaint: "inpainted "};
const QUICK = 8; // steps of a preset one can type with
const LEAST = 2; // steps while typing, where the student takes so few and none are asked for
let quick, ready, work, live, shown = null;
let typing = false; // since the last job or pick: what was wished for before is not shown any more
const picked = new Map(), listed = new Map(); // results by id
let oldest = null; // time of the oldest job that is listed

export async function start() {
  work = new Work("paint", {preview: p => look(jpeg(p), "")});
  live = new Live(follow, t => typing && work.say(plain(t)), () => typing && busy() && work.say(`Live painting waits: ${busy()}`, "note"));
  told($("refine-strength"));
  sends($("paint-form"));
  $("paint-form").addEventListener("submit", e => { e.preventDefault(); paint(); });
  $("refine-form").addEventListener("submit", e => { e.preventDefault(); refine(); });
  $("paint-prompt").addEventListener("input", () => { sliders(); typed(); });
  for (const name of ["preset", "steps", "seed", "guidance", "negative", "size", "scheduler", "schedule", "clip_skip"]) $(`paint-${name}`).addEventListener("input", typed);
  $("paint-seed").addEventListener("input", () => { $("paint-lock").checked = $("paint-seed").value !== ""; keep(); });
  $("paint-dice").addEventListener("click", () => { $("paint-seed").value = randomSeed(); typed(); });
  for (const box of ["live", "lock"]) $(`paint-${box}`).addEventListener("change", typed);
  $("paint-older").addEventListener("click", () => drafts(oldest).catch(e => work.say(e.message)));
  $("paint-to-inpaint").addEventListener("click", () => { tell("inpaint", {url: $("paint-shown").src, id: shown.id}); open("Inpaint"); });
  $("paint-again").addEventListener("click", () => recipeOf(shown));
  hear("recipe", fill);
  hear("strength", ({name, value}) => { use(name); set(name, value); open("Paint"); });
  hear("name", name => { use(name); open("Paint"); });
  hear("made", job => add(job, true));
  hear("concepts", () => names().catch(e => work.say(e.message)));
  try {
    ready = await presets($("paint-preset"));
    await presets($("refine-preset"), "its own");
    const {limits, live: quickest, samplers, schedules = [], images} = await capabilities();
    for (const [name, first, values] of [["scheduler", "the preset's", samplers], ["schedule", "automatic", schedules]])
      $(`paint-${name}`).replaceChildren(make("option", {value: "", text: first}), ...values.map(s => make("option", {value: s, text: s})));
    $("paint-kept").textContent = images.folder ? `Every image is saved in ${images.folder}.`
      : `Images are deleted here after ${images.hours} hours: download what you want to keep.`;
    quick = ready.find(p => p.name === quickest);
    $("paint-n").max = limits.images;
    $("paint-steps").max = limits.steps;
    const before = localStorage.getItem(SHOWN); // the draft that was shown before the page was loaded again
    restore();
    await names();
    await drafts();
    if (listed.has(before)) select(listed.get(before));
  } catch (e) { work.say(e.message); }
}

// ---- the recipe in the form

const value = () => filled({
  prompt: $("paint-prompt").value.trim(), negative: $("paint-negative").value.trim(), preset: $("paint-preset").value,
  steps: number("paint-steps"), seed: number("paint-seed"), guidance: number("paint-guidance"), size: $("paint-size").value.trim(),
  scheduler: $("paint-scheduler").value, schedule: $("paint-schedule").value, clip_skip: number("paint-clip_skip")});

function fill(recipe) {
  for (const name of KEPT) if (name in recipe) $(`paint-${name}`).value = recipe[name] ?? "";
  if (recipe.seed !== undefined) $("paint-lock").checked = recipe.seed !== ""; // painted again, it is the same image
  if ($("paint-seed").value === "") $("paint-seed").value = randomSeed();
  if (behind()) $("paint-more").open = true;
  sliders();
  typed();
}
/** What is set under More, as words: it acts, whether it is seen or not. */
function behind() {
  const words = Object.entries(BEHIND).filter(([n]) => $(`paint-${n}`).value.trim()).map(([n, word]) => n === "negative" ? word : `${word} ${$(`paint-${n}`).value.trim()}`).join(", ");
  $("paint-more-said").textContent = words && `: ${words}`;
  return words;
}
/** The form as it was; a seed only if it was to be kept. */
function restore() {
  let before = {};
  try { before = JSON.parse(localStorage.getItem("minikin.paint") ?? "{}"); } catch { /* of another version */ }
  const {live: painting = true, lock = false, seed, ...recipe} = before;
  $("paint-live").checked = painting;
  fill(lock ? {...recipe, seed} : recipe);
}
function keep() {
  localStorage.setItem("minikin.paint", JSON.stringify({...Object.fromEntries(KEPT.map(n => [n, $(`paint-${n}`).value])),
    live: $("paint-live").checked, lock: $("paint-lock").checked}));
  behind();
}
async function recipeOf(result) {
  const body = new FormData();
  body.append("file", await (await fetch(result.url)).blob(), "image.png");
  try { fill(await formOf(await ask("/api/recipe", {method: "POST", body}))); } catch (e) { work.say(e.message); }
}
/** An image's metadata as the form's fields: Minikin's own, or what another program wrote. */
export async function formOf(found) {
  const {base, samplers} = await capabilities();
  const {width, height, scheduler, ...own} = found.fields;
  const size = width && height && !(width === base.side && height === base.side) ? `${width}x${height}` : "";
  return {negative: "", seed: "", steps: "", guidance: "", schedule: "", clip_skip: "", n: 1, ...own, size, scheduler: samplers.includes(scheduler) ? scheduler : ""};
}

// ---- live, and concepts' strengths

/** Few steps for typing: the form's own preset where it is quick, else the quickest there is. And what is fewer,
    for who types quicker than is painted. */
function wished() {
  const own = ready?.find(p => p.name === $("paint-preset").value);
  const all = {prompt: "", negative: "", steps: null, guidance: null, width: null, height: null, ...value()};
  const fits = own && (all.steps ?? own.steps) <= QUICK;
  const used = fits ? own : quick;
  const least = used?.allowed.length ? Math.min(...used.allowed.filter(n => n >= Math.min(LEAST, Math.max(...used.allowed)))) : null;
  const asked = fits && all.steps;
  return [{prompt: all.prompt, negative: all.negative, seed: all.seed ?? 0,
    preset: used?.name, steps: asked || least, guidance: fits ? all.guidance : null},
  !asked && used?.allowed.length ? {steps: Math.min(...used.allowed)} : {}];
}
function typed() {
  keep();
  typing = true;
  if (!$("paint-live").checked || !$("paint-prompt").value.trim() || !quick) return;
  localStorage.removeItem(SHOWN);
  live.wish(...wished());
}
async function names() {
  const all = await concepts();
  $("paint-names").replaceChildren(...all.map(c => make("button", {type: "button", class: "mk-name", text: `<${c.name}>`,
    title: c.category, onclick: () => use(c.name)})));
  sliders();
}
function use(name) {
  const field = $("paint-prompt");
  if (strengthOf(field.value, name) === null) {
    const at = field.selectionStart ?? field.value.length;
    const [before, after] = [field.value.slice(0, at), field.value.slice(at)];
    field.value = before + (before && !/\s$/.test(before) ? " " : "") + `<${name}>` + after || `a photo of <${name}>`;
  }
  field.focus();
  sliders();
  typed();
}
function set(name, strength) {
  $("paint-prompt").value = withStrength($("paint-prompt").value, name, strength);
  sliders();
  typed();
}
async function sliders() {
  const all = await concepts().catch(() => []);
  const prompt = $("paint-prompt").value;
  const named = all.filter(c => strengthOf(prompt, c.name) !== null);
  const place = $("paint-strengths");
  const there = [...place.children].map(e => e.dataset.name).join();
  if (there !== named.map(c => c.name).join()) place.replaceChildren(...named.map(slider));
  for (const row of place.children) {
    const strength = strengthOf(prompt, row.dataset.name);
    row.querySelector("output").textContent = strength.toFixed(2);
    const range = row.querySelector("input");
    if (range !== document.activeElement) range.value = strength;
  }
}
function slider({name}) {
  const id = `strength-${name}`;
  return make("div", {class: "mk-strength", "data-name": name},
    make("label", {for: id, text: `<${name}> `}), make("input", {id, type: "range", min: 0, max: 2, step: 0.05, value: 1,
      oninput: e => set(name, Number(e.target.value))}), make("output", {for: id}));
}

// ---- jobs

async function paint() {
  if (!$("paint-prompt").value.trim()) {
    work.say("Type a prompt first: what is to be seen?");
    $("paint-prompt").focus();
    return;
  }
  typing = false;
  $("paint-go").disabled = true;
  const recipe = {...value(), seed: number("paint-seed") ?? randomSeed(), n: number("paint-n") ?? 1};
  if (!$("paint-lock").checked) $("paint-seed").value = randomSeed(); // the next drafts are others
  keep();
  const end = await work.run(() => post("/api/paint", recipe));
  $("paint-go").disabled = false;
  if (end) { add(end, true); select(end.results[0]); }
}
async function refine() {
  const chosen = [...picked.values()];
  $("refine-go").disabled = true;
  const more = filled({strength: number("refine-strength"), size: $("refine-size").value, preset: $("refine-preset").value});
  for (const result of chosen) {
    const end = await work.run(() => post("/api/refine", {image: `result:${result.id}`, ...more}));
    if (!end) break;
    add(end, true);
    select(end.results[0]);
  }
  unpick();
}
async function drafts(before = null) {
  const {jobs} = await ask(`/api/jobs?limit=${MANY}${before ? `&before=${before}` : ""}`);
  oldest = jobs.at(-1)?.created ?? oldest;
  $("paint-older").hidden = jobs.length < MANY;
  for (const job of jobs.filter(j => ["paint", "refine", "inpaint"].includes(j.kind))) {
    if (job.status === "completed") add(job, false);
    else if (job.status === "queued" || job.status === "running") work.run(async () => job).then(end => end && add(end, true));
  }
}

// ---- images

function follow({image, seconds, number, prompt}) {
  if (!typing) return;
  look(jpeg(image), `live, ${Math.round(seconds * 1000)} ms`);
  Object.assign($("paint-shown").dataset, {number, prompt, seconds}); // measured by benchmarks/page.py
}

function look(src, caption) {
  const image = $("paint-shown");
  image.src = src;
  image.alt = $("paint-prompt").value || "The image";
  image.hidden = false;
  $("paint-empty").hidden = true;
  $("paint-tools").hidden = true;
  $("paint-caption").textContent = caption;
}
function select(result) {
  shown = result;
  typing = false;
  look(result.url, `seed ${result.seed} · ${result.width}x${result.height}`);
  $("paint-tools").hidden = false;
  $("paint-download").href = result.url;
  $("paint-download").download = result.name;
  localStorage.setItem(SHOWN, result.id);
  for (const card of $("paint-drafts").children) card.classList.toggle("mk-on", card.dataset.id === result.id);
}
function add(job, first) {
  $("paint-none").hidden = true;
  const cards = job.results.map(r => card(r, job.kind));
  for (const r of job.results) listed.set(r.id, r);
  if (first) $("paint-drafts").prepend(...cards); else $("paint-drafts").append(...cards);
}
function card(result, kind) {
  const box = make("input", {type: "checkbox", "aria-label": `Pick seed ${result.seed} for refining`});
  box.addEventListener("change", () => {
    if (box.checked) picked.set(result.id, result); else picked.delete(result.id);
    counted();
  });
  const face = make("button", {type: "button", class: "mk-face", "aria-label": `Show ${kind} of seed ${result.seed}`, onclick: () => select(result)},
    make("img", {src: result.url, alt: "", loading: "lazy", width: result.width, height: result.height}));
  const label = make("label", {class: "mk-pick"}, box, `${DID[kind]}${result.seed}`);
  return make("div", {class: "mk-card", "data-id": result.id, "data-kind": kind}, face, label);
}
function counted() {
  $("refine-go").disabled = !picked.size;
  $("refine-go").textContent = picked.size > 1 ? `Refine ${picked.size}` : "Refine";
}
function unpick() {
  picked.clear();
  for (const box of $("paint-drafts").querySelectorAll("input:checked")) box.checked = false;
  counted();
}
