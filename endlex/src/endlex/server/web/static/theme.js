// Choose light or dark before the first paint; a plain script, since modules run too late for that.
(function () {
  let chosen = null;
  try {
    chosen = localStorage.getItem("endlex.theme");
  } catch {
    // Storage may be refused; then the system's preference holds.
  }
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
})();
