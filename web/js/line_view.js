// The line on a Sparge Attention node: before a run what is about to happen, after it what happened. It stays when the run is over, and comes back
// when the page is loaded again.

import { VERSION } from "./lib/model.js";
import { el } from "./monitor_dom.js";

export class LineView {
  /** As MonitorView's (see node_panel.js). */
  constructor({ t, load, names, wheel }) {
    Object.assign(this, { t, load, names, wheel });
    this.element = el("div", { class: "sparge-line widget-expands" });
    this.asked = null; // the question on its way; none once something newer has come
  }

  /** Starts to listen to the user. */
  attach() {
    if (this.listening) return;
    this.listening = new AbortController();
    const { signal } = this.listening;
    this.text = el("div", { class: "sparge-line-text", role: "status", "aria-live": "polite", tabindex: "0" });
    this.element.replaceChildren(this.text);
    // A press on the text selects it, and is not the beginning of a drag of the node.
    this.text.addEventListener("pointerdown", (event) => event.stopPropagation(), { signal });
    this.element.addEventListener("wheel", (event) => {
      if (this.text.contains(event.target) && this.text.scrollHeight > this.text.clientHeight) event.stopPropagation();
      else this.wheel(event);
    }, { signal });
    this.show(null);
  }

  /** Undoes `attach`: nothing of the page holds on to this view afterwards. */
  detach() {
    this.listening?.abort();
    this.listening = null;
    this.asked = null;
    this.element.replaceChildren();
  }

  /** A message of the server; one for other nodes is passed over. */
  receive(message) {
    if (!this.listening || !this.names().includes(String(message?.node))) return;
    this.asked = null;
    this.take(message);
  }

  /** Asks the server for the last line: at the beginning, and after the connection was lost. */
  async refresh() {
    if (!this.listening) return;
    const asked = (this.asked = {});
    let said;
    try {
      said = await Promise.all(this.names().map((node) => this.ask(node)));
    } catch {
      return; // what stands there stays; the monitor says that the server does not answer
    }
    if (this.asked !== asked) return;
    this.asked = null;
    const known = said.filter(Boolean);
    this.take(known.length ? known.reduce((one, other) => (other.number > one.number ? other : one)) : null);
  }

  async ask(node) {
    const response = await this.load("line", { node });
    if (!response.ok) throw new Error(`HTTP ${response.status}`);
    const { version, line } = await response.json();
    return version === VERSION ? line : { version, number: Infinity };
  }

  take(line) {
    if (line && line.version !== VERSION) this.show(this.t("outdated"));
    else this.show(typeof line?.text === "string" && line.text ? line.text : null);
  }

  // Each part of the line, between semicolons, begins on a line of its own, the first one in the text's full colour.
  show(text) {
    const said = text ?? this.t("noLineYet");
    if (said === this.said && this.text.hasChildNodes()) return;
    this.said = said;
    this.element.title = text ?? "";
    this.text.classList.toggle("sparge-faded", text === null);
    this.text.replaceChildren(...said.split("; ").map((part, at) => el("div", { class: at ? "sparge-faded" : "sparge-line-first", text: part })));
    this.text.scrollTop = 0;
  }
}
