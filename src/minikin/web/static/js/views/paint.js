// @ts-check
// Paint: the prompt and its settings, the image that follows, and the drafts.

import {capabilities, presetOptions} from "../api.js";
import {begin} from "../change.js";
import {
  change, form, hidden, live, lock, paint, pick, rollSeed, setLive, setLock, stopTyping, useRecipe, work,
} from "../form.js";
import * as images from "../images.js";
import {Message, Progress} from "../jobs.js";
import {open} from "../router.js";
import {Check, Field, html, Icon, Range, Select, sendsWithKeys, submits, useState} from "../ui.js";
import {PromptField} from "./prompt-field.js";
import {inPrompt, placing, RegionBar, Regions} from "./regions.js";
import {Styles} from "./styles.js";

export const Paint = () => html`
  <div class="split paint">
    <form class="panel" aria-label="Paint" autocomplete="off" onSubmit=${submits(paint)}
        onKeyDown=${sendsWithKeys}>
      <${PromptField} />
      <div class="settings"><${Settings} /></div>
    </form>
    <${Stage} />
  </div>
  <${Drafts} />`;

/** An input of the form, by its name. */
export const Input = ({name, label, ...input}) => html`<${Field} label=${label}>
  <input value=${form.value[name]} onInput=${e => change({[name]: e.target.value})} ...${input} /><//>`;

function Settings() {
  const {limits, samplers = [], schedules = []} = capabilities.value ?? {};
  const choices = (first, names) => [["", first], ...names.map(n => [n, n])];
  const set = name => text => change({[name]: text});
  const more = hidden(), [isOpen, setOpen] = useState(false);
  return html`
    <${Input} name="negative" label="Negative prompt" type="text" placeholder="what should not be seen" />
    <${Styles} />
    <div class="fields">
      <${Select} label="Preset" value=${form.value.preset} options=${presetOptions()}
        onInput=${set("preset")} />
      <${Input} name="guidance" label="Guidance" type="number" min="0" max="50" step="0.5"
        placeholder="the preset's" />
      <${Seed} />
      <${Input} name="n" label="Images" type="number" min="1" max=${limits?.images ?? 10} />
    </div>
    <details open=${isOpen || more !== ""} onToggle=${e => setOpen(e.currentTarget.open)}>
      <summary>More${more && `: ${more}`}</summary><div class="fields">
      <${Input} name="steps" label="Steps" type="number" min="1" max=${limits?.steps ?? 50}
        placeholder="the preset's" />
      <${Input} name="size" label="Size" type="text" placeholder="the base's own" />
      <${Select} label="Sampler" value=${form.value.scheduler} options=${choices("the preset's", samplers)}
        onInput=${set("scheduler")} />
      <${Select} label="Schedule" value=${form.value.schedule} options=${choices("automatic", schedules)}
        onInput=${set("schedule")} />
      <${Input} name="clip_skip" label="Clip skip" type="number" min="1" max="12" placeholder="1" />
    </div></details>
    <div class="actions">
      <button class="main" disabled=${work.busy.value}>Paint <kbd>Ctrl Enter</kbd></button>
      <${Check} label="Paint as I type" checked=${live.value} onChange=${setLive} />
    </div>
    <${Progress} work=${work} />`;
}

const Seed = () => html`<div class="field">
  <label class="label" for="seed">Seed</label>
  <span class="joined">
    <input id="seed" type="number" min="0" value=${form.value.seed}
      onInput=${e => change({seed: e.target.value})} />
    <button type="button" class="square" aria-label="Another seed" title="Another seed" onClick=${rollSeed}>
      <${Icon} name="dice" /></button>
    <button type="button" class="square" aria-label="Keep the seed" aria-pressed=${lock.value}
      title=${lock.value ? "The seed is kept" : "Each press of Paint takes another seed"}
      onClick=${() => setLock(!lock.value)}><${Icon} name=${lock.value ? "locked" : "open"} /></button>
  </span></div>`;

function Stage() {
  const image = images.shown.value, draft = images.selected.value;
  const toChange = () => { begin({url: draft.url, id: draft.id}); open("change"); };
  return html`<div class="stage">
    <figure class="image">
      ${image || inPrompt.value.includes(placing.value) ? html`<div class="placed">
          ${image ? html`<img class="shown" src=${image.src} alt=${image.alt} data-number=${image.live?.count}
            data-prompt=${image.live?.prompt} data-seconds=${image.live?.seconds} />`
            : html`<div class="shown blank" />`}
          <${Regions} /></div>`
        : html`<p class="hint">Type a prompt; the image follows.</p>`}
      <figcaption>${image?.caption}</figcaption></figure>
    <${RegionBar} />
    <${Message} work=${work} />
    ${draft && html`<div class="actions">
      <a class="button" href=${draft.url} download=${draft.name}>Download</a>
      <button type="button" onClick=${toChange}>Change</button>
      <button type="button" onClick=${() => useRecipe(draft)}>Use its recipe</button></div>`}
  </div>`;
}

// ---- drafts

function Drafts() {
  const folder = capabilities.value?.images;
  const older = () => images.load(undefined, true).catch(e => work.say(e.message));
  return html`<section class="below" aria-label="Drafts">
    <div class="bar"><h2>Drafts</h2><${RefineForm} /></div>
    <div class="grid">${images.drafts.value.map(d => html`<${Draft} key=${d.id} draft=${d} />`)}</div>
    ${!images.drafts.value.length && html`<p class="hint">Drafts come here. Tick those worth refining.</p>`}
    <div class="inline">
      ${images.hasOlder.value && html`<button type="button" class="small" onClick=${older}>Show older</button>`}
      ${folder && html`<p class="hint">${folder.folder ? `Every image is saved in ${folder.folder}.`
        : `Images are deleted here after ${folder.hours} hours: download what you want to keep.`}</p>`}
    </div></section>`;
}

const DID = {paint: "", refine: "refined ", inpaint: "inpainted "};
const Draft = ({draft}) => html`
  <div class=${images.selected.value?.id === draft.id ? "card on" : "card"} data-kind=${draft.kind}>
    <button type="button" class="face" aria-label=${`Show ${draft.kind} of seed ${draft.seed}`}
      onClick=${() => pick(draft)}>
      <img src=${draft.url} alt="" loading="lazy" width=${draft.width} height=${draft.height} /></button>
    <label class="check"><input type="checkbox" checked=${images.picked.value.has(draft.id)}
      aria-label=${`Pick seed ${draft.seed} for refining`} onChange=${() => images.togglePick(draft)} />
      ${DID[draft.kind]}${draft.seed}</label></div>`;

function RefineForm() {
  const [options, setOptions] = useState({strength: 0.4, size: "", preset: ""});
  const set = name => value => setOptions(before => ({...before, [name]: value}));
  const count = images.picked.value.size;
  const go = () => { stopTyping(); images.refine(options, send => work.run(send)); };
  return html`<form class="inline refine" aria-label="Refine" onSubmit=${submits(go)}>
    <${Range} label="Strength" min="0.05" max="1" step="0.05" value=${options.strength}
      onInput=${set("strength")} />
    <${Select} label="Size" value=${options.size} options=${[["", "same"], ["1.5x", "1.5x"], ["2x", "2x"]]}
      onInput=${set("size")} />
    <${Select} label="Preset" value=${options.preset} options=${presetOptions("its own")}
      onInput=${set("preset")} />
    <button disabled=${!count || work.busy.value}>${count > 1 ? `Refine ${count}` : "Refine"}</button></form>`;
}
