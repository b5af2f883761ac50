// What is running now: a strip above every section, also after a reload, and why live painting waits.

import {$, ask, concepts, hear, make, progress, share, tell} from "./minikin.js";

const BUSY_MS = 1000, IDLE_MS = 4000;
const DOES = {paint: "Painting", refine: "Refining", inpaint: "Inpainting", teach: "Teaching", masks: "Finding masks of"};
let timer, known = "", last = {jobs: [], others: []};

export function start() {
  hear("work", look);
  document.addEventListener("visibilitychange", () => { if (!document.hidden) { look(); refresh(); } });
  addEventListener("focus", refresh);
  document.addEventListener("click", e => { if (e.target.closest("[role=tab]")) refresh(); });
  look();
}

async function look() {
  clearTimeout(timer);
  try {
    const now = await ask("/api/jobs?unfinished=true");
    const taught = last.jobs.some(j => j.kind === "teach" && !now.jobs.some(k => k.id === j.id));
    last = now;
    show();
    if (taught) refresh();
  } catch { /* the next look says more */ }
  clearTimeout(timer);
  if (!document.hidden) timer = setTimeout(look, last.jobs.length || last.others.length ? BUSY_MS : IDLE_MS);
}
/** The concepts anew: some may have been taught or removed on the command line. */
async function refresh() {
  const all = await concepts(true).catch(() => null);
  const found = JSON.stringify(all);
  if (all && found !== known) { known = found; tell("concepts"); }
}

const about = text => text.length > 60 ? `${text.slice(0, 57)}...` : text;
const named = job => `${DOES[job.kind] ?? job.kind} ${about(job.about)}`.trim();
/** Why the engine is busy, as a sentence; "" when it is not. */
export function busy() {
  const job = last.jobs.find(j => j.queue_position === null), other = last.others[0];
  if (job) return `${named(job)} is running (${progress(job)}).`;
  return other ? `Somebody else's work is running (${DOES[other.kind] ?? other.kind}: ${other.step} of ${other.steps || "?"}).` : "";
}

function show() {
  const strip = $("mk-now");
  strip.hidden = !(last.jobs.length || last.others.length);
  const rows = [...last.jobs, ...last.others.map((o, k) => ({...o, id: `other-${k}`}))];
  const there = new Map([...strip.children].map(e => [e.dataset.id, e]));
  if ([...there.keys()].join() !== rows.map(j => j.id).join()) // else a button would lose its focus
    strip.replaceChildren(...rows.map(j => there.get(j.id) ?? (j.progress ? row(j) : make("p", {class: "mk-row", "data-id": j.id}))));
  rows.forEach((j, k) => update(strip.children[k], j));
}
function row(job) {
  const act = (path, options, button) => { button.disabled = true; ask(`/api/jobs/${job.id}${path}`, options).then(look, e => tell("said", e.message)); };
  const buttons = [make("button", {type: "button", class: "mk-small", text: "Cancel", "aria-label": `Cancel ${named(job)}`, onclick: e => act("", {method: "DELETE"}, e.target)})];
  if (job.kind === "teach") buttons.unshift(make("button", {type: "button", class: "mk-small", text: "Stop and keep", "aria-label": `Stop ${named(job)} and keep it`,
    onclick: e => act("/stop", {method: "POST"}, e.target)}));
  return make("div", {class: "mk-row", "data-id": job.id}, make("b", {text: named(job)}), make("progress", {max: 1, value: 0}), make("span"), ...buttons);
}
function update(element, job) {
  if (!job.progress) { element.textContent = `Somebody else: ${DOES[job.kind] ?? job.kind}, ${job.step} of ${job.steps || "?"}`; return; }
  element.children[1].value = share(job);
  element.children[2].textContent = progress(job);
}
