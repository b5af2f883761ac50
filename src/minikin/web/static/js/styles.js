// @ts-check
// Styles: named parts of a prompt, of the person who uses this browser; and the prompts painted before.

import {signal} from "./ui.js";

const STYLES = "minikin.styles", PROMPTS = "minikin.prompts";
const MOST = 50; // prompts that are remembered

function stored(key) {
  try {
    const list = JSON.parse(localStorage.getItem(key) ?? "[]");
    return Array.isArray(list) ? list : [];
  } catch { return []; } // of another version
}

/** @typedef {{name: string, text: string}} Style */
/** @returns {Style[]} */
const storedStyles = () =>
  stored(STYLES).filter(s => typeof s?.name === "string" && typeof s?.text === "string");
/** @returns {string[]} */
const storedPrompts = () => stored(PROMPTS).filter(p => typeof p === "string");

export const styles = signal(storedStyles());
/** Save a style; of a name that is there, the new text. */
export function saveStyle(name, text) {
  setStyles([...storedStyles().filter(s => s.name !== name), {name, text}]);
}
export function deleteStyle(name) { setStyles(storedStyles().filter(s => s.name !== name)); }
function setStyles(list) {
  styles.value = list;
  localStorage.setItem(STYLES, JSON.stringify(list));
}
/** A prompt with styles: each at its end, or around it where its text has `{prompt}`. */
export function styled(prompt, names) {
  let whole = prompt;
  for (const {name, text} of styles.value) {
    if (!names.includes(name)) continue;
    const before = whole;
    whole = text.includes("{prompt}") ? text.replaceAll("{prompt}", () => before) : `${before}, ${text}`;
  }
  return whole;
}

/** Prompts, the latest first. */
export const prompts = signal(storedPrompts());
export function remember(prompt) {
  prompts.value = [prompt, ...storedPrompts().filter(p => p !== prompt)].slice(0, MOST);
  localStorage.setItem(PROMPTS, JSON.stringify(prompts.value));
}

// another tab changed them
addEventListener("storage", e => {
  if (e.key === STYLES) styles.value = storedStyles();
  if (e.key === PROMPTS) prompts.value = storedPrompts();
});
