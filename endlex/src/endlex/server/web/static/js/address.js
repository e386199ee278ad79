// Where things are: the path under which the server answers, links to pages, and what of a page's
// state stands in its address.

export const ROOT = document.documentElement.dataset.root || "";

export function query(values) {
  const pairs = [];
  for (const [key, value] of Object.entries(values)) {
    for (const item of Array.isArray(value) ? value : [value]) {
      if (item === undefined || item === null || item === "") continue;
      pairs.push(`${encodeURIComponent(key)}=${encodeURIComponent(item)}`);
    }
  }
  return pairs.length ? `?${pairs.join("&")}` : "";
}

export const listLink = (values = {}) => `${ROOT}/${query(values)}`;
// The search for a tag. In quotes everything is taken as it is; a quote itself stands for any text.
export const tagQuery = (tag) => (tag.includes('"') ? `tag:*"${tag.replaceAll('"', '"*"')}"` : `tag:"${tag}"`);
export const runLink = (id) => `${ROOT}/runs/${encodeURIComponent(id)}`;
export const compareLink = (ids) => `${ROOT}/compare?runs=${ids.map(encodeURIComponent).join(",")}`;

export function readAddress() {
  return Object.fromEntries(new URLSearchParams(location.search));
}

// Replaces some of the address; what is empty, or undefined, is left out of it.
export function writeAddress(changes) {
  const values = { ...readAddress(), ...changes };
  // An exported file has no address of its own to change in some browsers.
  try {
    history.replaceState(null, "", (query(values) || location.pathname) + location.hash);
  } catch {
    // The page works without it.
  }
}
