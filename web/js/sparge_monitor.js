// The node SpargeMonitor in the browser: numbers of a run while it is sampled.

import { app } from "../../../scripts/app.js";
import { MonitorView } from "./monitor_view.js";
import { Panels } from "./node_panel.js";

const NODE = "SpargeMonitor";
const MIN_HEIGHT = 480;
const SIZE = [460, 680];

const panels = new Panels("sparge.run", (services) => new MonitorView(services), MIN_HEIGHT);

app.registerExtension({
  name: "sparge.monitor",

  init: () => panels.listen(),

  nodeCreated(node) {
    if (node.comfyClass === NODE) panels.add(node, SIZE);
  },

  afterConfigureGraph: () => panels.configured(),
});
