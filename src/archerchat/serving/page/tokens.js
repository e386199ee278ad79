// What the model found likely: each token shaded by its surprise, with a list of what else it weighed.

import { element } from "./markdown.js";

// Take the log probabilities of a chunk, in the form of either kind of completion.
export function readTokens(logprobs) {
  const likely = (text, logprob) => ({ text, probability: Math.exp(logprob) });
  const read = (text, logprob, top) => ({ ...likely(text, logprob), top: top.map((pair) => likely(...pair)).sort((a, b) => b.probability - a.probability) });
  if (logprobs?.content) return logprobs.content.map((each) => read(each.token, each.logprob, each.top_logprobs.map((top) => [top.token, top.logprob])));
  return (logprobs?.tokens ?? []).map((text, i) => read(text, logprobs.token_logprobs[i], Object.entries(logprobs.top_logprobs[i] ?? {})));
}

const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "·");

export function showTokens(tokens, onPick) {
  return tokens.map((token, i) => {
    const made = element("span", token.text, { class: "token", role: "button", tabindex: "0", "aria-label": `${token.text} ${percent(token.probability)}` });
    made.style.setProperty("--surprise", Math.min(1, -Math.log10(Math.max(token.probability, 1e-3)) / 3));
    const show = () => showAlternatives(made, token, (text) => onPick(i, text));
    made.onclick = () => show().firstChild?.focus();
    made.onkeydown = (event) => event.key === "Enter" && made.onclick();
    made.onpointermove = (event) => { // a token that comes under a resting pointer shows nothing
      const shown = document.getElementById("alternatives");
      if (event.pointerType === "mouse" && shown?.anchor !== made && !shown?.matches(":focus-within")) show();
    };
    made.onpointerleave = () => setTimeout(() => document.querySelector("#alternatives:not(:hover, :focus-within)")?.remove(), 200);
    return made;
  });
}

function showAlternatives(anchor, token, onPick) {
  document.getElementById("alternatives")?.remove();
  const list = element("div", token.top.map(({ text, probability }) => {
    const pick = () => { list.remove(); onPick(text); };
    return element("button", [element("span", visible(text)), element("span", percent(probability))], { class: text === token.text ? "said" : "", onclick: pick });
  }), { id: "alternatives", "aria-label": "What else was likely" });
  list.anchor = anchor;
  list.onkeydown = (event) => {
    const beside = { ArrowDown: "nextSibling", ArrowUp: "previousSibling" }[event.key];
    if (beside) document.activeElement[beside]?.focus();
    if (event.key !== "Escape") return;
    list.remove();
    anchor.focus();
    event.stopPropagation();
  };
  list.onpointerleave = () => list.remove();
  document.body.append(list);
  const place = anchor.getBoundingClientRect();
  list.style.left = `${Math.max(4, Math.min(place.left, innerWidth - list.offsetWidth - 4))}px`;
  const below = place.bottom + list.offsetHeight < innerHeight; // it never covers its own token
  list.style.top = `${below ? place.bottom : Math.max(0, place.top - list.offsetHeight)}px`;
  return list;
}
document.addEventListener("pointerdown", (event) => {
  if (!event.target.closest?.("#alternatives, .token")) document.getElementById("alternatives")?.remove();
});
