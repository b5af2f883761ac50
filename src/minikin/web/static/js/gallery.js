// @ts-check
// All images of this person, as the gallery lists them: pages are fetched as they come into view.

import {ask, blobOf, patch} from "./api.js";
import {forget} from "./images.js";
import {addPhotos} from "./photos.js";
import {signal} from "./ui.js";

export const PAGE = 100;
const UNDO_MS = 8000;

/**
 * @typedef {import("./api.js").Result
 *   & {kind: string, about: string, favourite: boolean, created: number}} Item
 */
export const search = signal("");
export const onlyFavourites = signal(false);
export const total = signal(0);
export const problem = signal("");
/** Why an image was not deleted or marked; until something else is done. */
export const failure = signal("");
/** Images by their place in the list; those that were not fetched are missing. */
export const items = signal(/** @type {Record<number, Item>} */ ({}));
/** The image that can be brought back. */
export const deleted = signal(/** @type {Item | null} */ (null));
/** Images to compare, download or teach from. */
export const chosen = signal(/** @type {Item[]} */ ([]));
/** Whether the file of chosen images is on its way. */
export const collecting = signal(false);

let requests = new Map(/** @type {[number, Promise<void>][]} */ ([])); // by page
let version = 0, filled = 0, timer = 0; // filled: the version that `items` is of

/** Begin the list anew, for another search or when there are new images. */
export async function reload() {
  version += 1;
  requests = new Map();
  await need(0, 0);
}
/** Fetch the pages of these places, unless they are there; resolves when they are. */
export async function need(first, last) {
  const [from, to] = [first, last].map(place => Math.floor(place / PAGE));
  const pages = Array.from({length: to - from + 1}, (_, k) => from + k);
  for (const page of pages) if (!requests.has(page)) requests.set(page, fetchPage(page));
  await Promise.all(pages.map(page => requests.get(page)));
}
async function fetchPage(page) {
  const now = version;
  const query = new URLSearchParams({
    search: search.value, favourite: String(onlyFavourites.value), limit: String(PAGE),
    offset: String(page * PAGE),
  });
  try {
    const answer = await ask(`/api/images?${query}`);
    if (now !== version) return; // of an earlier search
    const rows = Object.fromEntries(answer.images.map((item, k) => [page * PAGE + k, item]));
    items.value = filled === now ? {...items.value, ...rows} : rows; // whichever page comes first
    filled = now;
    total.value = answer.total;
    problem.value = "";
  } catch (e) {
    if (now !== version) return;
    requests.delete(page);
    problem.value = e.message;
  }
}

/** Mark or unmark an image; resolves with what it is now, undefined where that failed. */
export async function toggleFavourite(item) {
  failure.value = "";
  try {
    const {favourite} = await patch(`/api/images/${item.id}`, {favourite: !item.favourite});
    items.value = Object.fromEntries(Object.entries(items.value).map(([k, other]) =>
      [k, other.id === item.id ? {...other, favourite} : other]));
    return favourite;
  } catch (e) {
    failure.value = e.message;
    return undefined;
  }
}

/** Take an image out of the list; it is deleted on the server when its time to come back is over. */
export function remove(item) {
  if (deleted.value?.id === item.id) return;
  failure.value = "";
  finishDeleting();
  chosen.value = chosen.value.filter(other => other.id !== item.id);
  deleted.value = item;
  timer = setTimeout(finishDeleting, UNDO_MS);
}
export function undo() {
  clearTimeout(timer);
  deleted.value = null;
}
/** Delete for good; also when the page is left. */
export async function finishDeleting() {
  const item = deleted.value;
  if (!item) return;
  undo();
  try {
    await ask(`/api/images/${item.id}`, {method: "DELETE", keepalive: true});
    forget(item.id);
  } catch (e) { failure.value = e.message; }
  await reload();
}
addEventListener("pagehide", finishDeleting);

/** Save images as one file, with their recipes. @param {Item[]} list */
export async function download(list) {
  failure.value = "";
  collecting.value = true;
  try {
    const file = await blobOf("/api/images/archive", {
      method: "POST", headers: {"Content-Type": "application/json"},
      body: JSON.stringify({ids: list.map(item => item.id)}),
    });
    const link = document.createElement("a");
    link.href = URL.createObjectURL(file);
    link.download = "images.zip";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), UNDO_MS);
  } catch (e) { failure.value = e.message; } finally { collecting.value = false; }
}
/** Add images to the photos of Teach; resolves with whether that was possible. @param {Item[]} list */
export async function teachFrom(list) {
  failure.value = "";
  try {
    addPhotos(await Promise.all(list.map(async ({url, name}) =>
      new File([await blobOf(url)], name, {type: "image/png"}))));
    return true;
  } catch (e) {
    failure.value = e.message;
    return false;
  }
}
/** The image, those it was made from and those made from these; each names its parent; more: not all. */
export const family = id => ask(`/api/images/${id}/family`);
