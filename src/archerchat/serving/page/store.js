// Conversations, kept by the browser. Each is a tree: a message knows the one before it, so that
// another answer, or another wording of a question, is a branch beside the first.

const KEY = "archerchat.conversations";
const MAX_KEPT = 200;

function read(key, fallback) {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? fallback;
  } catch {
    return fallback;
  }
}

export const settings = read("archerchat.settings", {});
export function saveSettings() {
  localStorage.setItem("archerchat.settings", JSON.stringify(settings));
}

export let conversations = read(KEY, []);
export function save() {
  conversations.sort((a, b) => b.updated - a.updated);
  conversations = conversations.slice(0, MAX_KEPT);
  while (conversations.length) {
    try {
      localStorage.setItem(KEY, JSON.stringify(conversations, (key, value) => (key === "tokens" || key === "runs" ? undefined : value)));
      return;
    } catch {
      conversations.pop(); // the browser's room is used up: the oldest goes
    }
  }
  localStorage.removeItem(KEY);
}

export function create(mode) {
  const made = { id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`, mode, title: "", nodes: [], leaf: -1, other: -1, text: "", updated: Date.now() };
  conversations.unshift(made);
  return made;
}

export function remove(conversation) {
  conversations = conversations.filter((each) => each !== conversation);
  if (conversations.length) save();
  else localStorage.removeItem(KEY);
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

export function textOf(parts) {
  return parts.filter((part) => part.type === "text").map((part) => part.text).join("");
}

export function messagesOf(conversation, side) {
  return path(conversation, side).map((at) => {
    const { role, parts } = conversation.nodes[at];
    return { role, content: parts.every((part) => part.type === "text") ? textOf(parts) : parts };
  });
}

export function toLines() {
  const chats = conversations.filter((each) => each.mode === "chat" && each.nodes.length > 1);
  return chats.map((each) => `${JSON.stringify({ messages: messagesOf(each) })}\n`).join("");
}

export function fromLines(text) {
  let count = 0;
  for (const line of text.split("\n").filter((each) => each.trim())) {
    const read = JSON.parse(line);
    const made = { messages: Array.isArray(read) ? read : read.messages };
    if (!Array.isArray(made.messages)) throw new Error("a line holds no messages");
    const conversation = create("chat");
    for (const { role, content } of made.messages) {
      const parts = typeof content === "string" ? [{ type: "text", text: content }] : content;
      if (role === "user" || role === "assistant") conversation.leaf = add(conversation, role, parts.map(({ type, text }) => ({ type: String(type), text: String(text) })), conversation.leaf);
    }
    count += 1;
  }
  save();
  return count;
}
