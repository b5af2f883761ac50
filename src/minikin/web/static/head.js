import {$, capabilities, hear} from "./minikin.js";
import {start as startNow} from "./now.js";

const AGAIN_MS = 1000;

export async function start() {
  if (document.documentElement.lang !== "en") document.documentElement.lang = "en";
  hear("said", say);
  try {
    const {base, version, content_filter: filter} = await capabilities();
    startNow();
    await ready(`${base.name}, ${base.side} px · ${version}${filter ? ` · content filter: ${filter}` : ""}`);
  } catch (e) { say(e.message); }
}
function say(text) {
  $("mk-said").hidden = !text;
  $("mk-said").textContent = text;
}
/** What is served, and whether it is warm yet. */
async function ready(text) {
  for (;;) {
    const isReady = (await fetch("/readyz").catch(() => ({ok: false}))).ok;
    $("mk-base").textContent = isReady ? text : `${text} · warming up`;
    if (isReady) return;
    await new Promise(done => setTimeout(done, AGAIN_MS));
  }
}
