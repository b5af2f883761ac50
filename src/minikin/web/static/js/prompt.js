// @ts-check
// Concepts in a prompt's text: <tom>, <tom:0.6>, <tom@left>, <concept:tom>.

const tag = name => `<((?:concept:)?${name}(?:@[^<>:]*)?)(?::([^<>]*))?>`;

/** The strength at which a prompt names a concept; null where it does not. */
export function strengthOf(prompt, name) {
  const match = new RegExp(tag(name)).exec(prompt);
  return match && (match[2] === undefined || Number.isNaN(Number(match[2])) ? 1 : Number(match[2]));
}
/** The prompt with a concept's strength written into it. */
export const withStrength = (prompt, name, strength) =>
  prompt.replace(new RegExp(tag(name), "g"), (_, inside) => `<${inside}:${strength}>`);
/** The prompt without a concept, which its category (or nothing) replaces. */
export const without = (prompt, name, category = "") =>
  prompt.replace(new RegExp(tag(name), "g"), category).replace(/ {2,}/g, " ").trim();
/** The prompt with a concept named at a position, by default at its end. */
export function withName(prompt, name, at = prompt.length) {
  if (!prompt) return `a photo of <${name}>`;
  const [before, after] = [prompt.slice(0, at), prompt.slice(at)];
  return `${before}${before && !/\s$/.test(before) ? " " : ""}<${name}>${after}`;
}

// ---- regions: boxes as [left, top, right, bottom] in percent of the image

/** The box of a concept in a prompt; null where it has none. named: the server's boxes by name, in shares. */
export function boxOf(prompt, name, named = {}) {
  const region = new RegExp(tag(name)).exec(prompt)?.[1].split("@")[1]?.trim();
  if (!region) return null;
  const box = Object.hasOwn(named, region) ? named[region].map(share => share * 100)
    : region.split(",").map(Number);
  const [left, top, right, bottom] = box;
  return box.length === 4 && 0 <= left && left < right && right <= 100 && 0 <= top && top < bottom
    && bottom <= 100 ? box : null;
}
/** The name of a box among the server's; else its numbers, as a prompt has them. */
export function regionText(box, named = {}) {
  const same = other => other.every((share, k) => Math.abs(share * 100 - box[k]) < 0.5);
  return Object.keys(named).find(name => same(named[name])) ?? box.map(Math.round).join();
}
/** The prompt with a concept's region, a name or numbers, where it is named first; "" takes it away. */
export const withRegion = (prompt, name, region) =>
  prompt.replace(new RegExp(tag(name)), (_, inside, weight) =>
    `<${inside.split("@")[0]}${region && `@${region}`}${weight === undefined ? "" : `:${weight}`}>`);
/** The concepts of these names that a prompt has, in its order. */
export const namesIn = (prompt, names) =>
  names.map(name => ({name, at: prompt.search(new RegExp(tag(name)))})).filter(({at}) => at >= 0)
    .sort((a, b) => a.at - b.at).map(({name}) => name);
