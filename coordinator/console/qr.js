// A QR code of a short text (bytes, error level L, versions 1 to 13: up to 425 bytes), as SVG.

import { s } from "./dom.js";

// Per version: check bytes per block, then [blocks, data bytes each] groups, then centres of the alignment marks.
const VERSIONS = [
  [7, [[1, 19]], []], [10, [[1, 34]], [6, 18]], [15, [[1, 55]], [6, 22]], [20, [[1, 80]], [6, 26]],
  [26, [[1, 108]], [6, 30]], [18, [[2, 68]], [6, 34]], [20, [[2, 78]], [6, 22, 38]], [24, [[2, 97]], [6, 24, 42]],
  [30, [[2, 116]], [6, 26, 46]], [18, [[2, 68], [2, 69]], [6, 28, 50]], [20, [[4, 81]], [6, 30, 54]],
  [24, [[2, 92], [2, 93]], [6, 32, 58]], [26, [[4, 107]], [6, 34, 62]],
];
const MASKS = [
  (r, c) => (r + c) % 2 === 0, (r) => r % 2 === 0, (r, c) => c % 3 === 0, (r, c) => (r + c) % 3 === 0,
  (r, c) => ((r >> 1) + Math.floor(c / 3)) % 2 === 0, (r, c) => ((r * c) % 2) + ((r * c) % 3) === 0,
  (r, c) => (((r * c) % 2) + ((r * c) % 3)) % 2 === 0, (r, c) => (((r + c) % 2) + ((r * c) % 3)) % 2 === 0,
];
const QUIET = 4;
const EXP = [], LOG = [];
for (let power = 0, value = 1; power < 255; power += 1) {
  EXP[power] = value;
  LOG[value] = power;
  value = value & 128 ? (value << 1) ^ 0x11d : value << 1;
}
const times = (a, b) => (a && b ? EXP[(LOG[a] + LOG[b]) % 255] : 0);

// Rows of 0 and 1, or null when the text is too long.
export function encode(text, onlyMask) {
  const data = new TextEncoder().encode(text);
  const number = VERSIONS.findIndex(([, groups], index) => data.length <= capacity(groups) - (index < 9 ? 2 : 3)) + 1;
  if (number === 0) return null;
  const bits = toBits(codewords(data, number));
  const masks = onlyMask === undefined ? MASKS.map((_, index) => index) : [onlyMask];
  const made = masks.map((mask) => draw(number, bits, mask));
  return made.reduce((best, rows) => (penalty(rows) < penalty(best) ? rows : best));
}

const capacity = (groups) => groups.reduce((sum, [blocks, size]) => sum + blocks * size, 0);
const toBits = (values) => values.flatMap((value) => Array.from({ length: 8 }, (_, bit) => (value >> (7 - bit)) & 1));

function codewords(data, number) {
  const [checkSize, groups] = VERSIONS[number - 1];
  const size = capacity(groups), lengthBits = number < 10 ? 8 : 16;
  const head = (4 << lengthBits) | data.length; // mode "bytes", then the length
  const bits = Array.from({ length: 4 + lengthBits }, (_, bit) => (head >> (3 + lengthBits - bit)) & 1);
  bits.push(...toBits([...data]), 0, 0, 0, 0);
  const filled = [];
  for (let at = 0; at < bits.length && filled.length < size; at += 8) {
    filled.push(bits.slice(at, at + 8).reduce((value, bit, index) => value | (bit << (7 - index)), 0));
  }
  for (let pad = 0xec; filled.length < size; pad ^= 0xec ^ 0x11) filled.push(pad);
  const blocks = groups.flatMap(([count, each]) => Array.from({ length: count }, () => filled.splice(0, each)));
  const checks = blocks.map((block) => remainder(block, checkSize));
  return [...interleave(blocks), ...interleave(checks)];
}

function interleave(blocks) {
  const longest = Math.max(...blocks.map((block) => block.length));
  return Array.from({ length: longest }, (_, at) => blocks.filter((block) => at < block.length).map((block) => block[at])).flat();
}

// Reed-Solomon check bytes of a block.
function remainder(block, size) {
  let generator = [1];
  for (let power = 0; power < size; power += 1) {
    const next = [...generator, 0];
    generator.forEach((factor, index) => { next[index + 1] ^= times(factor, EXP[power]); });
    generator = next;
  }
  const rest = Array(size).fill(0);
  for (const value of block) {
    const factor = value ^ rest.shift();
    rest.push(0);
    for (let index = 0; index < size; index += 1) rest[index] ^= times(generator[index + 1], factor);
  }
  return rest;
}

function draw(number, bits, mask) {
  const size = 17 + 4 * number, centres = VERSIONS[number - 1][2];
  const rows = Array.from({ length: size }, () => Array(size).fill(null));
  const put = (row, column, dark) => { if (rows[row]?.[column] !== undefined) rows[row][column] = dark ? 1 : 0; };
  for (const [row, column] of [[3, 3], [3, size - 4], [size - 4, 3]]) square(put, row, column, 4, [2, 4]);
  for (const row of centres) {
    for (const column of centres) if (rows[row][column] === null) square(put, row, column, 2, [1]);
  }
  for (let at = 8; at < size - 8; at += 1) { put(6, at, at % 2 === 0); put(at, 6, at % 2 === 0); }
  put(size - 8, 8, true);
  writeFormat(put, size, mask);
  if (number >= 7) writeVersion(put, size, number);
  fillIn(rows, size, bits, mask);
  return rows;
}

// Rings around a centre; those named in `light` are light.
function square(put, row, column, radius, light) {
  for (let r = -radius; r <= radius; r += 1) {
    for (let c = -radius; c <= radius; c += 1) put(row + r, column + c, !light.includes(Math.max(Math.abs(r), Math.abs(c))));
  }
}

function writeFormat(put, size, mask) {
  const value = 0b01000 | mask; // level L
  let rest = value << 10;
  for (let bit = 14; bit >= 10; bit -= 1) if (rest & (1 << bit)) rest ^= 0x537 << (bit - 10);
  const format = ((value << 10) | rest) ^ 0x5412;
  for (let bit = 0; bit < 15; bit += 1) {
    const dark = (format >> bit) & 1;
    put(bit < 6 ? bit : bit < 8 ? bit + 1 : size - 15 + bit, 8, dark);
    put(8, bit < 8 ? size - 1 - bit : bit === 8 ? 7 : 14 - bit, dark);
  }
}

function writeVersion(put, size, number) {
  let rest = number << 12;
  for (let bit = 17; bit >= 12; bit -= 1) if (rest & (1 << bit)) rest ^= 0x1f25 << (bit - 12);
  const value = (number << 12) | rest;
  for (let bit = 0; bit < 18; bit += 1) {
    const dark = (value >> bit) & 1, a = Math.floor(bit / 3), b = size - 11 + (bit % 3);
    put(a, b, dark);
    put(b, a, dark);
  }
}

// Two columns at a time from the right, up and down, past the column of the timing marks.
function fillIn(rows, size, bits, mask) {
  let next = 0, isUp = true;
  for (let right = size - 1; right > 0; right -= 2, isUp = !isUp) {
    if (right === 6) right = 5;
    for (let step = 0; step < size; step += 1) {
      const row = isUp ? size - 1 - step : step;
      for (const column of [right, right - 1]) {
        if (rows[row][column] === null) rows[row][column] = (bits[next++] ?? 0) ^ (MASKS[mask](row, column) ? 1 : 0);
      }
    }
  }
}

// Long runs and blocks of one colour are hard to read: the mask with the fewest is taken.
function penalty(rows) {
  let sum = 0;
  const lines = [...rows, ...rows.map((_, column) => rows.map((row) => row[column]))];
  for (const line of lines) {
    for (const run of line.join("").match(/0{5,}|1{5,}/g) ?? []) sum += run.length - 2;
    sum += 40 * (line.join("").match(/(?=10111010000|00001011101)/g) ?? []).length;
  }
  for (let r = 1; r < rows.length; r += 1) {
    for (let c = 1; c < rows.length; c += 1) {
      if (rows[r][c] === rows[r - 1][c] && rows[r][c] === rows[r][c - 1] && rows[r][c] === rows[r - 1][c - 1]) sum += 3;
    }
  }
  const dark = rows.flat().filter(Boolean).length / rows.length ** 2;
  return sum + 10 * Math.floor(Math.abs(dark - 0.5) * 20);
}

// The code as elements to show: one, or none when the text is too long.
export function drawCode(text) {
  const rows = encode(text);
  if (rows === null) return [];
  const size = rows.length + 2 * QUIET;
  const dots = rows.flatMap((row, r) => row.flatMap((dark, c) => (dark ? [`M${c + QUIET} ${r + QUIET}h1v1h-1z`] : [])));
  return [s("svg", { viewBox: `0 0 ${size} ${size}`, role: "img", "aria-label": "The link as a QR code", "shape-rendering": "crispEdges" },
    s("path", { d: dots.join(""), fill: "#000" }))];
}
