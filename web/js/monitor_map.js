// The block map of one cell: what its queries kept of its keys, as a picture and, for video, frame by frame.

import { integer } from "./lib/format.js";
import { tileColumns } from "./lib/heat_map_grid.js";
import { readMap } from "./lib/map.js";
import { TABLE, gradient } from "./lib/palette.js";
import { choice, el, legend, setText } from "./monitor_dom.js";

export class MapPanel {
  /** `load(route, query)` resolves to a Response of the server; `onClose()` is called when the user closes the panel. */
  constructor(t, load, onClose, signal) {
    this.t = t;
    this.load = load;
    this.wanted = null; // { run, step, layer, head }
    this.shown = null;
    this.part = "queries";
    this.title = el("strong");
    this.head = el("select", { title: t("headTitle"), "aria-label": t("head") });
    this.close_ = el("button", { type: "button", text: "✕", title: t("close"), "aria-label": t("close") });
    this.status = el("div", { role: "status" });
    this.picture = el("canvas", { role: "img" });
    this.axes = el("div", { class: "sparge-faded" });
    this.parts = choice(t("frames"), (value) => this.show(value), signal);
    this.parts.offer(["queries", "keys"].map((value) => ({ value, text: t(value), title: t(`${value}Title`) })));
    this.tiles = el("div", { class: "sparge-tiles" });
    const square = el("div", { class: "sparge-picture sparge-square" }, this.picture);
    const pictureSide = el("div", { class: "sparge-map-part" }, square, this.axes, legend(gradient()).element);
    this.frameBox = el("div", { class: "sparge-picture" }, this.tiles);
    this.frameSide = el("div", { class: "sparge-map-part" }, this.parts.element, this.frameBox);
    this.body = el("div", { class: "sparge-map-body" }, pictureSide, this.frameSide);
    const buttons = el("span", { class: "sparge-row" }, this.head, this.close_);
    const top = el("div", { class: "sparge-row" }, this.title, buttons);
    this.element = el("div", { class: "sparge-map", role: "dialog", hidden: "" }, top, this.status, this.body);
    this.close_.addEventListener("click", () => onClose(), { signal });
    this.head.addEventListener("change", () => this.open({ ...this.wanted, head: this.head.value }), { signal });
  }

  get isOpen() {
    return this.wanted !== null;
  }

  /** Shows a cell once the server has answered; an answer that is no longer wanted is dropped. */
  async open(wanted) {
    this.wanted = wanted;
    const { run, step, layer, head } = wanted;
    const title = this.t("blockMap", { step: step + 1, layer });
    setText(this.title, title);
    this.element.setAttribute("aria-label", title);
    this.element.hidden = false;
    this.tell(this.t("loading"));
    try {
      const response = await this.load("map", { run, step, layer, ...(head ? { head } : {}) });
      const answer = await response.json().catch(() => ({}));
      if (!response.ok) throw new Error(answer.error ?? `HTTP ${response.status}`);
      if (this.wanted === wanted) this.fill(readMap(answer));
    } catch (error) {
      if (this.wanted === wanted) this.tell(this.t("mapFailed", { error: error.message }));
    }
  }

  close() {
    this.wanted = null;
    this.shown = null;
    this.element.hidden = true;
    this.tiles.replaceChildren();
  }

  tell(text) {
    setText(this.status, text);
    this.status.hidden = !text;
    this.body.style.visibility = text ? "hidden" : "visible";
  }

  fill(map) {
    this.tell("");
    this.shown = map;
    paint(this.picture, map.columns, map.rows, map.values);
    const sizes = { n_q: integer(map.n_q, this.t), n_k: integer(map.n_k, this.t) };
    this.picture.setAttribute("aria-label", this.t("blockMapPicture", sizes));
    this.picture.title = this.t("blockMapPicture", sizes);
    setText(this.axes, `↓ ${this.t("queryAxis", { n: sizes.n_q })}   → ${this.t("keyAxis", { n: sizes.n_k })}`);
    this.frameSide.hidden = !map.frames;
    if (map.frames) this.show(this.part);
  }

  /** Shows what the queries or what the keys of every frame kept. */
  show(part) {
    this.part = part;
    this.parts.set(part);
    const { t: frames, h, w } = this.shown.frames;
    const { clientWidth: width, clientHeight: height } = this.frameBox;
    const columns = tileColumns(frames, w, h, width, height);
    const scale = Math.max(1, Math.min((width - 3 * columns) / (columns * w), height / (Math.ceil(frames / columns) * h) - 3 / h));
    const tiles = Array.from({ length: frames }, (_, n) => {
      const label = this.t("frame", { n: n + 1, total: frames });
      const tile = el("canvas", { role: "img", title: label, "aria-label": label });
      Object.assign(tile.style, { width: `${w * scale}px`, height: `${h * scale}px` });
      paint(tile, w, h, this.shown.frames[part].subarray(n * h * w, (n + 1) * h * w));
      return tile;
    });
    this.tiles.style.gridTemplateColumns = `repeat(${columns}, max-content)`;
    this.tiles.replaceChildren(...tiles);
  }

  /** The heads that can be asked for: those of the last sparse step. */
  offerHeads(heads, isLast) {
    const count = isLast ? heads : 0;
    if (this.head.options.length !== count + 1) {
      const options = Array.from({ length: count }, (_, n) => el("option", { value: n, text: `${this.t("head")} ${n}` }));
      this.head.replaceChildren(el("option", { value: "", text: `${this.t("head")}: ${this.t("allHeads")}` }), ...options);
    }
    this.head.disabled = !count;
    const head = this.wanted?.head ?? "";
    if (this.head.value !== head) this.head.value = Number(head) < count ? head : "";
  }
}

function paint(canvas, width, height, values) {
  canvas.width = width;
  canvas.height = height;
  const picture = new ImageData(width, height);
  for (let i = 0; i < values.length; i++) picture.data.set(TABLE.subarray(values[i] * 4, values[i] * 4 + 4), i * 4);
  canvas.getContext("2d").putImageData(picture, 0, 0);
}
