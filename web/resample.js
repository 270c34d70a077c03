/**
 * Resampling by a windowed sinc, the same on every machine. Delays nothing.
 *
 * @module
 */

import { resampledLength } from './tokenfile.js';

const ZEROS = 32; // of the sinc on each side
const BETA = 9; // of the Kaiser window
const ROLLOFF = 0.95; // of the band that is kept
const FINE = 512; // points of the table per zero, between which it is interpolated

/** Modified Bessel function of the first kind. @param {number} x */
function bessel(x) {
  let sum = 1;
  for (let term = 1, k = 1; term > 1e-12 * sum; k++) {
    term *= (x / (2 * k)) ** 2;
    sum += term;
  }
  return sum;
}

const TABLE = Float64Array.from({ length: ZEROS * FINE + 2 }, (_, i) => {
  const x = i / FINE;
  if (x >= ZEROS) return 0;
  const sinc = x ? Math.sin(Math.PI * x) / (Math.PI * x) : 1;
  return (sinc * bessel(BETA * Math.sqrt(1 - (x / ZEROS) ** 2))) / bessel(BETA);
});

/**
 * Samples at another rate.
 *
 * @param {Float32Array} samples of one channel
 * @param {number} from Hz
 * @param {number} to Hz
 * @param {number} [length] of the result; ceil(samples.length * to / from)
 * @returns {Float32Array} the same array if the rates are equal
 */
export function resample(samples, from, to, length) {
  length ??= resampledLength(samples.length, from, to);
  if (from === to) return samples.length === length ? samples : fitted(samples, length);
  const divisor = gcd(from, to);
  const phases = to / divisor;
  const step = from / divisor;
  const scale = ROLLOFF * Math.min(1, to / from);
  const reach = Math.ceil(ZEROS / scale);
  // Few phases: their weights are worth keeping. The rates of recordings have at most a few hundred.
  /** @type {(Float64Array | undefined)[]} */
  const kept = [];
  const weightsOf = (/** @type {number} */ phase) => {
    const weights = new Float64Array(2 * reach);
    for (let i = 0; i < weights.length; i++) {
      const x = Math.abs(i + 1 - reach - phase / phases) * scale * FINE;
      const n = Math.min(Math.floor(x), TABLE.length - 2);
      weights[i] = scale * (TABLE[n] + (TABLE[n + 1] - TABLE[n]) * Math.min(x - n, 1));
    }
    if (phases <= 1024) kept[phase] = weights;
    return weights;
  };
  const result = new Float32Array(length);
  for (let i = 0, whole = 0, phase = 0; i < length; i++) {
    const weights = kept[phase] ?? weightsOf(phase);
    const first = whole + 1 - reach;
    const end = Math.min(weights.length, samples.length - first);
    let sum = 0;
    for (let j = Math.max(0, -first); j < end; j++) sum += weights[j] * samples[first + j];
    result[i] = sum;
    phase += step;
    whole += Math.floor(phase / phases);
    phase %= phases;
  }
  return result;
}

/** @param {Float32Array} samples @param {number} length */
function fitted(samples, length) {
  const result = new Float32Array(length);
  result.set(samples.subarray(0, length));
  return result;
}

/** @param {number} a @param {number} b @returns {number} */
function gcd(a, b) {
  return b ? gcd(b, a % b) : a;
}
