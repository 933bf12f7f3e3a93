// What a monitor knows: a pure reducer over the server's messages. Nothing here touches the page.
//
// A model is { runs, chosen }: the last runs with the newest at the end, and the number of the run that the user picked, or null for the newest.
// A run's `columns` are its statistics, { name, unit, label } each, as its first message named them. `cells` and `stepTotals` hold one array for
// each, by name: indexed by step * layers + layer, and by step; NaN is "no such number". The server sums up; nothing is added here.

export const VERSION = 3;
export const MAX_RUNS = 4;
export const MAX_STEPS = 1024;
export const MAX_LAYERS = 512;
export const MISSING = 0;
export const DENSE = 1;
export const SPARSE = 2;

const FINAL = new Set(["done", "failed"]);

export function emptyModel() {
  return { runs: [], chosen: null };
}

/** The model after one message; the same object when the message changes nothing. */
export function receive(model, message) {
  if (!isMessage(message)) return model;
  const known = model.runs.find((run) => run.number === message.run);
  const run = merged(known ?? emptyRun(message), message);
  if (run === known) return model;
  const others = model.runs.filter((other) => other !== known);
  const runs = [...others, run].sort((a, b) => a.number - b.number).slice(-MAX_RUNS);
  if (!runs.includes(run)) return model; // older than everything kept
  const isNew = !known && runs.at(-1) === run;
  const keepsChoice = !isNew && runs.some((other) => other.number === model.chosen);
  return { runs, chosen: keepsChoice ? model.chosen : null };
}

/**
 * The model after the server's answer, which is everything it keeps; `since` are the messages that arrived while it was being asked.
 *
 * What was known before is dropped: run numbers begin again when the server was restarted.
 */
export function replace(model, messages, since = []) {
  const fresh = [...messages, ...since].reduce(receive, emptyModel());
  return { ...fresh, chosen: fresh.runs.some((run) => run.number === model.chosen) ? model.chosen : null };
}

/** Shows run `number`; the newest one is followed, so that the next run takes its place. */
export function choose(model, number) {
  const newest = model.runs.at(-1)?.number;
  return { ...model, chosen: number === newest || !model.runs.some((run) => run.number === number) ? null : number };
}

export function shownRun(model) {
  return model.runs.find((run) => run.number === model.chosen) ?? model.runs.at(-1) ?? null;
}

function isMessage(message) {
  return message?.version === VERSION && Number.isInteger(message.run) && Array.isArray(message.columns);
}

function emptyRun(message) {
  return {
    number: message.run, state: "running", step: 0, steps: 0, layers: 0, heads: 0, tokens: 0, reasons: [], warning: null, note: null, comparedWith: null,
    totals: {},
    revision: 0, columns: message.columns.filter(({ unit }) => unit !== "index"), cells: {}, stepTotals: {},
  };
}

function merged(run, message) {
  const cells = rows(message, message.cells).filter(({ step, layer }) => isIndex(step, MAX_STEPS) && isIndex(layer, MAX_LAYERS));
  const steps = extent(run.steps, message.steps, cells.map(({ step }) => step), MAX_STEPS);
  const layers = extent(run.layers, message.layers, cells.map(({ layer }) => layer), MAX_LAYERS);
  const next = { ...run, steps, layers };
  next.cells = copied(run.columns, run.cells, run, next);
  next.stepTotals = copied(run.columns, run.stepTotals, { steps: run.steps, layers: 1 }, { steps, layers: 1 });
  const stepRows = rows(message, message.step_totals).filter(({ step }) => isIndex(step, steps));
  const written = [
    ...cells.map((row) => write(next.cells, row.step * layers + row.layer, row)),
    ...stepRows.map((row) => write(next.stepTotals, row.step, row)),
  ].some(Boolean);
  const isNews = run.revision === 0 || (rank(message) >= rank(run) && differs(run, header(message)));
  if (!isNews && !written && steps === run.steps && layers === run.layers) return run;
  return { ...next, ...(isNews ? header(message) : {}), revision: run.revision + 1 };
}

// Rows of a message as objects: its columns say what stands where.
function rows({ columns }, list) {
  const read = (row) => Object.fromEntries(columns.map(({ name }, index) => [name, row[index]]));
  return (Array.isArray(list) ? list : []).filter(Array.isArray).map(read);
}

// A message that ends the run outranks every step, so that late repeats do not take it back.
function rank({ state, step }) {
  return FINAL.has(state) ? Infinity : count(step);
}

function differs(run, head) {
  return Object.keys(head).some((name) => JSON.stringify(head[name]) !== JSON.stringify(run[name]));
}

function header(message) {
  return {
    state: FINAL.has(message.state) ? message.state : "running",
    step: count(message.step), heads: count(message.heads), tokens: count(message.tokens),
    reasons: (Array.isArray(message.reasons) ? message.reasons : []).filter(Array.isArray).map(([text, n]) => [String(text), count(n)]),
    warning: sentence(message.warning), note: sentence(message.note), comparedWith: sentence(message.compared_with),
    totals: typeof message.totals === "object" && message.totals ? { ...message.totals } : {},
  };
}

function isIndex(value, limit) {
  return Number.isInteger(value) && value >= 0 && value < limit;
}

function extent(known, said, indices, limit) {
  return indices.reduce((most, index) => Math.max(most, index + 1), Math.max(known, Math.min(count(said), limit)));
}

// New arrays with the same numbers; `from` and `to` are their { steps, layers }.
function copied(columns, numbers, from, to) {
  const copy = ({ name }) => {
    const array = new Float64Array(to.steps * to.layers).fill(NaN);
    for (let step = 0; step < from.steps; step++) array.set(numbers[name].subarray(step * from.layers, (step + 1) * from.layers), step * to.layers);
    return [name, array];
  };
  return Object.fromEntries(columns.map(copy));
}

// Writes a row and returns whether it says something new: the calls of a cell and of a step only grow, so a row with fewer is an older message's.
function write(numbers, index, row) {
  const calls = (of) => (number(of("sparse_calls")) || 0) + (number(of("dense_calls")) || 0);
  const isOlder = calls((name) => row[name]) < calls((name) => numbers[name]?.[index]);
  const changed = Object.keys(numbers).filter((name) => !Object.is(number(row[name]), numbers[name][index]));
  if (isOlder || !changed.length) return false;
  for (const name of changed) numbers[name][index] = number(row[name]);
  return true;
}

/** Whether a cell is not there yet, ran dense in all its calls, or ran sparse in at least one. */
export function kindOf(run, index) {
  if (run.cells.sparse_calls?.[index] > 0) return SPARSE;
  return run.cells.dense_calls?.[index] > 0 ? DENSE : MISSING;
}

/** What the server says of one step over its layers, by name. */
export function stepNumbers(run, step) {
  return Object.fromEntries(run.columns.map(({ name }) => [name, run.stepTotals[name][step]]));
}

/** The last step with calls of one of these kinds, or -1. A step that a sampler left out has none. */
export function lastStep(run, kinds = ["sparse_calls", "dense_calls"]) {
  return Math.max(...kinds.map((name) => run.stepTotals[name]?.findLastIndex((calls) => calls > 0) ?? -1));
}

/** The last step with a sparse call, or -1: the one whose heads the server keeps. */
export function lastSparseStep(run) {
  return lastStep(run, ["sparse_calls"]);
}

/** The upper end of the colour scale: { max, clipped }. Shares end at 1; other quantities where all but the slowest cells fit. */
export function scaleOf(run, quantity) {
  if (run.columns.some(({ name, unit }) => name === quantity && unit === "share")) return { max: 1, clipped: false };
  const values = run.cells[quantity].filter((value) => value > 0).sort();
  if (!values.length) return { max: 1, clipped: false };
  const most = values.at(-1);
  const usual = values[Math.floor((values.length - 1) * 0.95)]; // the first call of a run may take a hundred times as long as the rest
  const max = niceCeiling(most > 3 * usual ? usual : most);
  return { max, clipped: most > max };
}

export function niceCeiling(value) {
  const unit = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 5, 7, 10].map((factor) => factor * unit).find((step) => step >= value * (1 - 1e-6));
}

function number(value) {
  return typeof value === "number" && Number.isFinite(value) ? value : NaN;
}

function count(value) {
  return Number.isFinite(value) && value > 0 ? Math.floor(value) : 0;
}

function sentence(value) {
  return typeof value === "string" && value ? value : null;
}
