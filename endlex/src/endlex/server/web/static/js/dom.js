// Elements from code. Text always becomes a text node: nothing logged can turn into markup.

export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (key === "class") element.className = value;
    else if (key === "data") Object.assign(element.dataset, value);
    else if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key in element && key !== "list" && key !== "form" && !key.includes("-")) {
      element[key] = value;
    } else element.setAttribute(key, value === true ? "" : value);
  }
  append(element, children);
  return element;
}

function append(element, children) {
  for (const child of [children].flat(3)) {
    if (child !== null && child !== undefined && child !== false) element.append(child);
  }
  return element;
}

export function replaceContent(element, ...children) {
  element.replaceChildren();
  return append(element, children);
}

// A message at the page's foot, with at most one action such as "Undo".
export function toast(text, { action, onaction, error = false, seconds = 8 } = {}) {
  const box = document.getElementById("toasts");
  const close = () => note.remove();
  const act = action && el("button", { type: "button", class: "link", onclick: () => (close(), onaction()) }, action);
  const dismiss = el("button", { type: "button", class: "icon-button", "aria-label": "Dismiss", onclick: close }, "✕");
  const note = el("div", { class: error ? "toast toast-error" : "toast" }, el("span", {}, text), act, dismiss);
  box.append(note);
  while (box.children.length > 4) box.firstChild.remove();
  setTimeout(close, seconds * 1000);
  return note;
}

export function fail(error) {
  if (error?.name === "AbortError") return;
  toast(error?.message || String(error), { error: true });
}

// An asynchronous `call` whose failure is shown instead of thrown.
export const reporting = (call) => (...given) => call(...given).catch(fail);

// Runs `call` once, `milliseconds` after the last request for it.
export function debounce(call, milliseconds) {
  let timer = 0;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => call(...given), milliseconds);
  };
}

// Runs `call` at once, then at most every `milliseconds`; a request in between is not lost.
export function throttle(call, milliseconds) {
  let timer = 0;
  let last = -Infinity;
  return () => {
    if (timer) return;
    const wait = Math.max(0, last + milliseconds - performance.now());
    timer = setTimeout(() => {
      timer = 0;
      last = performance.now();
      call();
    }, wait);
  };
}

// A setting of this browser; storage that is refused or damaged counts as empty.
export function remember(key, value) {
  try {
    localStorage.setItem(`endlex.${key}`, JSON.stringify(value));
  } catch {
    // The page works without it.
  }
}

export function recall(key, fallback) {
  try {
    const text = localStorage.getItem(`endlex.${key}`);
    return text === null ? fallback : JSON.parse(text);
  } catch {
    return fallback;
  }
}

export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Clipboard access needs a secure origin; the old way works on plain http and from files.
    const area = el("textarea", { class: "offscreen", value: text });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  toast("Copied", { seconds: 2 });
}

export function download(name, text, type = "text/plain") {
  const url = URL.createObjectURL(new Blob([text], { type }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
