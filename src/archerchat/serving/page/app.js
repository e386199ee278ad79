// The page: a conversation with a model, or a text that it continues.

import { element, markdown } from "./markdown.js";
import * as store from "./store.js";
import { readTokens, showTokens } from "./tokens.js";

const FIELDS = [
  ["system", "System message", "textarea", "Read before the first message."],
  ["temperature", "Temperature", "number", "0 to 2; 0 always takes the likeliest token.", { min: 0, max: 2, step: 0.1 }],
  ["top_k", "Top-k", "number", "0 to 200; 0 samples from all tokens.", { min: 0, max: 200 }],
  ["top_p", "Top-p", "number", "Above 0, up to 1.", { min: 0, max: 1, step: 0.05 }],
  ["min_p", "Min-p", "number", "0 to 1.", { min: 0, max: 1, step: 0.01 }],
  ["repetition_penalty", "Repetition penalty", "number", "Above 1 repeats less.", { min: 0.1, max: 10, step: 0.05 }],
  ["max_tokens", "Tokens per answer", "number", "", { min: 1 }],
  ["seed", "Seed", "number", "The same seed gives the same answer.", {}],
  ["tokens", "Token view", "select", "Shade each token by how unlikely it was; a click shows what else was likely, and continues from there.", ["off", "on"]],
  ["key", "API key", "password", "If the server asks for one."],
  ["theme", "Theme", "select", "", ["system", "light", "dark"]],
];
const SENT = ["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens", "seed"];

const $ = (id) => document.getElementById(id);
let models = [];
let current = null;
let running = null; // the AbortController of the answers that are coming
let undo = null; // the text before the last continuation
let editing = null; // for each side, the message before the one whose other wording is being written

const headers = () => ({ "content-type": "application/json", ...(store.settings.key && { authorization: `Bearer ${store.settings.key}` }) });

function notice(text, isError = false) {
  $("notice").textContent = text;
  $("notice").className = isError ? "error" : "";
}

function keep(problem = store.save(current)) {
  if (problem) notice(`Not saved: ${problem}.`, true);
}

async function explain(response) {
  const body = await response.json().catch(() => null);
  if (response.status === 401) document.body.classList.add("show-settings");
  return body?.error?.message ?? `the server answers ${response.status}`;
}

async function loadModels() {
  try {
    const response = await fetch("/v1/models", { headers: headers() });
    if (!response.ok) throw new Error(await explain(response));
    models = (await response.json()).data;
  } catch (error) {
    notice(error.message, true);
    return;
  }
  const options = () => models.map((model) => element("option", model.id, { value: model.id }));
  $("model").replaceChildren(...options());
  $("compare").replaceChildren(element("option", "⇄ compare", { value: "" }), ...options());
  for (const name of ["model", "compare"]) if (models.some((model) => model.id === store.settings[name])) $(name).value = store.settings[name];
  describeModel();
  if (isUnused(current)) current.mode = usualMode();
  if (!running) showAll();
  notice("");
}

const modelNow = () => models.find((model) => model.id === $("model").value);

// Each side that is shown, with the model that answers there.
const sides = () => ({ leaf: $("model").value, ...($("compare").value && { other: $("compare").value }) });

function describeModel() {
  const model = modelNow();
  if (!model) return;
  const bpb = model.val_bpb ? `\n${model.val_bpb.toFixed(4)} bits per byte (validation)` : "";
  $("about").textContent = `${model.id}, step ${model.step}\n${(model.parameters / 1e6).toFixed(1)}M parameters, depth ${model.depth}\ncontext of ${model.context} tokens${bpb}`;
}

const isUnused = (conversation) => !conversation.nodes.length && !conversation.text;
const usualMode = () => (modelNow()?.stage === "base" ? "text" : "chat");

function showAll() {
  const isText = current.mode === "text";
  for (const button of $("mode").children) button.setAttribute("aria-pressed", button.dataset.mode === current.mode);
  $("messages").hidden = isText;
  $("texts").hidden = !isText;
  $("prompt").hidden = isText;
  showTexts();
  showMessages();
  showList();
  $("send").textContent = running ? "Stop" : isText ? "Continue" : "Send";
  $("undo").hidden = !isText || undo === null || Boolean(running);
}

function showList() {
  const wanted = $("search").value.toLowerCase();
  const texts = (each) => `${each.title} ${each.text} ${each.nodes.map((node) => store.textOf(node.parts)).join(" ")}`;
  const shown = store.conversations.filter((each) => (!isUnused(each) || each === current) && (!wanted || texts(each).toLowerCase().includes(wanted)));
  $("conversations").replaceChildren(...shown.map((each) => {
    const open = element("button", each.title || (each.text || "New conversation").slice(0, 80), { class: "open", onclick: () => openConversation(each) });
    const remove = element("button", "✕", { class: "remove", "aria-label": "Delete this conversation" });
    remove.onclick = () => {
      if (!confirm("Delete this conversation?")) return;
      const problem = store.remove(each);
      if (each === current) start();
      else showList();
      notice("");
      keep(problem);
    };
    return element("li", [open, remove], each === current ? { class: "current" } : {});
  }));
}

function openConversation(conversation) {
  running?.abort();
  [current, undo, editing] = [conversation, null, null];
  document.body.classList.remove("show-sidebar");
  notice("");
  showAll();
  $("messages").scrollTop = $("messages").scrollHeight;
  (current.mode === "text" ? $("text") : $("prompt")).focus();
}

function start(mode = usualMode()) {
  const unused = store.conversations.find(isUnused);
  if (unused) unused.mode = mode;
  openConversation(unused ?? store.create(mode));
}

function showMessages() {
  const columns = Object.keys(sides()).map((side) => {
    if (side === "other" && !((current.other ?? -1) >= 0)) current.other = current.leaf;
    const shown = store.path(current, side).map((at) => showMessage(at, side));
    if (!shown.length) shown.push(element("p", `Write a message to chat. The model runs on this server, and conversations stay in this browser${store.isBlocked ? " until you leave: it stores nothing" : ""}.`, { class: "empty" }));
    return element("div", shown, { class: "column", "data-side": side });
  });
  $("messages").replaceChildren(...columns);
  $("messages").classList.toggle("pair", columns.length > 1);
}

function showMessage(at, side) {
  const node = current.nodes[at];
  const body = element("div", [], { class: "body" });
  showParts(body, node, side);
  const tools = element("div", [], { class: "tools" });
  const button = (text, label, onclick) => tools.append(element("button", text, { title: label, "aria-label": label, onclick }));
  const beside = store.siblings(current, at);
  if (beside.length > 1) {
    const place = beside.indexOf(at);
    const walk = (step) => () => {
      if (running || !(beside[place + step] >= 0)) return;
      store.walkTo(current, beside[place + step], side);
      keep();
      showMessages();
    };
    button("‹", "The branch before", walk(-1));
    tools.append(`${place + 1}/${beside.length}`);
    button("›", "The next branch", walk(1));
  }
  button("Copy", "Copy this message", () => navigator.clipboard?.writeText(store.textOf(node.parts)));
  if (node.role === "user") button("Edit", "Write it differently; this branch is kept", () => edit(at, side));
  else button("Again", "Another answer; this one is kept", () => answerAt([[node.parent, side]]));
  if (node.note) tools.append(node.note);
  return element("article", [body, tools], { class: `message ${node.role}`, "data-at": at });
}

function showParts(body, node, side) {
  if (node.role === "user") {
    body.textContent = store.textOf(node.parts);
    return;
  }
  if (node.tokens?.length && store.settings.tokens === "on") {
    body.replaceChildren(element("div", showTokens(node.tokens, (i, text) => goOn(node, side, i, text)), { class: "tokens" }));
    return;
  }
  const nodes = [];
  node.parts.forEach((part, i) => { // calls stand in the line that they interrupt
    const before = node.parts[i - 1]?.type;
    let added = [];
    if (part.type === "text") added = markdown(part.text);
    else if (part.type === "python") {
      const result = node.parts[i + 1]?.type === "python_output" ? ` = ${node.parts[i + 1].text}` : "";
      added = [element("p", element("span", part.text + result, { class: "call", title: "The calculator was called" }))];
    } else if (before !== "python") added = [element("p", element("span", part.text, { class: "call" }))];
    if (before && added[0]?.tagName === "P" && nodes.at(-1)?.tagName === "P") nodes.at(-1).append(" ", ...added.shift().childNodes);
    nodes.push(...added);
  });
  body.replaceChildren(...nodes);
}

function edit(at, side) {
  if (running) return;
  const before = (each) => store.path(current, each)[store.path(current, side).indexOf(at) - 1] ?? current.nodes[at].parent;
  editing = { leaf: before("leaf"), other: before("other") };
  $("prompt").value = store.textOf(current.nodes[at].parts);
  grow();
  $("prompt").focus();
  notice("Send the other wording; Escape keeps the old one.");
}

function options(model) {
  const given = { model, stream: true, stream_options: { include_usage: true } };
  for (const name of SENT) if (Number.isFinite(store.settings[name])) given[name] = store.settings[name];
  return given;
}

// Let requests run together, which the same button stops.
async function run(work) {
  if (running) return;
  const conversation = current; // another may be opened before the end
  running = new AbortController();
  showAll();
  notice("");
  await work(running.signal);
  running = null;
  conversation.updated = Date.now();
  keep(store.save(conversation));
  showAll();
}

// Send a request and hand on each chunk of its stream.
async function request(url, body, signal, onChunk) {
  try {
    const response = await fetch(url, { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
    if (!response.ok) throw new Error(await explain(response));
    const dropped = response.headers.get("archerchat-dropped-messages");
    if (dropped) notice(`The context is full: the model did not read the oldest ${dropped} messages.`);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const events = (rest + value.replaceAll("\r", "")).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        if (!event.startsWith("data: {")) continue;
        const chunk = JSON.parse(event.slice(6));
        if (chunk.error) throw new Error(chunk.error.message);
        onChunk(chunk);
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") notice(error.message, true);
  }
}

function figures(chunk, model) {
  const speed = chunk.timings?.predicted_per_second;
  const context = models.find((each) => each.id === model)?.context;
  if (chunk.usage) return ` · ${chunk.usage.total_tokens} of ${context} tokens`;
  return speed ? `${model} · ${speed.toFixed(speed < 10 ? 1 : 0)} tokens/s` : "";
}

function addPiece(parts, { type, text, starts }) { // of two calls in a row each is a part
  if (parts.at(-1)?.type === type && (type === "text" || !starts)) parts.at(-1).text += text;
  else if (text) parts.push({ type, text });
}

// Return the text up to a token that is replaced by another, or null where it cannot be said again.
function upTo(tokens, at, text) {
  const said = [...tokens.slice(0, at).map((token) => token.text), text];
  if (!said.some((each) => /^<\||\ufffd/.test(each))) return said.join("");
  notice("A calculator call or a part of a character comes before: choose an earlier token.");
  return null;
}

function goOn(node, side, at, text) {
  const said = upTo(node.tokens, at, text);
  const tokens = [...node.tokens.slice(0, at), { text, probability: 0, top: node.tokens[at].top }];
  if (said !== null) answerAt([[node.parent, side]], said, tokens);
}

function answerAt(places, said, tokens) {
  return run((signal) => Promise.all(places.map(([parent, side]) => answer(parent, side, signal, said, tokens))));
}

async function answer(parent, side, signal, said = "", tokens = []) {
  const [conversation, model] = [current, sides()[side]];
  conversation[side] = parent;
  const messages = store.messagesOf(conversation, side);
  if (said) messages.push({ role: "assistant", content: said });
  if (store.settings.system?.trim()) messages.unshift({ role: "system", content: store.settings.system });
  const at = store.add(conversation, "assistant", said ? [{ type: "text", text: said }] : [], parent);
  const node = conversation.nodes[at];
  [node.tokens, node.note, conversation[side]] = [tokens, "", at];
  const view = store.settings.tokens === "on" ? { logprobs: true, top_logprobs: 5 } : {};
  showMessages();
  const list = $("messages");
  list.scrollTop = list.scrollHeight;
  let due = false;
  const show = () => {
    due = false;
    const body = list.querySelector(`[data-side=${side}] [data-at="${at}"] .body`);
    if (conversation !== current || !running || !body) return;
    const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 80;
    showParts(body, node, side);
    body.classList.add("waiting");
    if (atEnd) list.scrollTop = list.scrollHeight;
  };
  show();
  await request("/v1/chat/completions", { ...options(model), ...view, messages }, signal, (chunk) => {
    const delta = chunk.choices[0]?.delta;
    node.tokens.push(...readTokens(chunk.choices[0]?.logprobs));
    for (const part of delta?.parts ?? [{ type: "text", text: delta?.content ?? "" }]) addPiece(node.parts, part);
    node.note += figures(chunk, model);
    if (!due) requestAnimationFrame(show);
    due = true;
  });
  if (!node.parts.length) conversation[side] = parent; // nothing was said: as before
}

async function send() {
  const text = $("prompt").value.trim();
  if (!text || running) return;
  const asked = new Map(); // sides that continue the same message share the next one
  const places = Object.keys(sides()).map((side) => {
    let parent = [editing?.[side], current[side]].find((at) => at < current.nodes.length); // another tab may have replaced them
    if (current.nodes[parent]?.role === "user") parent = current.nodes[parent].parent; // it was never answered
    if (!asked.has(parent)) asked.set(parent, store.add(current, "user", [{ type: "text", text }], parent));
    return [asked.get(parent), side];
  });
  $("prompt").value = "";
  editing = null;
  grow();
  await answerAt(places);
}

function showTexts() {
  const runs = current.mode === "text" ? current.runs ?? [] : [];
  $("text").value = runs[0]?.text ?? current.text;
  $("text-other").hidden = !sides().other;
  $("text-other").value = runs[1]?.text ?? "";
  for (const area of [$("text"), $("text-other")]) if (running) area.scrollTop = area.scrollHeight;
  const shown = store.settings.tokens === "on" && !running && runs.some((each) => each.tokens.length);
  $("tokens").hidden = !shown;
  if (!shown) return;
  $("tokens").replaceChildren(...runs.map((each) => element("div", showTokens(each.tokens, (at, text) => {
    const said = upTo(each.tokens, at, text);
    if (said !== null && !running) continueText(each.start + said);
  }))));
}

async function continueText(prompt = $("text").value) {
  const conversation = current;
  const view = store.settings.tokens === "on" ? { logprobs: 5 } : {};
  conversation.runs = Object.values(sides()).map((model) => ({ model, start: prompt, text: prompt, tokens: [], note: "" }));
  undo = prompt;
  $("text").readOnly = true;
  await run((signal) => Promise.all(conversation.runs.map((each) => {
    const body = { max_tokens: 128, temperature: 0.7, top_k: 50, ...options(each.model), ...view, prompt };
    return request("/v1/completions", body, signal, (chunk) => {
      each.tokens.push(...readTokens(chunk.choices[0]?.logprobs));
      each.text += chunk.choices[0]?.text ?? "";
      each.note += figures(chunk, each.model);
      conversation.text = conversation.runs[0].text;
      if (conversation !== current) return;
      showTexts();
      if (each.note) notice(conversation.runs.map((run) => run.note).join("   "));
    });
  })));
  $("text").readOnly = false;
}

const grow = () => { $("prompt").rows = Math.min(12, Math.max(1, $("prompt").value.split("\n").length)); };
const setTheme = () => { document.documentElement.dataset.theme = store.settings.theme ?? "system"; };

function buildSettings() {
  $("fields").replaceChildren(...FIELDS.map(([name, label, kind, help, more]) => {
    const tag = kind === "textarea" || kind === "select" ? kind : "input";
    const content = kind === "select" ? more.map((each) => element("option", each)) : [];
    const input = element(tag, content, tag === "input" ? { type: kind, placeholder: "default", autocomplete: "off", step: "any", ...more } : {});
    if (store.settings[name] !== undefined) input.value = store.settings[name];
    input.onchange = () => {
      const value = kind === "number" ? (input.value === "" ? undefined : Number(input.value)) : input.value;
      store.set(name, value);
      setTheme();
      if (name === "tokens" && !running) showAll();
      if (name === "key") loadModels();
    };
    return element("label", [label, input, element("small", help)]);
  }));
}

$("composer").onsubmit = (event) => {
  event.preventDefault();
  if (running) running.abort();
  else if (current.mode === "text") continueText();
  else send();
};
$("prompt").oninput = grow;
$("prompt").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!running) send();
};
$("text").oninput = () => { [current.text, current.runs, current.updated, undo] = [$("text").value, [], Date.now(), null]; keep(); showAll(); };
$("text").onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !running) continueText();
};
$("undo").onclick = () => { [current.text, undo, current.runs] = [undo, null, []]; keep(); showAll(); };
for (const name of ["model", "compare"]) $(name).onchange = () => {
  store.set(name, $(name).value);
  describeModel();
  if (name === "model" && isUnused(current)) current.mode = usualMode();
  if (!running) showAll();
};
for (const button of $("mode").children) button.onclick = () => button.dataset.mode !== current.mode && start(button.dataset.mode);
$("new").onclick = () => start();
$("search").oninput = showList;
$("menu").onclick = () => document.body.classList.toggle("show-sidebar");
$("settings-button").onclick = $("settings-close").onclick = () => document.body.classList.toggle("show-settings");
document.querySelector("main").addEventListener("click", (event) => {
  if (!event.target.closest("#menu")) document.body.classList.remove("show-sidebar");
});
$("export").onclick = () => {
  const url = URL.createObjectURL(new Blob([store.toLines()], { type: "application/jsonl" }));
  element("a", [], { href: url, download: "conversations.jsonl" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
};
$("import").onclick = () => $("file").click();
$("file").onchange = async () => {
  try {
    notice(`${store.fromLines(await $("file").files[0].text())} conversations were added.`);
  } catch (error) {
    notice(`Nothing was added: ${error.message}`, true);
  }
  $("file").value = "";
  showList();
};
document.onkeydown = (event) => {
  if (event.key === "Escape") {
    if (running) running.abort();
    else if (editing !== null) { editing = null; $("prompt").value = ""; grow(); notice(""); }
    else document.body.classList.remove("show-sidebar", "show-settings");
  }
  if (event.altKey && event.key.toLowerCase() === "n") { event.preventDefault(); start(); }
};
addEventListener("pagehide", () => running?.abort()); // what was said so far is saved
addEventListener("storage", ({ key }) => {
  store.receive(key, running && current);
  current = store.conversations.find((each) => each.id === current.id);
  if (current) showAll();
  else start();
});

setTheme();
buildSettings();
if (store.conversations.length) openConversation(store.conversations[0]);
else start("chat");
loadModels().then(() => keep(store.conversations.find((each) => each.unsaved)?.unsaved ?? ""));
