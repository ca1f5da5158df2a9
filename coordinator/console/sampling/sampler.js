// From logits to an id (docs/noise.md, section 4): what the target draws, drawn in a page.
// Knows: filters and the argmax under keyed noise. Does not know: penalties, sequences, models.

import { exp, gumbelNoise, log, splitSeed } from "./noise.js";

const largestOf = (logits) => logits.reduce((best, logit) => (logit > best ? logit : best), -Infinity);

// The id with the largest d + noise among those the filters keep, ties to the lowest id. `logits`: array of doubles;
// `seed`: BigInt; `position`: the one that the drawn token will have. Temperature 0: the largest logit.
export function sample(logits, { seed, position, temperature, topK = 0, topP = 1, minP = 0 }) {
  const largest = largestOf(logits);
  if (temperature === 0) return logits.indexOf(largest);
  const d = logits.map((logit) => (logit - largest) / temperature);
  const key = splitSeed(seed);
  let best = -1, bestScore = -Infinity;
  for (const id of survivors(d, { topK, topP, minP })) {
    const score = d[id] + gumbelNoise(key, position, id);
    if (score > bestScore) [best, bestScore] = [id, score];
  }
  return best;
}

// Ids, ascending, that top-k, top-p and min-p keep. `d`: (logit - largest) / temperature.
function survivors(d, { topK, topP, minP }) {
  const weights = d.map(exp);
  let kept = [];
  for (let id = 0; id < d.length; id += 1) if (weights[id] > 0) kept.push(id);
  const total = (ids) => ids.reduce((sum, id) => sum + weights[id], 0);
  if (topK || topP < 1) kept.sort((a, b) => d[b] - d[a] || a - b);
  if (topK) kept = kept.slice(0, topK);
  if (topP < 1) {
    const enough = topP * total([...kept].sort((a, b) => a - b)); // summed in id order
    let sum = 0;
    const last = kept.findIndex((id) => (sum += weights[id]) >= enough);
    if (last >= 0) kept = kept.slice(0, last + 1);
  }
  return kept.filter((id) => weights[id] >= minP).sort((a, b) => a - b);
}

// [log-probability of `chosen`, the `top` most likely as [id, log-probability]], of the model's own distribution.
export function logProbabilities(logits, chosen, top) {
  const largest = largestOf(logits);
  const normalizer = log(logits.reduce((sum, logit) => sum + exp(logit - largest), 0));
  const order = Array.from(logits, (_, id) => id).sort((a, b) => logits[b] - logits[a] || a - b);
  const value = (id) => logits[id] - largest - normalizer;
  return [value(chosen), order.slice(0, top).map((id) => [id, value(id)])];
}
