// @ts-check
// The images of Paint: the one that is shown, and the drafts, newest first.

import {ask, filled, post} from "./api.js";
import {computed, signal} from "./ui.js";

const SHOWN = "minikin.shown";
const last = localStorage.getItem(SHOWN); // the draft that was shown before the page was loaded
const LISTED = 40; // jobs that are listed at once
export const KINDS = ["paint", "refine", "inpaint"];

/**
 * A draft: a result and the kind of its job.
 * @typedef {import("./api.js").Result & {kind: string, about: string}} Draft
 * What is shown: an address, and the draft where it is one.
 * @typedef {{src: string, alt: string, caption: string, draft?: any,
 *   live?: {count: number, prompt: string, seconds: number}}} Shown
 */
export const shown = signal(/** @type {Shown | null} */ (null));
export const drafts = signal(/** @type {Draft[]} */ ([]));
export const picked = signal(/** @type {Set<string>} */ (new Set()));
export const hasOlder = signal(false);
export const selected = computed(() => shown.value?.draft ?? null);
let oldest = 0; // time of the oldest job that is listed

/** @param {Shown} image */
export function show(image) { shown.value = image; }
export function select(draft) {
  const caption = `seed ${draft.seed} · ${draft.width}x${draft.height}`;
  show({src: draft.url, alt: draft.about || "The image", caption, draft});
  localStorage.setItem(SHOWN, draft.id);
}
const draftsOf = job => job.results.map(result => ({...result, kind: job.kind, about: job.about}));
/** Put a completed job's images in front; the first of them. */
export function addJob(job) {
  const made = draftsOf(job);
  drafts.value = [...made, ...drafts.value.filter(d => !made.some(m => m.id === d.id))];
  return made[0];
}
export function togglePick(draft) {
  const set = new Set(picked.value);
  if (!set.delete(draft.id)) set.add(draft.id);
  picked.value = set;
}

/** Put a draft in front and pick it for refining. @param {Draft} draft */
export function pickForRefining(draft) {
  drafts.value = [draft, ...drafts.value.filter(d => d.id !== draft.id)];
  picked.value = new Set([...picked.value, draft.id]);
}
/** Take a deleted image out of the drafts, and of those to refine. */
export function forget(id) {
  drafts.value = drafts.value.filter(d => d.id !== id);
  picked.value = new Set([...picked.value].filter(other => other !== id));
  if (shown.value?.draft?.id === id) shown.value = null;
}

/** List the newest drafts, or the next older ones; `resume` watches those that are still being made. */
export async function load(resume = job => {}, older = false) {
  const {jobs} = await ask(`/api/jobs?limit=${LISTED}${older ? `&before=${oldest}` : ""}`);
  oldest = jobs.length ? jobs[jobs.length - 1].created : oldest;
  hasOlder.value = jobs.length === LISTED;
  const made = jobs.filter(j => KINDS.includes(j.kind));
  const listed = made.filter(j => j.status === "completed").flatMap(draftsOf);
  drafts.value = [...drafts.value, ...listed.filter(d => !drafts.value.some(other => other.id === d.id))];
  for (const job of made) if (job.status === "queued" || job.status === "running") resume(job);
}
/** Show again what was shown before the page was loaded. */
export function selectLast() {
  const draft = drafts.value.find(d => d.id === last);
  if (draft) select(draft);
  return Boolean(draft);
}

/** Refine the picked drafts, one after the other; `run` runs each job. */
export async function refine(options, run) {
  const chosen = drafts.value.filter(d => picked.value.has(d.id));
  picked.value = new Set();
  for (const draft of chosen) {
    const end = await run(() => post("/api/refine", {image: `result:${draft.id}`, ...filled(options)}));
    if (!end) break;
    select(addJob(end));
  }
}
