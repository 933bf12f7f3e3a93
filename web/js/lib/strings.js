// Every sentence of the monitor, in every language it speaks. {names} are filled in.

export const LANGUAGES = ["en", "zh"];

export const STRINGS = {
  densityTitle: { en: "Share of the visible blocks that was kept. Lower is sparser.", zh: "可见块中被保留的比例，越低越稀疏。" },
  pv_skippedTitle: { en: "Share of the kept tiles whose value half was skipped as well.", zh: "保留的块中，值（PV）部分也被跳过的比例。" },
  msTitle: { en: "Attention time of the layer in this step, sparse and dense calls together.", zh: "该层在这一步的注意力时间，稀疏与稠密调用合计。" },
  quantity: { en: "What the heat map shows", zh: "热图显示的数值" },
  waiting: { en: "Waiting for a run: queue the workflow.", zh: "等待运行：请将工作流加入队列。" },
  noLineYet: { en: "No run yet: queue the workflow. What it did will stand here.", zh: "尚未运行：请将工作流加入队列，结果将显示在此处。" },
  unreachable: { en: "The server does not answer; the numbers may be old.", zh: "服务器没有响应，数值可能已过时。" },
  outdated: {
    en: "The server runs another version of Sparge Attention than this page: reload the page.",
    zh: "服务器运行的 Sparge Attention 版本与此页面不同：请重新加载页面。",
  },
  running: { en: "running", zh: "运行中" },
  done: { en: "done", zh: "已完成" },
  failed: { en: "ended early", zh: "提前结束" },
  stepOf: { en: "step {step} of {steps}", zh: "第 {step} / {steps} 步" },
  layers: { en: "{n} layers", zh: "{n} 层" },
  heads: { en: "{n} heads", zh: "{n} 头" },
  tokens: { en: "{n} tokens", zh: "{n} 个 token" },
  runNumber: { en: "run {n}", zh: "运行 {n}" },
  runs: { en: "Run to show", zh: "要显示的运行" },
  nothingYet: { en: "no sparse call so far", zh: "目前没有稀疏调用" },
  nothingSparse: { en: "nothing ran sparse", zh: "没有任何稀疏调用" },
  notMeasured: {
    en: "speed-up: not measured (needs measure_dense, or 3 dense steps of the same size)",
    zh: "加速比：未测量（需要打开 measure_dense，或有 3 个相同大小的稠密步）",
  },
  notMeasuredYet: { en: "speed-up: not measured so far", zh: "加速比：尚未测量" },
  tooFew: { en: "speed-up: too few calls to compare with {what} ({n} measured)", zh: "加速比：可与{what}比较的调用太少（实测 {n} 次）" },
  noDifference: {
    en: "attention: no clear difference from {what} ({low} to {high}x, {n} measured calls)",
    zh: "注意力：与{what}没有明显差别（{low} 至 {high} 倍，实测 {n} 次调用）",
  },
  faster: {
    en: "attention {factor}x faster than {what} ({low} to {high}, {n} measured calls)",
    zh: "注意力比{what}快 {factor} 倍（{low} 至 {high}，实测 {n} 次调用）",
  },
  slower: {
    en: "attention {factor}x slower than {what} ({low} to {high}, {n} measured calls)",
    zh: "注意力比{what}慢 {factor} 倍（{low} 至 {high}，实测 {n} 次调用）",
  },
  saved: { en: "{time} saved", zh: "节省 {time}" },
  savedSoFar: { en: "{time} saved so far", zh: "目前节省 {time}" },
  lost: { en: "{time} lost", zh: "多用 {time}" },
  lostSoFar: { en: "{time} lost so far", zh: "目前多用 {time}" },
  joined: { en: "{first}, {second}", zh: "{first}，{second}" },
  milliseconds: { en: "{n} ms", zh: "{n} 毫秒" },
  seconds: { en: "{n} s", zh: "{n} 秒" },
  minutes: { en: "{n} min {s} s", zh: "{n} 分 {s} 秒" },
  stepColumn: { en: "step {n}", zh: "第 {n} 步" },
  runColumn: { en: "whole run", zh: "整个运行" },
  measuring: { en: "cost of measuring: {time}", zh: "测量开销：{time}" },
  denseBecause: { en: "Dense calls, by reason", zh: "稠密调用及原因" },
  reason: { en: "{n} x {reason}", zh: "{n} x {reason}" },
  dense: { en: "dense", zh: "稠密" },
  missing: { en: "not run", zh: "未运行" },
  atLeast: { en: "{n} and more", zh: "{n} 及以上" },
  heatMap: {
    en: "Heat map of {quantity}: {steps} steps from left to right, {layers} layers from top to bottom. "
      + "Arrow keys move, Enter opens the block map, Escape closes it.",
    zh: "{quantity}热图：从左到右 {steps} 步，从上到下 {layers} 层。方向键移动，Enter 打开块图，Escape 关闭。",
  },
  stepAxis: { en: "step", zh: "步" },
  layerAxis: { en: "layer", zh: "层" },
  place: { en: "step {step}, layer {layer}", zh: "第 {step} 步，第 {layer} 层" },
  cell: { en: "{place}: {what}", zh: "{place}：{what}" },
  msCell: { en: "{n}", zh: "{n}" },
  sparse_callsCell: { en: "{n} sparse", zh: "{n} 次稀疏" },
  dense_callsCell: { en: "{n} dense", zh: "{n} 次稠密" },
  hint: { en: "Click a cell to see which blocks it kept.", zh: "点击单元格查看保留了哪些块。" },
  blockMap: { en: "Block map of step {step}, layer {layer}", zh: "第 {step} 步、第 {layer} 层的块图" },
  blockMapPicture: {
    en: "Share kept of {n_q} blocks of queries (top to bottom) by {n_k} blocks of keys (left to right)",
    zh: "{n_q} 个查询块（从上到下）与 {n_k} 个键块（从左到右）的保留比例",
  },
  queryAxis: { en: "queries ({n})", zh: "查询（{n}）" },
  keyAxis: { en: "keys ({n})", zh: "键（{n}）" },
  loading: { en: "Loading ...", zh: "加载中……" },
  close: { en: "Close", zh: "关闭" },
  head: { en: "head", zh: "头" },
  allHeads: { en: "all", zh: "全部" },
  headTitle: { en: "One head of the last sparse step, or the mean over all heads", zh: "最后一个稀疏步中的某个头，或所有头的平均" },
  frames: { en: "Frames", zh: "帧" },
  queries: { en: "queries", zh: "查询" },
  keys: { en: "keys", zh: "键" },
  queriesTitle: { en: "How much the queries of each region kept", zh: "每个区域的查询保留了多少" },
  keysTitle: { en: "How often the keys of each region were kept", zh: "每个区域的键被保留的频率" },
  frame: { en: "frame {n} of {total}", zh: "第 {n} / {total} 帧" },
  mapFailed: { en: "The block map could not be loaded: {error}", zh: "无法加载块图：{error}" },
};

// What statistics are called, by name. The server's messages carry the English label, which also stands in for one that is missing here.
const LABELS = {
  zh: { density: "密度", pv_skipped: "跳过的 PV", ms: "时间", sparse_calls: "稀疏调用", dense_calls: "稠密调用" },
};

/**
 * t(key, values) in the language of a locale such as "zh" or "zh-TW"; English for one that is not spoken here. t.has(key): whether there is such a
 * sentence; t.label(column): what a statistic is called.
 */
export function translator(locale) {
  const language = String(locale ?? "").toLowerCase().split(/[-_]/)[0];
  const spoken = LANGUAGES.includes(language) ? language : "en";
  const t = (key, values = {}) => STRINGS[key][spoken].replace(/\{(\w+)\}/g, (_, name) => String(values[name]));
  const label = ({ name, label }) => LABELS[spoken]?.[name] ?? label ?? name;
  return Object.assign(t, { locale: spoken, has: (key) => Object.hasOwn(STRINGS, key), label });
}
