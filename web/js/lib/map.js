// The server's answer about one block map, checked: bytes that say how much of each block was kept, 0..255.

import { VERSION } from "./model.js";

/** { rows, columns, n_q, n_k, values, frames } with byte arrays; throws an Error when the answer is not one. */
export function readMap(answer) {
  const { rows, columns } = answer ?? {};
  if (answer?.version !== VERSION) throw new Error(`block map of version ${answer?.version}, expected ${VERSION}`);
  const values = bytes(answer.values, rows * columns);
  const frames = answer.frames ? readFrames(answer.frames) : null;
  return { rows, columns, n_q: answer.n_q, n_k: answer.n_k, values, frames };
}

function readFrames({ t, h, w, queries, keys }) {
  return { t, h, w, queries: bytes(queries, t * h * w), keys: bytes(keys, t * h * w) };
}

function bytes(text, size) {
  const plain = atob(String(text));
  if (!(size > 0) || plain.length !== size) throw new Error(`block map of ${plain.length} bytes, expected ${size}`);
  return Uint8Array.from(plain, (character) => character.charCodeAt(0));
}
