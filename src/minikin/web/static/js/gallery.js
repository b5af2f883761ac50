// @ts-check
// All images of this person, as the gallery lists them: pages are fetched as they come into view.

import {ask, patch} from "./api.js";
import {forget} from "./images.js";
import {signal} from "./ui.js";

const PAGE = 100;
const UNDO_MS = 8000;

/**
 * @typedef {import("./api.js").Result
 *   & {kind: string, about: string, favourite: boolean, created: number}} Item
 */
export const search = signal("");
export const onlyFavourites = signal(false);
export const total = signal(0);
export const problem = signal("");
/** Images by their place in the list; those that were not fetched are missing. */
export const items = signal(/** @type {Record<number, Item>} */ ({}));
/** The image that can be brought back. */
export const deleted = signal(/** @type {Item | null} */ (null));

let asked = new Set(/** @type {number[]} */ ([])), version = 0, timer = 0;

/** Begin the list anew, for another search or when there are new images. */
export async function reload() {
  version += 1;
  asked = new Set();
  await fetchPage(0, true);
}
/** Fetch the pages of these places, unless they are there. */
export function need(first, last) {
  for (let page = Math.floor(first / PAGE); page <= Math.floor(last / PAGE); page++) fetchPage(page);
}
async function fetchPage(page, fresh = false) {
  if (asked.has(page)) return;
  asked.add(page);
  const now = version;
  const query = new URLSearchParams({
    search: search.value, favourite: String(onlyFavourites.value), limit: String(PAGE),
    offset: String(page * PAGE),
  });
  try {
    const answer = await ask(`/api/images?${query}`);
    if (now !== version) return; // of an earlier search
    const rows = Object.fromEntries(answer.images.map((item, k) => [page * PAGE + k, item]));
    items.value = fresh ? rows : {...items.value, ...rows};
    total.value = answer.total;
    problem.value = "";
  } catch (e) {
    asked.delete(page);
    problem.value = e.message;
  }
}

export async function toggleFavourite(item) {
  try {
    const {favourite} = await patch(`/api/images/${item.id}`, {favourite: !item.favourite});
    items.value = Object.fromEntries(Object.entries(items.value).map(([k, other]) =>
      [k, other.id === item.id ? {...other, favourite} : other]));
  } catch (e) { problem.value = e.message; }
}

/** Take an image out of the list; it is deleted on the server when its time to come back is over. */
export function remove(item) {
  finishDeleting();
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
  } catch (e) { problem.value = e.message; }
  await reload();
}
addEventListener("pagehide", finishDeleting);
