// @ts-check
// Change: one canvas to refine an image, to inpaint a part of it, and to extend it.

import {presetOptions} from "../api.js";
import {
  begin, fields, image, kind, margins, result, run, set, setMargin, SIDES, takeFile, work,
} from "../change.js";
import {Drop, IMAGES, useFiles} from "../files.js";
import {Message, Progress} from "../jobs.js";
import {Check, Field, html, Range, Select, sendsWithKeys, submits} from "../ui.js";
import {Easel} from "./easel.js";
import {Pair} from "./pair.js";

const SIZES = [["", "same"], ["1.5x", "1.5x"], ["2x", "2x"], ["4x", "4x"]];

export function Change() {
  useFiles(IMAGES, takeFile);
  return html`<div class="split change">
    <form class="panel" aria-label="Change" autocomplete="off" onSubmit=${submits(run)}
        onKeyDown=${sendsWithKeys}>
      <${Form} />
      <div class="actions"><button class="main" disabled=${work.busy.value}>
        ${kind.value === "refine" ? "Refine" : "Inpaint"} <kbd>Ctrl Enter</kbd></button></div>
      <${Progress} work=${work} />
      <${Message} work=${work} />
    </form>
    <div class="stage">
      ${image.value ? html`<${Easel} />` : html`<${Drop} accept=${IMAGES} take=${takeFile}>
        <b>Drop an image</b>, paste one or choose a file; or pick a draft and press Change there.<//>`}
      ${result.value && html`<${Result} />`}
    </div></div>`;
}

const Input = ({name, label, ...input}) => html`<${Field} label=${label}>
  <input value=${fields.value[name]} onInput=${e => set(name)(e.target.value)} ...${input} /><//>`;

function Form() {
  const {strength, prompt, preset, size, onlyMasked} = fields.value, job = kind.value;
  return html`
    <${Field} label=${job === "refine" ? "What it shows" : "What to put there"}><textarea rows="2"
      placeholder=${job === "refine" ? "as before" : "a yellow duck; <tom> sits here"}
      spellcheck="false" value=${prompt} onInput=${e => set("prompt")(e.target.value)} /><//>
    <div class="fields">
      <${Select} label="Preset" value=${preset} options=${presetOptions("the image's")}
        onInput=${set("preset")} />
      <${Range} label="Strength" min="0.05" max="1" step="0.05" value=${strength[job]}
        onInput=${value => set("strength")({...strength, [job]: value})} />
      <${Input} name="seed" label="Seed" type="number" min="0" placeholder="another each time" />
      ${job === "refine"
        ? html`<${Select} label="Size" value=${size} options=${SIZES} onInput=${set("size")} />`
        : html`<${Input} name="feather" label="Feather, px" type="number" min="0" max="512"
          placeholder="usual" />`}
    </div>
    ${job === "inpaint" && html`<${Check} label="Only the masked part, for detail" checked=${onlyMasked}
      onChange=${set("onlyMasked")} />`}
    <fieldset><legend>Extend, px</legend><div class="fields four">
      ${SIDES.map(side => html`<${Field} label=${side[0].toUpperCase() + side.slice(1)}>
        <input type="number" min="0" max="1024" value=${margins.value[side]}
          onInput=${e => setMargin(side, Math.max(0, Number(e.target.value) || 0))} /><//>`)}
    </div></fieldset>`;
}

function Result() {
  const {src, caption, made, before} = /** @type {any} */ (result.value);
  const alt = fields.value.prompt || "The changed image";
  return html`<div class="result">
    ${before
      ? html`<${Pair} left=${{src: before, alt: "Before"}} right=${{src, alt}} label="Share of before" />`
      : html`<figure class="image"><img class="shown" src=${src} alt=${alt} /></figure>`}
    <p class="hint caption">${before && made ? `before and after · ${caption}` : caption}</p>
    ${made && html`<div class="actions">
      <button type="button" onClick=${() => begin({url: made.url, id: made.id})}>Go on with this</button>
      <a class="button" href=${made.url} download=${made.name}>Download</a></div>`}</div>`;
}
