// @ts-check
// The form of Paint: its fields, which survive a reload, live generation while one types, and its jobs.

import {blobOf, capabilities, filled, plain, post, upload} from "./api.js";
import {addJob, select, show} from "./images.js";
import {busy, Work} from "./jobs.js";
import {Live} from "./live.js";
import {withName, withStrength} from "./prompt.js";
import {remember, styled, styles} from "./styles.js";
import {jpeg, number, randomSeed, signal} from "./ui.js";

const STORED = "minikin.paint";
const QUICK = 8; // steps of a preset one can type with
const LEAST = 2; // steps while typing, where the student takes so few and none are asked for
const EMPTY = {
  prompt: "", negative: "", preset: "", steps: "", seed: "", n: "4", guidance: "", size: "",
  scheduler: "", schedule: "", clip_skip: "",
};
/** Fields under More, where one may not look, and what they are called there. */
const HIDDEN = {
  steps: "steps", size: "size", scheduler: "sampler", schedule: "schedule", clip_skip: "clip skip",
};

/** The fields, as the texts of their inputs. */
export const form = signal({...EMPTY});
/** Paint as one types. */
export const live = signal(true);
/** Keep the seed for the next drafts. */
export const lock = signal(false);
/** The names of the styles that the prompt is painted with. */
export const chosenStyles = signal(/** @type {string[]} */ ([]));
/** Live images are shown until a job or a pick has another shown. */
let typing = false;

export const work = new Work((preview, job) => show({src: jpeg(preview), alt: job.about, caption: ""}));
const socket = new Live(
  ({image, seconds, number: count, prompt}) => {
    const caption = `live, ${Math.round(seconds * 1000)} ms`;
    if (typing) show({src: jpeg(image), alt: prompt, caption, live: {count, prompt, seconds}});
  },
  text => { if (typing) work.say(plain(text)); },
  () => { if (typing && busy()) work.say(`Live painting waits: ${busy()}`, "note"); },
);

/** Set fields, as their inputs do; the image follows. */
export function change(fields) {
  if ("seed" in fields) lock.value = fields.seed !== "";
  form.value = {...form.value, ...fields};
  typed();
}
/** Put a whole recipe into the form. */
export function fill(recipe) {
  const texts = Object.fromEntries(
    Object.keys(EMPTY).filter(name => name in recipe).map(name => [name, String(recipe[name] ?? "")]));
  if ("seed" in texts) lock.value = texts.seed !== ""; // painted again, it is the same image
  if ("prompt" in texts) chosenStyles.value = []; // they are in it
  form.value = {...form.value, ...texts};
  if (!form.value.preset) form.value = {...form.value, preset: usable()[0]?.name ?? ""};
  if (!form.value.seed) form.value = {...form.value, seed: String(randomSeed())};
  typed();
}
/** Another seed, which is kept no longer than any. */
export function rollSeed() {
  form.value = {...form.value, seed: String(randomSeed())};
  typed();
}
export function toggleStyle(name) {
  const others = chosenStyles.value.filter(s => s !== name);
  chosenStyles.value = others.length < chosenStyles.value.length ? others : [...others, name];
  typed();
}
export function setLive(on) { live.value = on; typed(); }
export function setLock(on) { lock.value = on; keep(); }
/** Name a concept in the prompt; at: where, by default at its end. */
export function nameConcept(name, at) { change({prompt: withName(form.value.prompt, name, at)}); }
export function setStrength(name, strength) {
  change({prompt: withStrength(form.value.prompt, name, strength)});
}

/** What is set under More, as words: it acts, whether it is seen or not. */
export const hidden = () =>
  Object.entries(HIDDEN).filter(([name]) => form.value[name].trim())
    .map(([name, word]) => `${word} ${form.value[name].trim()}`).join(", ");

// ---- kept over a reload

function keep() {
  const {value: chosen} = chosenStyles;
  localStorage.setItem(STORED, JSON.stringify({...form.value, live: live.value, lock: lock.value, chosen}));
}
/** The form as it was; a seed only if it was to be kept. */
export function restore() {
  let before = /** @type {any} */ ({});
  try { before = JSON.parse(localStorage.getItem(STORED) ?? "{}"); } catch { /* of another version */ }
  const {live: painting = true, lock: locked = false, chosen, seed, ...recipe} = before;
  live.value = painting;
  fill(locked ? {...recipe, seed} : recipe);
  if (Array.isArray(chosen)) {
    chosenStyles.value = styles.value.map(s => s.name).filter(name => chosen.includes(name));
  }
}

// ---- live

const usable = () => (capabilities.value?.presets ?? []).filter(p => p.ready !== false);

function recipe() {
  const {steps, seed, guidance, clip_skip, n: _, ...texts} = form.value;
  const trimmed = Object.fromEntries(Object.entries(texts).map(([name, text]) => [name, text.trim()]));
  const prompt = trimmed.prompt && styled(trimmed.prompt, chosenStyles.value);
  return filled({...trimmed, prompt, steps: number(steps), seed: number(seed), guidance: number(guidance),
    clip_skip: number(clip_skip)});
}
/** The steps to type with, of those that a preset's student takes; null for the preset's own. */
const leastSteps = allowed =>
  (allowed.length ? Math.min(...allowed.filter(n => n >= Math.min(LEAST, Math.max(...allowed)))) : null);
/** Preset and steps of the quickest images; null while none is ready. */
export function quickest() {
  const preset = usable().find(p => p.name === capabilities.value?.live);
  return preset ? {preset: preset.name, steps: leastSteps(preset.allowed ?? [])} : null;
}
/** A recipe of few steps, and of fewer for who types faster than it is painted: with the form's preset where
    that is quick, else with the quickest there is. */
function liveRecipe() {
  const chosen = usable().find(p => p.name === form.value.preset);
  const fallback = usable().find(p => p.name === capabilities.value?.live);
  const all = {prompt: "", negative: "", steps: null, guidance: null, seed: 0, ...recipe()};
  const fits = chosen && (all.steps ?? chosen.steps) <= QUICK;
  const preset = fits ? chosen : fallback;
  if (!preset) return null;
  const allowed = preset.allowed ?? [], least = leastSteps(allowed);
  const steps = fits && all.steps;
  return [
    {prompt: all.prompt, negative: all.negative, seed: all.seed, preset: preset.name, steps: steps || least,
      guidance: fits ? all.guidance : null},
    !steps && allowed.length ? {steps: Math.min(...allowed)} : {},
  ];
}
function typed() {
  keep();
  typing = true;
  const requests = liveRecipe();
  if (!live.value || !form.value.prompt.trim() || !requests) return;
  localStorage.removeItem("minikin.shown");
  socket.request(...requests);
}
/** Live images are shown no more, until one types on. */
export function stopTyping() { typing = false; }

// ---- jobs

export async function paint() {
  if (!form.value.prompt.trim()) {
    work.say("Type a prompt first: what is to be seen?");
    document.getElementById("prompt")?.focus();
    return;
  }
  stopTyping();
  const body = {...recipe(), seed: number(form.value.seed) ?? randomSeed(), n: number(form.value.n) ?? 1};
  if (!lock.value) form.value = {...form.value, seed: String(randomSeed())}; // the next drafts are others
  keep();
  remember(form.value.prompt.trim());
  const end = await work.run(() => post("/api/paint", body));
  if (end) pick(addJob(end));
}
/** Show a finished image; it stays until one types on. */
export function pick(draft) { typing = false; if (draft) select(draft); }

/** The metadata of an image here, in the form; resolves with whether it could be read. */
export async function useRecipe(result) {
  try {
    fill(formOf(await readRecipe(await blobOf(result.url))));
    return true;
  } catch (e) {
    work.say(e.message);
    return false;
  }
}
export const readRecipe = file => upload("/api/recipe", [["file", file, "image.png"]]);
/** An image's metadata as the form's fields: Minikin's own, or what another program wrote. */
export function formOf(found) {
  const {base, samplers} = capabilities.value;
  const {width, height, scheduler, ...fields} = found.fields;
  const size = width && height && !(width === base.side && height === base.side) ? `${width}x${height}` : "";
  return {negative: "", seed: "", steps: "", guidance: "", schedule: "", clip_skip: "", n: 1, ...fields, size,
    scheduler: samplers.includes(scheduler) ? scheduler : ""};
}
