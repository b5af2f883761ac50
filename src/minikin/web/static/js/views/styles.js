// @ts-check
// The styles under the prompt: chosen by a click, added and deleted; and the prompts painted before.

import {change, chosenStyles, form, toggleStyle} from "../form.js";
import {deleteStyle, prompts, saveStyle, styles} from "../styles.js";
import {Field, html, Sure, useState} from "../ui.js";

export function Styles() {
  const [draft, setDraft] = useState({name: "", text: ""});
  const names = chosenStyles.value.filter(name => styles.value.some(s => s.name === name));
  const add = () => {
    if (!draft.name.trim() || !draft.text.trim()) return;
    saveStyle(draft.name.trim(), draft.text.trim());
    if (!names.includes(draft.name.trim())) toggleStyle(draft.name.trim());
    else change({});
    setDraft({name: "", text: ""});
  };
  const remove = name => {
    if (names.includes(name)) toggleStyle(name);
    deleteStyle(name);
  };
  const keys = e => { if (e.key === "Enter" && !e.ctrlKey && !e.metaKey) { e.preventDefault(); add(); } };
  const input = (name, label, placeholder) => html`<${Field} label=${label}><input type="text"
    value=${draft[name]} placeholder=${placeholder} onKeyDown=${keys}
    onInput=${e => setDraft({...draft, [name]: e.target.value})} /><//>`;
  return html`<details>
    <summary>Styles${names.length > 0 && `: ${names.join(", ")}`}</summary>
    <div class="settings">
      ${styles.value.length > 0 && html`<div class="names" role="group" aria-label="Styles">
        ${styles.value.map(({name, text}) => html`<span key=${name} class="joined">
          <button type="button" class="small" aria-pressed=${names.includes(name)} title=${text}
            onClick=${() => toggleStyle(name)}>${name}</button>
          <${Sure} label="×" name=${`Delete the style ${name}`} onClick=${() => remove(name)} /></span>`)}
        </div>`}
      <div class="fields">${input("name", "Name of a new style", "watercolour")}
        ${input("text", "What it adds to the prompt", "a watercolour painting")}</div>
      <div class="actions"><button type="button" class="small" onClick=${add}>Add the style</button></div>
    </div></details>`;
}

/** The prompts painted before, to take one again; nothing while there are none. */
export const History = () => prompts.value.length > 0 && html`
  <select class="history" aria-label="Earlier prompts" value=""
    onInput=${e => { change({prompt: e.target.value}); e.target.value = ""; }}>
    <option value="">Earlier prompts</option>
    ${prompts.value.filter(p => p !== form.value.prompt)
      .map(p => html`<option key=${p} value=${p}>${p}</option>`)}
  </select>`;
