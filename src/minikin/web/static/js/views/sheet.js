// @ts-check
// The first sheet of a concept: the thing in six scenes, live, at a strength that a slider sets.

import {capabilities, plain} from "../api.js";
import {quickest} from "../form.js";
import {busy} from "../jobs.js";
import {Live} from "../live.js";
import {html, jpeg, Range, useEffect, useRef, useState} from "../ui.js";

const SCENES = [ // those of `minikin demo`
  "in the snow", "in the forest", "in the desert", "at night", "on a blue background", "on a pink background",
];
const SEED = 7;

/** use: hears the name and the strength. */
export function Sheet({name, use}) {
  const [strength, setStrength] = useState(1);
  const [answers, setAnswers] = useState(/** @type {Record<string, {src?: string, problem?: string}>} */ ({}));
  const [problem, setProblem] = useState("");
  const round = useRef({prompts: /** @type {string[]} */ ([]), next: 0});
  const socket = useRef(/** @type {any} */ (null));
  const ask = () => {
    const {prompts, next} = round.current, quick = quickest();
    if (quick && next < prompts.length) socket.current.request({prompt: prompts[next], seed: SEED, ...quick});
    else if (!quick && capabilities.value) setProblem("No preset is ready, so nothing can be painted.");
  };
  /** A scene has its image, or the reason why there is none. */
  const answered = (prompt, answer) => {
    const {prompts, next} = round.current, scene = prompts.indexOf(prompt);
    if (scene < 0) return; // of another strength
    setAnswers(before => ({...before, [SCENES[scene]]: answer}));
    setProblem("");
    round.current = {prompts, next: Math.max(next, scene + 1)};
    ask();
  };
  useEffect(() => {
    socket.current = new Live(({image, prompt}) => answered(prompt, {src: jpeg(image)}), (text, prompt) => {
      if (text && prompt) answered(prompt, {problem: plain(text)});
      else if (text) setProblem(plain(text));
    }, () => { if (busy()) setProblem(`Live painting waits: ${busy()}`); }, "move the slider");
    return () => socket.current.close();
  }, []);
  useEffect(() => {
    const word = strength === 1 ? name : `${name}:${strength}`;
    round.current = {prompts: SCENES.map(scene => `a photo of <${word}> ${scene}`), next: 0};
    ask();
  }, [name, strength, capabilities.value]);
  return html`<section class="sheet" aria-label=${`${name} in six scenes`}>
    <div class="bar"><h2>${`<${name}>`} in six scenes</h2>
      <div class="inline"><${Range} label="Strength" min="0" max="2" step="0.05" value=${strength}
          onInput=${setStrength} />
        <button type="button" class="main"
          onClick=${() => use(name, strength === 1 ? undefined : strength)}>Use it</button></div></div>
    <div class="scenes">${SCENES.map(scene => html`<figure key=${scene}>
      ${answers[scene]?.src ? html`<img src=${answers[scene].src} alt=${`${name} ${scene}`} />`
        : html`<div class="blank hint">${answers[scene]?.problem}</div>`}
      <figcaption>${scene}</figcaption></figure>`)}</div>
    <p class="message" role="status">${problem}</p></section>`;
}
