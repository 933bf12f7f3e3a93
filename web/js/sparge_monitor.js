// The node SpargeMonitor in the browser: numbers of a run while it is sampled.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { namesOf } from "./lib/ids.js";
import { translator } from "./lib/strings.js";
import { addStyle } from "./monitor_dom.js";
import { MonitorView } from "./monitor_view.js";

const NODE = "SpargeMonitor";
const MIN_HEIGHT = 480;
const SIZE = [460, 680];

const views = new Map(); // node -> view, of the nodes that are in a graph

app.registerExtension({
  name: "sparge.monitor",

  init() {
    addStyle();
    api.addEventListener("sparge.run", ({ detail }) => views.forEach((view) => view.receive(detail)));
    api.addEventListener("reconnected", () => views.forEach((view) => view.refresh()));
  },

  nodeCreated(node) {
    if (node.comfyClass === NODE) addMonitor(node);
  },

  // Only now does a node in a subgraph know its full name. And the front end does not call `onRemoved` for every node of the workflow before.
  afterConfigureGraph() {
    views.forEach((view, node) => (isInWorkflow(node) ? view.refresh() : leave(node)));
  },
});

function addMonitor(node) {
  const view = new MonitorView({
    t: translator(locale()),
    load: (address) => api.fetchApi(address),
    names: () => namesOf(node, rootGraph()),
    wheel: (event) => zoomGraph(view.element, event),
  });
  node.addDOMWidget("monitor", "sparge_monitor", view.element, { serialize: false, hideOnZoom: false, getMinHeight: () => MIN_HEIGHT });
  node.setSize([Math.max(node.size[0], SIZE[0]), Math.max(node.size[1], SIZE[1])]);
  const enter = () => {
    views.set(node, view);
    view.attach();
    requestAnimationFrame(() => takePlace(node, view.element));
  };
  chain(node, "onAdded", enter);
  chain(node, "onRemoved", () => leave(node));
  if (node.graph) enter();
}

function leave(node) {
  views.get(node)?.detach();
  views.delete(node);
}

// In "Nodes 2.0" the front end puts a panel into the page when it makes its node's frame. An undo, or a subgraph that is entered at once, replaces a
// node by another of the same id; the frame then stays, with the removed node's panel in it, which `detach` has emptied. The new node's panel would
// never come into the page: it takes the empty one's place here.
function takePlace(node, element) {
  if (element.isConnected || node.graph !== app.canvas.graph) return;
  document.querySelector(`[data-node-id="${CSS.escape(node.id)}"] .sparge-monitor:empty`)?.replaceWith(element);
}

function isInWorkflow(node) {
  const root = rootGraph();
  return node.graph === root || root.subgraphs?.get(node.graph?.id) === node.graph;
}

function rootGraph() {
  return app.rootGraph ?? app.graph;
}

// The graph zooms as it does beside the panel. As a part of the page ("Nodes 2.0") the panel lets the wheel through by itself.
function zoomGraph(element, event) {
  if (element.closest("[data-node-id]")) return;
  event.preventDefault();
  app.canvas.canvas.dispatchEvent(new WheelEvent(event.type, event));
}

function chain(node, name, added) {
  const before = node[name];
  node[name] = function (...values) {
    const result = before?.apply(this, values);
    added();
    return result;
  };
}

function locale() {
  return app.extensionManager?.setting?.get("Comfy.Locale") ?? app.ui?.settings?.getSettingValue("Comfy.Locale");
}
