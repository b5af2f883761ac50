import {$, ask, make, open, takes, tell} from "./minikin.js";
import {formOf} from "./paint.js";

let found = null, dropped = null;

export function start() {
  takes($("recipe-drop"), $("recipe-file"), ([file]) => read(file));
  $("recipe-use").addEventListener("click", () => { formOf(found).then(form => { tell("recipe", form); open("Paint"); }); });
  $("recipe-inpaint").addEventListener("click", () => { tell("inpaint", {url: URL.createObjectURL(dropped), file: dropped}); open("Inpaint"); });
}

const SAID = {paint: "Painted", refine: "Refined", inpaint: "Inpainted"};

async function read(file) {
  const body = new FormData();
  body.append("file", file);
  $("recipe-problem").textContent = "";
  $("recipe-found").hidden = true;
  try {
    found = await ask("/api/recipe", {method: "POST", body});
  } catch (e) { $("recipe-problem").textContent = e.message; return; }
  dropped = file;
  $("recipe-shown").src = URL.createObjectURL(file);
  $("recipe-found").hidden = false;
  $("recipe-chain").replaceChildren(...found.chain.map(step => make("li", {text:
    `${SAID[step.work] ?? step.work} with ${step.preset ?? "the usual preset"}, seed ${step.seed}${step.work === "refine" || step.work === "inpaint" ? `, strength ${step.strength}` : ""}`})));
  const facts = {Prompt: found.prompt, ...(found.negative ? {"Keep out": found.negative} : {}), ...found.settings};
  $("recipe-facts").replaceChildren(...Object.entries(facts).flatMap(([k, v]) => [make("dt", {text: k}), make("dd", {text: v})]));
}
