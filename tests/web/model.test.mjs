import assert from "node:assert/strict";
import { test } from "node:test";

import { cellText } from "../../web/js/lib/format.js";
import {
  DENSE, MAX_LAYERS, MAX_RUNS, MISSING, SPARSE,
  choose, emptyModel, kindOf, lastSparseStep, lastStep, niceCeiling, receive, replace, scaleOf, shownRun, stepNumbers,
} from "../../web/js/lib/model.js";
import { translator } from "../../web/js/lib/strings.js";

const TOTALS = { density: 0.5, pv_skipped: 0.1, ms: 7, sparse_calls: 2, dense_calls: 1, speedup: 2, saved_ms: 5, measuring_ms: 1 };
const column = (name, unit) => ({ name, unit, label: name });
const INDICES = [column("step", "index"), column("layer", "index")];
const COLUMNS = [...INDICES, column("density", "share"), column("pv_skipped", "share"), column("ms", "ms"), column("sparse_calls", "calls"),
  column("dense_calls", "calls")];

function message(changes = {}) {
  return {
    version: 3, run: 7, monitors: ["12"], state: "running", step: 1, steps: 4, layers: 2, heads: 3, tokens: 5000, columns: COLUMNS,
    cells: [], step_totals: [], reasons: [], warning: null, note: null, totals: TOTALS, ...changes,
  };
}

const sparse = (step, layer, density = 0.25) => [step, layer, density, 0.125, 2, 1, 0];
const dense = (step, layer) => [step, layer, null, null, 8, 0, 1];
const all = (messages) => messages.reduce(receive, emptyModel());

test("an opening message and its steps fill one run", () => {
  const steps = [
    message({ cells: [sparse(0, 0), dense(0, 1)], step_totals: [[0, null, 0.25, 0.125, 10, 1, 1]] }),
    message({ step: 2, cells: [sparse(1, 0, 0.5)], step_totals: [sparse(1, null, 0.5)] }),
  ];
  const run = shownRun(all([message({ step: 0 }), ...steps]));
  assert.deepEqual([run.number, run.state, run.step, run.steps, run.layers, run.heads, run.tokens], [7, "running", 2, 4, 2, 3, 5000]);
  assert.deepEqual([...run.cells.density], [0.25, NaN, 0.5, NaN, NaN, NaN, NaN, NaN]);
  assert.deepEqual([0, 1, 2, 3].map((index) => kindOf(run, index)), [SPARSE, DENSE, SPARSE, MISSING]);
  assert.equal(lastStep(run), 1);
});

test("messages in any order, and repeated, end in the same run", () => {
  const messages = [
    message({ step: 0, layers: 0 }),
    message({ step: 1, cells: [sparse(0, 0)], step_totals: [sparse(0, null)], reasons: [["short", 1]] }),
    message({ step: 2, cells: [dense(0, 1), sparse(1, 0)], step_totals: [[0, null, 0.25, 0.125, 10, 1, 1], sparse(1, null)], reasons: [["short", 2]] }),
    message({ step: 4, state: "done", cells: [sparse(3, 1)], step_totals: [sparse(3, null)], note: "over" }),
  ];
  const plain = (model) => ({ ...shownRun(model), revision: 0 });
  const expected = plain(all(messages));
  assert.equal(expected.state, "done");
  assert.equal(expected.step, 4);
  for (const order of [[3, 2, 1, 0], [2, 0, 3, 1], [0, 0, 1, 3, 2, 1, 0, 3], [1, 3, 2]]) {
    assert.deepEqual(plain(all(order.map((i) => messages[i]))), expected, order.join());
  }
});

test("a message that says nothing new leaves the model as it is", () => {
  const model = all([message({ cells: [sparse(0, 0)] })]);
  assert.equal(receive(model, message({ cells: [sparse(0, 0)] })), model);
  assert.equal(receive(model, message({ step: 0 })), model);
  assert.notEqual(receive(model, message({ warning: "nothing ran sparse" })), model);
});

test("a cell or a step with fewer calls is an older one", () => {
  const twice = [0, 0, 0.5, 0, 6, 2, 1];
  const older = message({ cells: [sparse(0, 0)], step_totals: [sparse(0, null)] });
  const run = shownRun(all([message({ cells: [twice], step_totals: [[0, null, 0.5, 0, 7, 2, 2]] }), older]));
  assert.deepEqual(stepNumbers(run, 0), { density: 0.5, pv_skipped: 0, ms: 7, sparse_calls: 2, dense_calls: 2 });
  assert.deepEqual([run.cells.density[0], run.cells.ms[0], run.cells.sparse_calls[0], run.cells.dense_calls[0]], [0.5, 6, 2, 1]);
});

test("the model before a message is untouched", () => {
  const before = all([message({ cells: [sparse(0, 0)] })]);
  receive(before, message({ step: 2, cells: [sparse(0, 1), sparse(1, 0)] }));
  assert.deepEqual([...shownRun(before).cells.density].slice(0, 3), [0.25, NaN, NaN]);
});

test("a run grows with the layers and steps that its cells show", () => {
  const small = [message({ layers: 0, steps: 1 }), message({ cells: [sparse(0, 0)], layers: 1 })];
  const run = shownRun(all([...small, message({ step: 2, cells: [sparse(4, 2, 0.75)] })]));
  assert.deepEqual([run.steps, run.layers], [5, 3]);
  assert.equal(run.cells.density[0], 0.25);
  assert.equal(run.cells.density[4 * 3 + 2], 0.75);
  assert.equal(run.cells.density.filter((value) => !Number.isNaN(value)).length, 2);
});

test("at most four runs are kept, the newest is shown", () => {
  const model = all([1, 2, 3, 4, 5, 6].map((run) => message({ run })));
  assert.deepEqual(model.runs.map((run) => run.number), [3, 4, 5, 6]);
  assert.equal(model.runs.length, MAX_RUNS);
  assert.equal(shownRun(model).number, 6);
  assert.equal(receive(model, message({ run: 1 })), model);
});

test("an earlier run stays chosen until a new one begins", () => {
  let model = choose(all([1, 2, 3].map((run) => message({ run }))), 2);
  assert.equal(shownRun(model).number, 2);
  model = receive(model, message({ run: 3, step: 3 }));
  assert.equal(shownRun(model).number, 2);
  model = receive(model, message({ run: 4 }));
  assert.equal(shownRun(model).number, 4);
  assert.equal(choose(model, 4).chosen, null);
  assert.equal(choose(model, 99).chosen, null);
});

test("the server's answer replaces what was known, and messages of meanwhile are not lost", () => {
  const model = all([message({ run: 40 }), message({ run: 41 })]);
  const fresh = replace(model, [message({ run: 1, cells: [sparse(0, 0)] })], [message({ run: 1, step: 2, step_totals: [sparse(1, null)] })]);
  assert.deepEqual(fresh.runs.map((run) => run.number), [1]);
  assert.equal(shownRun(fresh).step, 2);
  assert.equal(lastStep(shownRun(fresh)), 1);
  assert.equal(replace(choose(model, 40), [message({ run: 40 }), message({ run: 41 })]).chosen, 40);
});

test("what is no message of this version is passed over", () => {
  const model = emptyModel();
  for (const broken of [null, undefined, 3, "x", {}, message({ version: 2 }), message({ version: 4 }), message({ columns: 3 }), message({ run: "7" }), message({ run: 1.5 })]) {
    assert.equal(receive(model, broken), model);
  }
});

test("damaged cells and sizes do no harm", () => {
  const cells = [null, [], [0], ["0", 0], [-1, 0], [0.5, 0], [0, 1e9], [1e9, 0], [0, 0, "x", {}, Infinity, -3, NaN, undefined], sparse(1, 1)];
  const run = shownRun(all([message({ cells, step_totals: [...cells, 5], layers: 1e12, steps: 3, reasons: "no", totals: null, warning: 5 })]));
  assert.equal(run.layers, MAX_LAYERS);
  assert.equal(run.cells.density[MAX_LAYERS + 1], 0.25);
  assert.equal(run.cells.density.filter((value) => !Number.isNaN(value)).length, 1);
  assert.deepEqual([run.reasons, run.totals, run.warning], [[], {}, null]);
});

test("numbers of a step are the server's", () => {
  const run = shownRun(all([message({ cells: [sparse(1, 0)], step_totals: [[1, null, 0.3, 0.2, 8, 4, 2], dense(2, null)] })]));
  assert.deepEqual(stepNumbers(run, 1), { density: 0.3, pv_skipped: 0.2, ms: 8, sparse_calls: 4, dense_calls: 2 });
  assert.equal(stepNumbers(run, 0).sparse_calls, NaN);
  assert.deepEqual([stepNumbers(run, 2).density, stepNumbers(run, 2).ms], [NaN, 8]);
  assert.deepEqual([lastStep(run), lastSparseStep(run)], [2, 1]);
});

test("columns may stand in any order, and one more is taken as it comes", () => {
  const columns = [column("dense_calls", "calls"), column("layer", "index"), column("energy", "share"), column("step", "index"),
    column("sparse_calls", "calls")];
  const changes = { columns, cells: [[0, 1, 0.75, 2, 3]], step_totals: [[0, null, 0.5, 2, 3]], totals: { energy: 0.6 } };
  const run = shownRun(all([message(changes)]));
  assert.deepEqual(run.columns.map(({ name }) => name), ["dense_calls", "energy", "sparse_calls"]);
  assert.deepEqual([run.cells.energy[2 * 2 + 1], run.cells.sparse_calls[2 * 2 + 1], kindOf(run, 2 * 2 + 1)], [0.75, 3, SPARSE]);
  assert.deepEqual(stepNumbers(run, 2), { dense_calls: 0, energy: 0.5, sparse_calls: 3 });
  assert.equal(run.totals.energy, 0.6);
  assert.deepEqual(scaleOf(run, "energy"), { max: 1, clipped: false });
  assert.equal(cellText(run, { step: 2, layer: 1 }, translator("zh")), "第 3 步，第 1 层：energy 0.75, 3 次稀疏");
});

test("the scale of milliseconds is not spoilt by one slow first call", () => {
  const cells = Array.from({ length: 40 }, (_, step) => [step, 0, 0.5, 0, step ? 8 + step / 100 : 900, 1, 0]);
  const run = shownRun(all([message({ steps: 40, layers: 1, cells })]));
  assert.deepEqual(scaleOf(run, "ms"), { max: 10, clipped: true });
  assert.deepEqual(scaleOf(run, "density"), { max: 1, clipped: false });
  assert.deepEqual(scaleOf(shownRun(all([message()])), "ms"), { max: 1, clipped: false });
});

test("the end of a scale is a round number just above", () => {
  assert.deepEqual([0.013, 0.1, 1, 1.2, 2.5, 99, 101].map(niceCeiling), [0.015, 0.1, 1, 1.5, 3, 100, 150]);
});

test("fifty steps of sixty layers are taken in quickly", () => {
  let model = emptyModel();
  let slowest = 0;
  for (let step = 0; step < 50; step++) {
    const cells = Array.from({ length: 60 }, (_, layer) => sparse(step, layer));
    const started = process.cpuUsage(); // a busy machine's pauses are not counted
    model = receive(model, message({ step: step + 1, steps: 50, layers: 60, cells }));
    const { user, system } = process.cpuUsage(started);
    if (step > 5) slowest = Math.max(slowest, (user + system) / 1000);
  }
  assert.equal(kindOf(shownRun(model), 2999), SPARSE);
  assert.ok(slowest < 50, `${slowest} ms for one message`);
});

test("the step whose heads can be asked for is the last sparse one", () => {
  const model = receive(emptyModel(), message({ step: 2, step_totals: [[0, null, 0.25, 0.125, 10, 1, 1], dense(1, null)] }));
  assert.equal(lastSparseStep(shownRun(model)), 0);
  assert.equal(lastStep(shownRun(model)), 1);
  assert.equal(lastSparseStep(shownRun(receive(emptyModel(), message({ step: 0, cells: [] })))), -1);
});
