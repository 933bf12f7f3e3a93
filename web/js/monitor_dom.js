// Small pieces of page that the panels on our nodes are built from.

/** An element with attributes and children; `text` becomes textContent, so data is never read as HTML. */
export function el(tag, { text, ...attributes } = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  made.append(...children);
  return made;
}

/** Sets text only where it differs: an unchanged line costs no layout and is not read out again. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A row of buttons of which one is pressed. `onPick(value)`; returns { element, offer(options), set(value) }; options are { value, text, title }. */
export function choice(label, onPick, signal) {
  const element = el("div", { class: "sparge-choice", role: "group", "aria-label": label });
  const buttons = () => [...element.children];
  element.addEventListener("click", ({ target }) => target !== element && onPick(target.value), { signal });
  return {
    element,
    offer(options) {
      if (buttons().map((button) => button.value).join() === options.map(({ value }) => value).join()) return;
      element.replaceChildren(...options.map((option) => el("button", { type: "button", "aria-pressed": "false", ...option })));
    },
    set: (picked) => buttons().forEach((button) => button.setAttribute("aria-pressed", String(button.value === picked))),
  };
}

const CSS = `
.sparge-monitor { position: relative; display: flex; flex-direction: column; gap: 6px; width: 100%; height: 100%; min-height: 480px; padding: 8px;
  box-sizing: border-box; overflow: hidden; border-radius: 6px; font: 12px/1.35 Inter, system-ui, sans-serif; text-align: left; cursor: default;
  color: var(--input-text, #ddd); background: var(--comfy-input-bg, #222); --sparge-faded: var(--descrip-text, #999);
  --sparge-line: var(--border-color, #4e4e4e); --sparge-paper: var(--comfy-menu-bg, #353535); }
.sparge-monitor * { box-sizing: border-box; }
.sparge-monitor [hidden] { display: none !important; }
.sparge-row { display: flex; align-items: center; gap: 10px; justify-content: space-between; }
.sparge-row > * { flex: none; }
.sparge-row > span:first-child, .sparge-row > strong { flex: 0 1 auto; min-width: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.sparge-faded { color: var(--sparge-faded); }
.sparge-headline { font-size: 13px; font-weight: 600; }
.sparge-warning { padding: 4px 8px; border-radius: 4px; background: #ffcf5c; color: #241a00; }
.sparge-monitor button, .sparge-monitor select { font: inherit; color: inherit; background: var(--sparge-paper); border: 1px solid var(--sparge-line);
  border-radius: 4px; padding: 1px 7px; margin: 0; height: 22px; line-height: 1; cursor: pointer; }
.sparge-monitor button:disabled, .sparge-monitor select:disabled { opacity: 0.5; cursor: not-allowed; }
.sparge-monitor button:focus-visible, .sparge-monitor select:focus-visible, .sparge-monitor canvas:focus-visible {
  outline: 2px solid #3b8eea; outline-offset: 1px; }
.sparge-choice { display: inline-flex; }
.sparge-choice button { border-radius: 0; margin-left: -1px; }
.sparge-choice button:first-child { border-radius: 4px 0 0 4px; margin-left: 0; }
.sparge-choice button:last-child { border-radius: 0 4px 4px 0; }
.sparge-choice button[aria-pressed="true"] { background: #2f6db3; border-color: #2f6db3; color: #fff; }
.sparge-stage { position: relative; flex: 1 1 230px; min-height: 230px; display: flex; flex-direction: column; gap: 6px; }
.sparge-heat { position: relative; flex: 1 1 auto; min-height: 140px; }
.sparge-heat canvas { position: absolute; inset: 0; width: 100%; height: 100%; border-radius: 4px; cursor: pointer; touch-action: none; }
.sparge-paper { position: absolute; background: var(--sparge-paper); }
.sparge-labels span { position: absolute; font-size: 10px; line-height: 12px; color: var(--sparge-faded); pointer-events: none; white-space: nowrap; }
.sparge-labels .sparge-x { transform: translateX(-50%); }
.sparge-labels .sparge-y { transform: translateY(-50%); width: 32px; left: 0; text-align: right; }
.sparge-labels .sparge-steps { width: 32px; left: 0; text-align: right; }
.sparge-labels .sparge-axis { left: -1px; writing-mode: vertical-rl; transform: translateY(-50%) rotate(180deg); }
.sparge-cursor { position: absolute; pointer-events: none; border: 2px solid #fff; outline: 2px solid #000; border-radius: 1px; }
.sparge-legend { display: flex; align-items: center; gap: 6px; font-size: 11px; color: var(--sparge-faded); white-space: nowrap; }
.sparge-bar { flex: 1 1 60px; height: 10px; border-radius: 2px; }
.sparge-swatch { width: 14px; height: 10px; border-radius: 2px; border: 1px solid var(--sparge-line); margin-left: 8px; }
.sparge-cell { min-height: 1.35em; font-variant-numeric: tabular-nums; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.sparge-monitor table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
.sparge-monitor th, .sparge-monitor td { padding: 1px 4px; text-align: right; font-weight: normal; border-bottom: 1px solid var(--sparge-line); }
.sparge-monitor th { color: var(--sparge-faded); }
.sparge-monitor th:first-child { text-align: left; padding-left: 0; }
.sparge-reasons { margin: 0; padding: 0; list-style: none; max-height: 5.4em; overflow: auto; }
.sparge-map { position: absolute; inset: 0; display: flex; flex-direction: column; gap: 6px; background: var(--comfy-input-bg, #222); }
.sparge-map-body { flex: 1 1 auto; min-height: 0; display: flex; gap: 10px; }
.sparge-map-part { flex: 1 1 50%; min-width: 0; min-height: 0; display: flex; flex-direction: column; gap: 4px; }
.sparge-picture { flex: 1 1 auto; min-height: 0; min-width: 0; position: relative; }
.sparge-picture canvas { image-rendering: pixelated; }
.sparge-picture > canvas { position: absolute; left: 0; top: 0; width: 100%; height: 100%; }
.sparge-square { flex: 0 1 auto; aspect-ratio: 1; }
.sparge-line { position: relative; width: 100%; height: 100%; min-height: 92px; box-sizing: border-box; overflow: hidden; border-radius: 6px;
  font: 12px/16px Inter, system-ui, sans-serif; text-align: left; cursor: default; color: var(--input-text, #ddd);
  background: var(--comfy-input-bg, #222); --sparge-faded: var(--descrip-text, #999); }
.sparge-line-text { position: absolute; inset: 6px 4px 6px 8px; overflow: auto; overflow-wrap: anywhere; scrollbar-width: thin; cursor: text; user-select: text; }
.sparge-line-text:focus-visible { outline: 2px solid #3b8eea; outline-offset: 2px; border-radius: 2px; }
.sparge-line-first { font-weight: 600; font-variant-numeric: tabular-nums; }
.sparge-faded > .sparge-line-first { font-weight: normal; }
.sparge-tiles { position: absolute; inset: 0; display: grid; gap: 3px; place-content: start; }
`;

/** The colour scale between two numbers, and the elements around it: { element, low, high }. */
export function legend(gradient, ...more) {
  const [low, high, bar] = [el("span", { text: "0" }), el("span", { text: "1" }), el("span", { class: "sparge-bar" })];
  bar.style.background = gradient;
  return { element: el("div", { class: "sparge-legend" }, low, bar, high, ...more), low, high };
}

/** Adds the panels' style sheet to the page, once. */
export function addStyle() {
  const id = "sparge-monitor-style";
  if (!document.getElementById(id)) document.head.append(el("style", { id, text: CSS }));
}
