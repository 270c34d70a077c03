/**
 * Spectrograms as small grey images.
 *
 * @module
 */

const SIZE = 512; // samples of a window
export const ROWS = 128; // 0 Hz to half the rate
const RANGE = 75; // dB from white to black

const WINDOW = Float64Array.from({ length: SIZE }, (_, i) => 0.5 - 0.5 * Math.cos((2 * Math.PI * i) / SIZE));

/**
 * Levels in dB over time and frequency.
 *
 * @param {Float32Array} samples
 * @param {number} columns
 * @returns {Float32Array} (columns, ROWS), lowest frequency first
 */
export function levels(samples, columns) {
  const result = new Float32Array(columns * ROWS);
  const re = new Float64Array(SIZE);
  const im = new Float64Array(SIZE);
  const step = samples.length / columns;
  const bins = SIZE / 2 / ROWS;
  for (let column = 0; column < columns; column++) {
    const first = Math.round((column + 0.5) * step - SIZE / 2);
    for (let i = 0; i < SIZE; i++) {
      re[i] = (samples[first + i] ?? 0) * WINDOW[i];
      im[i] = 0;
    }
    transform(re, im);
    for (let row = 0; row < ROWS; row++) {
      let power = 1e-10;
      for (let k = row * bins; k < (row + 1) * bins; k++) power += re[k] ** 2 + im[k] ** 2;
      result[column * ROWS + row] = 10 * Math.log10(power);
    }
  }
  return result;
}

/**
 * Levels as bytes, 255 for those of `highest` dB.
 *
 * @param {Float32Array} values
 * @param {number} highest
 */
export function shades(values, highest) {
  return Uint8ClampedArray.from(values, (value) => 255 * (1 + (value - highest) / RANGE));
}

/** Fourier transform in place. @param {Float64Array} re @param {Float64Array} im */
function transform(re, im) {
  const n = re.length;
  for (let i = 1, j = 0; i < n; i++) {
    let bit = n >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) {
      [re[i], re[j]] = [re[j], re[i]];
      [im[i], im[j]] = [im[j], im[i]];
    }
  }
  for (let size = 2; size <= n; size *= 2) {
    for (let k = 0; k < size / 2; k++) {
      const c = Math.cos((-2 * Math.PI * k) / size);
      const s = Math.sin((-2 * Math.PI * k) / size);
      for (let i = k; i < n; i += size) {
        const j = i + size / 2;
        const x = re[j] * c - im[j] * s;
        const y = re[j] * s + im[j] * c;
        re[j] = re[i] - x;
        im[j] = im[i] - y;
        re[i] += x;
        im[i] += y;
      }
    }
  }
}
