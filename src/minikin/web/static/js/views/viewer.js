// @ts-check
// One image large, with all that can be done with it; and two, compared under a slider.

import {change, paint, pick, rollSeed, setLock, useRecipe} from "../form.js";
import {failure, family, remove, teachFrom} from "../gallery.js";
import {pickForRefining} from "../images.js";
import {open} from "../router.js";
import {html, Icon, useEffect, usePan, useRef, useState, ZOOMS} from "../ui.js";
import {begin} from "../change.js";
import {Pair} from "./pair.js";

/** A dialog over the list: arrows step through the images, Escape closes. */
export function Viewer({item, close, step, show, mark}) {
  const dialog = useRef(/** @type {any} */ (null));
  const [zoom, setZoom] = useState(0);
  const area = useRef(/** @type {any} */ (null));
  usePan(area);
  useEffect(() => { dialog.current.showModal(); }, []);
  const shut = () => dialog.current?.close(); // so that the focus goes back to where it was
  const keys = e => {
    if (e.ctrlKey || e.metaKey || e.altKey) return; // the browser's
    const by = {ArrowLeft: -1, ArrowRight: 1}[e.key];
    if (by && zoom === 0) step(by); // else they scroll
    else if (e.key === "f") mark(item);
    else if (e.key === "Delete") drop();
    else return;
    e.preventDefault();
  };
  const drop = () => { shut(); remove(item); };
  const teach = async () => {
    const isAdded = await teachFrom([item]);
    shut();
    if (isAdded) open("teach");
  };
  const then = (view, act) => () => { act(); shut(); open(view); };
  const more = async () => {
    const isFilled = await useRecipe(item);
    shut();
    open("paint");
    if (!isFilled) return; // the message says why
    setLock(false);
    rollSeed();
    change({n: "4"});
    paint();
  };
  const kind = item.kind === "paint" ? "" : item.kind;
  const facts = [item.about, `seed ${item.seed}`, `${item.width}x${item.height}`, kind];
  return html`<dialog ref=${dialog} class="viewer" aria-label=${item.about || item.name} onClose=${close}
      onKeyDown=${keys}>
    <div class="bar"><p class="hint">${facts.filter(Boolean).join(" · ")}</p>
      <button type="button" class="square" aria-label="Close" onClick=${shut}>
        <${Icon} name="close" /></button></div>
    <div class="zoom" ref=${area} tabindex="0" role="group" aria-label="The image">
      <button type="button" class="bare" aria-label=${`Zoom, now ${ZOOMS[zoom]} times`}
        onClick=${() => setZoom((zoom + 1) % ZOOMS.length)}>
        <img src=${item.url} alt=${item.about} draggable=${false}
          style=${{width: `${ZOOMS[zoom] * 100}%`}} /></button></div>
    <div class="actions">
      <button type="button" onClick=${() => step(-1)}>Previous</button>
      <button type="button" onClick=${() => step(1)}>Next</button>
      <button type="button" aria-pressed=${item.favourite} onClick=${() => mark(item)}>
        <${Icon} name="heart" />Favourite</button>
      <button type="button" onClick=${then("paint", () => { pick(item); useRecipe(item); })}>
        Use its recipe</button>
      <button type="button" onClick=${more}>More like this</button>
      <button type="button" onClick=${then("paint", () => pickForRefining(item))}>Refine</button>
      <button type="button" onClick=${then("change", () => begin({url: item.url, id: item.id}))}>
        Change</button>
      <a class="button" href=${item.url} download=${item.name}>Download</a>
      <button type="button" onClick=${teach}>Teach from it</button>
      <button type="button" onClick=${drop}>Delete</button></div>
    <p class="message" role="status">${failure.value}</p>
    <${Family} item=${item} show=${show} /></dialog>`;
}

const DID = {paint: "painted", refine: "refined", inpaint: "inpainted"};
/** What an image was made from, and what was made from that; nothing for one that stands alone. */
function Family({item, show}) {
  const [{images: list, more}, setFamily] = useState({images: /** @type {any[]} */ ([]), more: false});
  useEffect(() => {
    let isCurrent = true;
    family(item.id).catch(() => ({images: [], more: false}))
      .then(answer => { if (isCurrent) setFamily(answer); });
    return () => { isCurrent = false; };
  }, [item.id]);
  if (list.length < 2 || !list.some(other => other.id === item.id)) return null;
  const ids = new Set(list.map(other => other.id));
  const branch = parents => html`<ul>${parents.map(other => {
    const children = list.filter(child => child.parent === other.id);
    return html`<li key=${other.id}>
      <button type="button" class="bare" aria-current=${other.id === item.id ? "true" : null}
        aria-label=${`${DID[other.kind]}, seed ${other.seed}`} onClick=${() => show(other)}>
        <img src=${`/api/images/${other.id}/thumbnail`} alt="" width="56" height="56" />
        <span>${DID[other.kind]}</span></button>
      ${children.length > 0 && branch(children)}</li>`;
  })}</ul>`;
  return html`<section class="family" aria-label="Family">
    ${branch(list.filter(other => !ids.has(other.parent)))}
    ${more && html`<p class="hint">There are more; these are the nearest.</p>`}</section>`;
}

/** Two images on one place; the slider moves the line between them. */
export function Compare({pair: [left, right], close}) {
  const caption = image => `${image.about}, seed ${image.seed}`;
  return html`<section class="compare" aria-label="Compare">
    <div class="bar"><h2>Compare</h2><button type="button" onClick=${close}>Back to the gallery</button></div>
    <${Pair} left=${{src: left.url, alt: caption(left)}} right=${{src: right.url, alt: caption(right)}}
      label="Share of the first image" />
    <div class="bar"><p class="hint">${caption(left)}</p><p class="hint">${caption(right)}</p></div></section>`;
}
