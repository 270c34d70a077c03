/**
 * Sound files and the microphone to samples.
 *
 * @module
 */

import { readWav } from './wav.js';

export const MAX_SAMPLES = 2 ** 26; // of all channels, that a page has the memory for
export const USUAL_RATE = 48_000; // of files whose rate is not known

export const TOO_LONG = 'too long for a page; the command vpcodec takes any length';

/** @typedef {{channels: Float32Array[], rate: number}} Sound */

/**
 * The samples of a file, at its own rate.
 *
 * @param {Uint8Array} bytes
 * @returns {Promise<Sound>}
 * @throws {Error} not a sound that the browser reads
 */
export async function readSound(bytes) {
  const wav = readWav(bytes);
  const sound = wav ?? (await decoded(bytes));
  if (sound.channels[0].length * sound.channels.length > MAX_SAMPLES) throw new Error(TOO_LONG);
  return sound;
}

/** @param {Uint8Array} bytes @returns {Promise<Sound>} */
async function decoded(bytes) {
  const rate = rateOf(bytes) ?? USUAL_RATE;
  try {
    const context = new OfflineAudioContext(1, 1, rate);
    const buffer = await context.decodeAudioData(bytes.slice().buffer);
    const channels = Array.from({ length: buffer.numberOfChannels }, (_, c) =>
      buffer.getChannelData(c),
    );
    return { channels, rate };
  } catch {
    throw new Error('neither a sound nor a picture that this browser reads, nor a .tok file');
  }
}

/**
 * The sample rate that a FLAC, Ogg or MP3 file states.
 *
 * @param {Uint8Array} bytes
 * @returns {number | null}
 */
export function rateOf(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const starts = (/** @type {string} */ text, at = 0) =>
    [...text].every((char, i) => bytes[at + i] === char.charCodeAt(0));
  let rate = null;
  if (bytes.length < 64) return null;
  if (starts('fLaC')) rate = view.getUint32(18) >>> 12;
  if (starts('OggS')) {
    const at = 27 + bytes[26];
    if (starts('OpusHead', at)) rate = 48_000;
    if (starts('\x01vorbis', at)) rate = view.getUint32(at + 12, true);
  }
  let at = 0;
  if (starts('ID3')) {
    at = 10 + ((bytes[6] << 21) | (bytes[7] << 14) | (bytes[8] << 7) | bytes[9]);
  }
  if (at + 4 <= bytes.length && bytes[at] === 0xff && (bytes[at + 1] & 0xe6) === 0xe2) {
    const version = (bytes[at + 1] >> 3) & 3; // 3: MPEG 1, 2: MPEG 2, 0: MPEG 2.5
    const first = [44_100, 48_000, 32_000][(bytes[at + 2] >> 2) & 3];
    if (version !== 1 && first) rate = first / { 3: 1, 2: 2, 0: 4 }[/** @type {0 | 2 | 3} */ (version)];
  }
  return rate !== null && rate >= 8_000 && rate <= 96_000 ? rate : null;
}

/** A recording from the microphone. */
export class Recording {
  /**
   * Asks for the microphone, and begins.
   *
   * @param {(seconds: number) => void} told how long it is
   */
  static async start(told) {
    const stream = await navigator.mediaDevices.getUserMedia({
      audio: { echoCancellation: false, noiseSuppression: false, autoGainControl: false },
    });
    const context = new AudioContext();
    await context.audioWorklet.addModule('recorder.js');
    return new Recording(stream, context, told);
  }

  /** @param {MediaStream} stream @param {AudioContext} context @param {(s: number) => void} told */
  constructor(stream, context, told) {
    this.stream = stream;
    this.context = context;
    /** @type {Float32Array[]} */
    this.parts = [];
    let size = 0;
    const node = new AudioWorkletNode(context, 'recorder', { numberOfOutputs: 0 });
    node.port.onmessage = ({ data }) => {
      if (size + data.length > MAX_SAMPLES) return;
      this.parts.push(data);
      size += data.length;
      told(size / context.sampleRate);
    };
    context.createMediaStreamSource(stream).connect(node);
  }

  /** Ends it. @returns {Promise<Sound>} */
  async stop() {
    this.stream.getTracks().forEach((track) => track.stop());
    const rate = this.context.sampleRate;
    await this.context.close();
    const samples = new Float32Array(this.parts.reduce((n, part) => n + part.length, 0));
    let position = 0;
    for (const part of this.parts) {
      samples.set(part, position);
      position += part.length;
    }
    if (!position) throw new Error('nothing was recorded');
    return { channels: [samples], rate };
  }
}
