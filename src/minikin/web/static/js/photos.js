// @ts-check
// The photos of Teach: each with its mask and caption, and what may be wrong with it.

import {capabilities} from "./api.js";
import {canvasOf} from "./strokes.js";
import {signal} from "./ui.js";

// by type, or by name where the system knows no type
const PHOTO = /^image\/(png|jpeg|webp|avif|hei[cf])$|\.(hei[cf]|avif)$/i;
const HASH = 16; // side of the grey image that photos are compared by
const SIMILAR = 6; // mean difference of its grey levels

/**
 * size is null and hash empty for a photo that this browser does not show; drawn: its mask was drawn by hand.
 * @typedef {{file: File, url: string, mask: Blob | null, drawn: boolean, overlay: string,
 *   accepted: boolean, caption: string, size: [number, number] | null, hash: Uint8ClampedArray | null}} Photo
 */
export const photos = signal(/** @type {Photo[]} */ ([]));

/** Add files; those that are no photos are returned. @param {File[]} files */
export function addPhotos(files) {
  const isPhoto = f => PHOTO.test(f.type) || PHOTO.test(f.name);
  const fresh = files.filter(isPhoto).map(file => ({
    file, url: URL.createObjectURL(file), mask: null, drawn: false, overlay: "", accepted: false, caption: "",
    size: null, hash: null,
  }));
  photos.value = [...photos.value, ...fresh];
  return files.filter(f => !isPhoto(f));
}
/** Change a photo, by its address. */
export function changePhoto(url, more) {
  photos.value = photos.value.map(p => (p.url === url ? {...p, ...more} : p));
}
/** Give photos, by their addresses, their masks, all at once; null takes one away. drawn: by hand; a proposed
    one does not replace such a mask. @param {any[][]} pairs */
export async function setMasks(pairs, drawn = false) {
  const changes = await Promise.all(pairs.map(async ([url, mask]) => ({
    url, mask, drawn: drawn && Boolean(mask), accepted: Boolean(mask),
    overlay: mask ? await inverted(mask) : "",
  })));
  photos.value = photos.value.map(p =>
    (p.drawn && !drawn ? p : {...p, ...changes.find(change => change.url === p.url)}));
}

/** Take the measures of a photo that was loaded into an image element. */
export function measure(url, image) {
  const grey = canvasOf(HASH, HASH, g => {
    g.filter = "grayscale(1)";
    g.drawImage(image, 0, 0, HASH, HASH);
  }).getContext("2d")?.getImageData(0, 0, HASH, HASH).data.filter((_, i) => i % 4 === 0);
  changePhoto(url, {size: [image.naturalWidth, image.naturalHeight], hash: grey});
}
/** Whether teaching can use a caption: it has the concept's name or its category. */
function isUsable(caption, name, category) {
  const word = category.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&");
  return caption.includes("{}") || (name && caption.includes(`<${name}>`))
    || new RegExp(`(?<![\\p{L}\\p{N}_])${word}(?![\\p{L}\\p{N}_])`, "u").test(caption);
}
/** What may be wrong with a photo of a concept, in a few words; "" where nothing is. @param {Photo} photo */
export function warning(photo, name, category) {
  const {caption} = photo;
  if (caption.trim() && category && !isUsable(caption, name, category)) {
    return `The caption is used only with the word "${category}" in it`;
  }
  const side = capabilities.value?.base.side ?? 0, least = photo.size ? Math.min(...photo.size) : side;
  if (least < side) return `Small: ${photo.size?.join("x")}, the base paints ${side} px`;
  const earlier = photos.value.slice(0, photos.value.indexOf(photo));
  const twin = earlier.findIndex(p => p.hash && photo.hash && difference(p.hash, photo.hash) < SIMILAR);
  return twin < 0 ? "" : `Nearly the same as photo ${twin + 1}: other views teach more`;
}
const difference = (a, b) => a.reduce((sum, v, i) => sum + Math.abs(v - b[i]), 0) / a.length;

/** The inverted mask as transparency, to dim what is not learned. */
async function inverted(blob) {
  const image = await createImageBitmap(blob);
  return canvasOf(image.width, image.height, g => {
    g.drawImage(image, 0, 0);
    const data = g.getImageData(0, 0, image.width, image.height);
    for (let i = 0; i < data.data.length; i += 4) data.data[i + 3] = 255 - data.data[i];
    g.putImageData(data, 0, 0);
  }).toDataURL();
}
/** The whole photo: for one whose mask was not accepted, beside others that were. */
export const whole = () => new Promise(done => canvasOf(64, 64, g => {
  g.fillStyle = "white";
  g.fillRect(0, 0, 64, 64);
}).toBlob(done, "image/png"));
