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
