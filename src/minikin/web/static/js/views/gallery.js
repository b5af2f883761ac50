// @ts-check
// Gallery: every image, searched, marked, deleted; one large, or two compared.

import * as gallery from "../gallery.js";
import {lost, queue} from "../jobs.js";
import {open} from "../router.js";
import {html, Icon, signal, useEffect, useRef, useState} from "../ui.js";
import {Compare, Viewer} from "./viewer.js";

const GAP = 12, LEAST = 150; // px: between tiles, and the least width of one
const LABEL = 30; // px under an image
const MARGIN = 600; // px beyond the window that are drawn, too
const SEARCH_MS = 200;
const MOST_CHOSEN = 200; // that the server puts into one file

const {chosen} = gallery;
/** The image that is shown large, as it was listed last; null for the list alone. */
const current = signal(/** @type {import("../gallery.js").Item | null} */ (null));
const comparing = signal(false);
let place = 0; // of the large image, when it was listed last

/** The place of the large image in the list; none while its page is on the way. */
function entry() {
  return Object.entries(gallery.items.value).find(([, item]) => item.id === current.value?.id);
}

export function Gallery() {
  const jobs = queue.value.jobs.map(job => job.id).join();
  useEffect(() => { if (!lost.value) gallery.reload(); }, [lost.value, jobs]); // images came, or the server
  useEffect(() => () => {
    current.value = null;
    comparing.value = false;
    gallery.failure.value = "";
  }, []);
  const item = entry()?.[1] ?? current.value;
  useEffect(() => {
    const listed = entry(); // now: it may have been closed since this was drawn
    if (listed) [place, current.value] = [Number(listed[0]), listed[1]];
    else if (current.value) gallery.need(Math.max(0, place - gallery.PAGE), place + gallery.PAGE);
  }, [gallery.items.value, current.value]);
  if (comparing.value && chosen.value.length === 2) {
    return html`<${Compare} pair=${chosen.value} close=${() => { comparing.value = false; }} />`;
  }
  return html`<section aria-label="Images">
    <${Bar} />
    <p class="message" role="status">${gallery.failure.value || gallery.problem.value}</p>
    <${Tiles} />
    ${!gallery.total.value && html`<p class="hint">${gallery.search.value || gallery.onlyFavourites.value
      ? "No image fits." : "Images come here when they are painted."}</p>`}
    ${item && html`<${Viewer} item=${item} step=${step} mark=${mark}
      close=${() => { current.value = null; }} show=${other => { current.value = other; }} />`}
  </section>`;
}

/** Mark an image, listed or not; it may have been closed or stepped on from meanwhile. */
async function mark(item) {
  const favourite = await gallery.toggleFavourite(item);
  if (favourite !== undefined && current.value?.id === item.id) current.value = {...item, favourite};
}
/** Show the next image, or the one before, that is not being deleted. */
async function step(by) {
  const id = current.value?.id;
  for (let next = Number(entry()?.[0] ?? place) + by; next >= 0 && next < gallery.total.value; next += by) {
    await gallery.need(next, next);
    const item = gallery.items.value[next];
    if (!item || current.value?.id !== id) return; // it did not come, or one closed or stepped on meanwhile
    if (item.id === gallery.deleted.value?.id) continue;
    current.value = item;
    return;
  }
}

function Bar() {
  const timer = useRef(0);
  const typed = e => {
    gallery.search.value = e.target.value;
    clearTimeout(timer.current);
    timer.current = setTimeout(gallery.reload, SEARCH_MS);
  };
  const toggle = () => {
    gallery.onlyFavourites.value = !gallery.onlyFavourites.value;
    gallery.reload();
  };
  const count = gallery.total.value;
  return html`<div class="bar gallery-bar">
    <div class="inline">
      <input type="search" aria-label="Search prompts" placeholder="Search prompts"
        value=${gallery.search.value} onInput=${typed} />
      <button type="button" aria-pressed=${gallery.onlyFavourites.value} onClick=${toggle}>
        <${Icon} name="heart" />Favourites</button>
      <${Chosen} />
    </div>
    <p class="hint" role="status">${gallery.deleted.value
      ? html`Deleted. <button type="button" class="small" onClick=${gallery.undo}>Undo</button>`
      : `${count} ${count === 1 ? "image" : "images"}`}</p></div>`;
}

/** What can be done with the chosen images. */
function Chosen() {
  const count = chosen.value.length;
  const teach = async () => { if (await gallery.teachFrom(chosen.value)) open("teach"); };
  if (!count) return null;
  return html`<span class="inline" role="group" aria-label=${`${count} chosen`}>
    <button type="button" disabled=${count !== 2} title="Choose two"
      onClick=${() => { comparing.value = true; }}>Compare</button>
    <button type="button" disabled=${gallery.collecting.value}
      onClick=${() => gallery.download(chosen.value)}>
      ${gallery.collecting.value ? "Collecting" : "Download"} ${count}</button>
    <button type="button" onClick=${teach}>Teach from ${count}</button>
    <button type="button" onClick=${() => { chosen.value = []; }}>Choose none</button></span>`;
}

/** A grid of which only the rows near the window are in the document. */
function Tiles() {
  const grid = useRef(/** @type {any} */ (null));
  const [view, setView] = useState({width: 0, top: 0, height: 0});
  useEffect(() => {
    const measure = () => {
      if (!grid.current) return;
      const box = grid.current.getBoundingClientRect();
      setView({width: box.width, top: -box.top, height: innerHeight});
    };
    measure();
    const observer = new ResizeObserver(() => requestAnimationFrame(measure)); // after this layout, not in it
    observer.observe(grid.current);
    addEventListener("scroll", measure, {passive: true});
    return () => { observer.disconnect(); removeEventListener("scroll", measure); };
  }, []);
  const columns = Math.max(2, Math.floor((view.width + GAP) / (LEAST + GAP)));
  const side = (view.width - GAP * (columns - 1)) / columns, row = side + LABEL + GAP;
  const count = gallery.total.value, rows = Math.ceil(count / columns);
  const first = Math.max(0, Math.floor((view.top - MARGIN) / row));
  const last = Math.min(rows, Math.ceil((view.top + view.height + MARGIN) / row));
  const begin = first * columns, end = view.width ? Math.max(begin, Math.min(count, last * columns)) : begin;
  const places = Array.from({length: end - begin}, (_, k) => begin + k);
  useEffect(() => { if (places.length) gallery.need(places[0], places[places.length - 1]); });
  return html`<div class="tiles" ref=${grid} role="list" style=${{height: `${Math.max(0, rows * row)}px`}}>
    ${places.map(k => html`<${Tile} key=${k} item=${gallery.items.value[k]} side=${side}
      left=${(k % columns) * (side + GAP)} top=${Math.floor(k / columns) * row} />`)}</div>`;
}

function Tile({item, side, left, top}) {
  const style = {width: `${side}px`, height: `${side + LABEL}px`, transform: `translate(${left}px, ${top}px)`};
  if (!item) return html`<div class="tile" style=${style} role="listitem" />`;
  const isChosen = chosen.value.some(c => c.id === item.id);
  const choose = () => {
    const others = chosen.value.filter(c => c.id !== item.id);
    chosen.value = isChosen ? others : [...others, item].slice(-MOST_CHOSEN);
  };
  const name = `${item.about || item.name}, seed ${item.seed}`;
  const gone = gallery.deleted.value?.id === item.id;
  return html`<div class=${gone ? "tile gone" : "tile"} style=${style} role="listitem">
    <button type="button" class="face" aria-label=${`Open ${name}`} disabled=${gone}
      onClick=${() => { current.value = item; }}>
      <img src=${`/api/images/${item.id}/thumbnail`} alt="" loading="lazy" width=${side} height=${side} />
    </button>
    <div class="under">
      <label class="check"><input type="checkbox" checked=${isChosen} aria-label=${`Choose ${name}`}
        onChange=${choose} /><span>${item.about || item.seed}</span></label>
      <button type="button" class="bare" aria-label=${`Favourite ${name}`} aria-pressed=${item.favourite}
        onClick=${() => gallery.toggleFavourite(item)}><${Icon} name="heart" /></button></div></div>`;
}
