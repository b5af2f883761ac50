// @ts-check
// Two images on one place; the slider moves the line between them.

import {html, useState} from "../ui.js";

export function Pair({left, right, label}) {
  const [share, setShare] = useState(50);
  return html`<div class="pair"><img src=${right.src} alt=${right.alt} />
      <img src=${left.src} alt=${left.alt} style=${{clipPath: `inset(0 ${100 - share}% 0 0)`}} /></div>
    <input type="range" aria-label=${label} min="0" max="100" value=${share}
      onInput=${e => setShare(Number(e.target.value))} />`;
}
