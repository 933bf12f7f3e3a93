// What the panels on our nodes share: they come and go with their nodes, know the names of these on the server, and hear what it sends.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { nameOf, newId, numbersOf } from "./lib/ids.js";
import { translator } from "./lib/strings.js";
import { addStyle } from "./monitor_dom.js";

const ID = "id"; // the input of the node

/**
 * The panels of one kind of node. `event`: what the server sends for them; `makeView(services)`: a panel with `element`, `attach()`, `detach()`
 * (which empties the element), `receive(message)` and `refresh()`; `minHeight`: of the panel with its margin.
 *
 * services: `t`, a translator; `names()`, of the node on the server; `load(route, query)`, which resolves to a Response; `wheel(event)`.
 */
export class Panels {
  constructor(event, makeView, minHeight) {
    Object.assign(this, { event, makeView, minHeight });
    this.views = new Map(); // node -> view, of the nodes that are in a graph
    this.asking = new Set(); // views that are about to ask the server
  }

  /** In `init` of the extension. */
  listen() {
    addStyle();
    api.addEventListener(this.event, ({ detail }) => this.views.forEach((view) => view.receive(detail)));
    api.addEventListener("reconnected", () => this.views.forEach((view) => this.ask(view)));
  }

  /** In `nodeCreated`: gives the node its id, and below its widgets a panel of at least `size`, which no file and no prompt holds. */
  add(node, size) {
    const widget = node.widgets?.find(({ name }) => name === ID);
    if (widget) this.giveId(node, widget);
    const view = this.makeView({ t: translator(locale()), load, wheel: (event) => zoomGraph(view.element, event),
      names: () => numbersOf(node, rootGraph()).map((number) => nameOf(widget?.value, number)) });
    const kind = view.element.classList[0];
    const options = { serialize: false, hideOnZoom: false, getMinHeight: () => this.minHeight };
    const panel = node.addDOMWidget(kind, kind.replaceAll("-", "_"), view.element, options);
    panel.serialize = false; // the one above is about prompts
    node.setSize([Math.max(node.size[0], size[0]), Math.max(node.size[1], size[1])]);
    const enter = () => {
      if (widget && this.isTaken(widget.value, node)) widget.value = newId();
      this.views.set(node, view);
      view.attach();
      this.ask(view);
      requestAnimationFrame(() => takePlace(node, view.element));
    };
    chain(node, "onAdded", enter);
    chain(node, "onRemoved", () => this.leave(node));
    if (node.graph) enter();
  }

  /** In `afterConfigureGraph`. Only now does a node in a subgraph know its full name. And the front end does not call `onRemoved` for every node of
   * the workflow before. */
  configured() {
    this.views.forEach((view, node) => (isInWorkflow(node) ? this.ask(view) : this.leave(node)));
  }

  // Once all is done that is going on: a node that is loaded comes into the graph first, and gets its id after that.
  ask(view) {
    if (this.asking.has(view)) return;
    this.asking.add(view);
    queueMicrotask(() => {
      this.asking.delete(view);
      view.refresh();
    });
  }

  leave(node) {
    this.views.get(node)?.detach();
    this.views.delete(node);
  }

  // Once for each node. A file gives the node back the one that it was saved with. A copy is another node: it comes without the number of the one
  // that it was made from. Inner nodes of a copied subgraph have theirs, and so have the newest front ends' clones until they come into the graph:
  // they are known by the id of another node that is there.
  giveId(node, widget) {
    hide(node, widget);
    widget.value = newId();
    chain(node, "onConfigure", (saved) => {
      const isCopy = saved.id == null || Number(saved.id) === -1 || String(saved.id) !== String(node.id);
      if (isCopy || !widget.value || (node.graph && this.isTaken(widget.value, node))) widget.value = newId();
      const view = this.views.get(node);
      if (view) this.ask(view);
    });
  }

  isTaken(id, except) {
    const has = (node) => node.widgets.some(({ name, value }) => name === ID && value === id);
    return [...this.views.keys()].some((node) => node !== except && isInWorkflow(node) && has(node));
  }
}

// Front ends hide it by themselves, as its schema says, but older ones keep its room, and all of them offer a socket for links.
function hide(node, widget) {
  widget.hidden = true;
  widget.options.hidden = true;
  widget.computeSize = () => [0, -4]; // a widget takes 4 more than it says
  const socket = node.inputs?.findIndex((input) => input.widget?.name === ID) ?? -1;
  if (socket >= 0) node.removeInput(socket);
}

// In "Nodes 2.0" the front end puts a panel into the page when it makes its node's frame. An undo, or a subgraph that is entered at once, replaces a
// node by another of the same id; the frame then stays, with the removed node's panel in it, which `detach` has emptied. The new node's panel would
// never come into the page: it takes the empty one's place here.
function takePlace(node, element) {
  if (element.isConnected || node.graph !== app.canvas.graph) return;
  document.querySelector(`[data-node-id="${CSS.escape(node.id)}"] .${element.classList[0]}:empty`)?.replaceWith(element);
}

function isInWorkflow(node) {
  const root = rootGraph();
  const isThere = node.graph === root || (node.graph && root.subgraphs?.get(node.graph.id) === node.graph);
  return Boolean(isThere) && node.graph.getNodeById(node.id) === node;
}

function rootGraph() {
  return app.rootGraph ?? app.graph;
}

async function load(route, query) {
  return api.fetchApi(`/sparge_attention/${route}?${new URLSearchParams({ ...query, client: await client() })}`);
}

// The name of this browser tab on the server. A tab that was reloaded keeps its own, a new one gets it with the first message of its socket.
async function client() {
  const known = () => api.clientId || window.name || "";
  if (known()) return known();
  await new Promise((resolve) => {
    api.addEventListener("status", resolve, { once: true });
    setTimeout(resolve, 3000);
  });
  return known();
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
    added(...values);
    return result;
  };
}

function locale() {
  return app.extensionManager?.setting?.get("Comfy.Locale") ?? app.ui?.settings?.getSettingValue("Comfy.Locale");
}
