// Keyed noise (docs/noise.md, sections 1 to 3): the same bits as NumPy's and C++'s, in any engine. Only 32-bit integer
// operations and + - * / of doubles, in the order written; Math.log and Math.exp differ between engines in their last bits.
// Knows: arithmetic. Does not know: logits, filters, who holds the seed.

const PARITY = 0x1bd11bda;
const ROTATIONS = [[13, 15, 26, 6], [17, 29, 16, 24]];
const LN2_HIGH = 0.6931471803691238; // 0x1.62e42feep-1
const LN2_LOW = 1.9082149292705877e-10; // 0x1.a39ef35793c76p-33
const LOG2_E = 1.4426950408889634; // 0x1.71547652b82fep+0
const SQRT2 = 1.4142135623730951; // 0x1.6a09e667f3bcdp+0
const ROUNDER = 1.5 * 2 ** 52; // adding and subtracting it rounds to an integer, ties to even
const LOG_TERMS = 11; // 1, 1/3, … 1/21
const EXP_TERMS = 14; // 1/0!, … 1/13!
const NEGLIGIBLE = -708; // exp below this is 0
const CHOICE_COUNTER = 0xffffffff;

const INVERSE_FACTORIALS = [1];
for (let term = 1, factorial = 1; term < EXP_TERMS; term += 1) INVERSE_FACTORIALS.push(1 / (factorial *= term));

const bits = new DataView(new ArrayBuffer(8)); // big-endian on purpose: the same everywhere

// Threefry-2x32 with 20 rounds, as in Random123: [word, word], each from 0 to 2^32 - 1.
export function threefry([k0, k1], c0, c1) {
  const words = [k0 | 0, k1 | 0, PARITY ^ k0 ^ k1];
  let x0 = (c0 + words[0]) | 0, x1 = (c1 + words[1]) | 0;
  for (let group = 0; group < 5; group += 1) {
    for (const rotation of ROTATIONS[group % 2]) {
      x0 = (x0 + x1) | 0;
      x1 = ((x1 << rotation) | (x1 >>> (32 - rotation))) ^ x0;
    }
    x0 = (x0 + words[(group + 1) % 3]) | 0;
    x1 = (x1 + words[(group + 2) % 3] + group + 1) | 0;
  }
  return [x0 >>> 0, x1 >>> 0];
}

// The key of a seed, a BigInt from 0 to 2^64 - 1: [low word, high word].
export const splitSeed = (seed) => [Number(seed & 0xffffffffn), Number(seed >> 32n)];

// The seed of choice `choice` of a request, a BigInt. Choice 0 has the request's own.
export function choiceSeed(seed, choice) {
  if (choice === 0) return seed;
  const [low, high] = threefry(splitSeed(seed), choice, CHOICE_COUNTER);
  return BigInt(low) | (BigInt(high) << 32n);
}

// Between 2^-53 and 1 - 2^-53, exact. `key`: of the seed; `position`: of the token in its session; `id`: the token.
export function uniform(key, position, id) {
  const [x0, x1] = threefry(key, position, id);
  const k = x0 * 2 ** 20 + (x1 >>> 12); // 52 bits: exact in a double
  return (2 * k + 1) * 2 ** -53;
}

export const gumbelNoise = (key, position, id) => -log(-log(uniform(key, position, id)));

// Natural logarithm of a positive normal double.
export function log(x) {
  bits.setFloat64(0, x);
  const high = bits.getUint32(0);
  let exponent = (high >>> 20) - 1023;
  bits.setUint32(0, (high & 0xfffff) | 0x3ff00000);
  let m = bits.getFloat64(0);
  if (m >= SQRT2) {
    m *= 0.5;
    exponent += 1;
  }
  const f = m - 1;
  const s = f / (f + 2);
  const z = s * s;
  let series = 1 / (2 * LOG_TERMS - 1);
  for (let term = LOG_TERMS - 2; term >= 0; term -= 1) series = series * z + 1 / (2 * term + 1);
  return exponent * LN2_HIGH + ((s + s) * series + exponent * LN2_LOW);
}

// e^x for x <= 0 or slightly above; 0 below -708.
export function exp(x) {
  if (x < NEGLIGIBLE) return 0;
  const n = x * LOG2_E + ROUNDER - ROUNDER;
  const r = x - n * LN2_HIGH - n * LN2_LOW;
  let series = INVERSE_FACTORIALS[EXP_TERMS - 1];
  for (let term = EXP_TERMS - 2; term >= 0; term -= 1) series = series * r + INVERSE_FACTORIALS[term];
  bits.setUint32(0, (n + 1023) << 20);
  bits.setUint32(4, 0);
  return series * bits.getFloat64(0);
}
