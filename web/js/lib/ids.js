// Names of a node as the server knows it, made there by `name_of` in nodes/_comfy.py.

export const MAX_DEPTH = 16;

/**
 * The name of a node: its number in a prompt, after the id that is its own and a slash. Numbers are the same in every workflow, ids are drawn by
 * chance. A node without one (of a prompt that no browser made) is known by its number.
 */
export function nameOf(id, number) {
  return id ? `${id}/${number}` : String(number);
}

/** The numbers of a node in a prompt: its id in the graph, after those of the subgraph nodes around it ("5:12"); several where its subgraph is used
 * several times. */
export function numbersOf(node, root) {
  if (!node.graph || node.graph === root || !root) return [String(node.id)];
  return pathsTo(node.graph, root, []).map((path) => [...path, node.id].join(":"));
}

function pathsTo(graph, from, around) {
  if (from === graph) return [around];
  if (around.length > MAX_DEPTH) return [];
  return (from.nodes ?? []).filter((node) => node.subgraph).flatMap((node) => pathsTo(graph, node.subgraph, [...around, node.id]));
}

/** Whether a message about a run is for one of these names. */
export function isFor(message, names) {
  return Array.isArray(message?.monitors) && message.monitors.some((name) => names.includes(String(name)));
}

/** A new id. From `getRandomValues`, which pages have that came without TLS too. */
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
