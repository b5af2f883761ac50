// @ts-check
// Concepts: a card for each, files added, and the operating points that a sweep measured.

import {ask, concepts, conceptsListed, loadConcepts, upload} from "../api.js";
import {FileButton, useFiles} from "../files.js";
import {strengthOf} from "../prompt.js";
import {form, nameConcept, setStrength} from "../form.js";
import {open} from "../router.js";
import {html, signal, Sure} from "../ui.js";
import {openSweep, Sweep} from "./sweep.js";

const problem = signal("");

/** Name a concept in the prompt at a strength, and show the prompt. */
export function use(name, strength) {
  if (strengthOf(form.value.prompt, name) === null) nameConcept(name);
  if (strength !== undefined) setStrength(name, strength);
  open("paint");
}
/** Do something to the concepts, then list them anew. */
async function changed(act) {
  try {
    await act();
    problem.value = "";
    await loadConcepts();
  } catch (e) { problem.value = e.message; }
}
async function add(files) {
  for (const file of files) await changed(() => upload("/api/concepts", [["file", file]]));
}

export function Concepts() {
  useFiles(".safetensors", add);
  useFiles(".json", openSweep);
  return html`
    <section aria-label="Concepts">
      <div class="bar"><h2>Your concepts</h2>
        <${FileButton} label="Add a file" accept=".safetensors" take=${add} /></div>
      <div class="concepts">${concepts.value.map(c => html`<${Card} key=${c.sha256} concept=${c} />`)}</div>
      ${conceptsListed.value && !concepts.value.length &&
        html`<p class="hint">No concept yet. Teach one from three to six photos, or add a file.</p>`}
      <p class="message" role="status">${problem.value}</p>
    </section>
    <${Sweep} use=${use} />`;
}

function Card({concept: c}) {
  const address = `/api/concepts/sha256:${c.sha256}`;
  const points = Object.entries(c.points).flatMap(([preset, byName]) =>
    Object.entries(byName).map(([name, point]) => ({preset, name, ...point})));
  return html`<article class="concept" aria-label=${c.name}>
    ${c.preview
      ? html`<img src=${`${address}/preview`} alt=${`A preview of ${c.name}`} width="96" height="96" />`
      : html`<span class="initial" aria-hidden="true">${c.name[0]}</span>`}
    <div><h3>${`<${c.name}>`}</h3><p class="hint">${c.category}</p>
      ${points.length > 0 && html`<div class="inline">${points.map(p => html`
        <button type="button" class="small" title=${measured(p)} onClick=${() => use(c.name, p.strength)}>
          ${p.name} ${p.strength}</button>`)}</div>`}
      <div class="inline">
        <button type="button" class="small" onClick=${() => use(c.name)}>Use</button>
        <a class="button small" href=${address} download=${`${c.name}.safetensors`}>Download</a>
        ${c.mine && html`<${Sure} label="Delete" name=${`Delete ${c.name}`}
          onClick=${() => changed(() => ask(address, {method: "DELETE"}))} />`}
      </div></div></article>`;
}
const measured = p =>
  `measured with preset ${p.preset}: subject fidelity ${p.likeness}, ` // word: JSON field
  + `prompt fidelity ${p.follows}`;
