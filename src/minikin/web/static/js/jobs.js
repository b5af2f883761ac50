// @ts-check
// Jobs: those this page sends, and the strip above every view of all that wait or run.

import {ask, conceptsProblem, loadConcepts, plain, watch} from "./api.js";
import {computed, html, signal} from "./ui.js";

const BUSY_MS = 1000, IDLE_MS = 4000;
const DOES = {
  paint: "Painting", refine: "Refining", inpaint: "Inpainting", teach: "Teaching", masks: "Finding masks of",
};

export const share = ({progress: {step, steps}}) => (steps ? step / steps : 0);
export function progress(job) {
  const {step, steps, stage, eta_s: left} = job.progress;
  if (job.queue_position !== null) return `Queue position ${job.queue_position + 1}`;
  return `${stage || "begins"}: ${step} of ${steps || "?"}${left > 1 ? `, ${duration(left)} left` : ""}`;
}
export function duration(seconds) {
  if (seconds < 99.5) return `${Math.ceil(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 100 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

/** The jobs of one form: its button waits for them, its bar shows the latest, its message says what failed. */
export class Work {
  /** @param {(jpeg: string, job: any) => void} preview  hears each new preview */
  constructor(preview = () => {}) {
    this.preview = preview;
    this.jobs = signal(/** @type {Record<string, any>} */ ({})); // by id; "" is one that is being sent
    this.message = signal({text: "", kind: "error"});
    this.busy = computed(() => Object.keys(this.jobs.value).length > 0);
  }
  /** kind: error, note, cancelled or good; each has a colour. */
  say(text, kind = "error") { this.message.value = {text, kind}; }
  cancel() {
    for (const id of Object.keys(this.jobs.value).filter(Boolean)) {
      ask(`/api/jobs/${id}`, {method: "DELETE"}).catch(e => this.say(e.message));
    }
  }
  #set(id, job) {
    const {[id]: _, "": __, ...others} = this.jobs.value;
    this.jobs.value = job ? {...others, [id]: job} : others;
  }
  /** send starts the job and resolves with it, preview hears its previews; resolves with the completed job, or
      null. */
  async run(send, preview = this.preview) {
    this.say("");
    this.#set("", {}); // a sign before the first answer: an upload may take a while
    let id = "";
    try {
      const job = await send();
      this.#set(id = job.id, job);
      look();
      const end = await watch(id, now => {
        this.#set(id, now);
        if (now.preview) preview(now.preview, now);
      });
      if (end.status === "failed") throw new Error(plain(end.error?.message ?? "This did not work."));
      if (end.status === "cancelled") this.say("Cancelled.", "cancelled");
      else if (end.warnings?.length) this.say(plain(end.warnings.join(" ")), "note");
      return end.status === "completed" ? end : null;
    } catch (e) {
      this.say(e.message);
      return null;
    } finally {
      this.#set(id, null);
      look();
    }
  }
}

export function Progress({work}) {
  const rows = Object.entries(work.jobs.value);
  if (!rows.length) return null;
  const [id, job] = rows[rows.length - 1];
  return html`<div class="progress" role="status">
    <progress max="1" value=${id ? share(job) : null} aria-label="Progress" />
    <span>${id ? progress(job) : "Sending"}</span>
    ${id && html`<button type="button" class="small" onClick=${() => work.cancel()}>Cancel</button>`}</div>`;
}
export function Message({work}) {
  const {text, kind} = work.message.value;
  return html`<p class="message" role="status" data-kind=${kind}>${text}</p>`;
}

// ---- all that waits or runs

/** The jobs of this person that have not ended, and what runs for others. */
export const queue = signal(/** @type {{jobs: any[], others: any[]}} */ ({jobs: [], others: []}));
/** Why the server cannot be reached; "" while it answers. */
export const lost = signal("");
let timer = 0;

export async function look() {
  clearTimeout(timer);
  try {
    const now = /** @type {any} */ (await ask("/api/jobs?unfinished=true"));
    const taught = queue.value.jobs.some(j => j.kind === "teach" && !now.jobs.some(k => k.id === j.id));
    queue.value = now;
    if (taught || lost.value || conceptsProblem.value) loadConcepts().catch(() => {});
    lost.value = "";
  } catch (e) { lost.value = e.message; }
  clearTimeout(timer);
  const busy = queue.value.jobs.length || queue.value.others.length;
  if (!document.hidden) timer = setTimeout(look, busy ? BUSY_MS : IDLE_MS);
}
document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });

const short = text => (text.length > 60 ? `${text.slice(0, 57)}...` : text);
const steps = ({kind, step, steps: all}) => `${DOES[kind] ?? kind}, ${step} of ${all || "?"}`;
const title = job => `${DOES[job.kind] ?? job.kind} ${short(job.about)}`.trim();
/** Why the engine is busy, as a sentence; "" when it is not. */
export function busy() {
  const job = queue.value.jobs.find(j => j.queue_position === null), other = queue.value.others[0];
  if (job) return `${title(job)} is running (${progress(job)}).`;
  return other ? `Somebody else's work is running (${steps(other)}).` : "";
}

/** The strip of all jobs; `say` hears what went wrong. */
export function Queue({say}) {
  const {jobs, others} = queue.value;
  if (!jobs.length && !others.length) return null;
  return html`<section class="queue" aria-label="Running now">
    ${jobs.map(job => html`<${Row} key=${job.id} job=${job} say=${say} />`)}
    ${others.map((other, k) => html`<p key=${k} class="job">Somebody else: ${steps(other)}</p>`)}
  </section>`;
}
function Row({job, say}) {
  const act = (path, method) => e => {
    e.currentTarget.disabled = true;
    ask(`/api/jobs/${job.id}${path}`, {method}).then(look, error => say(error.message));
  };
  return html`<div class="job"><b>${title(job)}</b>
    <progress max="1" value=${share(job)} aria-label="Progress" />
    <span>${progress(job)}</span>
    ${job.kind === "teach" && html`<button type="button" class="small"
      aria-label=${`Stop ${title(job)} and keep it`} onClick=${act("/stop", "POST")}>Stop and keep</button>`}
    <button type="button" class="small" aria-label=${`Cancel ${title(job)}`}
      onClick=${act("", "DELETE")}>Cancel</button></div>`;
}
