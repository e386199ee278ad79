// What the model found likely: each token shaded by its surprise, with a list of what else it weighed.

import { element } from "./markdown.js";

// Take the log probabilities of a chunk, in the form of either kind of completion.
export function readTokens(logprobs) {
  if (!logprobs) return [];
  const likely = (pairs) => pairs.map(([text, logprob]) => ({ text, probability: Math.exp(logprob) })).sort((a, b) => b.probability - a.probability);
  if (logprobs.content) {
    return logprobs.content.map(({ token, logprob, top_logprobs }) => ({
      text: token, probability: Math.exp(logprob), top: likely(top_logprobs.map((each) => [each.token, each.logprob])),
    }));
  }
  return logprobs.tokens.map((text, i) => ({
    text, probability: Math.exp(logprobs.token_logprobs[i]), top: likely(Object.entries(logprobs.top_logprobs[i] ?? {})),
  }));
}

const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "·");

export function showTokens(tokens, onPick) {
  return tokens.map((token, i) => {
    const others = token.top.map((each) => `${visible(each.text)} ${percent(each.probability)}`).join("\n");
    const made = element("span", token.text, { class: "token", role: "button", tabindex: "0", title: `${percent(token.probability)}\n\n${others}` });
    made.style.setProperty("--surprise", Math.min(1, -Math.log10(Math.max(token.probability, 1e-3)) / 3));
    made.onclick = () => showAlternatives(made, token, (text) => onPick(i, text));
    made.onkeydown = (event) => event.key === "Enter" && made.onclick();
    return made;
  });
}

function showAlternatives(anchor, token, onPick) {
  document.getElementById("alternatives")?.remove();
  const list = element("div", token.top.map(({ text, probability }) => {
    const made = element("button", [element("span", visible(text)), element("span", percent(probability))], text === token.text ? { class: "said" } : {});
    made.onclick = () => onPick(text);
    return made;
  }), { id: "alternatives" });
  document.body.append(list);
  const place = anchor.getBoundingClientRect();
  list.style.left = `${Math.max(4, Math.min(place.left, innerWidth - list.offsetWidth - 4))}px`;
  list.style.top = `${Math.min(place.bottom + 4, innerHeight - list.offsetHeight - 4)}px`;
  list.firstChild?.focus();
  const close = (event) => {
    if (event.type === "keydown" ? event.key !== "Escape" : event.target.closest(".token")) return;
    list.remove();
    document.removeEventListener("click", close);
    document.removeEventListener("keydown", close);
  };
  setTimeout(() => ["click", "keydown"].forEach((kind) => document.addEventListener(kind, close)));
}
