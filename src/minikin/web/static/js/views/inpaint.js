// @ts-check
// Inpaint: a mask drawn over an image, what comes there, and pixels added at the sides.

import {base64, filled, post, presetOptions} from "../api.js";
import {Drop, IMAGES, useFiles} from "../files.js";
import {addJob} from "../images.js";
import {Message, Progress, Work} from "../jobs.js";
import {
  batch, Check, Field, html, jpeg, number, randomSeed, Range, Select, sendsWithKeys, signal, submits,
} from "../ui.js";
import {Mask, maskOf} from "./brush.js";

const SIDES = ["left", "right", "up", "down"];
const fields = signal({
  prompt: "", preset: "", strength: 1, seed: "", feather: "", onlyMasked: false, left: "0", right: "0", up: "0",
  down: "0",
});
const brush = signal({size: 16, erase: false});
/** The image to change: its address, and its id or file. */
const image = signal(/** @type {{url: string, id?: string, file?: File} | null} */ (null));
const size = signal(/** @type {[number, number] | null} */ (null)); // of the image, once it is loaded
const strokes = signal(/** @type {import("./brush.js").Stroke[]} */ ([]));
const result = signal(/** @type {{src: string, caption: string, made?: any} | null} */ (null));
const work = new Work(preview => { result.value = {src: jpeg(preview), caption: ""}; });
const set = name => value => { fields.value = {...fields.value, [name]: value}; };

/** Take an image: {url, id} of one of this server, or {url, file}. */
export function begin(taken) {
  batch(() => { image.value = taken; size.value = null; strokes.value = []; result.value = null; });
  work.say("");
}
const takeFile = ([file]) => begin({url: URL.createObjectURL(file), file});
function unshown() {
  image.value = null;
  work.say("This browser cannot show this file, so nothing can be drawn over it. Use JPEG, PNG or WebP.");
}

async function inpaint() {
  const {left: _l, right: _r, up: _u, down: _d, onlyMasked, ...values} = fields.value;
  if (!image.value) return work.say("Choose an image first: drop one here, or press Inpaint under a draft.");
  const mask = size.value && await maskOf(strokes.value, size.value);
  const margins = SIDES.map(side => [side, Number(fields.value[side])]);
  const extend = margins.filter(([, pixels]) => Number(pixels) > 0).map(pair => pair.join("=")).join();
  if (!mask && !extend) return work.say("Draw over what should be generated again, or extend the image.");
  const {id, file} = image.value;
  const end = await work.run(async () => post("/api/inpaint", filled({
    ...values, image: id ? `result:${id}` : await base64(file), mask: mask && await base64(mask), extend,
    prompt: values.prompt.trim(), seed: number(values.seed) ?? randomSeed(), feather: number(values.feather),
    only_masked: onlyMasked})));
  if (!end) return;
  const [made] = end.results;
  result.value = {src: made.url, caption: `seed ${made.seed} · ${made.width}x${made.height}`, made};
  addJob(end);
}

export function Inpaint() {
  useFiles(IMAGES, takeFile);
  return html`<div class="split inpaint">
    <form class="panel" aria-label="Inpaint" autocomplete="off" onSubmit=${submits(inpaint)}
        onKeyDown=${sendsWithKeys}>
      <${Form} />
      <div class="actions">
        <button class="main" disabled=${work.busy.value}>Inpaint <kbd>Ctrl Enter</kbd></button></div>
      <${Progress} work=${work} />
      <${Message} work=${work} />
    </form>
    <div class="stage">
      ${image.value ? html`<${Easel} />` : html`<${Drop} accept=${IMAGES} take=${takeFile}>
        <b>Drop an image</b> or choose a file; or pick a draft and press Inpaint there.<//>`}
      ${result.value && html`<${Result} />`}
    </div></div>`;
}

const Input = ({name, label, ...input}) => html`<${Field} label=${label}>
  <input value=${fields.value[name]} onInput=${e => set(name)(e.target.value)} ...${input} /><//>`;

const Form = () => html`
  <${Field} label="What to put there"><textarea rows="2" placeholder="a yellow duck; <tom> sits here"
    spellcheck="false" value=${fields.value.prompt} onInput=${e => set("prompt")(e.target.value)} /><//>
  <div class="fields">
    <${Select} label="Preset" value=${fields.value.preset} options=${presetOptions("the image's")}
      onInput=${set("preset")} />
    <${Range} label="Strength" min="0.05" max="1" step="0.05" value=${fields.value.strength}
      onInput=${set("strength")} />
    <${Input} name="seed" label="Seed" type="number" min="0" placeholder="another each time" />
    <${Input} name="feather" label="Feather, px" type="number" min="0" max="512" placeholder="usual" />
  </div>
  <${Check} label="Only the masked part, for detail" checked=${fields.value.onlyMasked}
    onChange=${set("onlyMasked")} />
  <fieldset><legend>Extend, px</legend><div class="fields four">
    ${SIDES.map(side => html`<${Input} name=${side} label=${side[0].toUpperCase() + side.slice(1)}
      type="number" min="0" max="1024" />`)}
  </div></fieldset>`;

function Easel() {
  const {size: width, erase} = brush.value;
  const setBrush = more => { brush.value = {...brush.value, ...more}; };
  const loaded = e => { size.value = [e.target.naturalWidth, e.target.naturalHeight]; };
  return html`<div class="easel">
    <div class="inline" role="group" aria-label="Brush">
      <label for="brush">Brush</label><input id="brush" type="range" min="2" max="64" value=${width}
        onInput=${e => setBrush({size: Number(e.target.value)})} />
      <button type="button" aria-pressed=${erase} onClick=${() => setBrush({erase: !erase})}>Erase</button>
      <button type="button" onClick=${() => { strokes.value = strokes.value.slice(0, -1); }}>Undo</button>
      <button type="button" onClick=${() => { strokes.value = []; }}>Clear</button>
      <button type="button" onClick=${() => { image.value = null; }}>Another image</button>
    </div>
    <div class="canvas">
      <img src=${image.value?.url} alt="The image to inpaint" onLoad=${loaded} onError=${unshown} />
      ${size.value && html`<${Mask} size=${size.value} strokes=${strokes.value} brush=${width} erase=${erase}
        setStrokes=${list => { strokes.value = list; }} />`}
    </div>
    <p class="hint">What you paint over is painted anew. Not a pixel outside it moves.</p></div>`;
}

function Result() {
  const {src, caption, made} = /** @type {any} */ (result.value);
  return html`<div class="result">
    <figure class="image"><img class="shown" src=${src} alt=${fields.value.prompt || "The inpainted image"} />
      <figcaption>${caption}</figcaption></figure>
    ${made && html`<div class="actions">
      <button type="button" onClick=${() => begin({url: made.url, id: made.id})}>Go on with this</button>
      <a class="button" href=${made.url} download=${made.name}>Download</a></div>`}</div>`;
}
