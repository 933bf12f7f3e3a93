// What a monitor knows: a pure reducer over the server's messages (version 1). Nothing here touches the page.
//
// A model is { runs, chosen }: the last runs with the newest at the end, and the number of the run that the user picked, or null for the newest.
// A run holds one typed array per quantity, indexed by step * layers + layer; NaN is "no such number".

export const VERSION = 1;
export const MAX_RUNS = 4;
export const MAX_STEPS = 1024;
export const MAX_LAYERS = 512;
export const QUANTITIES = ["density", "pv_skipped", "ms", "error"];
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
  const run = merged(known ?? emptyRun(message.run), message);
  if (run === known) return model;
  const others = model.runs.filter((other) => other !== known);
  const runs = [...others, run].sort((a, b) => a.number - b.number).slice(-MAX_RUNS);
  if (!runs.includes(run)) return model; // older than everything kept
  const isNew = !known && runs.at(-1) === run;
  const keepsChoice = !isNew && runs.some((other) => other.number === model.chosen);
  return { runs, chosen: keepsChoice ? model.chosen : null };
}

/**
 * The model after the server told everything it keeps; `since` are the messages that arrived while it was being asked.
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
  return message?.version === VERSION && Number.isInteger(message.run);
}

function emptyRun(number) {
  return {
    number, state: "running", step: 0, steps: 0, layers: 0, heads: 0, tokens: 0,
    reasons: [], warning: null, note: null, totals: {}, revision: 0, ...arrays(0),
  };
}

function arrays(size) {
  const of = (Kind, fill) => new Kind(size).fill(fill);
  const floats = Object.fromEntries(QUANTITIES.map((name) => [name, of(Float32Array, NaN)]));
  return { ...floats, sparse_calls: of(Uint16Array, 0), dense_calls: of(Uint16Array, 0) };
}

function merged(run, message) {
  const cells = (Array.isArray(message.cells) ? message.cells : []).filter(isCell);
  const steps = extent(run.steps, message.steps, cells, 0, MAX_STEPS);
  const layers = extent(run.layers, message.layers, cells, 1, MAX_LAYERS);
  const resized = steps !== run.steps || layers !== run.layers;
  const next = { ...run, ...(resized ? grown(run, steps, layers) : copied(run)), steps, layers };
  const written = cells.filter((cell) => write(next, cell)).length;
  const isNews = run.revision === 0 || (rank(message) >= rank(run) && tells(run, header(message)));
  if (!isNews && !written && !resized) return run;
  return { ...next, ...(isNews ? header(message) : {}), revision: run.revision + 1 };
}

// A message that ends the run outranks every step, so that late repeats do not take it back.
function rank({ state, step }) {
  return FINAL.has(state) ? Infinity : count(step);
}

function tells(run, told) {
  return Object.keys(told).some((name) => JSON.stringify(told[name]) !== JSON.stringify(run[name]));
}

function header(message) {
  return {
    state: FINAL.has(message.state) ? message.state : "running",
    step: count(message.step), heads: count(message.heads), tokens: count(message.tokens),
    reasons: (Array.isArray(message.reasons) ? message.reasons : []).filter(Array.isArray).map(([text, n]) => [String(text), count(n)]),
    warning: sentence(message.warning), note: sentence(message.note),
    totals: typeof message.totals === "object" && message.totals ? { ...message.totals } : {},
  };
}

function isCell(cell) {
  return Array.isArray(cell) && isIndex(cell[0], MAX_STEPS) && isIndex(cell[1], MAX_LAYERS);
}

function isIndex(value, limit) {
  return Number.isInteger(value) && value >= 0 && value < limit;
}

function extent(known, told, cells, axis, limit) {
  return cells.reduce((most, cell) => Math.max(most, cell[axis] + 1), Math.max(known, Math.min(count(told), limit)));
}

function copied(run) {
  return Object.fromEntries(Object.keys(arrays(0)).map((name) => [name, run[name].slice()]));
}

function grown(run, steps, layers) {
  const bigger = arrays(steps * layers);
  for (const name of Object.keys(bigger)) {
    for (let step = 0; step < run.steps; step++) bigger[name].set(run[name].subarray(step * run.layers, (step + 1) * run.layers), step * layers);
  }
  return bigger;
}

// Writes a cell and returns whether it said something new: the calls of a cell only grow, so fewer are an older message.
function write(run, [step, layer, density, pvSkipped, ms, sparseCalls, denseCalls, error]) {
  const index = step * run.layers + layer;
  const told = { density: number(density), pv_skipped: number(pvSkipped), ms: number(ms), error: number(error) };
  const calls = { sparse_calls: Math.min(count(sparseCalls), 65535), dense_calls: Math.min(count(denseCalls), 65535) };
  const before = run.sparse_calls[index] + run.dense_calls[index];
  const after = calls.sparse_calls + calls.dense_calls;
  const repeated = after === before && QUANTITIES.every((name) => Object.is(Math.fround(told[name]), run[name][index]));
  if (after < before || repeated) return false;
  for (const [name, value] of Object.entries({ ...told, ...calls })) run[name][index] = value;
  return true;
}

/** Whether a cell is not there yet, ran dense in all its calls, or ran sparse in at least one. */
export function kindOf(run, index) {
  if (run.sparse_calls[index]) return SPARSE;
  return run.dense_calls[index] ? DENSE : MISSING;
}

export function hasNumbers(run, quantity) {
  return run[quantity].some((value) => !Number.isNaN(value));
}

/** The numbers of one step over its layers; null before its first cell. */
export function stepNumbers(run, step) {
  const sums = { density: null, pv_skipped: null, ms: 0, sparse_calls: 0, dense_calls: 0 };
  const weighted = { density: 0, pv_skipped: 0 };
  for (let index = step * run.layers; index < (step + 1) * run.layers && index < run.ms.length; index++) {
    const sparse = run.sparse_calls[index];
    sums.sparse_calls += sparse;
    sums.dense_calls += run.dense_calls[index];
    sums.ms += run.ms[index] || 0;
    for (const name of Object.keys(weighted)) weighted[name] += sparse ? sparse * (run[name][index] || 0) : 0;
  }
  if (!sums.sparse_calls && !sums.dense_calls) return null;
  for (const name of Object.keys(weighted)) sums[name] = sums.sparse_calls ? weighted[name] / sums.sparse_calls : null;
  return sums;
}

/** The last step that has a cell, or -1. A step that a sampler left out has none. */
export function lastStep(run) {
  for (let index = run.ms.length - 1; index >= 0; index--) if (kindOf(run, index) !== MISSING) return Math.floor(index / run.layers);
  return -1;
}

/** The last step with a sparse call, or -1: the one whose heads the server keeps. */
export function lastSparseStep(run) {
  for (let index = run.ms.length - 1; index >= 0; index--) if (run.sparse_calls[index]) return Math.floor(index / run.layers);
  return -1;
}

/** The upper end of the colour scale: { max, clipped }. Shares end at 1; other quantities where all but the slowest cells fit. */
export function scaleOf(run, quantity) {
  if (quantity === "density" || quantity === "pv_skipped") return { max: 1, clipped: false };
  const values = run[quantity].filter((value) => value > 0).sort();
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
