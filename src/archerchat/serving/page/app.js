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
  ["tokens", "Token view", "select", "Shade each token by how unlikely it was; a click shows what else was likely, and goes on from there.", ["off", "on"]],
  ["key", "API key", "password", "If the server asks for one."],
  ["theme", "Theme", "select", "", ["system", "light", "dark"]],
];
const SENT = ["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens", "seed"];

const $ = (id) => document.getElementById(id);
let models = [];
let current = null;
let running = null; // the AbortController of the answer that is coming
let undo = null; // the text before the last continuation
let editing = null; // the node whose other wording is being written

function headers() {
  const key = store.settings.key;
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

function notice(text, isError = false) {
  $("notice").textContent = text;
  $("notice").className = isError ? "error" : "";
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
  $("model").replaceChildren(...models.map((model) => element("option", model.id, { value: model.id })));
  const kept = models.find((model) => model.id === store.settings.model) ?? models[0];
  if (kept) $("model").value = kept.id;
  describeModel();
  if (current && !current.nodes.length && !current.text) setMode(modelNow()?.stage === "base" ? "text" : "chat");
  notice("");
}

function modelNow() {
  return models.find((model) => model.id === $("model").value);
}

function describeModel() {
  const model = modelNow();
  if (!model) return;
  const bpb = model.val_bpb ? `\n${model.val_bpb.toFixed(4)} bits per byte (validation)` : "";
  $("about").textContent = `${model.id}, step ${model.step}\n${(model.parameters / 1e6).toFixed(1)}M parameters, depth ${model.depth}\ncontext of ${model.context} tokens${bpb}`;
}

function setMode(mode) {
  current.mode = mode;
  showAll();
}

function showAll() {
  const isText = current.mode === "text";
  for (const button of $("mode").children) button.setAttribute("aria-pressed", button.dataset.mode === current.mode);
  $("messages").hidden = isText;
  $("text").hidden = !isText;
  $("prompt").hidden = isText;
  if (isText) $("text").value = current.text;
  showTextTokens();
  $("context").textContent = "";
  showMessages();
  showList();
  showState();
}

function showState() {
  const isText = current.mode === "text";
  $("send").textContent = running ? "Stop" : isText ? "Continue" : "Send";
  $("undo").hidden = !isText || undo === null || Boolean(running);
}

function showList() {
  const wanted = $("search").value.toLowerCase();
  const texts = (each) => `${each.title} ${each.text} ${each.nodes.map((node) => store.textOf(node.parts)).join(" ")}`;
  const shown = store.conversations.filter((each) => (each.nodes.length || each.text || each === current) && (!wanted || texts(each).toLowerCase().includes(wanted)));
  $("conversations").replaceChildren(...shown.map((each) => {
    const open = element("button", each.title || (each.text || "New conversation").slice(0, 80), { class: "open" });
    open.onclick = () => openConversation(each);
    const remove = element("button", "✕", { class: "remove", "aria-label": "Delete this conversation" });
    remove.onclick = () => {
      if (!confirm("Delete this conversation?")) return;
      store.remove(each);
      if (each === current) start();
      else showList();
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

function start(mode = modelNow()?.stage === "base" ? "text" : "chat") {
  const unused = store.conversations.find((each) => !each.nodes.length && !each.text);
  if (unused) unused.mode = mode;
  openConversation(unused ?? store.create(mode));
}

function showMessages() {
  const shown = store.path(current).map(showMessage);
  if (!shown.length) shown.push(element("p", "The model answers what you write. It runs on this server, and conversations stay in this browser.", { class: "empty" }));
  $("messages").replaceChildren(...shown);
}

function showMessage(at) {
  const node = current.nodes[at];
  const body = element("div", [], { class: "body" });
  showParts(body, node);
  const tools = element("div", [], { class: "tools" });
  const button = (text, label, action) => {
    const made = element("button", text, { title: label, "aria-label": label });
    made.onclick = action;
    tools.append(made);
  };
  const beside = store.siblings(current, at);
  if (beside.length > 1) {
    const place = beside.indexOf(at);
    const walk = (step) => () => {
      if (running || !(beside[place + step] >= 0)) return;
      store.walkTo(current, beside[place + step]);
      store.save();
      showMessages();
    };
    button("‹", "The branch before", walk(-1));
    tools.append(`${place + 1}/${beside.length}`);
    button("›", "The next branch", walk(1));
  }
  button("Copy", "Copy this message", () => navigator.clipboard?.writeText(store.textOf(node.parts)));
  if (node.role === "user") button("Edit", "Write it differently; this branch is kept", () => edit(at));
  else button("Again", "Another answer; this one is kept", () => !running && answer(node.parent));
  if (node.note) tools.append(node.note);
  return element("article", [body, tools], { class: `message ${node.role}`, "data-at": at });
}

function showParts(body, node) {
  if (node.role === "user") {
    body.textContent = store.textOf(node.parts);
    return;
  }
  if (node.tokens?.length && store.settings.tokens === "on") {
    body.replaceChildren(element("div", showTokens(node.tokens, (i, text) => goOn(node, i, text)), { class: "tokens" }));
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

function edit(at) {
  if (running) return;
  editing = at;
  $("prompt").value = store.textOf(current.nodes[at].parts);
  grow();
  $("prompt").focus();
  notice("Send the other wording; Escape keeps the old one.");
}

function options() {
  const given = { model: $("model").value, stream: true, stream_options: { include_usage: true } };
  for (const name of SENT) if (Number.isFinite(store.settings[name])) given[name] = store.settings[name];
  return given;
}

// Send a request and hand on each chunk of its stream; return whether it came to its end.
async function request(url, body, onChunk) {
  running = new AbortController();
  const { signal } = running;
  showState();
  notice("");
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
  } finally {
    running = null;
  }
}

function figures(chunk) {
  const model = modelNow();
  const used = chunk.usage?.total_tokens;
  if (used && model) $("context").textContent = `${used} of ${model.context} tokens`;
  const speed = chunk.timings?.predicted_per_second;
  return speed ? `${speed.toFixed(speed < 10 ? 1 : 0)} tokens/s` : "";
}

function addPiece(parts, { type, text }) {
  if (parts.at(-1)?.type === type) parts.at(-1).text += text;
  else if (text) parts.push({ type, text });
}

// Answer again with another token at one place. The model reads what it said before it as its own
// words, so this goes as far as its first calculator call.
function goOn(node, at, text) {
  const before = node.tokens.slice(0, at);
  if (running || before.some((token) => token.text.startsWith("<|"))) return;
  const said = before.map((token) => token.text).join("") + text;
  answer(node.parent, said, [...before, { text, probability: 0, top: node.tokens[at].top }]);
}

function showTextTokens() {
  const shown = current.mode === "text" && store.settings.tokens === "on" && current.tokens?.length;
  $("tokens").hidden = !shown;
  if (!shown) return;
  $("tokens").replaceChildren(...showTokens(current.tokens, (at, text) => {
    if (running) return;
    $("text").value = current.start + current.tokens.slice(0, at).map((token) => token.text).join("") + text;
    continueText();
  }));
}

async function answer(parent, said = "", tokens = []) {
  const conversation = current;
  conversation.leaf = parent;
  const messages = store.messagesOf(conversation);
  if (said) messages.push({ role: "assistant", content: said });
  if (store.settings.system) messages.unshift({ role: "system", content: store.settings.system });
  const node = conversation.nodes[store.add(conversation, "assistant", said ? [{ type: "text", text: said }] : [], parent)];
  node.tokens = tokens;
  const view = store.settings.tokens === "on" ? { logprobs: true, top_logprobs: 5 } : {};
  conversation.updated = Date.now();
  showMessages();
  const body = $("messages").lastElementChild.querySelector(".body");
  body.classList.add("waiting");
  let due = false;
  const show = () => {
    due = false;
    const list = $("messages");
    const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 80;
    showParts(body, node);
    if (atEnd) list.scrollTop = list.scrollHeight;
  };
  $("messages").scrollTop = $("messages").scrollHeight;
  await request("/v1/chat/completions", { ...options(), ...view, messages }, (chunk) => {
    const delta = chunk.choices[0]?.delta;
    node.tokens.push(...readTokens(chunk.choices[0]?.logprobs));
    for (const part of delta?.parts ?? [{ type: "text", text: delta?.content ?? "" }]) addPiece(node.parts, part);
    node.note = figures(chunk) || node.note;
    if (!due) requestAnimationFrame(show);
    due = true;
  });
  if (!node.parts.length && conversation.nodes.at(-1) === node) { // nothing was said: as before
    conversation.nodes.pop();
    conversation.leaf = parent;
  }
  store.save();
  if (conversation === current) showMessages();
  showList();
  showState();
}

async function send() {
  const text = $("prompt").value.trim();
  if (!text) return;
  let parent = editing === null ? current.leaf : current.nodes[editing].parent;
  if (current.nodes[parent]?.role === "user") parent = current.nodes[parent].parent; // it was never answered
  $("prompt").value = "";
  editing = null;
  grow();
  await answer(store.add(current, "user", [{ type: "text", text }], parent));
}

async function continueText() {
  const conversation = current;
  const prompt = conversation.text = conversation.start = $("text").value;
  const view = store.settings.tokens === "on" ? { logprobs: 5 } : {};
  conversation.tokens = [];
  undo = prompt;
  $("text").readOnly = true;
  await request("/v1/completions", { max_tokens: 128, temperature: 0.7, top_k: 50, ...options(), ...view, prompt }, (chunk) => {
    conversation.tokens.push(...readTokens(chunk.choices[0]?.logprobs));
    conversation.text += chunk.choices[0]?.text ?? "";
    const speed = figures(chunk);
    if (conversation !== current) return;
    $("text").value = conversation.text;
    $("text").scrollTop = $("text").scrollHeight;
    if (speed) notice(speed);
  });
  $("text").readOnly = false;
  if (conversation === current) showTextTokens();
  conversation.updated = Date.now();
  store.save();
  showList();
  showState();
}

function grow() {
  $("prompt").rows = Math.min(12, Math.max(1, $("prompt").value.split("\n").length));
}

function setTheme() {
  const theme = store.settings.theme;
  if (theme && theme !== "system") document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
}

function buildSettings() {
  $("fields").replaceChildren(...FIELDS.map(([name, label, kind, help, more]) => {
    const tag = kind === "textarea" || kind === "select" ? kind : "input";
    const content = kind === "select" ? more.map((each) => element("option", each)) : [];
    const input = element(tag, content, tag === "input" ? { type: kind, placeholder: "default", autocomplete: "off", step: "any", ...more } : {});
    if (store.settings[name] !== undefined) input.value = store.settings[name];
    input.onchange = () => {
      const value = kind === "number" ? (input.value === "" ? undefined : Number(input.value)) : input.value;
      store.settings[name] = value;
      store.saveSettings();
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
$("text").oninput = () => { [current.text, current.tokens, undo] = [$("text").value, [], null]; showTextTokens(); showState(); };
$("text").onchange = () => { current.updated = Date.now(); store.save(); showList(); };
$("text").onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !running) continueText();
};
$("undo").onclick = () => { $("text").value = current.text = undo; [undo, current.tokens] = [null, []]; showTextTokens(); store.save(); showState(); };
$("model").onchange = () => {
  store.settings.model = $("model").value;
  store.saveSettings();
  describeModel();
  if (!current.nodes.length && !current.text) setMode(modelNow().stage === "base" ? "text" : "chat");
};
for (const button of $("mode").children) button.onclick = () => {
  if (button.dataset.mode === current.mode) return;
  if (current.nodes.length || current.text) start(button.dataset.mode);
  else setMode(button.dataset.mode);
};
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
    notice(`This file cannot be read: ${error.message}`, true);
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

setTheme();
buildSettings();
if (store.conversations.length) openConversation(store.conversations[0]);
else start("chat");
loadModels();
