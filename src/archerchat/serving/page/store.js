// Conversations, kept by the browser. Each is a tree: a message knows the one before it, so that
// another answer, or another wording of a question, is a branch beside the first. Each has an entry
// of its own in the storage, so tabs do not overwrite each other. None is deleted to make room.

const PREFIX = "archerchat.conversation.";
const TOGETHER = "archerchat.conversations"; // version 0.2 kept all of them in this entry
const SETTINGS = "archerchat.settings";
const PASSING = ["tokens", "runs", "unsaved"]; // what is not stored

let room = null;
try {
  room = localStorage;
} catch { /* a SecurityError: the browser blocks it */ }
export const isBlocked = !room;
room ??= {}; // as long as the page is open

const newId = () => crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`;

function read(key, fallback = null) {
  try {
    return JSON.parse(room[key]) ?? fallback;
  } catch {
    return fallback;
  }
}

// Store a text, or delete it if there is none. Return why that failed, or "".
function write(key, text) {
  try {
    if (text === undefined) delete room[key];
    else room[key] = text;
    return "";
  } catch (error) {
    return error.name === "QuotaExceededError" ? "the browser has no room left for it; delete other conversations first" : error.message;
  }
}

export const settings = read(SETTINGS, {});
export function set(name, value) {
  settings[name] = value;
  write(SETTINGS, JSON.stringify({ ...read(SETTINGS, {}), [name]: value })); // another tab may have changed the others
}

export let conversations = Object.keys(room).filter((key) => key.startsWith(PREFIX)).map((key) => read(key)).filter(Boolean);
const isNewer = ({ id, updated }) => !(read(PREFIX + id)?.updated >= updated); // than its own entry, or has none
const moving = read(TOGETHER, []).filter(isNewer); // a tab that is open since then may have written it just now
conversations = [...new Map([...conversations, ...moving].map((each) => [each.id, each])).values()];
moving.find(save); // up to the first that does not fit: it and the others stay
shrink();
sort();

// Leave in 0.2's entry only what is not stored in entries of its own, and not this conversation. Return what it held.
function shrink(id) {
  const held = room[TOGETHER];
  const rest = read(TOGETHER, []).filter((each) => each.id !== id && isNewer(each));
  write(TOGETHER, rest.length ? JSON.stringify(rest) : undefined);
  return held;
}

function sort() {
  conversations.sort((a, b) => b.updated - a.updated);
}

// Save a conversation, unless it was deleted in the meantime. Return why that failed, or "".
export function save(conversation) {
  if (!conversations.includes(conversation)) return "";
  sort();
  const text = JSON.stringify(conversation, (name, value) => (PASSING.includes(name) ? undefined : value));
  const store = () => (conversation.unsaved = write(PREFIX + conversation.id, text));
  if (!store()) return "";
  const held = shrink(conversation.id); // there may be room now
  if (store()) write(TOGETHER, held);
  return conversation.unsaved;
}

// Take over what another tab saved or deleted. If that is the conversation which is being answered
// here, both versions are kept.
export function receive(key, answering) {
  if (!key?.startsWith(PREFIX)) return;
  const found = read(key);
  if (found && found.id === answering?.id) answering.id = newId();
  conversations = conversations.filter((each) => PREFIX + each.id !== key);
  if (found) conversations.push(found);
  sort();
}

const empty = (mode) => ({ id: newId(), mode, title: "", nodes: [], leaf: -1, other: -1, text: "", updated: Date.now() });
export function create(mode) {
  const made = empty(mode);
  conversations.unshift(made);
  return made;
}

// Delete a conversation. Return why others are still not saved, or "".
export function remove(conversation) {
  conversations = conversations.filter((each) => each !== conversation);
  write(PREFIX + conversation.id);
  shrink(conversation.id);
  return conversations.filter((each) => each.unsaved).map(save).find(Boolean) ?? ""; // there may be room now
}

export function add(conversation, role, parts, parent) {
  if (role === "user" && !conversation.title) conversation.title = textOf(parts).slice(0, 80);
  return conversation.nodes.push({ role, parts, parent }) - 1;
}

// A side, "leaf" or "other", names the end of what is shown: two models side by side have two.
export function path(conversation, side = "leaf") {
  const found = [];
  for (let at = conversation[side] ?? -1; at >= 0; at = conversation.nodes[at].parent) found.unshift(at);
  return found;
}

export function siblings(conversation, at) {
  const parent = conversation.nodes[at].parent;
  return conversation.nodes.flatMap((node, i) => (node.parent === parent && (node.parts.length || i === at) ? [i] : []));
}

export function walkTo(conversation, at, side) {
  for (let next = at; next >= 0;) {
    conversation[side] = next;
    next = conversation.nodes.findLastIndex((node) => node.parent === conversation[side] && node.parts.length);
  }
}

export const textOf = (parts) => parts.filter((part) => part.type === "text").map((part) => part.text).join("");

export function messagesOf(conversation, side) {
  return path(conversation, side).map((at) => {
    const { role, parts } = conversation.nodes[at];
    return { role, content: parts.every((part) => part.type === "text") ? textOf(parts) : parts };
  });
}

// Return the chats as `archerchat sft` reads them: each ends with an answer, and no message is blank.
export function toLines() {
  return conversations.filter((each) => each.mode === "chat").map((each) => {
    const messages = messagesOf(each);
    const blank = messages.findIndex(({ content }) => /^\s*$/.test(content));
    const end = blank < 0 ? messages.length : blank;
    return end > 1 ? `${JSON.stringify({ messages: messages.slice(0, end - (end % 2)) })}\n` : "";
  }).join("");
}

function fromMessages(messages) {
  const made = empty("chat");
  let system = ""; // joined to the first question, as models are shown it
  for (const { role, content } of Array.isArray(messages) ? messages : []) {
    const types = role === "assistant" ? ["text", "python", "python_output"] : ["text"];
    const parts = typeof content === "string" ? [{ type: "text", text: content }] : [content].flat();
    if (!parts.every((part) => types.includes(part?.type) && typeof part.text === "string")) throw new Error(`not all parts of ${role} are text`);
    if (["system", "developer"].includes(role) && !made.nodes.length) system = `${textOf(parts)}\n\n`;
    else if (role !== ["user", "assistant"][made.nodes.length % 2]) throw new Error(`${role} is out of turn`);
    else {
      made.title ||= textOf(parts).slice(0, 80);
      if (system) parts.unshift({ type: "text", text: system });
      made.leaf = add(made, role, parts.map(({ type, text }) => ({ type, text })), made.leaf);
      system = "";
    }
  }
  if (!made.nodes.length) throw new Error("there are no messages");
  return made;
}

// Add the conversations of a file: all of them, or none and throw.
export function fromLines(text) {
  const before = conversations;
  const made = text.split("\n").flatMap((line, i) => {
    try {
      const read = line.trim() && JSON.parse(line);
      return read === "" ? [] : [fromMessages(read.messages ?? read)];
    } catch (error) {
      throw new Error(`line ${i + 1}: ${error.message}`);
    }
  });
  conversations = [...made, ...before];
  const failed = made.find(save);
  if (!failed) return made.length;
  conversations = before;
  made.forEach((each) => write(PREFIX + each.id));
  throw new Error(failed.unsaved);
}
