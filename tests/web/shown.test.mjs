import assert from "node:assert/strict";
import { test } from "node:test";

import { cellText, duration, headline, integer, numberText, progress, share } from "../../web/js/lib/format.js";
import { cellAt, cellBox, heatMapGrid, moved, ticks, tileColumns } from "../../web/js/lib/heat_map_grid.js";
import { isFor, nameOf, newId, numbersOf } from "../../web/js/lib/ids.js";
import { readMap } from "../../web/js/lib/map.js";
import { emptyModel, receive, shownRun } from "../../web/js/lib/model.js";
import { COLOURS, HATCH, STOPS, TABLE, gradient, rgb } from "../../web/js/lib/palette.js";
import { LANGUAGES, STRINGS, translator } from "../../web/js/lib/strings.js";

const t = translator("en");

// Strings

test("every language has the same sentences with the same blanks", () => {
  const blanks = (text) => [...new Set(text.match(/\{\w+\}/g) ?? [])].sort();
  for (const [key, row] of Object.entries(STRINGS)) {
    assert.deepEqual(Object.keys(row), LANGUAGES, key);
    for (const language of LANGUAGES) assert.deepEqual(blanks(row[language]), blanks(row.en), `${language}.${key}`);
  }
});

test("the language follows the locale, English where it is not spoken", () => {
  assert.equal(translator("zh")("close"), STRINGS.close.zh);
  assert.equal(translator("zh-TW")("close"), STRINGS.close.zh);
  for (const other of ["fr", undefined, null, "", "constructor"]) assert.equal(translator(other)("close"), STRINGS.close.en);
  assert.equal(t("stepOf", { step: 3, steps: 20 }), "step 3 of 20");
});

// Numbers

test("shares keep the digits that tell them apart", () => {
  assert.deepEqual([0, 1, 0.5, 0.1234, 0.0321, 0.00004, null, NaN].map(share), ["0", "1", "0.50", "0.12", "0.032", "4e-5", "–", "–"]);
});

test("durations", () => {
  const texts = [0, 0.04, 8.26, 512, 1500, 41000, 125000, null].map((ms) => duration(ms, t));
  assert.deepEqual(texts, ["0 ms", "0.0 ms", "8.3 ms", "512 ms", "1.5 s", "41 s", "2 min 05 s", "–"]);
  assert.deepEqual([59499, 59970, 119700].map((ms) => duration(ms, t)), ["59 s", "1 min 00 s", "2 min 00 s"]); // never 60 s, nor 0 min
  assert.equal(integer(32760, t), "32,760");
});

const run = (totals, changes = {}) => ({ state: "running", totals: { sparse_calls: 4, ...totals }, ...changes });

test("the headline says what was measured, its spread and what it is compared with", () => {
  const measured = (speedup, speedup_low, speedup_high, more = {}) => ({ speedup, speedup_low, speedup_high, compared_calls: 5, saved_ms: null, ...more });
  const dense = { comparedWith: "dense" };
  const faster = measured(2.14, 1.9, 2.43, { saved_ms: 41000 });
  assert.equal(headline(run(faster, dense), t), "attention 2.1x faster than dense (1.9 to 2.4, 5 measured calls), 41 s saved so far");
  assert.equal(headline(run(faster, { ...dense, state: "done" }), t), "attention 2.1x faster than dense (1.9 to 2.4, 5 measured calls), 41 s saved");
  const slower = measured(0.5, 0.4, 0.8, { saved_ms: -2000 });
  assert.equal(headline(run(slower, dense), t), "attention 2.0x slower than dense (1.3 to 2.5, 5 measured calls), 2.0 s lost so far");
  const other = { comparedWith: "attention_override_sage of comfyui-kjnodes" };
  assert.equal(headline(run(measured(1.2, 1.02, 1.3), other), t),
    "attention 1.20x faster than attention_override_sage of comfyui-kjnodes (1.02 to 1.30, 5 measured calls)");
  assert.equal(headline(run(measured(null, 0.9, 1.3), dense), t), "attention: no clear difference from dense (0.9 to 1.3x, 5 measured calls)");
  assert.equal(headline(run(measured(null, 0.98, 1.02), dense), t), "attention: no clear difference from dense (0.98 to 1.02x, 5 measured calls)");
  assert.equal(headline(run(measured(null, 0.04, 2), dense), t), "attention: no clear difference from dense (0.04 to 2.00x, 5 measured calls)");
  const few = { speedup: null, speedup_low: null, speedup_high: null, compared_calls: 2, saved_ms: null };
  assert.equal(headline(run(few, dense), t), "speed-up: too few calls to compare with dense (2 measured)");
  assert.equal(headline(run({ ...few, compared_calls: 0 }), t), "speed-up: not measured so far");
  assert.match(headline(run({}, { state: "done" }), t), /not measured \(needs measure_dense/);
  assert.match(headline(run(faster, dense), translator("zh")), /^注意力比稠密快 2.1 倍（1.9 至 2.4，实测 5 次调用）/);
  assert.equal(headline(run({ sparse_calls: 0, speedup: 2 }), t), "no sparse call so far");
  assert.equal(headline(run({ sparse_calls: 0 }, { state: "done" }), t), "nothing ran sparse");
});

test("progress and cells in words", () => {
  const index = (name) => ({ name, unit: "index" });
  const shares = ["density", "pv_skipped"].map((name) => ({ name, unit: "share", label: name === "density" ? name : "PV skipped" }));
  const calls = ["sparse_calls", "dense_calls"].map((name) => ({ name, unit: "calls", label: name }));
  const columns = [index("step"), index("layer"), ...shares, { name: "ms", unit: "ms", label: "time" }, ...calls];
  const cells = [[0, 0, 0.25, 0.125, 8.3, 2, 1], [0, 1, null, null, 40, 0, 3], [1, 0, 0.5, 0, 3, 1, 0]];
  const message = { version: 3, run: 1, state: "running", step: 1, steps: 3, layers: 2, heads: 24, tokens: 32760, columns, cells };
  const shown = shownRun(receive(emptyModel(), message));
  assert.equal(progress(shown, t), "running · step 1 of 3 · 2 layers · 24 heads · 32,760 tokens");
  assert.equal(cellText(shown, { step: 0, layer: 0 }, t), "step 1, layer 0: density 0.25, PV skipped 0.13, 8.3 ms, 2 sparse, 1 dense");
  assert.equal(cellText(shown, { step: 0, layer: 1 }, t), "step 1, layer 1: 40 ms, 3 dense");
  assert.equal(cellText(shown, { step: 1, layer: 0 }, t), "step 2, layer 0: density 0.50, PV skipped 0, 3.0 ms, 1 sparse");
  assert.equal(cellText(shown, { step: 2, layer: 1 }, t), "step 3, layer 1: not run");
  const without = shownRun(receive(emptyModel(), { version: 3, run: 2, state: "done", step: 0, steps: 0, layers: 0, columns, cells: [] }));
  assert.equal(progress(without, t), "done", "without Sparge Attention no steps are known");
});

test("a number is written as its unit is", () => {
  assert.deepEqual(["share", "ms", "calls", "eggs"].map((unit) => numberText(unit, 1234, t)), ["1234.00", "1.2 s", "1,234", "1,234"]);
  assert.equal(numberText("share", undefined, t), "–");
});

test("a statistic is called as the language has it, else as the message says", () => {
  const column = { name: "density", label: "density" };
  assert.deepEqual([t.label(column), translator("zh").label(column), translator("zh").label({ name: "energy", label: "energy kept" })],
    ["density", "密度", "energy kept"]);
});

// Colours

const luminance = (colour) => {
  const [r, g, b] = colour.map((value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};

test("colours grow lighter with the number, so that they are told apart without hue", () => {
  for (let i = 8; i < 256; i++) assert.ok(luminance(rgb(i / 255)) > luminance(rgb((i - 8) / 255)), String(i)); // neighbours differ by rounding
  assert.ok(luminance(rgb(1)) > 10 * luminance(rgb(0)));
});

test("colours at the ends, outside, and in the tables", () => {
  assert.deepEqual(rgb(0), STOPS[0]);
  assert.deepEqual(rgb(1), STOPS.at(-1));
  assert.deepEqual([rgb(-5), rgb(NaN), rgb(9)], [rgb(0), rgb(0), rgb(1)]);
  assert.equal(COLOURS[255], "rgb(253,231,37)");
  assert.equal(COLOURS.length, 256);
  assert.deepEqual([...TABLE.slice(255 * 4)], [253, 231, 37, 255]);
  assert.equal(gradient().match(/rgb/g).length, STOPS.length);
});

test("the greys of a dense cell are no colour of the scale", () => {
  const greys = HATCH.map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  for (const grey of greys) {
    for (let i = 0; i < 256; i++) {
      const colour = rgb(i / 255);
      assert.ok(Math.hypot(...grey.map((value, channel) => value - colour[channel])) > 25, `${grey} and ${colour}`);
    }
  }
});

// Places

for (const [width, height, steps, layers, ratio] of [[440, 240, 50, 60, 1], [440, 240, 20, 6, 2], [301, 173, 7, 3, 1.5], [200, 100, 150, 90, 1]]) {
  test(`every pixel of a ${steps} x ${layers} map belongs to the cell that is painted there, at ratio ${ratio}`, () => {
    const grid = heatMapGrid(width, height, steps, layers, ratio);
    for (let step = 0; step < steps; step++) {
      for (let layer = 0; layer < layers; layer++) {
        const box = cellBox(grid, step, layer);
        assert.ok(box.x >= grid.left && box.x + box.width <= grid.right && box.y >= grid.top && box.y + box.height <= grid.bottom);
        if (!box.width || !box.height) continue;
        for (const [x, y] of [[box.x, box.y], [box.x + box.width - 0.5, box.y + box.height - 0.5]]) {
          assert.deepEqual(cellAt(grid, x / ratio, y / ratio), { step, layer });
        }
      }
    }
  });
}

test("beside the grid there is no cell", () => {
  const grid = heatMapGrid(440, 240, 5, 5);
  for (const [x, y] of [[0, 50], [439, 50], [100, 0], [100, 239], [NaN, 50]]) assert.equal(cellAt(grid, x, y), null);
  assert.equal(cellAt(heatMapGrid(440, 240, 0, 0), 100, 100), null);
  assert.equal(cellAt(heatMapGrid(0, 0, 5, 5), 0, 0), null);
});

test("cells do not overlap", () => {
  const grid = heatMapGrid(333, 222, 13, 17);
  for (let i = 1; i < 13; i++) assert.ok(cellBox(grid, i - 1, 0).x + cellBox(grid, i - 1, 0).width <= cellBox(grid, i, 0).x);
});

test("labels begin at 0 and keep apart", () => {
  assert.deepEqual(ticks(6, 300, 20), [0, 1, 2, 3, 4, 5]);
  assert.deepEqual(ticks(50, 400, 26), [0, 5, 10, 15, 20, 25, 30, 35, 40, 45]);
  assert.deepEqual(ticks(50, 400, 26, 1), [0, 4, 9, 14, 19, 24, 29, 34, 39, 44, 49]);
  assert.deepEqual(ticks(12, 400, 26, 1), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]);
  assert.deepEqual(ticks(0, 300, 20), []);
  assert.deepEqual(ticks(5000, 10, 20), [0]);
});

test("keys move the cursor within the map", () => {
  assert.deepEqual(moved(null, "ArrowLeft", 5, 3, 2), { step: 2, layer: 0 });
  assert.deepEqual(moved({ step: 0, layer: 0 }, "ArrowLeft", 5, 3, 2), { step: 0, layer: 0 });
  assert.deepEqual(moved({ step: 4, layer: 2 }, "ArrowDown", 5, 3, 2), { step: 4, layer: 2 });
  assert.deepEqual(moved({ step: 1, layer: 1 }, "ArrowRight", 5, 3, 2), { step: 2, layer: 1 });
  assert.deepEqual(moved({ step: 1, layer: 1 }, "End", 5, 3, 2), { step: 4, layer: 1 });
  assert.deepEqual(moved({ step: 1, layer: 1 }, "PageUp", 5, 3, 2), { step: 1, layer: 0 });
  assert.equal(moved({ step: 1, layer: 1 }, "Enter", 5, 3, 2), undefined);
  assert.equal(moved(null, "ArrowLeft", 0, 0, -1), undefined);
});

test("tiles fill their box", () => {
  assert.equal(tileColumns(4, 10, 10, 200, 200), 2);
  assert.equal(tileColumns(4, 10, 10, 400, 100), 4);
  assert.equal(tileColumns(4, 40, 10, 100, 400), 1);
  assert.equal(tileColumns(1, 10, 10, 0, 0), 1);
});

// Ids

const deepest = { nodes: [] };
const inner = { nodes: [{ id: 7, subgraph: deepest }] };
const middle = { nodes: [{ id: 8, subgraph: inner }, { id: 9 }] };
const root = { nodes: [{ id: 1 }, { id: 5, subgraph: middle }, { id: "6", subgraph: middle }] };

test("a node is called by its way through the subgraphs", () => {
  assert.deepEqual(numbersOf({ id: 12, graph: root }, root), ["12"]);
  assert.deepEqual(numbersOf({ id: "12", graph: root }, root), ["12"]);
  assert.deepEqual(numbersOf({ id: 3, graph: inner }, root), ["5:8:3", "6:8:3"]);
  assert.deepEqual(numbersOf({ id: 4, graph: deepest }, root), ["5:8:7:4", "6:8:7:4"]);
  assert.deepEqual(numbersOf({ id: 9, graph: { nodes: [] } }, root), []);
});

test("subgraphs deep in each other are followed, and a circle ends", () => {
  const graphs = Array.from({ length: 18 }, () => ({ nodes: [] }));
  for (let depth = 1; depth < 18; depth++) graphs[depth - 1].nodes.push({ id: depth, subgraph: graphs[depth] });
  const way = (depth) => Array.from({ length: depth }, (_, n) => n + 1).join(":");
  assert.deepEqual(numbersOf({ id: "x", graph: graphs[16] }, graphs[0]), [`${way(16)}:x`]);
  assert.deepEqual(numbersOf({ id: "x", graph: graphs[17] }, graphs[0]), [`${way(17)}:x`]);
  const circle = { nodes: [] };
  circle.nodes.push({ id: 1, subgraph: circle });
  assert.deepEqual(numbersOf({ id: "x", graph: { nodes: [] } }, circle), []);
});

test("a node's own id stands before its number", () => {
  assert.equal(nameOf("0f3c", "5:12"), "0f3c/5:12");
  assert.equal(nameOf("", "5:12"), "5:12");
  assert.equal(nameOf(undefined, 12), "12");
});

test("ids are drawn anew", () => {
  const drawn = new Set(Array.from({ length: 100 }, newId));
  assert.equal(drawn.size, 100);
  for (const id of drawn) assert.match(id, /^[0-9a-f]{16}$/);
});

test("messages find their monitors", () => {
  assert.equal(isFor({ monitors: ["12", "5:8:3"] }, ["5:8:3"]), true);
  assert.equal(isFor({ monitors: [12] }, ["12"]), true);
  assert.equal(isFor({ monitors: ["3"] }, ["5:8:3"]), false);
  for (const broken of [null, {}, { monitors: "12" }]) assert.equal(isFor(broken, ["12"]), false);
});

// Block maps

test("a block map is read, and a damaged one refused", () => {
  const text = (bytes) => Buffer.from(bytes).toString("base64");
  const answer = { version: 3, rows: 2, columns: 3, n_q: 5, n_k: 9, values: text([0, 1, 2, 3, 4, 255]), frames: null };
  assert.deepEqual([...readMap(answer).values], [0, 1, 2, 3, 4, 255]);
  assert.equal(readMap(answer).frames, null);
  const frames = { t: 2, h: 1, w: 2, queries: text([1, 2, 3, 4]), keys: text([5, 6, 7, 8]) };
  assert.deepEqual([...readMap({ ...answer, frames }).frames.keys], [5, 6, 7, 8]);
  const wrong = [null, { ...answer, version: 1 }, { ...answer, rows: 3 }, { ...answer, values: "" }, { ...answer, frames: { ...frames, t: 3 } }];
  for (const broken of wrong) assert.throws(() => readMap(broken), Error);
});
