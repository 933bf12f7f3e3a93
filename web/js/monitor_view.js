// What a monitor node shows: the run's numbers, the heat map, and the block map of the cell that was picked.

import { cellText, duration, headline, integer, numberText, progress } from "./lib/format.js";
import { moved } from "./lib/heat_map_grid.js";
import { isFor } from "./lib/ids.js";
import { VERSION, choose, emptyModel, lastSparseStep, lastStep, receive, replace, scaleOf, shownRun, stepNumbers } from "./lib/model.js";
import { gradient } from "./lib/palette.js";
import { choice, el, legend, setText } from "./monitor_dom.js";
import { HeatMap, hatchCss } from "./monitor_heat_map.js";
import { MapPanel } from "./monitor_map.js";

export class MonitorView {
  /**
   * `t`: a translator; `load(route, query)` resolves to a Response of the pack's routes; `names()`: the node's as the server knows it;
   * `wheel(event)`: what a turn of the wheel does.
   */
  constructor({ t, load, names, wheel }) {
    Object.assign(this, { t, load, names, wheel });
    this.model = emptyModel();
    this.quantity = "density";
    this.cell = null;
    this.since = null; // messages that arrive while the server is asked for everything
    this.frame = 0;
    this.element = el("div", { class: "sparge-monitor widget-expands" }); // the second: "Nodes 2.0" gives it the node's whole height
    this.problem = null; // with the server: "unreachable" or "outdated"
  }

  /** Starts to listen to the user. */
  attach() {
    if (this.listening) return;
    this.listening = new AbortController();
    this.build(this.listening.signal);
    this.observer = new ResizeObserver(([{ contentRect: { width, height } }]) => {
      this.heat.resize(width, height);
      this.schedule();
    });
    this.observer.observe(this.heat.canvas);
    this.schedule();
  }

  /** Undoes `attach`: nothing of the page holds on to this view afterwards. */
  detach() {
    this.listening?.abort();
    this.listening = null;
    this.observer?.disconnect();
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    this.since = null;
    this.element.replaceChildren();
  }

  build(signal) {
    const t = this.t;
    this.progress = el("span", { class: "sparge-faded" });
    this.runs = el("select", { "aria-label": t("runs"), title: t("runs") });
    this.headline = el("div", { class: "sparge-headline" });
    this.warning = el("div", { class: "sparge-warning", role: "alert" });
    this.note = el("div", { class: "sparge-faded" });
    this.numbers = el("table");
    this.heat = new HeatMap();
    this.quantities = choice(t("quantity"), (value) => this.pick(value), signal);
    this.legend = legend(gradient(), ...this.swatches());
    this.cellLine = el("div", { class: "sparge-cell", role: "status", "aria-live": "polite" });
    this.reasonsTitle = el("div", { class: "sparge-faded", text: t("denseBecause") });
    this.reasons = el("ul", { class: "sparge-reasons", tabindex: "0", "aria-label": t("denseBecause") });
    this.cost = el("div", { class: "sparge-faded" });
    this.map = new MapPanel(t, this.load, () => this.closeMap(), signal);
    const picture = [this.quantities.element, this.heat.element, this.legend.element, this.cellLine];
    const stage = el("div", { class: "sparge-stage" }, ...picture, this.map.element);
    const top = el("div", { class: "sparge-row" }, this.progress, this.runs);
    const parts = [top, this.headline, this.warning, this.note, this.numbers, stage, this.reasonsTitle, this.reasons, this.cost];
    this.element.replaceChildren(...parts);
    this.listen(signal);
  }

  swatches() {
    const swatch = (background, text) => [el("span", { class: "sparge-swatch", style: `background: ${background}` }), el("span", { text })];
    return [...swatch(hatchCss(), this.t("dense")), ...swatch("var(--sparge-paper)", this.t("missing"))];
  }

  listen(signal) {
    const canvas = this.heat.canvas;
    const on = (target, type, handler) => target.addEventListener(type, handler, { signal });
    on(canvas, "pointermove", (event) => this.hover(this.heat.cellAt(event.offsetX, event.offsetY)));
    on(canvas, "pointerleave", () => this.hover(null));
    on(canvas, "click", (event) => {
      const cell = this.heat.cellAt(event.offsetX, event.offsetY);
      if (cell) this.point(cell, true);
    });
    on(canvas, "keydown", (event) => this.key(event));
    on(this.map.element, "keydown", (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation();
      this.closeMap();
    });
    on(this.element, "wheel", (event) => {
      if (this.reasons.contains(event.target) && this.reasons.scrollHeight > this.reasons.clientHeight) event.stopPropagation();
      else this.wheel(event);
    });
    on(this.runs, "change", () => {
      this.model = choose(this.model, Number(this.runs.value));
      this.schedule();
    });
    // A press on a control is not the beginning of a drag of the node.
    for (const control of [canvas, this.runs, this.reasons, this.quantities.element, this.map.element]) {
      on(control, "pointerdown", (event) => event.stopPropagation());
    }
  }

  /** A message of the server; one for other monitors is passed over. */
  receive(message) {
    if (!this.listening || !isFor(message, this.names())) return;
    if (message.version !== VERSION) return this.fail("outdated");
    if (this.problem) {
      this.problem = null; // it is there again; what was missed meanwhile is asked for
      this.refresh();
    }
    this.since?.push(message);
    this.update(receive(this.model, message));
  }

  /** Asks the server for everything it keeps: at the beginning, and after the connection was lost. */
  async refresh() {
    if (!this.listening) return;
    const since = (this.since = []); // also tells this request apart from a later one
    try {
      const answers = await Promise.all(this.names().map((name) => this.ask(name)));
      if (this.since !== since) return;
      this.problem = null;
      this.update(replace(this.model, answers.flatMap(({ runs }) => runs), since));
      if (answers.some(({ version }) => version !== VERSION)) this.fail("outdated");
    } catch {
      if (this.since !== since) return;
      this.fail("unreachable");
    }
    this.since = null;
  }

  async ask(name) {
    const response = await this.load("runs", { monitor: name });
    if (!response.ok) throw new Error(`HTTP ${response.status}`);
    return { runs: [], ...(await response.json()) };
  }

  fail(problem) {
    this.problem = problem;
    this.schedule();
  }

  update(model) {
    if (model === this.model) return;
    this.model = model;
    this.schedule();
  }

  schedule() {
    if (!this.frame && this.listening) this.frame = requestAnimationFrame(() => this.render());
  }

  render() {
    this.frame = 0;
    const run = shownRun(this.model);
    if (run?.number !== this.number) {
      this.number = run?.number;
      this.cell = null;
      if (this.map.isOpen) this.closeMap();
    }
    this.showText(run);
    this.heat.element.style.visibility = run?.steps ? "" : "hidden"; // else the last run of a server that was restarted would stay on it
    if (run) this.showHeat(run);
  }

  showText(run) {
    const t = this.t;
    setText(this.progress, run ? progress(run, t) : t("waiting"));
    this.progress.title = this.progress.textContent;
    this.showRuns();
    setText(this.headline, run ? headline(run, t) : "");
    setText(this.warning, run?.warning ?? "");
    setText(this.note, this.problem ? t(this.problem) : (run?.note ?? ""));
    setText(this.cost, run && Number.isFinite(run.totals.measuring_ms) ? t("measuring", { time: duration(run.totals.measuring_ms, t) }) : "");
    this.numbers.replaceChildren(...(run && lastStep(run) >= 0 ? this.rows(run) : []));
    this.reasons.replaceChildren(...(run?.reasons ?? []).map(([reason, n]) => el("li", { text: t("reason", { n: integer(n, t), reason }) })));
    this.reasonsTitle.hidden = this.reasons.hidden = !run?.reasons.length;
    for (const line of [this.headline, this.warning, this.note, this.cost, this.numbers]) line.hidden = !line.hasChildNodes();
  }

  showRuns() {
    const numbers = this.model.runs.map((run) => run.number);
    this.runs.hidden = numbers.length < 2;
    if ([...this.runs.options].map((option) => Number(option.value)).join() !== numbers.join()) {
      this.runs.replaceChildren(...numbers.map((number) => el("option", { value: number, text: this.t("runNumber", { n: number }) })));
    }
    const shown = String(shownRun(this.model)?.number ?? "");
    if (this.runs.value !== shown) this.runs.value = shown;
  }

  rows(run) {
    const t = this.t;
    const step = lastStep(run);
    const row = (title, numbers) => {
      const texts = run.columns.map(({ name, unit }) => numberText(unit, numbers[name], t));
      return el("tr", {}, el("th", { scope: "row", text: title }), ...texts.map((text) => el("td", { text })));
    };
    const head = el("tr", {}, el("td"), ...run.columns.map((column) => el("th", { scope: "col", text: t.label(column) })));
    return [head, row(t("stepColumn", { n: step + 1 }), stepNumbers(run, step)), row(t("runColumn"), run.totals)];
  }

  showHeat(run) {
    const t = this.t;
    const shown = run.columns.filter(({ unit }) => unit !== "calls");
    const titleOf = (column) => (t.has(`${column.name}Title`) ? t(`${column.name}Title`) : t.label(column));
    this.quantities.offer(shown.map((column) => ({ value: column.name, text: t.label(column), title: titleOf(column) })));
    const quantity = shown.find(({ name }) => name === this.quantity) ?? shown[0];
    if (!quantity) return;
    this.quantities.set(quantity.name);
    const { max, clipped } = scaleOf(run, quantity.name);
    setText(this.legend.low, numberText(quantity.unit, 0, t));
    const top = numberText(quantity.unit, max, t);
    setText(this.legend.high, clipped ? t("atLeast", { n: top }) : top);
    this.heat.canvas.setAttribute("aria-label", t("heatMap", { quantity: t.label(quantity), steps: run.steps, layers: run.layers }));
    this.heat.draw(run, quantity.name, t);
    this.heat.point(this.cell);
    this.tellCell(run);
    if (this.map.isOpen) this.offerHeads(run);
  }

  tellCell(run, cell = this.cell) {
    const text = !run ? "" : cell ? cellText(run, cell, this.t) : this.t("hint");
    setText(this.cellLine, text);
    this.cellLine.title = text;
  }

  pick(quantity) {
    this.quantity = quantity;
    this.schedule();
  }

  hover(cell) {
    this.tellCell(shownRun(this.model), cell ?? this.cell);
  }

  /** Moves the cursor to a cell, and opens its block map where `opens`. */
  point(cell, opens) {
    const run = shownRun(this.model);
    if (!run) return;
    this.cell = cell;
    this.heat.point(cell);
    this.tellCell(run);
    if (!opens) return;
    this.map.open({ run: run.number, ...cell, head: "" });
    this.offerHeads(run);
    this.map.close_.focus();
  }

  offerHeads(run) {
    const wanted = this.map.wanted;
    const isLast = (wanted ?? this.cell)?.step === lastSparseStep(run);
    // The server keeps the heads of one step: when that has changed, the map of the head that is still shown would stand under the label "all".
    if (!isLast && wanted?.head) this.map.open({ ...wanted, head: "" });
    this.map.offerHeads(run.heads, isLast);
  }

  closeMap() {
    const hadFocus = this.map.element.contains(document.activeElement);
    this.map.close();
    if (hadFocus) this.heat.canvas.focus();
  }

  key(event) {
    const run = shownRun(this.model);
    if (!run || event.ctrlKey || event.metaKey || event.altKey) return;
    const to = moved(this.cell, event.key, run.steps, run.layers, lastStep(run));
    if (to) this.point(to, false);
    else if (event.key === "Enter" && this.cell) this.point(this.cell, true);
    else if (event.key === "Escape" && this.cell) {
      this.cell = null;
      this.heat.point(null);
      this.tellCell(run);
    } else return;
    event.preventDefault();
    event.stopPropagation();
  }
}
