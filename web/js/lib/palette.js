// Colours of numbers. Every 15th of the 256 colours of viridis (S. van der Walt, N. Smith, E. Firing, CC0), as in the report's pictures.

const VIRIDIS = "440154 481769 472a7a 433d84 3d4e8a 355e8d 2e6d8e 297b8e 23898e 1f978b 21a585 2eb37c 46c06f 65cb5e 89d548 b0dd2f d8e219 fde725";

export const STOPS = VIRIDIS.split(" ").map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
export const HATCH = ["#a3a8b0", "#737a85"]; // the two greys of a cell that ran dense, quiet on light and dark pages

/** [red, green, blue] of a share; what is outside 0..1 is clipped. */
export function rgb(share) {
  const position = Math.min(1, Math.max(0, share || 0)) * (STOPS.length - 1);
  const index = Math.min(Math.floor(position), STOPS.length - 2);
  return STOPS[index].map((low, channel) => Math.round(low + (STOPS[index + 1][channel] - low) * (position - index)));
}

/** 256 colours as [red, green, blue, 255] in one array, for pictures of bytes. */
export const TABLE = new Uint8ClampedArray(256 * 4);
/** The same as CSS colours. */
export const COLOURS = [];
for (let i = 0; i < 256; i++) {
  const colour = rgb(i / 255);
  TABLE.set([...colour, 255], i * 4);
  COLOURS.push(`rgb(${colour.join(",")})`);
}

/** The whole scale as a CSS gradient from left to right. */
export function gradient() {
  return `linear-gradient(to right, ${STOPS.map((colour) => `rgb(${colour.join(",")})`).join(", ")})`;
}
