// The server's HTTP interface: requests, their errors, and the stream of events.

import { ROOT, query } from "./address.js";

const API = `${ROOT}/api/v1`;
const KEEPALIVE_CHARS = 16_000; // browsers let 64 KB of bodies outlive their page

class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export async function request(path, { method = "GET", body, signal } = {}) {
  const options = { method, signal, headers: { Accept: "application/json" } };
  if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers["Content-Type"] = "application/json";
  }
  // A change is saved even if its page is left or reloaded at once.
  options.keepalive = method !== "GET" && (options.body?.length ?? 0) < KEEPALIVE_CHARS;
  let response;
  try {
    response = await fetch(API + path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Is endlex serve running?", 0);
  }
  if (response.status === 401) toLogin();
  if (!response.ok) throw new ApiError(await errorText(response), response.status);
  return response.status === 204 ? null : response.json();
}

async function errorText(response) {
  const answer = await response.json().catch(() => null);
  return answer?.error || answer?.detail || `The server answered ${response.status}`;
}

function toLogin() {
  const here = location.pathname.slice(ROOT.length) + location.search + location.hash;
  location.assign(`${ROOT}/login?next=${encodeURIComponent(here)}`);
}

export function runPath(run, rest = "") {
  return `/runs/${encodeURIComponent(run)}${rest}`;
}

// What a page reads about runs; `local_source.js` answers the same from an exported file.
export class ApiSource {
  live = true;

  run(id) {
    return request(runPath(id));
  }

  series(run, metrics, { x, from, to, points, log }, signal) {
    const asked = query({ metric: metrics, x, from, to, points, log });
    return request(runPath(run, `/series${asked}`), { signal });
  }

  runs(options, signal) {
    return request(`/runs${query(options)}`, { signal });
  }

  change(runs, changes) {
    return request("/runs", { method: "PATCH", body: { runs, changes } });
  }

  settings(project) {
    return request(`/settings${query({ project })}`);
  }

  // Saves under a project, or deletes where `content` is null.
  save(project, kind, name, content) {
    const method = content === null ? "DELETE" : "PUT";
    return request(`/settings${query({ project, kind, name })}`, { method, body: content ?? undefined });
  }

  // A page of texts, tables or media, newest first.
  async records(kind, run, options) {
    return (await request(runPath(run, `/${kind}${query(options)}`)))[kind];
  }

  mediaUrl(run, id) {
    return `${API}${runPath(run, `/media/${id}`)}`;
  }

  checkpoint(run, name) {
    return request(runPath(run, `/checkpoints/${encodeURIComponent(name)}`));
  }

  alerts(run) {
    return request(`/alerts${query({ run, open: "true" })}`);
  }

  fileUrl(run, checkpoint, path) {
    const parts = path.split("/").map(encodeURIComponent).join("/");
    return `${API}${runPath(run, `/checkpoints/${encodeURIComponent(checkpoint)}/files/${parts}`)}`;
  }

  exportUrl(run, format) {
    return `${API}${runPath(run, `/export?format=${format}`)}`;
  }
}

// Calls `onevent(kind, data)` as things happen, and `onreturn()` after a gap in which some may have
// been missed. A hidden tab holds no connection: browsers allow six a server, for all tabs together.
export function subscribe(run, onevent, onreturn) {
  let stream = null;
  let opened = false;
  const kinds = ["run", "metrics", "text", "media", "checkpoint", "alert"];
  const open = () => {
    if (stream || document.hidden) return;
    stream = new EventSource(`${API}/events${query({ run })}`);
    stream.onopen = () => {
      if (opened) onreturn();
      opened = true;
      document.documentElement.dataset.stream = "open";
    };
    stream.onerror = () => {
      document.documentElement.dataset.stream = "broken";
      // The browser reconnects by itself, except after an answer that is no stream.
      if (stream?.readyState === EventSource.CLOSED) {
        close();
        setTimeout(open, 5000);
      }
    };
    for (const kind of kinds) {
      stream.addEventListener(kind, (event) => {
        try {
          onevent(kind, JSON.parse(event.data));
        } catch (error) {
          console.warn("an event that is not JSON", error);
        }
      });
    }
  };
  const close = () => {
    stream?.close();
    stream = null;
  };
  document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
  addEventListener("pagehide", close);
  addEventListener("pageshow", open);
  open();
}
