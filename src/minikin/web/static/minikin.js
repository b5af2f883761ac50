// Shared by all sections: requests and their errors, jobs and their events, images passed between them.

export const $ = id => document.getElementById(id);
const listeners = {};
const waiting = {}; // what was told to a section before it was there

/** Tell the other sections: {image to inpaint, recipe for the form, concepts that changed}. */
export function tell(what, data) {
  if (listeners[what]) listeners[what].forEach(f => f(data));
  else waiting[what] = data;
}
export function hear(what, f) {
  (listeners[what] ??= []).push(f);
  if (what in waiting) { f(waiting[what]); delete waiting[what]; }
}

/** A request; its answer, or an Error whose message is the server's sentence. */
export async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer. Is minikin studio still running?");
  }
  const text = await answer.text();
  let told = {};
  try { told = JSON.parse(text); } catch { /* no JSON: the status says it */ }
  if (!answer.ok) throw new Error(told.error?.message ?? `The server refused this (${answer.status}).`);
  return told;
}
export const post = (path, body) =>
  ask(path, {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body)});

/** Fields of a request: what is empty is not sent. */
export function filled(values) {
  return Object.fromEntries(Object.entries(values).filter(([, v]) => v !== "" && v !== null && !Number.isNaN(v)));
}
export const number = id => ($(id).value.trim() === "" ? null : Number($(id).value));

/** Watch a job to its end; `step` hears how it goes. Resolves with the ended job. */
export function watch(id, step) {
  return new Promise((resolve, reject) => {
    const source = new EventSource(`/api/jobs/${id}/events`);
    let lost = 0;
    source.addEventListener("progress", e => { lost = 0; step(JSON.parse(e.data)); });
    source.addEventListener("end", e => { source.close(); resolve(JSON.parse(e.data)); });
    source.onerror = () => {
      if (++lost > 4) { source.close(); reject(new Error("The server went away while it worked.")); }
    };
  });
}

/** One job at a time: submits, shows progress, offers Cancel, says what went wrong in a sentence. */
export class Work {
  constructor(name, {problem, preview} = {}) {
    this.bar = $(`${name}-progress`);
    this.cancel = $(`${name}-cancel`);
    this.problem = $(problem ?? `${name}-problem`);
    this.preview = preview ?? (() => {});
    this.ids = new Set();
    this.cancel.addEventListener("click", () => this.ids.forEach(id => ask(`/api/jobs/${id}`, {method: "DELETE"}).catch(() => {})));
  }
  say(text, good = false) { this.problem.textContent = text; this.problem.classList.toggle("mk-good", good); }
  /** send   starts the job and resolves with it; resolves with the completed job, or null. */
  async run(send) {
    this.say("");
    let job = null;
    try {
      job = await send();
      this.ids.add(job.id);
      this.show(job);
      const end = await watch(job.id, now => { this.show(now); if (now.preview) this.preview(now.preview, now); });
      if (end.status === "failed") throw new Error(end.error?.message ?? "This did not work.");
      if (end.status === "cancelled") this.say("Cancelled.");
      else if (end.warnings?.length) this.say(end.warnings.join(" "));
      return end.status === "completed" ? end : null;
    } catch (e) {
      this.say(e.message);
      return null;
    } finally {
      if (job) this.ids.delete(job.id);
      if (!this.ids.size) { this.bar.hidden = true; this.cancel.hidden = true; }
    }
  }
  show(job) {
    const {step, steps, stage, eta_s} = job.progress;
    this.bar.hidden = this.cancel.hidden = false;
    this.bar.firstElementChild.value = steps ? step / steps : 0;
    const left = eta_s > 1 ? `, ${Math.ceil(eta_s)} s left` : "";
    this.bar.lastElementChild.textContent = job.queue_position !== null
      ? `Queue position ${job.queue_position + 1}` : `${stage || "begins"}: ${step} of ${steps || "?"}${left}`;
  }
}

export const jpeg = data => `data:image/jpeg;base64,${data}`;
export const base64 = blob => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
  reader.onerror = () => reject(new Error("The file could not be read."));
  reader.readAsDataURL(blob);
});

/** A place that takes files: dropped, pasted or chosen. */
export function takes(place, input, got) {
  input.addEventListener("change", () => { if (input.files.length) got([...input.files]); input.value = ""; });
  for (const kind of ["dragover", "dragenter"])
    place.addEventListener(kind, e => { e.preventDefault(); place.classList.add("mk-over"); });
  for (const kind of ["dragleave", "drop"]) place.addEventListener(kind, () => place.classList.remove("mk-over"));
  place.addEventListener("drop", e => { e.preventDefault(); if (e.dataTransfer.files.length) got([...e.dataTransfer.files]); });
}

/** Show a section. */
export function open(label) {
  for (const tab of document.querySelectorAll("[role=tab]")) if (tab.textContent.trim() === label) { tab.click(); return; }
}

/** Ctrl+Enter anywhere in a form sends it; and Enter alone does not, but on its buttons. */
export function sends(form) {
  form.addEventListener("keydown", e => {
    if (e.key !== "Enter") return;
    if (e.ctrlKey || e.metaKey) { e.preventDefault(); form.requestSubmit(); }
    else if (e.target.tagName === "INPUT") e.preventDefault();
  });
}
export function told(range) { // what a slider stands at, beside its label
  const output = $(`${range.id}-said`);
  const show = () => { output.textContent = Number(range.value); };
  range.addEventListener("input", show);
  show();
}

export function make(tag, {text, ...attributes} = {}, ...children) {
  const e = Object.assign(document.createElement(tag), text === undefined ? {} : {textContent: text});
  for (const [k, v] of Object.entries(attributes)) if (k.startsWith("on")) e.addEventListener(k.slice(2), v); else if (v !== false) e.setAttribute(k, v === true ? "" : v);
  e.append(...children);
  return e;
}

/** Asks at most once at a time, and keeps the last answer that came: one that failed is asked for again. */
function kept(get) {
  let answer, asked;
  return (fresh = false) => {
    if (answer && !fresh) return answer;
    const one = asked && !fresh ? asked : asked = get();
    const end = () => { if (asked === one) asked = undefined; };
    return one.then(() => { answer = one; end(); return one; }, e => { end(); throw e; });
  };
}
/** What this server can do. */
export const capabilities = kept(() => ask("/api/capabilities"));
export async function presets(select, first) {
  const {presets} = await capabilities();
  select.replaceChildren(...(first === undefined ? [] : [make("option", {value: "", text: first})]), ...presets.map(p => make("option", {
    value: p.name, text: p.ready === false ? `${p.name} (not here)` : `${p.name}, ${p.steps} steps`, disabled: p.ready === false})));
  return presets.filter(p => p.ready !== false);
}
/** The concepts one can name, the newest of each name. */
export const concepts = kept(() => ask("/api/concepts").then(t => t.concepts.filter(c => c.newest)));

/** A recipe's prompt with this concept's strength written into it. */
export function withStrength(prompt, name, value) {
  return prompt.replace(new RegExp(`<((?:concept:)?${name}(?:@[^<>:]*)?)(?::[^<>]*)?>`, "g"), (_, tag) => `<${tag}:${value}>`);
}
export function strengthOf(prompt, name) {
  const found = new RegExp(`<(?:concept:)?${name}(?:@[^<>:]*)?(?::([^<>]*))?>`).exec(prompt);
  return found && (found[1] === undefined || Number.isNaN(Number(found[1])) ? 1 : Number(found[1]));
}
