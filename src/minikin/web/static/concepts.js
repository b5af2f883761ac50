import {$, ask, concepts, hear, make, takes, tell} from "./minikin.js";

export async function start() {
  const file = $("concepts-file");
  takes(file.parentElement, file, files => files.forEach(add));
  const sweep = $("sweep-file");
  takes(sweep.parentElement, sweep, ([f]) => chart(f));
  hear("concepts", list);
  await list();
}

const say = text => { $("concepts-problem").textContent = text; };

async function list() {
  try {
    const all = await concepts();
    $("concepts-none").hidden = all.length > 0;
    $("concepts-list").replaceChildren(...all.map(card));
  } catch (e) { say(e.message); }
}
async function changed() {
  await concepts(true);
  tell("concepts");
}
function card(c) {
  const ref = `/api/concepts/sha256:${c.sha256}`;
  const face = c.preview ? make("img", {src: `${ref}/preview`, alt: `What ${c.name} looks like`, width: 96, height: 96})
    : make("span", {class: "mk-noface", "aria-hidden": true, text: c.name[0]});
  const points = Object.entries(c.points).flatMap(([preset, named]) => Object.entries(named).map(([name, p]) =>
    make("button", {type: "button", class: "mk-small", text: `${name} ${p.strength}`, title: `measured with preset ${preset}: subject fidelity ${p.likeness}, prompt fidelity ${p.follows}`, // word: JSON field
      onclick: () => tell("strength", {name: c.name, value: p.strength})})));
  const tools = make("div", {class: "mk-inline"},
    make("button", {type: "button", text: "Use", onclick: () => tell("name", c.name)}),
    make("a", {class: "mk-button", href: ref, download: `${c.name}.safetensors`, text: "Download"}));
  if (c.mine) tools.append(make("button", {type: "button", text: "Delete", onclick: e => remove(e.target, c)}));
  return make("article", {class: "mk-concept"}, face,
    make("div", {}, make("h3", {text: `<${c.name}>`}), make("p", {class: "mk-hint", text: c.category}), make("div", {class: "mk-inline"}, ...points), tools));
}
async function remove(button, c) {
  if (button.textContent === "Delete") { // once more, on the same place
    button.textContent = "Really?";
    button.classList.add("mk-sure");
    setTimeout(() => { button.textContent = "Delete"; button.classList.remove("mk-sure"); }, 3000);
    return;
  }
  try { await ask(`/api/concepts/sha256:${c.sha256}`, {method: "DELETE"}); say(""); await changed(); } catch (e) { say(e.message); }
}
async function add(file) {
  const body = new FormData();
  body.append("file", file);
  try { await ask("/api/concepts", {method: "POST", body}); say(""); await changed(); } catch (e) { say(e.message); }
}

// ---- the sweep's chart: subject fidelity to the right, prompt fidelity upwards

const SVG = "http://www.w3.org/2000/svg";
function svg(tag, attributes, ...children) {
  const e = document.createElementNS(SVG, tag);
  for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
  e.append(...children);
  return e;
}
async function chart(file) {
  let facts;
  try {
    facts = JSON.parse(await file.text());
    if (!facts.measured?.length) throw new Error();
  } catch { $("sweep-hint").textContent = "This file is no sweep: open the PRESET.json that minikin sweep wrote."; return; }
  const axis = [facts.prompt_fidelity, facts.axis, "text_alignment", "alignment"].find(name => name in facts.measured[0]); // the last two: sweeps of 0.1
  const read = (row, name) => row[name]?.value ?? 0;
  const subject = row => read(row, "subject_fidelity") || read(row, "likeness"); // word: sweeps of 0.1
  const rows = facts.measured.map(row => ({row, x: subject(row), y: read(row, axis)}));
  const span = k => { const v = rows.map(r => r[k]); const [a, b] = [Math.min(...v), Math.max(...v)]; return [a - (b - a || 1) * 0.08, b + (b - a || 1) * 0.08]; };
  const [[x0, x1], [y0, y1]] = [span("x"), span("y")];
  const [w, h, m] = [640, 360, 44];
  const at = ({x, y}) => [m + (x - x0) / (x1 - x0) * (w - m - 12), h - m - (y - y0) / (y1 - y0) * (h - m - 12)];
  const same = (a, b) => ["strength", "tau", "concept_start", "switch", "guidance"].every(k => a[k] === b[k]);
  const {name} = facts.concept;
  const dots = rows.map(one => {
    const [cx, cy] = at(one);
    const point = Object.entries(facts.points).find(([, p]) => same(p, one.row))?.[0];
    const text = `${point ? `${point}: ` : ""}strength ${one.row.strength}, subject fidelity ${one.x.toFixed(3)}, prompt fidelity ${one.y.toFixed(3)}`;
    const use = () => { $("sweep-hint").textContent = `<${name}> at ${text}`; tell("strength", {name, value: one.row.strength}); };
    const dot = svg("circle", {cx, cy, r: point ? 9 : 6, class: point ? "mk-dot mk-point" : "mk-dot", tabindex: 0, role: "button", "aria-label": text}, svg("title", {}, text));
    dot.addEventListener("click", use);
    dot.addEventListener("keydown", e => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); use(); } });
    return point ? svg("g", {}, dot, svg("text", cx < w * 0.75 ? {x: cx + 12, y: cy + 4} : {x: cx - 12, y: cy + 4, "text-anchor": "end"}, point)) : dot;
  });
  const front = facts.front.map(row => at({x: subject(row), y: read(row, axis)})).sort((a, b) => a[0] - b[0]);
  $("sweep-chart").replaceChildren(svg("svg", {viewBox: `0 0 ${w} ${h}`, role: "group", "aria-label": `Sweep of ${name}`},
    svg("path", {d: `M${m} 8V${h - m}H${w - 8}`, class: "mk-axis"}), svg("path", {d: `M${front.map(p => p.join()).join("L")}`, class: "mk-front"}),
    svg("text", {x: (w + m) / 2, y: h - 10, "text-anchor": "middle"}, "subject fidelity"),
    svg("text", {x: -(h - m) / 2, y: 16, transform: "rotate(-90)", "text-anchor": "middle"}, axis), ...dots));
  $("sweep-hint").textContent = `<${name}>, preset ${facts.preset}, ${rows.length} settings. A point sets the strength in the prompt.`;
}
