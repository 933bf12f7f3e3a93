// Numbers and sentences of a run as text. `t(key, values)` is a translator from strings.js.

import { MISSING, kindOf } from "./model.js";

/** A share with as many digits as tell it apart. */
export function share(value) {
  if (!isNumber(value)) return "–";
  if (value === 0 || value === 1) return String(value);
  if (value < 0.001) return value.toExponential(0);
  return value.toFixed(value < 0.1 ? 3 : 2);
}

/** A time of 0 ms or more in words. */
export function duration(ms, t) {
  if (!isNumber(ms)) return "–";
  if (!ms) return t("milliseconds", { n: 0 });
  if (ms < 1000) return t("milliseconds", { n: ms < 10 ? ms.toFixed(1) : ms.toFixed(0) });
  const whole = Math.round(ms / 1000);
  if (whole < 60) return t("seconds", { n: (ms / 1000).toFixed(ms < 10000 ? 1 : 0) });
  return t("minutes", { n: Math.floor(whole / 60), s: String(whole % 60).padStart(2, "0") });
}

export function integer(value, t) {
  return isNumber(value) ? new Intl.NumberFormat(t.locale).format(value) : "–";
}

/** A statistic as its unit is written. */
export function numberText(unit, value, t) {
  if (unit === "ms") return duration(value, t);
  return unit === "share" ? share(value) : integer(value, t);
}

/** How sparse attention compares with what would have run instead, measured; or that this is not known. */
export function headline(run, t) {
  const { saved_ms: saved } = run.totals;
  if (!run.totals.sparse_calls) return t(run.state === "running" ? "nothingYet" : "nothingSparse");
  const text = comparison(run, t);
  if (!isNumber(saved)) return text;
  const kind = saved >= 0 ? "saved" : "lost";
  return t("joined", { first: text, second: t(run.state === "running" ? `${kind}SoFar` : kind, { time: duration(Math.abs(saved), t) }) });
}

// The same sentences as `remarks.compared` in Python, which writes them on the node and into the log.
function comparison(run, t) {
  const { speedup, speedup_low: low, speedup_high: high, compared_calls: n } = run.totals;
  if (!isNumber(n) || n <= 0) return t(run.state === "running" ? "notMeasuredYet" : "notMeasured");
  const what = run.comparedWith === "dense" || !run.comparedWith ? t("dense") : run.comparedWith;
  const isSpread = isNumber(low) && isNumber(high) && low > 0;
  if (!isSpread) return t("tooFew", { what, n });
  const written = (values, digits) => Object.fromEntries(Object.entries(values).map(([name, value]) => [name, value.toFixed(digits)]));
  if (!isNumber(speedup) || speedup <= 0) return t("noDifference", { what, n, ...written({ low, high }, high - low < 0.1 || low < 0.1 ? 2 : 1) });
  const isFaster = speedup >= 1;
  const values = isFaster ? { factor: speedup, low, high } : { factor: 1 / speedup, low: 1 / high, high: 1 / low };
  return t(isFaster ? "faster" : "slower", { what, n, ...written(values, values.low < 1.1 ? 2 : 1) });
}

export function progress(run, t) {
  const known = ["layers", "heads", "tokens"].filter((name) => run[name]);
  const sizes = known.map((name) => t(name, { n: name === "tokens" ? integer(run.tokens, t) : run[name] }));
  const place = run.steps ? [t("stepOf", { step: Math.min(run.step, run.steps), steps: run.steps })] : []; // none are known without Sparge Attention
  return [t(run.state), ...place, ...sizes].join(" · ");
}

/** One cell in words. Steps count from 1, as the progress bar does; layers from 0. */
export function cellText(run, { step, layer }, t) {
  const index = step * run.layers + layer;
  const place = t("place", { step: step + 1, layer });
  if (kindOf(run, index) === MISSING) return t("cell", { place, what: t("missing") });
  const parts = [];
  for (const column of run.columns) {
    const value = run.cells[column.name][index];
    if (Number.isNaN(value) || (column.unit === "calls" && !value)) continue;
    const n = numberText(column.unit, value, t);
    parts.push(t.has(`${column.name}Cell`) ? t(`${column.name}Cell`, { n }) : `${t.label(column)} ${n}`);
  }
  return t("cell", { place, what: parts.join(", ") });
}

function isNumber(value) {
  return typeof value === "number" && Number.isFinite(value);
}
