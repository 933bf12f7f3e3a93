// The node SpargeAttention in the browser: workflow files hold the values of its widgets by position, and those of before 0.1.0 had another order, the
// share to keep first. In today's, the name of a preset is first.

import { app } from "../../../scripts/app.js";

const NODE = "SpargeAttention";
const OLD_ORDER = ["topk", "pvthreshd", "start_percent", "end_percent", "dense_blocks", "min_tokens", "simthreshd1", "cdfthreshd", "token_order",
  "compensate", "protect_references", "backend", "preset"];
const GONE = "block_mask"; // a socket that no node had an output for

app.registerExtension({
  name: "sparge.attention",

  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const before = node.onConfigure;
    node.onConfigure = function (saved) {
      if (typeof saved.widgets_values?.[0] === "number") fromOldOrder(this, saved.widgets_values);
      return before?.call(this, saved);
    };
  },
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
