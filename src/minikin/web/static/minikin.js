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

/** A message of the server for somebody who has this page before them and no command line. */
export function plain(text) {
  return text.replace(/Teach it with `?minikin teach`?, put its file into this folder,/, "Teach it under Teach, add its file under Concepts,")
    .replace(/:? ?`?minikin concepts (remove|add|import)[^.`]*`?/g, " under Concepts")
    .replace(/`(minikin [^`]*)`|--(no-)?([a-z][a-z-]*)/g, (_, command, no, name) => // what only a terminal can do stays whole
      command ? `${command} (in a terminal)` : `${no ? "no " : ""}${name.replaceAll("-", " ")}`).replaceAll("`", "");
}

/** A request; its answer, or an Error whose message is the server's sentence. */
export async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer. Was it ended in its terminal?");
  }
  const text = await answer.text();
  let told = {};
  try { told = JSON.parse(text); } catch { /* no JSON: the status says it */ }
  if (!answer.ok) throw new Error(plain(told.error?.message ?? `The server refused this (${answer.status}).`));
  return told;
}
export const post = (path, body) =>
  ask(path, {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body)});

/** Fields of a request: what is empty is not sent. */
export function filled(values) {
  return Object.fromEntries(Object.entries(values).filter(([, v]) => v !== "" && v !== null && !Number.isNaN(v)));
}
export const randomSeed = () => Math.floor(Math.random() * 1e9);
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
  /** kind: error, note, cancelled or good; each has a colour. */
  say(text, kind = "error") { this.problem.textContent = text; this.problem.dataset.kind = kind; }
  /** send   starts the job and resolves with it; resolves with the completed job, or null. */
  async run(send) {
    this.say("");
    let job = null;
    this.bar.hidden = false; // a sign before the first answer: an upload may take a while
    this.bar.firstElementChild.removeAttribute("value");
    this.bar.lastElementChild.textContent = "Sending";
    try {
      job = await send();
      this.ids.add(job.id);
      this.show(job);
      tell("work");
      const end = await watch(job.id, now => { this.show(now); if (now.preview) this.preview(now.preview, now); });
      if (end.status === "failed") throw new Error(plain(end.error?.message ?? "This did not work."));
      if (end.status === "cancelled") this.say("Cancelled.", "cancelled");
      else if (end.warnings?.length) this.say(plain(end.warnings.join(" ")), "note");
      return end.status === "completed" ? end : null;
    } catch (e) {
      this.say(e.message);
      return null;
    } finally {
      if (job) this.ids.delete(job.id);
      tell("work");
      if (!this.ids.size) { this.bar.hidden = true; this.cancel.hidden = true; }
    }
  }
  show(job) {
    this.bar.hidden = this.cancel.hidden = false;
    this.bar.firstElementChild.value = share(job);
    this.bar.lastElementChild.textContent = progress(job);
  }
}
export const share = ({progress: {step, steps}}) => steps ? step / steps : 0;
export function progress(job) {
  const {step, steps, stage, eta_s} = job.progress;
  if (job.queue_position !== null) return `Queue position ${job.queue_position + 1}`;
  return `${stage || "begins"}: ${step} of ${steps || "?"}${eta_s > 1 ? `, ${duration(eta_s)} left` : ""}`;
}
export function duration(seconds) {
  if (seconds < 99.5) return `${Math.ceil(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 100 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

export const jpeg = data => `data:image/jpeg;base64,${data}`;
export const base64 = blob => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
  reader.onerror = () => reject(new Error("The file could not be read."));
  reader.readAsDataURL(blob);
});

/** A place that takes files: dropped on it or beside it, pasted or chosen. */
const places = [];
export function takes(place, input, got) {
  places.push({place, input, got});
  input.addEventListener("change", () => { if (input.files.length) got([...input.files]); input.value = ""; });
  for (const kind of ["dragover", "dragenter"])
    place.addEventListener(kind, e => { e.preventDefault(); place.classList.add("mk-over"); });
  for (const kind of ["dragleave", "drop"]) place.addEventListener(kind, () => place.classList.remove("mk-over"));
  place.addEventListener("drop", e => {
    e.preventDefault();
    e.stopPropagation(); // it has its place
    if (e.dataTransfer.files.length) got([...e.dataTransfer.files]);
  });
}
const isVisible = e => e.getClientRects().length > 0;
/** Files dropped beside a place, where a browser would open them, or pasted: to the open section's place for them. */
function arrived(files) {
  const fits = ({input, place}) => isVisible(place.closest("section, .mk-stage") ?? place) && [...files].every(f => accepts(input, f));
  const found = places.find(p => isVisible(p.place) && fits(p)) ?? places.find(fits);
  if (found) { found.got([...files]); return true; }
  tell("said", "Files can be dropped and pasted in Inpaint, Concepts, Teach and Recipe.");
  return false;
}
const accepts = (input, file) => input.accept.split(",").some(a => a.startsWith(".") ? file.name.toLowerCase().endsWith(a) : file.type === a);
addEventListener("dragover", e => { if (e.dataTransfer?.types.includes("Files")) e.preventDefault(); });
addEventListener("drop", e => { if (e.dataTransfer?.files.length) { e.preventDefault(); arrived(e.dataTransfer.files); } });
addEventListener("paste", e => { if (e.clipboardData?.files.length && arrived(e.clipboardData.files)) e.preventDefault(); });

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
