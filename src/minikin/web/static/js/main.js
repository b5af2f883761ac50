// @ts-check
// The page: its header, its views, and what is loaded when it opens.

import {capabilities, conceptsProblem, loadCapabilities, loadConcepts} from "./api.js";
import {notice} from "./files.js";
import {pick, restore, stopTyping, work} from "./form.js";
import {addJob, load, selectLast} from "./images.js";
import {look, lost, Queue} from "./jobs.js";
import {view} from "./router.js";
import {html, Icon, render, signal, useEffect} from "./ui.js";
import {Change} from "./views/change.js";
import {Concepts} from "./views/concepts.js";
import {Gallery} from "./views/gallery.js";
import {Paint} from "./views/paint.js";
import {Recipe} from "./views/recipe.js";
import {resume, Teach} from "./views/teach.js";

const AGAIN_MS = 1000;
const VIEWS = {
  paint: Paint, gallery: Gallery, change: Change, concepts: Concepts, teach: Teach, recipe: Recipe,
};
const title = name => name[0].toUpperCase() + name.slice(1);
const warm = signal(false);

function App() {
  const asked = view.value === "inpaint" ? "change" : view.value; // its name before
  const name = Object.hasOwn(VIEWS, asked) ? asked : "paint";
  useEffect(() => {
    document.title = `${title(name)} · Minikin`;
    loadConcepts().catch(() => {}); // the notice says why
  }, [name]);
  return html`
    <a class="skip" href="#view" onClick=${skip}>Skip to the content</a>
    <${Header} current=${name} />
    <main id="view" tabindex="-1">
      <h1 class="unseen">${title(name)}</h1>
      <${Queue} say=${text => { notice.value = text; }} />
      <p class="notice" role="status">${lost.value || notice.value || conceptsProblem.value}</p>
      <${VIEWS[name]} />
    </main>`;
}

function skip(e) {
  e.preventDefault(); // the address names the view
  document.getElementById("view")?.focus();
}

const Header = ({current}) => html`<header class="top">
  <a class="brand" href="#paint"><img src="icon.svg" alt="" width="26" height="26" />Minikin</a>
  <nav aria-label="Views">${Object.keys(VIEWS).map(name => html`<a key=${name} href=${`#${name}`}
    aria-current=${name === current ? "page" : null}><${Icon} name=${name} />${title(name)}</a>`)}</nav>
  <p class="where" aria-live="polite">${where()}</p>
  <button type="button" class="square" aria-label=${`Theme: ${theme.value}`} title=${`Theme: ${theme.value}`}
    onClick=${nextTheme}><${Icon} name="theme" /></button></header>`;

/** What is served, and whether it is warm. */
function where() {
  if (!capabilities.value) return "";
  const {base, version, content_filter: filter} = capabilities.value;
  const facts = [`${base.name}, ${base.side} px`, version, filter && `content filter: ${filter}`];
  return [...facts, !warm.value && "warming up"].filter(Boolean).join(" · ");
}

// ---- the theme: the system's, or the one chosen here

const THEMES = ["system", "light", "dark"];
const theme = signal(localStorage.getItem("minikin.theme") ?? "system");
theme.subscribe(name => { document.documentElement.dataset.theme = name; });
function nextTheme() {
  theme.value = THEMES[(THEMES.indexOf(theme.value) + 1) % THEMES.length];
  localStorage.setItem("minikin.theme", theme.value);
}

// ---- opening

const pause = ms => new Promise(done => setTimeout(done, ms));
/** Try until the server answers. */
async function untilDone(act) {
  for (;;) {
    try { return await act(); } catch (e) { lost.value = e.message; }
    await pause(AGAIN_MS);
  }
}
async function waitUntilWarm() {
  while (!(await fetch("/readyz").catch(() => ({ok: false}))).ok) await pause(AGAIN_MS);
  warm.value = true;
}
/** Go on showing jobs of Paint that had begun before this page was loaded. */
const goOn = job => work.run(async () => job).then(end => { if (end) pick(addJob(end)); });

async function start() {
  render(html`<${App} />`, /** @type {Element} */ (document.getElementById("app")));
  await untilDone(loadCapabilities);
  waitUntilWarm();
  look();
  addEventListener("focus", () => loadConcepts().catch(() => {}));
  restore();
  await untilDone(loadConcepts);
  await untilDone(() => load(goOn));
  if (selectLast()) stopTyping();
  await resume().catch(e => { notice.value = e.message; });
}
start();
