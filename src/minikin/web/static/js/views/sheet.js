// @ts-check
// The first sheet of a concept: the thing in six scenes, live, at a strength that a slider sets.

import {plain} from "../api.js";
import {quickest} from "../form.js";
import {Live} from "../live.js";
import {html, jpeg, Range, useEffect, useRef, useState} from "../ui.js";

const SCENES = [ // those of `minikin demo`
  "in the snow", "in the forest", "in the desert", "at night", "on a blue background", "on a pink background",
];
const SEED = 7;

/** use: hears the name and the strength. */
export function Sheet({name, use}) {
  const [strength, setStrength] = useState(1);
  const [images, setImages] = useState(/** @type {Record<string, string>} */ ({})); // by scene
  const [problem, setProblem] = useState("");
  const round = useRef({prompts: /** @type {string[]} */ ([]), next: 0});
  const socket = useRef(/** @type {any} */ (null));
  const ask = () => {
    const {prompts, next} = round.current, quick = quickest();
    if (quick && next < prompts.length) socket.current.request({prompt: prompts[next], seed: SEED, ...quick});
  };
  useEffect(() => {
    socket.current = new Live(({image, prompt}) => {
      const {prompts, next} = round.current;
      if (prompt !== prompts[next]) return; // of another strength
      setImages(before => ({...before, [SCENES[next]]: jpeg(image)}));
      setProblem("");
      round.current = {prompts, next: next + 1};
      ask();
    }, text => { if (text) setProblem(plain(text)); }, () => {});
    return () => socket.current.close();
  }, []);
  useEffect(() => {
    const word = strength === 1 ? name : `${name}:${strength}`;
    round.current = {prompts: SCENES.map(scene => `a photo of <${word}> ${scene}`), next: 0};
    ask();
  }, [name, strength]);
  return html`<section class="sheet" aria-label=${`${name} in six scenes`}>
    <div class="bar"><h2>${`<${name}>`} in six scenes</h2>
      <div class="inline"><${Range} label="Strength" min="0" max="2" step="0.05" value=${strength}
          onInput=${setStrength} />
        <button type="button" class="main"
          onClick=${() => use(name, strength === 1 ? undefined : strength)}>Use it</button></div></div>
    <div class="scenes">${SCENES.map(scene => html`<figure key=${scene}>
      ${images[scene] ? html`<img src=${images[scene]} alt=${`${name} ${scene}`} />`
        : html`<div class="blank" />`}
      <figcaption>${scene}</figcaption></figure>`)}</div>
    <p class="message" role="status">${problem}</p></section>`;
}
