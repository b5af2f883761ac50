// @ts-check
// The prompt with completion of names behind "<", and the concepts it names, each with its strength.

import {capabilities, concepts} from "../api.js";
import {change, form, nameConcept, setStrength} from "../form.js";
import {strengthOf, without} from "../prompt.js";
import {html, useRef, useState} from "../ui.js";
import {inPrompt, PlaceButton, Proposal} from "./regions.js";
import {History} from "./styles.js";

const MOST = 8; // names proposed at once
const OPEN_TAG = /<([\w-]*)$/;

/** What "<" and the letters behind it may become: concepts, and LoRAs with their syntax. */
function proposals(text) {
  const match = OPEN_TAG.exec(text);
  if (!match) return [];
  const begins = name => name.toLowerCase().startsWith(match[1].toLowerCase());
  const loras = (capabilities.value?.loras ?? []).map(name => ({tag: `<lora:${name}:1>`, name, note: "LoRA"}));
  return [...concepts.value.map(c => ({tag: `<${c.name}>`, name: c.name, note: c.category})), ...loras]
    .filter(p => begins(p.name) || begins(p.tag.slice(1))).slice(0, MOST);
}

export function PromptField() {
  const field = useRef(/** @type {any} */ (null));
  const [list, setList] = useState(/** @type {any[]} */ ([]));
  const [at, setAt] = useState(0);
  const propose = e => {
    const found = e.target.selectionStart === e.target.selectionEnd
      ? proposals(e.target.value.slice(0, e.target.selectionStart)) : [];
    setList(found);
    setAt(0);
  };
  const take = proposal => {
    const {value, selectionStart} = field.current;
    const start = selectionStart - (OPEN_TAG.exec(value.slice(0, selectionStart))?.[0].length ?? 0);
    change({prompt: value.slice(0, start) + proposal.tag + value.slice(selectionStart).replace(/^>/, "")});
    setList([]);
    const end = start + proposal.tag.length;
    requestAnimationFrame(() => { field.current?.focus(); field.current?.setSelectionRange(end, end); });
  };
  const keys = e => {
    if (!list.length || e.ctrlKey || e.metaKey || e.altKey) return;
    if (e.key === "ArrowDown" || e.key === "ArrowUp") {
      setAt((at + (e.key === "ArrowDown" ? 1 : list.length - 1)) % list.length);
    } else if (e.key === "Enter" || e.key === "Tab") take(list[at]);
    else if (e.key === "Escape") setList([]);
    else return;
    e.preventDefault();
    e.stopPropagation();
  };
  return html`<div class="prompt">
    <div class="bar tight"><label class="label" for="prompt">Prompt</label><${History} /></div>
    <textarea id="prompt" ref=${field} rows="3" placeholder="a photo of a cat on the beach" spellcheck="false"
      value=${form.value.prompt} onKeyDown=${keys} onBlur=${() => setList([])}
      aria-autocomplete="list" aria-controls="prompt-names"
      aria-activedescendant=${list.length ? `prompt-name-${at}` : null}
      onInput=${e => { change({prompt: e.target.value}); propose(e); }}></textarea>
    <ul id="prompt-names" class="proposals" role="listbox" aria-label="Names" hidden=${!list.length}>
      ${list.map((p, k) => html`
        <li key=${p.tag} id=${`prompt-name-${k}`} role="option" aria-selected=${k === at}
          onPointerDown=${e => { e.preventDefault(); take(p); }}>
          <code>${p.tag}</code><span>${p.note}</span></li>`)}
    </ul>
    <${Chips} field=${field} />
  </div>`;
}

/** The concepts of the prompt, with a slider each; the others, to name them. */
function Chips({field}) {
  const {prompt} = form.value;
  const named = inPrompt.value.map(name => concepts.value.find(c => c.name === name));
  const others = concepts.value.filter(c => !named.includes(c));
  const add = name => {
    nameConcept(name, field.current?.selectionStart);
    field.current?.focus();
  };
  return html`
    ${named.map(c => c && html`
      <${Chip} key=${c.name} concept=${c} strength=${strengthOf(prompt, c.name) ?? 1} />`)}
    <${Proposal} />
    ${others.length > 0 && html`<div class="names" role="group" aria-label="Concepts to name">
      ${others.map(c => html`<button key=${c.name} type="button" class="name" title=${c.category}
        onClick=${() => add(c.name)}>${`<${c.name}>`}</button>`)}</div>`}`;
}

const Chip = ({concept: {name, category}, strength}) => html`
  <div class="chip">
    <label for=${`strength-${name}`}>${`<${name}>`}</label>
    <input id=${`strength-${name}`} type="range" min="0" max="2" step="0.05" value=${strength}
      title=${`Strength of ${name}`} onInput=${e => setStrength(name, Number(e.target.value))} />
    <output>${strength.toFixed(2)}</output>
    <${PlaceButton} name=${name} />
    <button type="button" class="bare" aria-label=${`Leave ${name} out of the prompt`}
      onClick=${() => change({prompt: without(form.value.prompt, name, category)})}>×</button></div>`;
