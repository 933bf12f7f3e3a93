// Names of a node as the server knows it: its id, after the ids of the subgraph nodes around it ("5:12"). Ids are numbers or strings.

/** Every name of `node`; several where its subgraph is used several times. */
export function namesOf(node, root) {
  if (!node.graph || node.graph === root || !root) return [String(node.id)];
  return pathsTo(node.graph, root, []).map((path) => [...path, node.id].join(":"));
}

function pathsTo(graph, from, around) {
  if (from === graph) return [around];
  if (around.length > 16) return [];
  return (from.nodes ?? []).filter((node) => node.subgraph).flatMap((node) => pathsTo(graph, node.subgraph, [...around, node.id]));
}

/** Whether a message is for one of these names. */
export function isFor(message, names) {
  return Array.isArray(message?.monitors) && message.monitors.some((id) => names.includes(String(id)));
}
