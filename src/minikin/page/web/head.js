import {$, ask, capabilities} from "./minikin.js";

export async function start() {
  if (document.documentElement.lang !== "en") document.documentElement.lang = "en";
  try {
    const {base, version} = await capabilities();
    $("mk-base").textContent = `${base.name}, ${base.side} px · ${version}`;
    const ready = await fetch("/readyz");
    if (!ready.ok) $("mk-base").textContent += " · warming up";
    await ask("/livez");
  } catch (e) {
    $("mk-said").hidden = false;
    $("mk-said").textContent = e.message;
  }
}
