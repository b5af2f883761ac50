import {$, ask, capabilities} from "./minikin.js";

export async function start() {
  if (document.documentElement.lang !== "en") document.documentElement.lang = "en";
  try {
    const {base, version, content_filter: filter} = await capabilities();
    $("mk-base").textContent = `${base.name}, ${base.side} px · ${version}${filter ? ` · content filter: ${filter}` : ""}`;
    const ready = await fetch("/readyz");
    if (!ready.ok) $("mk-base").textContent += " · warming up";
    await ask("/livez");
  } catch (e) {
    $("mk-said").hidden = false;
    $("mk-said").textContent = e.message;
  }
}
