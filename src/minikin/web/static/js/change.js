// @ts-check
// Change: an image that is refined as a whole, inpainted under a mask, or extended at its sides.

import {base64, blobOf, filled, post, upload} from "./api.js";
import {addJob} from "./images.js";
import {Work} from "./jobs.js";
import {added, EMPTY, isDrawn, maskOf, strokeOf} from "./strokes.js";
import {batch, computed, jpeg, number, randomSeed, signal} from "./ui.js";

export const SIDES = ["left", "right", "up", "down"];
const NONE = {left: 0, right: 0, up: 0, down: 0};
export const fields = signal({
  prompt: "", preset: "", seed: "", feather: "", onlyMasked: false, size: "",
  strength: {refine: 0.4, inpaint: 1},
});
export const set = name => value => { fields.value = {...fields.value, [name]: value}; };
/** Pixels to add at each side. */
export const margins = signal(NONE);
export const setMargin = (side, pixels) => { margins.value = {...margins.value, [side]: pixels}; };
/** The image to change: its address, and its id or file. */
export const image = signal(/** @type {{url: string, id?: string, file?: File} | null} */ (null));
/** [width, height] of it, once it is loaded. */
export const size = signal(/** @type {[number, number] | null} */ (null));
export const drawn = signal(EMPTY);
export const word = signal("");
export const result = signal(
  /** @type {{src: string, caption: string, made?: any, before: string} | null} */ (null));
export const work = new Work();
/** What the button does: only a mask or an extension leaves the rest as it is. */
export const kind = computed(() =>
  isDrawn(drawn.value) || SIDES.some(side => margins.value[side] > 0) ? "inpaint" : "refine");

/** Take an image: {url, id} of one of this server, or {url, file}. */
export function begin(taken) {
  batch(() => {
    image.value = taken;
    size.value = null;
    drawn.value = EMPTY;
    margins.value = NONE;
    result.value = null;
  });
  work.say("");
}
export const takeFile = ([file]) => begin({url: URL.createObjectURL(file), file});
export function unshown() {
  image.value = null;
  work.say("This browser cannot show this file, so nothing can be drawn over it. Use JPEG, PNG or WebP.");
}

/** Mask what `word` names. */
export async function maskByWord() {
  const asked = image.value, category = word.value.trim();
  if (!asked || !category) return work.say("Say what is to be masked, for example cat.");
  try {
    const end = await work.run(async () => upload("/api/masks", [
      ["photos", asked.file ?? await blobOf(asked.url), "image.png"], ["category", category]]));
    if (!end) return;
    const stroke = await strokeOf(await blobOf(end.results[0].url));
    if (image.value === asked) drawn.value = added(drawn.value, stroke); // else another one was taken meanwhile
  } catch (e) { work.say(e.message); }
}

/** Send what is drawn and set. */
export async function run() {
  const {onlyMasked, strength, size: newSize, feather, ...values} = fields.value;
  const asked = image.value, job = kind.value;
  if (!asked) return work.say("Choose an image first: drop one here, or press Change under a draft.");
  const {id, file, url} = asked;
  const extend = SIDES.filter(side => margins.value[side] > 0)
    .map(side => `${side}=${margins.value[side]}`).join();
  let mask;
  try {
    mask = size.value && await maskOf(drawn.value, size.value);
  } catch (e) { return work.say(e.message); }
  if (job === "inpaint" && !mask && !extend) {
    return work.say("The mask is empty. Draw over what is to change, or clear it to refine the whole.");
  }
  const options = job === "refine" ? {size: newSize}
    : {mask: mask && await base64(mask), extend, feather: number(feather), only_masked: onlyMasked};
  const before = extend ? "" : url;
  const show = shown => { if (image.value === asked) result.value = shown; }; // else another was taken
  if (result.value) show({...result.value, before});
  const end = await work.run(async () => post(`/api/${job}`, filled({
    ...values, ...options, strength: strength[job], image: id ? `result:${id}` : await base64(file),
    prompt: values.prompt.trim(), seed: number(values.seed) ?? randomSeed()})),
  preview => show({src: jpeg(preview), caption: "", before}));
  if (!end) return;
  const [made] = end.results;
  show({src: made.url, caption: `seed ${made.seed} · ${made.width}x${made.height}`, made, before});
  addJob(end);
}
