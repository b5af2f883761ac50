// @ts-check
// The chart of a sweep: subject fidelity to the right, prompt fidelity upwards. A point sets the strength.

import {FileButton} from "../files.js";
import {html, signal} from "../ui.js";

const [WIDTH, HEIGHT, MARGIN, EDGE] = [640, 360, 44, 12];
const SETTINGS = ["strength", "tau", "concept_start", "switch", "guidance"];
const NAME = /^[\w-]+$/;
const hint = signal("The PRESET.json that minikin sweep wrote: subject fidelity against prompt fidelity. "
  + "A point sets the strength.");
const sweep = signal(/** @type {any} */ (null));

export async function openSweep([file]) {
  try {
    const facts = JSON.parse(await file.text());
    if (!isSweep(facts)) throw new Error();
    sweep.value = facts;
    hint.value = `<${facts.concept.name}>, preset ${facts.preset}, ${facts.measured.length} settings. `
      + "A point sets the strength in the prompt.";
  } catch { hint.value = "This file is no sweep: open the PRESET.json that minikin sweep wrote."; }
}

export const Sweep = ({use}) => html`<section class="below" aria-label="Sweep">
  <div class="bar"><h2>Operating points</h2>
    <${FileButton} label="Open a sweep" accept=".json" take=${openSweep} /></div>
  <p class="hint">${hint.value}</p>
  ${sweep.value && html`<${Chart} facts=${sweep.value} use=${use} />`}</section>`;

const read = (row, name) => row[name]?.value ?? 0;
const subject = row => read(row, "subject_fidelity") || read(row, "likeness"); // word: sweeps of 0.1
/** The name of the prompt fidelity; the last two are of sweeps of 0.1. */
const axisOf = facts => [facts.prompt_fidelity, facts.axis, "text_alignment", "alignment"]
  .find(name => name in facts.measured[0]);
/** Whether all that the chart reads is there; a TypeError says that it is not. */
function isSweep(facts) {
  const axis = axisOf(facts);
  const isPoint = row => [row.strength, subject(row), read(row, axis)].every(Number.isFinite);
  const {concept: {name}, measured, front, points} = facts;
  return [axis, name].every(text => typeof text === "string" && NAME.test(text))
    && [measured, front, Object.values(points)].every(rows => rows.every(isPoint));
}
/** The range of values, with a margin of 8 % at both ends. */
function span(values) {
  const [low, high] = [Math.min(...values), Math.max(...values)], more = (high - low || 1) * 0.08;
  return [low - more, high + more];
}

function Chart({facts, use}) {
  const axis = axisOf(facts);
  const value = row => ({row, x: subject(row), y: read(row, axis)});
  const rows = facts.measured.map(value);
  const [[x0, x1], [y0, y1]] = [span(rows.map(r => r.x)), span(rows.map(r => r.y))];
  const at = ({x, y}) => [
    MARGIN + (x - x0) / (x1 - x0) * (WIDTH - MARGIN - EDGE),
    HEIGHT - MARGIN - (y - y0) / (y1 - y0) * (HEIGHT - MARGIN - EDGE),
  ];
  const front = facts.front.map(row => at(value(row))).sort((a, b) => a[0] - b[0]);
  return html`<div class="chart"><svg viewBox=${`0 0 ${WIDTH} ${HEIGHT}`} role="group"
      aria-label=${`Sweep of ${facts.concept.name}`}>
    <path d=${`M${MARGIN} 8V${HEIGHT - MARGIN}H${WIDTH - 8}`} class="axis" />
    <path d=${`M${front.map(p => p.join()).join("L")}`} class="front" />
    <text x=${(WIDTH + MARGIN) / 2} y=${HEIGHT - 10} text-anchor="middle">subject fidelity</text>
    <text x=${(MARGIN - HEIGHT) / 2} y="16" transform="rotate(-90)" text-anchor="middle">${axis}</text>
    ${rows.map(r => html`<${Point} facts=${facts} value=${r} at=${at(r)} use=${use} />`)}</svg></div>`;
}

function Point({facts, value: {row, x, y}, at: [cx, cy], use}) {
  const same = point => SETTINGS.every(k => point[k] === row[k]);
  const name = Object.entries(facts.points).find(([, point]) => same(point))?.[0];
  const text = `${name ? `${name}: ` : ""}strength ${row.strength}, subject fidelity ${x.toFixed(3)}, `
    + `prompt fidelity ${y.toFixed(3)}`;
  const act = () => {
    hint.value = `<${facts.concept.name}> at ${text}`;
    use(facts.concept.name, row.strength);
  };
  const keys = e => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); act(); } };
  const right = cx < WIDTH * 0.75;
  return html`<g>
    <circle cx=${cx} cy=${cy} r=${name ? 9 : 6} class=${name ? "dot point" : "dot"} tabindex="0" role="button"
      aria-label=${text} onClick=${act} onKeyDown=${keys}><title>${text}</title></circle>
    ${name && html`<text x=${cx + (right ? 12 : -12)} y=${cy + 4}
      text-anchor=${right ? "start" : "end"}>${name}</text>`}</g>`;
}
