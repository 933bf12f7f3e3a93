// Where things are on the heat map: steps from left to right, layers from top to bottom, in device pixels.

const LEFT = 36;
const BOTTOM = 16;
const EDGE = 4;

/** Places a grid of steps x layers on a canvas of width x height CSS pixels; `ratio` device pixels are one CSS pixel. */
export function heatMapGrid(width, height, steps, layers, ratio = 1) {
  const left = Math.round(LEFT * ratio);
  const top = Math.round(EDGE * ratio);
  const right = Math.max(left, Math.round((width - EDGE) * ratio));
  const bottom = Math.max(top, Math.round((height - BOTTOM) * ratio));
  return { left, top, right, bottom, steps, layers, ratio };
}

/** { x, y, width, height } of a cell on whole pixels, with a gap to its neighbours where there is room for one. */
export function cellBox(grid, step, layer) {
  const [x, xEnd] = span(grid.left, grid.right, grid.steps, step, grid.ratio);
  const [y, yEnd] = span(grid.top, grid.bottom, grid.layers, layer, grid.ratio);
  return { x, y, width: xEnd - x, height: yEnd - y };
}

function span(start, end, n, i, ratio) {
  const room = (end - start) / n;
  const gap = room >= 5 * ratio ? Math.max(1, Math.round(ratio)) : 0;
  const from = start + Math.round(i * room);
  return [from, Math.max(from, start + Math.round((i + 1) * room) - gap)];
}

/** The cell at a point in CSS pixels: { step, layer }, or null beside the grid. */
export function cellAt(grid, x, y) {
  const step = indexAt(x * grid.ratio, grid.left, grid.right, grid.steps);
  const layer = indexAt(y * grid.ratio, grid.top, grid.bottom, grid.layers);
  return step === null || layer === null ? null : { step, layer };
}

function indexAt(at, start, end, n) {
  if (!(n > 0) || !(at >= start) || !(at < end)) return null;
  let i = Math.min(n - 1, Math.floor(((at - start) / (end - start)) * n));
  const room = (end - start) / n;
  // The edges of cells are rounded to whole pixels.
  if (at < start + Math.round(i * room)) i -= 1;
  else if (i + 1 < n && at >= start + Math.round((i + 1) * room)) i += 1;
  return i;
}

/**
 * Indices to label on an axis of n cells over `length` pixels, `apart` pixels from each other at least: 0, and where the label, which counts
 * from `first`, is a round number.
 */
export function ticks(n, length, apart, first = 0) {
  if (!(n > 0) || !(length > 0)) return [];
  const every = [1, 2, 5, 10, 20, 50, 100, 200, 500].find((step) => (step * length) / n >= apart) ?? n;
  const round = Array.from({ length: Math.floor((n - 1 + first) / every) }, (_, i) => (i + 1) * every - first);
  return [0, ...round.filter((index) => (index * length) / n >= apart)];
}

const MOVES = {
  ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1],
  Home: [-Infinity, 0], End: [Infinity, 0], PageUp: [0, -Infinity], PageDown: [0, Infinity],
};

/** The cell that a key leads to from `cell` (null: the last step's first layer); undefined for a key that moves nothing. */
export function moved(cell, key, steps, layers, lastStep) {
  const move = MOVES[key];
  if (!move || !steps || !layers) return undefined;
  if (!cell) return { step: Math.max(0, lastStep), layer: 0 };
  const within = (value, n) => Math.min(n - 1, Math.max(0, value));
  return { step: within(cell.step + move[0], steps), layer: within(cell.layer + move[1], layers) };
}

/** Columns of the arrangement of n tiles (w x h each) in a box that shows them largest. */
export function tileColumns(n, w, h, boxWidth, boxHeight) {
  let best = 1;
  let largest = 0;
  for (let columns = 1; columns <= n; columns++) {
    const scale = Math.min(boxWidth / (columns * w), boxHeight / (Math.ceil(n / columns) * h));
    if (scale > largest) [best, largest] = [columns, scale];
  }
  return best;
}
