// Numbers and sentences of a run as text. `t(key, values)` is a translator from strings.js.

/** A share or error with as many digits as tell it apart. */
export function share(value) {
  if (!isNumber(value)) return "–";
  if (value === 0 || value === 1) return String(value);
  if (value < 0.001) return value.toExponential(0);
  return value.toFixed(value < 0.1 ? 3 : 2);
}

export function duration(ms, t) {
  if (!isNumber(ms)) return "–";
  const size = Math.abs(ms);
  if (!size) return t("milliseconds", { n: 0 });
  if (size < 1000) return t("milliseconds", { n: size < 10 ? ms.toFixed(1) : ms.toFixed(0) });
  if (size < 59950) return t("seconds", { n: (ms / 1000).toFixed(size < 10000 ? 1 : 0) });
  return t("minutes", { n: Math.floor(ms / 60000), s: String(Math.floor((ms / 1000) % 60)).padStart(2, "0") });
}

export function integer(value, t) {
  return isNumber(value) ? new Intl.NumberFormat(t.locale).format(value) : "–";
}

export function quantityText(quantity, value, t) {
  return quantity === "ms" ? duration(value, t) : share(value);
}

/** How much faster than dense, measured; or slower, or that it was not measured. */
export function headline(run, t) {
  const { speedup, saved_ms: saved } = run.totals;
  if (!run.totals.sparse_calls) return t(run.state === "running" ? "nothingYet" : "nothingSparse");
  if (!isNumber(speedup) || speedup <= 0) return t("notMeasured");
  const faster = speedup >= 1;
  const factor = (faster ? speedup : 1 / speedup).toFixed(Math.max(speedup, 1 / speedup) < 10 ? 2 : 1);
  const text = t(faster ? "faster" : "slower", { factor });
  if (!isNumber(saved)) return text;
  const kind = saved >= 0 ? "saved" : "lost";
  return t("joined", { first: text, second: t(run.state === "running" ? `${kind}SoFar` : kind, { time: duration(Math.abs(saved), t) }) });
}

export function facts(run, t) {
  const parts = [t(run.state), t("stepOf", { step: Math.min(run.step, run.steps), steps: run.steps })];
  if (run.layers) parts.push(t("layers", { n: run.layers }));
  if (run.heads) parts.push(t("heads", { n: run.heads }));
  if (run.tokens) parts.push(t("tokens", { n: integer(run.tokens, t) }));
  return parts.join(" · ");
}

/** One cell in words. Steps count from 1, as the progress bar does; layers from 0. */
export function cellText(run, { step, layer }, t) {
  const index = step * run.layers + layer;
  const place = t("place", { step: step + 1, layer });
  const sparse = run.sparse_calls[index];
  const dense = run.dense_calls[index];
  if (!sparse && !dense) return t("cell", { place, what: t("notRun") });
  const parts = [];
  if (sparse) {
    parts.push(`${t("density")} ${share(run.density[index])}`, `${t("pv_skipped")} ${share(run.pv_skipped[index])}`);
    if (!Number.isNaN(run.error[index])) parts.push(`${t("error")} ${share(run.error[index])}`);
  }
  parts.push(duration(run.ms[index], t));
  if (sparse) parts.push(t("sparseCalls", { n: sparse }));
  if (dense) parts.push(t("denseCalls", { n: dense }));
  return t("cell", { place, what: parts.join(", ") });
}

function isNumber(value) {
  return typeof value === "number" && Number.isFinite(value);
}
