// The page of an exported file: one run, read from the file itself.

import { LocalSource } from "./local_source.js";
import { RunView } from "./run_view.js";

const data = JSON.parse(document.getElementById("endlex-data").textContent);
document.documentElement.dataset.exported = "true";
new RunView(new LocalSource(data), data.run, document.getElementById("main"));
