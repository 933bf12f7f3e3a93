// The node SpargeAttention in the browser: the line that says what its runs did, and files of before its inputs had their order. Workflow files hold
// the values of widgets by position, and those of before 0.1.0 had another order, the share to keep first. In today's, the name of a preset is first.

import { app } from "../../../scripts/app.js";
import { LineView } from "./line_view.js";
import { Panels } from "./node_panel.js";

const NODE = "SpargeAttention";
const MIN_HEIGHT = 112; // five lines of text; more scroll, so that the node keeps its height
const SIZE = [300, 0];
const OLD_ORDER = ["topk", "pvthreshd", "start_percent", "end_percent", "dense_blocks", "min_tokens", "simthreshd1", "cdfthreshd", "token_order",
  "compensate", "protect_references", "backend", "preset"];
const GONE = "block_mask"; // a socket that no node had an output for

const panels = new Panels("sparge.line", (services) => new LineView(services), MIN_HEIGHT);

app.registerExtension({
  name: "sparge.attention",

  init: () => panels.listen(),

  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    panels.add(node, [SIZE[0], node.size[1] + MIN_HEIGHT]);
    const before = node.onConfigure;
    node.onConfigure = function (saved) {
      if (typeof saved.widgets_values?.[0] === "number") fromOldOrder(this, saved.widgets_values);
      return before?.call(this, saved);
    };
  },

  afterConfigureGraph: () => panels.configured(),
});

// Runs after the front end has given out the values by position. It joins sockets to links by their names, and keeps those that it does not know.
function fromOldOrder(node, values) {
  for (const widget of node.widgets) {
    const at = OLD_ORDER.indexOf(widget.name);
    if (at >= 0) widget.value = values[at] ?? "auto"; // the last one came later: files without it got its default
  }
  const gone = node.findInputSlot(GONE);
  if (gone >= 0) node.removeInput(gone);
}
