/**
 * Encoding and decoding with a model and ONNX Runtime, which the caller hands in.
 *
 *     import * as ort from 'onnxruntime-web/wasm';
 *     const codec = openCodec(await loadModel('models/speech-3k'), ort);
 *     const file = await codec.encodeFile([samples], 48000);
 *
 * @module
 */

import { hex } from './entropy.js';
import { knows } from './model.js';
import { resample } from './resample.js';
import {
  TokenFileError,
  makeHeader,
  readHeader,
  readTokens,
  resampledLength,
  writeTokens,
} from './tokenfile.js';

const CHUNK_SECONDS = 0.75; // audio that goes through the graphs at once
const FILE_BLOCK = 2048; // frames per block of an audio file
const IMAGE_BLOCK = 2 ** 14; // and of an image, about
const TILE_SIDE = 512; // pixels of a tile without its surroundings
export const MAX_PIXELS = 2 ** 26; // of an image that is coded here

/** @typedef {import('./model.js').Model} Model */
/** @typedef {import('./tokenfile.js').TokenHeader} TokenHeader */
/** @typedef {import('./tokenfile.js').AudioHeader} AudioHeader */
/** @typedef {import('./tokenfile.js').ImageHeader} ImageHeader */
/** @typedef {any} Ort the module `onnxruntime-web`, `onnxruntime-node` or one like them */
/** @typedef {(done: number, total: number) => void} Progress */

/**
 * A codec for a model.
 *
 * @param {Model} model
 * @param {Ort} ort
 * @param {object} [options] of the sessions, such as `executionProviders`
 * @returns {AudioCodec | ImageCodec}
 */
export function openCodec(model, ort, options = {}) {
  return new (model.kind === 'audio' ? AudioCodec : ImageCodec)(model, ort, options);
}

/** What both codecs share. */
class Codec {
  /** @param {Model} model @param {Ort} ort @param {object} options */
  constructor(model, ort, options) {
    this.model = model;
    this.ort = ort;
    this.options = options;
    /** @type {Map<string, Promise<any>>} */
    this.sessions = new Map();
  }

  /**
   * The session of a graph, loaded when it is first needed.
   *
   * @param {'encoder' | 'decoder'} part
   * @returns {Promise<any>}
   */
  session(part) {
    let session = this.sessions.get(part);
    if (!session) {
      const { files } = this.model;
      session = this.ort.InferenceSession.create(files[`${part}.onnx`], {
        ...this.options,
        externalData: [{ path: 'model.safetensors', data: files['model.safetensors'] }],
      });
      this.sessions.set(part, /** @type {Promise<any>} */ (session));
    }
    return /** @type {Promise<any>} */ (session);
  }

  /**
   * The tokens of a file that this model may decode.
   *
   * @param {Uint8Array} bytes
   */
  readTokens(bytes) {
    const { header } = readHeader(bytes);
    const { model } = this;
    if (
      header.kind !== model.kind ||
      header.codebookSize !== model.codebookSize ||
      header.hopLength !== model.hopLength ||
      (header.kind === 'audio' && header.sampleRate !== model.config.sample_rate)
    ) {
      throw new TokenFileError(
        `made by the model '${header.model}', whose tokens '${model.name}' cannot decode`,
      );
    }
    const identity = hex(header.identity);
    if (!knows(model, identity)) {
      throw new TokenFileError(
        `made by other weights (model '${header.model}', token space ${identity.slice(0, 8)}; ` +
          `this is '${model.name}', ${hex(model.space).slice(0, 8)})`,
      );
    }
    return readTokens(bytes, { coder: model.coder });
  }

  /** The header fields that say which model made a file. */
  get ownFields() {
    const { name, space, hopLength, codebookSize } = this.model;
    return { model: name, identity: space, hopLength, codebookSize };
  }
}

/** Audio to tokens and back. */
export class AudioCodec extends Codec {
  get sampleRate() {
    return this.model.config.sample_rate;
  }

  /**
   * A stream that takes audio piece by piece, and gives the tokens of the whole.
   *
   * @param {number} [channels]
   */
  encoderStream(channels = 1) {
    return new EncoderStream(this, channels);
  }

  /**
   * A stream that takes tokens piece by piece, and gives the audio of the whole.
   *
   * @param {number} [channels]
   */
  decoderStream(channels = 1) {
    return new DecoderStream(this, channels);
  }

  /** Frames that go through a graph at a time. @param {number} channels */
  chunkFrames(channels) {
    const frameRate = this.sampleRate / this.model.hopLength;
    return Math.max(1, Math.round((CHUNK_SECONDS * frameRate) / channels));
  }

  /**
   * Samples at the model's rate to tokens.
   *
   * @param {Float32Array[]} channels of one length, in [-1, 1]
   * @param {Progress} [progress] told the samples that are done
   * @returns {Promise<Uint32Array[]>} ceil(length / hopLength) tokens per channel
   */
  async encode(channels, progress) {
    const stream = this.encoderStream(channels.length);
    const total = channels[0].length;
    const step = this.chunkFrames(channels.length) * this.model.hopLength;
    const parts = [];
    for (let start = 0; start < total; start += step) {
      parts.push(await stream.push(channels.map((row) => row.subarray(start, start + step))));
      progress?.(Math.min(start + step, total), total);
    }
    parts.push(await stream.flush());
    return concatenated(Uint32Array, parts, channels.length);
  }

  /**
   * Tokens to samples at the model's rate.
   *
   * @param {ArrayLike<number>[]} tokens per channel
   * @param {number} [nSamples] to cut to; all
   * @param {Progress} [progress] told the tokens that are done
   * @returns {Promise<Float32Array[]>}
   */
  async decode(tokens, nSamples, progress) {
    const stream = this.decoderStream(tokens.length);
    const rows = tokens.map((row) => Uint32Array.from(row));
    const total = rows[0].length;
    const step = this.chunkFrames(tokens.length);
    const parts = [];
    for (let start = 0; start < total; start += step) {
      parts.push(await stream.push(rows.map((row) => row.subarray(start, start + step))));
      progress?.(Math.min(start + step, total), total);
    }
    parts.push(await stream.flush());
    const samples = concatenated(Float32Array, parts, tokens.length);
    return samples.map((row) => row.subarray(0, nSamples));
  }

  /**
   * Audio at any rate to a token file, the one that `vpcodec encode` makes.
   *
   * @param {Float32Array[]} channels of one length, in [-1, 1]
   * @param {number} rate Hz
   * @param {Progress} [progress]
   * @returns {Promise<Uint8Array>}
   */
  async encodeFile(channels, rate, progress) {
    const header = makeHeader({
      kind: 'audio',
      ...this.ownFields,
      channels: channels.length,
      sampleRate: this.sampleRate,
      originalRate: rate,
      nSamples: channels[0].length,
      blockFrames: Math.min(FILE_BLOCK, Math.floor(2 ** 17 / channels.length)),
    });
    const own = channels.map((row) => resample(row, rate, this.sampleRate));
    const tokens = await this.encode(own, progress);
    return writeTokens(header, tokens, { coder: this.model.coder });
  }

  /**
   * A token file to audio at its original rate.
   *
   * @param {Uint8Array} bytes
   * @param {Progress} [progress]
   * @returns {Promise<{channels: Float32Array[], rate: number, header: AudioHeader}>}
   */
  async decodeFile(bytes, progress) {
    const { tokens, header } = /** @type {{tokens: Uint32Array[], header: AudioHeader}} */ (
      this.readTokens(bytes)
    );
    const rate = header.originalRate;
    const nSamples = /** @type {number} */ (header.nSamples);
    const own = await this.decode(
      tokens,
      resampledLength(nSamples, rate, this.sampleRate),
      progress,
    );
    const channels = own.map((row) => resample(row, this.sampleRate, rate, nSamples));
    return { channels, rate, header };
  }
}

/** A graph with states: input `past.X` takes output `next.X` of the step before. */
class Steps {
  /** @param {AudioCodec} codec @param {'encoder' | 'decoder'} part @param {number} channels */
  constructor(codec, part, channels) {
    this.codec = codec;
    this.part = part;
    this.channels = channels;
    /** @type {Record<string, any> | null} */
    this.state = null;
    this.busy = false;
  }

  /**
   * One step.
   *
   * @param {'float32' | 'int64'} type
   * @param {Float32Array | BigInt64Array} data channel after channel
   * @returns {Promise<any>} the data of the first output
   */
  async run(type, data) {
    if (this.busy) throw new Error('the stream is in use: await each push');
    this.busy = true;
    try {
      const { Tensor } = this.codec.ort;
      const session = await this.codec.session(this.part);
      const [input, ...past] = session.inputMetadata;
      this.state ??= Object.fromEntries(
        past.map((/** @type {any} */ { name, shape }) => {
          const full = [this.channels, ...shape.slice(1)];
          const size = full.reduce((a, b) => a * b, 1);
          return [name, new Tensor('float32', new Float32Array(size), full)];
        }),
      );
      const shape = [this.channels, data.length / this.channels];
      const found = await session.run({ [input.name]: new Tensor(type, data, shape), ...this.state });
      const [output, ...next] = session.outputNames;
      this.state = Object.fromEntries(
        next.map((/** @type {string} */ name) => [name.replace('next.', 'past.'), found[name]]),
      );
      return found[output].data;
    } finally {
      this.busy = false;
    }
  }
}

/** See `AudioCodec.encoderStream`. */
class EncoderStream {
  /** @param {AudioCodec} codec @param {number} channels */
  constructor(codec, channels) {
    this.hop = codec.model.hopLength;
    this.channels = channels;
    this.steps = new Steps(codec, 'encoder', channels);
    this.rest = Array.from({ length: channels }, () => new Float32Array(0));
  }

  /**
   * The tokens of the frames that are now complete.
   *
   * @param {Float32Array[]} samples at the model's rate, one array per channel
   * @returns {Promise<Uint32Array[]>}
   */
  async push(samples) {
    const rows = concatenated(Float32Array, [this.rest, samples], this.channels);
    const whole = rows[0].length - (rows[0].length % this.hop);
    this.rest = rows.map((row) => row.slice(whole));
    if (!whole) return rows.map(() => new Uint32Array(0));
    const data = new Float32Array(whole * this.channels);
    rows.forEach((row, c) => data.set(row.subarray(0, whole), c * whole));
    const tokens = Uint32Array.from(await this.steps.run('float32', data), Number);
    return split(tokens, this.channels);
  }

  /** The token of the last frame, if one is begun; then the stream can take other audio. */
  async flush() {
    const missing = (this.hop - (this.rest[0].length % this.hop)) % this.hop;
    const tokens = await this.push(this.rest.map(() => new Float32Array(missing)));
    this.steps.state = null;
    return tokens;
  }
}

/** See `AudioCodec.decoderStream`. */
class DecoderStream {
  /** @param {AudioCodec} codec @param {number} channels */
  constructor(codec, channels) {
    this.channels = channels;
    this.delay = codec.model.config.decoder_delay;
    this.hop = codec.model.hopLength;
    this.steps = new Steps(codec, 'decoder', channels);
    this.#reset();
  }

  #reset() {
    this.steps.state = null;
    this.late = this.delay * this.hop; // samples still to drop
    /** @type {number[] | null} */
    this.last = null;
  }

  /**
   * The samples that are now final.
   *
   * @param {ArrayLike<number>[]} tokens one array per channel
   * @returns {Promise<Float32Array[]>}
   */
  async push(tokens) {
    const frames = tokens[0].length;
    if (!frames) return tokens.map(() => new Float32Array(0));
    this.last = tokens.map((row) => row[frames - 1]);
    const data = new BigInt64Array(frames * this.channels);
    tokens.forEach((row, c) => {
      for (let i = 0; i < frames; i++) data[c * frames + i] = BigInt(row[i]);
    });
    const samples = split(await this.steps.run('int64', data), this.channels);
    const late = Math.min(this.late ?? 0, samples[0].length);
    this.late = (this.late ?? 0) - late;
    return samples.map((row) => row.slice(late));
  }

  /** The samples that the decoder held back; then the stream can take other tokens. */
  async flush() {
    const { last, delay } = this;
    const samples = last
      ? await this.push(last.map((token) => new Array(delay).fill(token)))
      : Array.from({ length: this.channels }, () => new Float32Array(0));
    this.#reset();
    return samples;
  }
}

/**
 * An image in memory: 8 bits per component, row by row.
 *
 * @typedef {object} Picture
 * @property {Uint8Array | Uint8ClampedArray} data
 * @property {number} width pixels
 * @property {number} height
 * @property {number} components 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA
 */

/** Images to tokens and back. Large ones are coded in tiles, with the tokens of the whole. */
export class ImageCodec extends Codec {
  /**
   * An image to tokens.
   *
   * @param {Picture} picture
   * @param {Progress} [progress] told the pixels that are done
   * @returns {Promise<Uint32Array[]>} row by row; a second channel for alpha
   */
  async encode(picture, progress) {
    const { width, height, components } = picture;
    const hop = this.model.hopLength;
    const columns = Math.ceil(width / hop);
    const tokens = Array.from(
      { length: 2 - (components % 2) },
      () => new Uint32Array(columns * Math.ceil(height / hop)),
    );
    for (const { down, right } of this.#tiles(height, width, 'encoder', progress)) {
      const side = right.last - right.first;
      for (const [channel, row] of tokens.entries()) {
        const plane = toNetwork(picture, channel, down, right, hop);
        const found = await this.#run('encoder', 'float32', plane.data, plane.shape);
        for (let y = down.start; y < Math.min(down.stop, Math.ceil(height / hop)); y++) {
          for (let x = right.start; x < Math.min(right.stop, columns); x++) {
            row[y * columns + x] = Number(found[(y - down.first) * side + x - right.first]);
          }
        }
      }
    }
    return tokens;
  }

  /**
   * Tokens to an image.
   *
   * @param {ArrayLike<number>[]} tokens row by row; a second channel for alpha
   * @param {{width: number, height: number, components: number}} shape
   * @param {Progress} [progress] told the pixels that are done
   * @returns {Promise<Picture>}
   */
  async decode(tokens, { width, height, components }, progress) {
    checkPixels(width, height);
    const hop = this.model.hopLength;
    const columns = Math.ceil(width / hop);
    const rows = Math.ceil(height / hop);
    const picture = { data: new Uint8Array(width * height * components), width, height, components };
    for (const { down, right } of this.#tiles(height, width, 'decoder', progress)) {
      const shape = [1, down.last - down.first, right.last - right.first];
      for (const [channel, row] of tokens.entries()) {
        const tile = new BigInt64Array(shape[1] * shape[2]);
        for (let y = 0, i = 0; y < shape[1]; y++) {
          const from = Math.min(down.first + y, rows - 1) * columns;
          for (let x = 0; x < shape[2]; x++) {
            tile[i++] = BigInt(row[from + Math.min(right.first + x, columns - 1)]);
          }
        }
        const found = await this.#run('decoder', 'int64', tile, shape);
        fromNetwork(picture, channel, found, down, right, hop);
      }
    }
    return picture;
  }

  /**
   * An image to a token file.
   *
   * @param {Picture} picture
   * @param {Progress} [progress]
   * @returns {Promise<Uint8Array>}
   */
  async encodeFile(picture, progress) {
    const { width, height, components } = picture;
    checkPixels(width, height);
    const channels = 2 - (components % 2);
    const columns = Math.ceil(width / this.model.hopLength);
    const blockFrames = columns * Math.max(1, Math.floor(IMAGE_BLOCK / columns)); // whole rows
    const header = makeHeader({
      kind: 'image',
      ...this.ownFields,
      channels,
      width,
      height,
      components,
      blockFrames: Math.min(blockFrames, 2 ** 16 - 1),
    });
    const tokens = await this.encode(picture, progress);
    return writeTokens(header, tokens, { coder: this.model.coder });
  }

  /**
   * A token file to an image.
   *
   * @param {Uint8Array} bytes
   * @param {Progress} [progress]
   * @returns {Promise<{picture: Picture, header: ImageHeader}>}
   */
  async decodeFile(bytes, progress) {
    const { tokens, header } = /** @type {{tokens: Uint32Array[], header: ImageHeader}} */ (
      this.readTokens(bytes)
    );
    return { picture: await this.decode(tokens, header, progress), header };
  }

  /**
   * @param {'encoder' | 'decoder'} part
   * @param {'float32' | 'int64'} type
   * @param {Float32Array | BigInt64Array} data
   * @param {number[]} shape
   * @returns {Promise<any>}
   */
  async #run(part, type, data, shape) {
    const session = await this.session(part);
    const tensor = new this.ort.Tensor(type, data, shape);
    const found = await session.run({ [session.inputNames[0]]: tensor });
    return found[session.outputNames[0]].data;
  }

  /**
   * The tiles of an image; each is reported as done when the next one is asked for.
   *
   * @param {number} height
   * @param {number} width
   * @param {'encoder' | 'decoder'} part
   * @param {Progress} [progress]
   */
  *#tiles(height, width, part, progress) {
    const hop = this.model.hopLength;
    const { attention_window: window, patch_size: patch, [`${part}_depths`]: depths } =
      this.model.config;
    // The reach of the 3 x 3 convolutions, one at each end and two per block, in whole windows.
    const blocks = depths.reduce(
      (/** @type {number} */ sum, /** @type {number} */ depth, /** @type {number} */ i) =>
        sum + 2 * depth * 2 ** i,
      0,
    );
    const halo = Math.ceil((patch * (1 + blocks)) / (hop * window)) * window;
    let done = 0;
    for (const down of spans(Math.ceil(height / hop), hop, window, halo)) {
      for (const right of spans(Math.ceil(width / hop), hop, window, halo)) {
        yield { down, right };
        const length = (/** @type {Span} */ span, /** @type {number} */ end) =>
          Math.min(span.stop * hop, end) - span.start * hop;
        done += length(down, height) * length(right, width);
        progress?.(done, height * width);
      }
    }
  }
}

/** @param {number} width @param {number} height */
function checkPixels(width, height) {
  if (width * height > MAX_PIXELS) {
    throw new TokenFileError(`${width} x ${height} pixels are more than ${MAX_PIXELS}`);
  }
}

/**
 * Tokens of a tile along one axis, and all those that go through the network with them.
 *
 * @typedef {{start: number, stop: number, first: number, last: number}} Span
 */

/**
 * Cuts an axis into tiles of whole windows, nearly equal, each with `halo` around it.
 *
 * @param {number} nTokens
 * @param {number} hop
 * @param {number} window
 * @param {number} halo
 * @returns {Span[]}
 */
function spans(nTokens, hop, window, halo) {
  const windows = Math.ceil(nTokens / window);
  const whole = windows * window * hop <= TILE_SIDE + 2 * halo * hop;
  const most = Math.max(1, Math.floor(TILE_SIDE / (window * hop)));
  const tiles = whole ? 1 : Math.ceil(windows / most);
  const edge = (/** @type {number} */ i) => Math.floor((windows * i) / tiles) * window;
  return Array.from({ length: tiles }, (_, i) => ({
    start: edge(i),
    stop: edge(i + 1),
    first: Math.max(0, edge(i) - halo),
    last: Math.min(windows * window, edge(i + 1) + halo),
  }));
}

/**
 * A tile of colours (channel 0) or of alpha, extended beyond the edges of the image.
 *
 * @param {Picture} picture
 * @param {number} channel
 * @param {Span} down
 * @param {Span} right
 * @param {number} hop
 */
function toNetwork({ data, width, height, components }, channel, down, right, hop) {
  const rows = (down.last - down.first) * hop;
  const columns = (right.last - right.first) * hop;
  const plane = new Float32Array(3 * rows * columns);
  const scale = Math.fround(2 / 255);
  for (let c = 0, i = 0; c < 3; c++) {
    const component = channel ? components - 1 : components >= 3 ? c : 0;
    for (let y = 0; y < rows; y++) {
      const from = Math.min(down.first * hop + y, height - 1) * width;
      for (let x = 0; x < columns; x++) {
        const pixel = from + Math.min(right.first * hop + x, width - 1);
        plane[i++] = Math.fround(data[pixel * components + component] * scale) - 1;
      }
    }
  }
  return { data: plane, shape: [1, 3, rows, columns] };
}

/**
 * Puts the inside of a tile into the image.
 *
 * @param {Picture} picture
 * @param {number} channel
 * @param {Float32Array} tile (3, rows, columns) in [-1, 1]
 * @param {Span} down
 * @param {Span} right
 * @param {number} hop
 */
function fromNetwork({ data, width, height, components }, channel, tile, down, right, hop) {
  const columns = (right.last - right.first) * hop;
  const size = (down.last - down.first) * hop * columns;
  const colours = channel ? 1 : components - (components % 2 ? 0 : 1);
  const { fround } = Math;
  for (let y = down.start * hop; y < Math.min(down.stop * hop, height); y++) {
    for (let x = right.start * hop; x < Math.min(right.stop * hop, width); x++) {
      const i = (y - down.first * hop) * columns + x - right.first * hop;
      const target = (y * width + x) * components + (channel ? components - 1 : 0);
      for (let c = 0; c < colours; c++) {
        const value =
          colours === 3
            ? tile[c * size + i]
            : fround(fround(fround(tile[i] + tile[size + i]) + tile[2 * size + i]) / 3);
        data[target + c] = roundHalfEven(fround(fround(value + 1) * 127.5));
      }
    }
  }
}

/** @param {number} x from 0 */
function roundHalfEven(x) {
  const down = Math.floor(x);
  return x - down === 0.5 ? down + (down % 2) : Math.round(x);
}

/**
 * Joins arrays of parts, for each channel.
 *
 * @template {Float32Array | Uint32Array} T
 * @param {new (length: number) => T} type
 * @param {T[][]} parts
 * @param {number} channels
 * @returns {T[]}
 */
function concatenated(type, parts, channels) {
  return Array.from({ length: channels }, (_, c) => {
    const row = new type(parts.reduce((n, part) => n + part[c].length, 0));
    let position = 0;
    for (const part of parts) {
      row.set(part[c], position);
      position += part[c].length;
    }
    return row;
  });
}

/**
 * @template {Float32Array | Uint32Array} T
 * @param {T} data channel after channel
 * @param {number} channels
 * @returns {T[]}
 */
function split(data, channels) {
  const n = data.length / channels;
  return Array.from({ length: channels }, (_, c) => /** @type {T} */ (data.subarray(c * n, c * n + n)));
}
