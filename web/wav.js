/**
 * WAV files: reading what recorders make, exactly, and writing 16 bits.
 *
 * @module
 */

const PCM = 1;
const FLOAT = 3;
const EXTENSIBLE = 0xfffe;

/**
 * The samples of a WAV file of 8, 16, 24 or 32 bits, or of floats.
 *
 * @param {Uint8Array} bytes
 * @returns {{channels: Float32Array[], rate: number} | null} null: not such a file, or not whole
 */
export function readWav(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const text = (/** @type {number} */ at) => String.fromCharCode(...bytes.subarray(at, at + 4));
  if (bytes.length < 12 || text(0) !== 'RIFF' || text(8) !== 'WAVE') return null;
  let coding = 0;
  let count = 0;
  let rate = 0;
  let bits = 0;
  for (let at = 12; at + 8 <= bytes.length; ) {
    const size = view.getUint32(at + 4, true);
    const start = at + 8;
    if (text(at) === 'fmt ' && size >= 16 && start + size <= bytes.length) {
      coding = view.getUint16(start, true);
      count = view.getUint16(start + 2, true);
      rate = view.getUint32(start + 4, true);
      bits = view.getUint16(start + 14, true);
      if (coding === EXTENSIBLE && size >= 26) coding = view.getUint16(start + 24, true);
    } else if (text(at) === 'data') {
      const read = reader(view, coding, bits);
      const frame = (count * bits) / 8;
      if (!read || !count || !rate || start + size > bytes.length || size % frame) return null;
      const n = size / frame;
      const channels = Array.from({ length: count }, () => new Float32Array(n));
      for (let i = 0, place = start; i < n; i++) {
        for (let c = 0; c < count; c++, place += bits / 8) channels[c][i] = read(place);
      }
      return { channels, rate };
    }
    at = start + size + (size % 2);
  }
  return null;
}

/**
 * @param {DataView} view
 * @param {number} coding
 * @param {number} bits
 * @returns {((place: number) => number) | null}
 */
function reader(view, coding, bits) {
  if (coding === FLOAT && bits === 32) return (place) => view.getFloat32(place, true);
  if (coding === FLOAT && bits === 64) return (place) => view.getFloat64(place, true);
  if (coding !== PCM) return null;
  if (bits === 8) return (place) => (view.getUint8(place) - 128) / 128;
  if (bits === 16) return (place) => view.getInt16(place, true) / 32768;
  if (bits === 24) {
    return (place) => (view.getInt16(place + 1, true) * 256 + view.getUint8(place)) / 2 ** 23;
  }
  if (bits === 32) return (place) => view.getInt32(place, true) / 2 ** 31;
  return null;
}

/**
 * A WAV file of 16 bits.
 *
 * @param {Float32Array[]} channels of one length, in [-1, 1]
 * @param {number} rate Hz
 * @returns {Uint8Array}
 */
export function writeWav(channels, rate) {
  const count = channels.length;
  const size = 2 * count * channels[0].length;
  const bytes = new Uint8Array(44 + size);
  const view = new DataView(bytes.buffer);
  const put = (/** @type {number} */ at, /** @type {string} */ text) =>
    bytes.set(new TextEncoder().encode(text), at);
  put(0, 'RIFF');
  view.setUint32(4, 36 + size, true);
  put(8, 'WAVEfmt ');
  view.setUint32(16, 16, true);
  view.setUint16(20, PCM, true);
  view.setUint16(22, count, true);
  view.setUint32(24, rate, true);
  view.setUint32(28, 2 * count * rate, true);
  view.setUint16(32, 2 * count, true);
  view.setUint16(34, 16, true);
  put(36, 'data');
  view.setUint32(40, size, true);
  for (let i = 0, place = 44; i < channels[0].length; i++) {
    for (const row of channels) {
      view.setInt16(place, Math.max(-32768, Math.min(32767, Math.round(row[i] * 32768))), true);
      place += 2;
    }
  }
  return bytes;
}
