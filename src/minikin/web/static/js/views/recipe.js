// @ts-check
// Recipe: what an image says about how it was made.

import {begin} from "../change.js";
import {Drop, useFiles} from "../files.js";
import {fill, formOf, readRecipe} from "../form.js";
import {open} from "../router.js";
import {html, signal} from "../ui.js";

const TYPES = "image/png,image/jpeg,image/webp,image/avif";
const DID = {paint: "Painted", refine: "Refined", inpaint: "Inpainted"};
const problem = signal("");
const read = signal(/** @type {{file: File, url: string, recipe: any} | null} */ (null));
let latest = /** @type {File | null} */ (null);

async function take([file]) {
  problem.value = "";
  read.value = null;
  latest = file;
  const [recipe, why] = await readRecipe(file).then(answer => [answer, ""], e => [null, e.message]);
  if (file !== latest) return; // another one was dropped meanwhile
  problem.value = why;
  if (recipe) read.value = {file, url: URL.createObjectURL(file), recipe};
}

export function Recipe() {
  useFiles(TYPES, take);
  return html`
    <${Drop} accept=${TYPES} take=${take}><b>Drop an image</b> to get its recipe back: Minikin's own, A1111's,
      Forge's, Fooocus'.<//>
    <p class="message" role="status">${problem.value}</p>
    ${read.value && html`<${Found} ...${read.value} />`}`;
}

function Found({file, url, recipe}) {
  const facts = {
    Prompt: recipe.prompt, ...(recipe.negative ? {"Negative prompt": recipe.negative} : {}), ...recipe.settings,
  };
  const toForm = () => { fill(formOf(recipe)); open("paint"); };
  const toChange = () => { begin({url, file}); open("change"); };
  return html`<section class="split read" aria-label="The image's recipe">
    <figure class="image"><img class="shown" src=${url} alt="The dropped image" /></figure>
    <div>
      <ol class="chain">${recipe.chain.map(step => html`<li>${sentence(step)}</li>`)}</ol>
      <dl class="facts">${Object.entries(facts).map(([name, value]) =>
        html`<dt>${name}</dt><dd>${String(value)}</dd>`)}</dl>
      <div class="actions"><button type="button" class="main" onClick=${toForm}>Put it into the form</button>
        <button type="button" onClick=${toChange}>Change it</button></div></div></section>`;
}
function sentence({work, preset, seed, strength}) {
  const from = work === "refine" || work === "inpaint" ? `, strength ${strength}` : "";
  return `${DID[work] ?? work} with ${preset ?? "the usual preset"}, seed ${seed}${from}`;
}
