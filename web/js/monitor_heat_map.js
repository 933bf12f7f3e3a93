// The heat map's canvas: repaints only the cells whose look has changed.

import { cellAt, cellBox, heatMapGrid, ticks } from "./lib/heat_map_grid.js";
import { DENSE, MISSING, kindOf, scaleOf } from "./lib/model.js";
import { COLOURS, HATCH } from "./lib/palette.js";
import { el } from "./monitor_dom.js";

const BLANK = 0;
const HATCHED = 1;
const COLOUR = 2; // and 255 more
const COLOUR_HATCHED = COLOUR + 256; // a dense call's milliseconds

export class HeatMap {
  constructor() {
    this.canvas = el("canvas", { tabindex: "0", role: "application" });
    this.paper = el("div", { class: "sparge-paper" });
    this.labels = el("div", { class: "sparge-labels", "aria-hidden": "true" });
    this.cursor = el("div", { class: "sparge-cursor", hidden: "" });
    this.element = el("div", { class: "sparge-heat" }, this.paper, this.canvas, this.labels, this.cursor);
    this.context = this.canvas.getContext("2d");
    this.painted = new Uint16Array(0); // the look of every cell on the canvas
    this.grid = null;
    this.size = { width: 0, height: 0 };
  }

  /** Takes the canvas's size in CSS pixels. Reading it in `draw` would lay out the page once a message. */
  resize(width, height) {
    this.size = { width, height };
  }

  /** Paints what differs from what is on the canvas; returns how many cells that was. */
  draw(run, quantity, t) {
    this.place(run, t);
    const { max } = scaleOf(run, quantity);
    let count = 0;
    for (let index = 0; index < this.painted.length; index++) {
      const look = lookOf(run, quantity, max, index);
      if (look === this.painted[index]) continue;
      this.painted[index] = look;
      this.paint(Math.floor(index / run.layers), index % run.layers, look);
      count++;
    }
    return count;
  }

  // A canvas that is resized is empty, and so is one for another number of cells.
  place(run, t) {
    const { width, height } = this.size;
    const ratio = window.devicePixelRatio || 1;
    const key = [width, height, ratio, run.steps, run.layers, t.locale].join();
    if (key === this.key) return;
    this.key = key;
    this.grid = heatMapGrid(width, height, run.steps, run.layers, ratio);
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    this.painted = new Uint16Array(run.steps * run.layers);
    this.hatch = pattern(this.context, ratio, HATCH[0], HATCH[1]);
    this.veil = pattern(this.context, ratio, null, "rgba(255,255,255,0.6)");
    this.label(t);
  }

  paint(step, layer, look) {
    const { x, y, width, height } = cellBox(this.grid, step, layer);
    this.context.clearRect(x, y, width, height);
    if (look === BLANK) return;
    const isColour = look !== HATCHED;
    this.context.fillStyle = isColour ? COLOURS[(look - COLOUR) % 256] : this.hatch;
    this.context.fillRect(x, y, width, height);
    if (look < COLOUR_HATCHED) return;
    this.context.fillStyle = this.veil;
    this.context.fillRect(x, y, width, height);
  }

  label(t) {
    const { left, top, right, bottom, ratio, steps, layers } = this.grid;
    const px = (value) => `${value / ratio}px`;
    Object.assign(this.paper.style, { left: px(left), top: px(top), width: px(right - left), height: px(bottom - top) });
    const spans = [];
    const add = (kind, text, style) => {
      const span = el("span", { class: kind, text });
      Object.assign(span.style, style);
      spans.push(span);
    };
    for (const step of ticks(steps, (right - left) / ratio, 26, 1)) {
      const { x, width } = cellBox(this.grid, step, 0);
      add("sparge-x", String(step + 1), { left: px(Math.max(x + width / 2, left + 4 * ratio)), top: px(bottom + 2 * ratio) });
    }
    for (const layer of ticks(layers, (bottom - top) / ratio, 16)) {
      const { y, height } = cellBox(this.grid, 0, layer);
      add("sparge-y", String(layer), { top: px(Math.max(y + height / 2, top + 5 * ratio)) });
    }
    add("sparge-steps", t("stepAxis"), { top: px(bottom + 2 * ratio) });
    add("sparge-axis", t("layerAxis"), { top: px((top + bottom) / 2) });
    this.labels.replaceChildren(...spans);
  }

  cellAt(x, y) {
    return this.grid && cellAt(this.grid, x, y);
  }

  /** Frames a cell; null frames none. */
  point(cell) {
    this.cursor.hidden = !cell || !this.grid;
    if (this.cursor.hidden) return;
    const { x, y, width, height } = cellBox(this.grid, cell.step, cell.layer);
    const ratio = this.grid.ratio;
    const size = { left: x / ratio - 2, top: y / ratio - 2, width: width / ratio + 4, height: height / ratio + 4 };
    for (const [name, value] of Object.entries(size)) this.cursor.style[name] = `${value}px`;
  }
}

function lookOf(run, quantity, max, index) {
  const kind = kindOf(run, index);
  if (kind === MISSING) return BLANK;
  const value = run.cells[quantity][index];
  if (Number.isNaN(value)) return kind === DENSE ? HATCHED : BLANK;
  const colour = Math.round(Math.min(1, Math.max(0, value / max)) * 255);
  return (kind === DENSE ? COLOUR_HATCHED : COLOUR) + colour;
}

function pattern(context, ratio, ground, line) {
  const size = Math.max(4, Math.round(5 * ratio));
  const tile = el("canvas", { width: size, height: size });
  const draw = tile.getContext("2d");
  if (ground) {
    draw.fillStyle = ground;
    draw.fillRect(0, 0, size, size);
  }
  draw.strokeStyle = line;
  draw.lineWidth = Math.max(1, 1.2 * ratio);
  for (const shift of [-size, 0, size]) {
    draw.moveTo(shift - 1, size + 1);
    draw.lineTo(shift + size + 1, -1);
  }
  draw.stroke();
  return context.createPattern(tile, "repeat");
}

/** The hatching of dense cells as a CSS background, for the legend. */
export function hatchCss() {
  return `repeating-linear-gradient(135deg, ${HATCH[1]} 0 1px, ${HATCH[0]} 1px 4px)`;
}
