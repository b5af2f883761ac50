// @ts-check
// Requests to the server's native API, and what the page knows of the server.

import {signal} from "./ui.js";

/**
 * @typedef {{id: string, seed: number, width: number, height: number, name: string, url: string}} Result
 *   a finished image
 * @typedef {{step: number, steps: number, stage: string, eta_s: number | null}} Steps
 * @typedef {{id: string, kind: string, status: string, queue_position: number | null, created: number,
 *   progress: Steps, results: Result[], result: any, warnings: string[], error: {message: string} | null,
 *   about: string, preview?: string,
 *   samples: {step: number, subject_fidelity: number}[]}} Job
 * @typedef {{name: string, sha256: string, category: string, mine: boolean, newest: boolean, preview: boolean,
 *   points: Record<string, Record<string, any>>}} Concept
 */

/** What this server can do; null until it has answered. */
export const capabilities = signal(/** @type {any} */ (null));
/** The concepts one can name, the newest of each name. */
export const concepts = signal(/** @type {Concept[]} */ ([]));
/** Whether the list of concepts has come. */
export const conceptsListed = signal(false);
/** Why the list of concepts did not come, the last time; "" when it did. */
export const conceptsProblem = signal("");

/** A message of the server for somebody who has this page before them and no command line. */
export function plain(text) {
  return text
    .replace(/Teach it with `?minikin teach`?, put its file into this folder,/,
      "Teach it under Teach, add its file under Concepts,")
    .replace(/:? ?`?minikin concepts (remove|add|import)[^.`]*`?/g, " under Concepts")
    .replace(/: --prompt "\.\.\."/, "")
    .replace(/`(minikin [^`]*)`|--(no-)?([a-z][a-z-]*)/g, (_, command, no, name) => // only a terminal can do it
      command ? `${command} (in a terminal)` : `${no ? "no " : ""}${name.replaceAll("-", " ")}`)
    .replaceAll("`", "");
}

/** A request; what `read` makes of its answer, or an Error whose message is the server's sentence. */
async function request(path, options, read) {
  let answer, body;
  try {
    answer = await fetch(path, options);
    body = await (answer.ok ? read(answer) : answer.text());
  } catch {
    throw new Error("The server does not answer. Was it ended in its terminal?");
  }
  if (answer.ok) return body;
  throw new Error(plain(parsed(body).error?.message ?? `The server refused this (${answer.status}).`));
}
function parsed(text) {
  try { return JSON.parse(text); } catch { return {}; } // no JSON: the status says it
}
/** A request and its answer. */
export const ask = async (path, options = {}) => parsed(await request(path, options, a => a.text()));
/** The file at an address of this server, or of the page's own (blob:). @returns {Promise<Blob>} */
export const blobOf = (path, options = {}) => request(path, options, a => a.blob());
const json = (method, path, body) =>
  ask(path, {method, headers: {"Content-Type": "application/json"}, body: JSON.stringify(body)});
export const post = (path, body) => json("POST", path, body);
export const patch = (path, body) => json("PATCH", path, body);
/** Send a form; parts are [name, value, file name]. */
export function upload(path, parts) {
  const body = new FormData();
  for (const [name, value, file] of parts) body.append(name, value, ...(file ? [file] : []));
  return ask(path, {method: "POST", body});
}

/** Fields of a request: what is empty is not sent. */
export const filled = values =>
  Object.fromEntries(Object.entries(values).filter(([, v]) => v !== "" && v !== null && !Number.isNaN(v)));

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

export async function loadCapabilities() {
  capabilities.value = await ask("/api/capabilities");
}
/** The concepts anew: some may have been taught or removed on the command line. */
export async function loadConcepts() {
  const {concepts: all} = await ask("/api/concepts").catch(e => {
    conceptsProblem.value = e.message;
    throw e;
  });
  conceptsProblem.value = "";
  const list = all.filter(c => c.newest);
  if (JSON.stringify(list) !== JSON.stringify(concepts.value)) concepts.value = list;
  conceptsListed.value = true;
}
/** A preset's options for a Select. */
export const presetOptions = first => [
  ...(first === undefined ? [] : [["", first]]),
  ...(capabilities.value?.presets ?? []).map(p =>
    [p.name, p.ready === false ? `${p.name} (not here)` : `${p.name}, ${p.steps} steps`, p.ready === false]),
];

export const base64 = blob => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(String(reader.result).slice(String(reader.result).indexOf(",") + 1));
  reader.onerror = () => reject(new Error("The file could not be read."));
  reader.readAsDataURL(blob);
});
