// @ts-check
// Change: an image that is refined as a whole, inpainted under a mask, or extended at its sides.

import {base64, filled, post, upload} from "./api.js";
import {addJob} from "./images.js";
import {Work} from "./jobs.js";
import {EMPTY, isDrawn, maskOf} from "./strokes.js";
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
export const work = new Work(preview => {
  result.value = {src: jpeg(preview), caption: "", before: result.value?.before ?? ""};
});
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

/** The mask of what `word` names, a PNG; null where there is none. */
export async function findMask() {
  if (!image.value || !word.value.trim()) {
    work.say("Say what is to be masked, for example cat.");
    return null;
  }
  const {url, file} = image.value;
  const end = await work.run(async () => upload("/api/masks", [
    ["photos", file ?? await (await fetch(url)).blob(), "image.png"], ["category", word.value.trim()]]));
  return end && (await fetch(end.results[0].url)).blob();
}

/** Send what is drawn and set. */
export async function run() {
  const {onlyMasked, strength, size: newSize, feather, ...values} = fields.value;
  if (!image.value) return work.say("Choose an image first: drop one here, or press Change under a draft.");
  const {id, file, url} = image.value, job = kind.value;
  const mask = size.value && await maskOf(drawn.value, size.value);
  const extend = SIDES.filter(side => margins.value[side] > 0)
    .map(side => `${side}=${margins.value[side]}`).join();
  const options = job === "refine" ? {size: newSize}
    : {mask: mask && await base64(mask), extend, feather: number(feather), only_masked: onlyMasked};
  result.value = result.value && {...result.value, before: extend ? "" : url};
  const end = await work.run(async () => post(`/api/${job}`, filled({
    ...values, ...options, strength: strength[job], image: id ? `result:${id}` : await base64(file),
    prompt: values.prompt.trim(), seed: number(values.seed) ?? randomSeed()})));
  if (!end) return;
  const [made] = end.results;
  result.value = {src: made.url, caption: `seed ${made.seed} · ${made.width}x${made.height}`, made,
    before: extend ? "" : url};
  addJob(end);
}
