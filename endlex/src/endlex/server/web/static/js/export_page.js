// The page of an exported file: one run, read from the file itself.

import { LocalSource } from "./local_source.js";
import { RunView } from "./run_view.js";

function openExport() {
  const data = JSON.parse(document.getElementById("endlex-data").textContent);
  const source = new LocalSource(data);
  document.documentElement.dataset.exported = "true";
  window.endlexRun = new RunView(source, data.run, document.getElementById("main"));
}

openExport();
