// @ts-check
// The open view is in the address (#paint), so that Back, reload and bookmarks work.

import {signal} from "./ui.js";

export const view = signal(location.hash.slice(1) || "paint");
addEventListener("hashchange", () => { view.value = location.hash.slice(1) || "paint"; });

export function open(name) {
  view.value = name;
  location.hash = name;
}
