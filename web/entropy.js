/**
 * The entropy coder of token files: rANS, driven by a small network of integers.
 *
 * docs/token-format.md specifies it, and `vpcodec/entropy.py` is its twin: both make the same bytes
 * of the same tokens. All numbers are integers that typed arrays and doubles hold exactly.
 *
 * @module
 */

import { sha256 } from './sha256.js';

const MAX_TABLES_BYTES = 1 << 26;
const FORMAT = '1';
const IMAGE_FORMAT = '2';
const ID_BYTES = 2;

const PRECISION = 15; // bits of a probability
const LOW = 2 ** 16; // of the rANS state, which stays below 2^32
const EXACT = 2 ** 24; // no sum of products reaches it
const ONE_SHIFT = 7; // an input that is present counts 128
const AVERAGE_BITS = 14;
const AVERAGE_SHIFT = 7; // from running averages to inputs
const HIDDEN_SHIFT = 11;
const HIDDEN_MAX = 127;
const LOGIT_SHIFT = 5;
const REACH = 8; // of a neighbour, in rows and in columns

/** Damaged tables, or a payload that was not coded with them; one line. */
export class EntropyError extends Error {
  name = 'EntropyError';
}

/**
 * Is given the place of a token, the number of a digit and the intervals of its values, and returns
 * the digit.
 *
 * @typedef {(place: number, k: number, cumulative: Int32Array) => number} Visit
 */

/** Codes blocks of tokens with the entropy tables of one model. */
export class TokenCoder {
  /**
   * @param {Uint8Array} bytes of a tables file
   * @throws {EntropyError} not a tables file, or damaged
   */
  constructor(bytes) {
    const { facts, arrays } = parseTables(bytes);
    /** First bytes of the SHA-256 of the tables file, in hexadecimal. */
    this.id = hex(sha256(bytes).subarray(0, ID_BYTES));
    const { levels, lags, averages, lane, neighbours, tile } = facts;
    this.levels = levels;
    this.lags = lags;
    this.averages = averages;
    this.lane = lane;
    /** What a frame of an image sees: rows above it, columns to the right. Null: audio. */
    this.neighbours = neighbours;
    this.tile = tile;
    this.depth = levels.length;
    this.size = levels.reduce((a, b) => a + b, 0);
    this.codebookSize = levels.reduce((a, b) => a * b, 1);
    this.offsets = levels.map((_, k) => levels.slice(0, k).reduce((a, b) => a + b, 0));
    this.radix = levels.map((_, k) => levels.slice(0, k).reduce((a, b) => a * b, 1));
    this.inputs = lags * (this.size + 1) + averages.length * this.size + 1;
    this.hidden = arrays.output?.shape[1] ?? 0;
    this.widest = Math.max(...levels);
    const units = this.depth * this.hidden;
    const take = (/** @type {string} */ name, /** @type {number[]} */ ...shape) => {
      const array = arrays[name];
      if (!array || String(array.shape) !== String(shape)) {
        throw new EntropyError(`${name} has shape (${array?.shape}), not (${shape})`);
      }
      return array.values;
    };
    this.past = take('past', this.inputs, units);
    this.current = take('current', this.size, units);
    this.output = take('output', this.depth, this.hidden, this.widest);
    this.bias = take('bias', this.depth, this.widest);
    this.exponentials = take('exponentials', arrays.exponentials?.shape[0] ?? 0);
    this.order = arrays.order ? take('order', this.codebookSize) : null;
    this.units = units;
    this.#check();
    /** @type {Uint32Array | null} */
    this.inverse = null;
    if (this.order) {
      this.inverse = new Uint32Array(this.codebookSize);
      this.order.forEach((to, from) => (/** @type {any} */ (this.inverse)[to] = from));
    }
  }

  /**
   * Codes a block.
   *
   * @param {Uint32Array} tokens frame by frame, all channels of a frame together
   * @param {number} channels
   * @param {number | null} [columns] of an image, whose frames go row by row
   * @returns {Uint8Array} the payload
   */
  pack(tokens, channels, columns = null) {
    const starts = new Uint16Array(tokens.length * this.depth);
    const widths = new Uint16Array(starts.length);
    const rest = new Float64Array(tokens.length);
    tokens.forEach((token, i) => (rest[i] = this.order ? this.order[token] : token));
    let n = 0;
    this.#walk(tokens.length / channels, channels, columns, (place, k, cumulative) => {
      const digit = rest[place] % this.levels[k];
      rest[place] = (rest[place] - digit) / this.levels[k];
      starts[n] = cumulative[digit];
      widths[n++] = cumulative[digit + 1] - cumulative[digit];
      return digit;
    });
    return this.#push(starts, widths);
  }

  /**
   * Decodes a block.
   *
   * @param {Uint8Array} payload from `pack` with the same tables
   * @param {number} nFrames
   * @param {number} channels
   * @param {number | null} [columns] as for `pack`
   * @returns {Uint32Array} tokens frame by frame
   * @throws {EntropyError} coded with other tables, or damaged
   */
  unpack(payload, nFrames, channels, columns = null) {
    if (hex(payload.subarray(0, ID_BYTES)) !== this.id) {
      throw new EntropyError('coded with other entropy tables');
    }
    const bytes = payload.subarray(ID_BYTES);
    if (bytes.length % 2 || bytes.length < 4) {
      throw new EntropyError('the payload is not a whole number of words');
    }
    const words = new Uint16Array(bytes.length / 2);
    for (let i = 0; i < words.length; i++) words[i] = bytes[2 * i] | (bytes[2 * i + 1] << 8);
    let state = words[0] * 65536 + words[1];
    let next = 2;
    const tokens = new Uint32Array(nFrames * channels);
    this.#walk(nFrames, channels, columns, (place, k, cumulative) => {
      const slot = state % (1 << PRECISION);
      let digit = 0;
      while (cumulative[digit + 1] <= slot) digit++;
      const start = cumulative[digit];
      state = (cumulative[digit + 1] - start) * Math.floor(state / (1 << PRECISION)) + slot - start;
      if (state < LOW) {
        if (next === words.length) throw new EntropyError('the payload ends too early');
        state = state * 65536 + words[next++];
      }
      tokens[place] += digit * this.radix[k];
      return digit;
    });
    if (state !== LOW || next !== words.length) {
      throw new EntropyError('the payload does not end where it should');
    }
    const { inverse } = this;
    return inverse ? tokens.map((token) => inverse[token]) : tokens;
  }

  /**
   * Goes through the digits of a block in the order of the coder.
   *
   * @param {number} nFrames
   * @param {number} channels
   * @param {number | null} columns
   * @param {Visit} visit
   */
  #walk(nFrames, channels, columns, visit) {
    if (this.neighbours) this.#walkTiles(nFrames, channels, columns ?? nFrames, visit);
    else this.#walkLanes(nFrames, channels, visit);
  }

  /** @param {number} nFrames @param {number} channels @param {Visit} visit */
  #walkLanes(nFrames, channels, visit) {
    const length = Math.min(this.lane, nFrames);
    const perChannel = Math.ceil(nFrames / length);
    const last = nFrames - (perChannel - 1) * length;
    const lanes = Array.from({ length: channels * perChannel }, (_, i) => {
      const channel = Math.floor(i / perChannel);
      const first = (i % perChannel) * length;
      const frames = i % perChannel === perChannel - 1 ? last : length;
      return { context: new Lane(this), place: first * channels + channel, frames };
    });
    for (let step = 0; step < length; step++) {
      const alive = step < last ? lanes : lanes.filter((lane) => step < lane.frames);
      for (const { context } of alive) context.begin();
      for (let k = 0; k < this.depth; k++) {
        for (const { context, place } of alive) {
          const digit = visit(place + step * channels, k, context.cumulative(k));
          context.know(k, digit);
        }
      }
      for (const { context } of alive) context.end();
    }
  }

  /**
   * The frames of all tiles with one number, column + slope * row, are coded together.
   *
   * @param {number} nFrames
   * @param {number} channels
   * @param {number} columns
   * @param {Visit} visit
   */
  #walkTiles(nFrames, channels, columns, visit) {
    const neighbours = /** @type {number[][]} */ (this.neighbours);
    const slope = Math.max(1, ...neighbours.map(([up, right]) => (up ? Math.floor(right / up) + 1 : 1)));
    columns = Math.min(columns, nFrames);
    const rows = Math.ceil(nFrames / columns);
    const height = Math.min(this.tile[0], rows);
    const width = Math.min(this.tile[1], columns);
    const known = new Uint16Array(nFrames * channels * this.depth);
    /** @type {Context[]} */
    const contexts = [];
    const fronts = width + slope * (height - 1);
    for (let front = 0; front < fronts; front++) {
      const places = [];
      for (let channel = 0; channel < channels; channel++) {
        for (let top = 0; top < rows; top += height) {
          for (let left = 0; left < columns; left += width) {
            const end = Math.min(left + width, columns);
            const last = Math.min(height - 1, Math.floor(front / slope));
            for (let down = 0; down <= last; down++) {
              const row = top + down;
              const column = left + front - slope * down;
              const frame = row * columns + column;
              if (column >= end || frame >= nFrames) continue;
              const context = (contexts[places.length] ??= new Context(this));
              context.clear();
              neighbours.forEach(([up, right], i) => {
                const beside = column + right;
                if (row - up < top || beside < left || beside >= end) return;
                const there = ((row - up) * columns + beside) * channels + channel;
                context.see(i, known.subarray(there * this.depth, (there + 1) * this.depth));
              });
              places.push(frame * channels + channel);
            }
          }
        }
      }
      for (let k = 0; k < this.depth; k++) {
        places.forEach((place, i) => {
          const digit = visit(place, k, contexts[i].cumulative(k));
          contexts[i].know(k, digit);
          known[place * this.depth + k] = digit;
        });
      }
    }
  }

  /**
   * rANS: intervals in the order of decoding to a payload.
   *
   * @param {Uint16Array} starts
   * @param {Uint16Array} widths
   */
  #push(starts, widths) {
    let state = LOW;
    const words = [];
    for (let i = starts.length - 1; i >= 0; i--) {
      const width = widths[i];
      if (state >= width * 2 ** (32 - PRECISION)) {
        words.push(state % 65536);
        state = Math.floor(state / 65536);
      }
      state = Math.floor(state / width) * (1 << PRECISION) + (state % width) + starts[i];
    }
    words.push(state % 65536, Math.floor(state / 65536));
    const payload = new Uint8Array(ID_BYTES + 2 * words.length);
    for (let i = 0; i < ID_BYTES; i++) payload[i] = parseInt(this.id.slice(2 * i, 2 * i + 2), 16);
    words.reverse().forEach((word, i) => {
      payload[ID_BYTES + 2 * i] = word & 255;
      payload[ID_BYTES + 2 * i + 1] = word >> 8;
    });
    return payload;
  }

  /** Refuses tables whose sums could be too large to be exact, as Python does. */
  #check() {
    const { exponentials, order, units, size, levels, lags, lane, averages } = this;
    if (levels.some((n) => n < 2 || n > 1 << 10)) throw new EntropyError('levels must be 2 to 1024');
    if (Math.min(lags, lane) < 1 || lane > 1 << 12 || lags > 64) {
      throw new EntropyError('lags and lane must be positive');
    }
    if (averages.length > 8 || averages.some((shift) => shift < 1 || shift > 12)) {
      throw new EntropyError('averages must be shifts of 1 to 12');
    }
    if (this.tile.some((n) => n < 1 || n > 1 << 12)) {
      throw new EntropyError('tiles must have 1 to 4096 rows and columns');
    }
    const strange = (/** @type {number[]} */ [up, right]) =>
      up < 0 || up > REACH || Math.abs(right) > REACH || (up === 0 && right >= 0);
    if (this.neighbours?.some(strange)) throw new EntropyError('neighbours must be near, and earlier');
    if (!exponentials.length) throw new EntropyError('exponentials are not a list of integers');
    if (exponentials.some((value) => value < 1 || value > 1 << 17)) {
      throw new EntropyError('exponentials must be 1 to 2^17');
    }
    if (order) {
      const seen = new Uint8Array(this.codebookSize);
      for (const token of order) if (token >= 0 && token < seen.length) seen[token] = 1;
      if (seen.includes(0)) throw new EntropyError('order is not a permutation of the codebook');
    }
    // One row of each group of one-hot digits counts; averages sum to at most one row.
    const reach = new Float64Array(units);
    const add = (/** @type {Int16Array | Int32Array} */ rows, /** @type {number} */ row, n = 1) => {
      for (let u = 0; u < units; u++) {
        let most = 0;
        for (let r = row; r < row + n; r++) most = Math.max(most, Math.abs(rows[r * units + u]));
        reach[u] += most;
      }
    };
    const addGroup = (/** @type {Int16Array | Int32Array} */ rows, /** @type {number} */ first) => {
      this.offsets.forEach((offset, k) => add(rows, first + offset, this.levels[k]));
    };
    addGroup(this.current, 0);
    for (let lag = 0; lag < this.lags; lag++) {
      addGroup(this.past, lag * (size + 1));
      add(this.past, lag * (size + 1) + size);
    }
    for (let a = 0; a < this.averages.length; a++) {
      addGroup(this.past, this.lags * (size + 1) + a * size);
    }
    add(this.past, this.inputs - 1);
    let most = Math.max(...reach) * 2 ** ONE_SHIFT;
    const { hidden, widest } = this;
    for (let i = 0; i < this.depth * widest; i++) {
      let sum = 0;
      const first = Math.floor(i / widest) * hidden * widest + (i % widest);
      for (let u = 0; u < hidden; u++) sum += Math.abs(this.output[first + u * widest]);
      most = Math.max(most, 2 * (HIDDEN_MAX * sum + Math.abs(this.bias[i])));
    }
    if (most >= EXACT) throw new EntropyError('numbers too large to be exact');
  }
}

/** What the network makes of what a frame sees. */
class Context {
  /** @param {TokenCoder} coder */
  constructor(coder) {
    this.coder = coder;
    this.sums = new Int32Array(coder.units);
    this.weights = new Float64Array(coder.widest);
    this.result = new Int32Array(coder.widest + 1);
  }

  /** Begins a frame that sees nothing yet. */
  clear() {
    const { coder, sums } = this;
    sums.fill(0);
    this.add(coder.past, coder.inputs - 1, 1 << ONE_SHIFT);
  }

  /**
   * Lets the frame see another one.
   *
   * @param {number} group the number of its inputs: a lag less one, or a neighbour
   * @param {ArrayLike<number>} digits
   */
  see(group, digits) {
    const { past, size, offsets } = this.coder;
    const first = group * (size + 1);
    for (let k = 0; k < digits.length; k++) {
      this.add(past, first + offsets[k] + digits[k], 1 << ONE_SHIFT);
    }
    this.add(past, first + size, 1 << ONE_SHIFT);
  }

  /**
   * Where the interval of each value of digit k begins, and 2^15.
   *
   * @param {number} k
   */
  cumulative(k) {
    const { coder, sums, weights, result } = this;
    const { hidden, widest, output, bias, exponentials } = coder;
    const n = coder.levels[k];
    const logits = weights;
    for (let v = 0; v < n; v++) logits[v] = bias[k * widest + v];
    for (let u = 0; u < hidden; u++) {
      const unit = Math.min(sums[k * hidden + u] >> HIDDEN_SHIFT, HIDDEN_MAX);
      if (unit <= 0) continue;
      const row = (k * hidden + u) * widest;
      for (let v = 0; v < n; v++) logits[v] += unit * output[row + v];
    }
    let highest = -Infinity;
    for (let v = 0; v < n; v++) highest = Math.max(highest, logits[v]);
    let total = 0;
    for (let v = 0; v < n; v++) {
      const below = (highest - logits[v]) >> LOGIT_SHIFT;
      total += exponentials[Math.min(below, exponentials.length - 1)];
      weights[v] = total;
    }
    const spread = (1 << PRECISION) - n;
    result[0] = 0;
    for (let v = 0; v < n; v++) result[v + 1] = Math.floor((weights[v] * spread) / total) + v + 1;
    return result;
  }

  /**
   * Takes a digit into the sums of those after it.
   *
   * @param {number} k
   * @param {number} digit
   */
  know(k, digit) {
    const { coder } = this;
    const first = (k + 1) * coder.hidden;
    this.add(coder.current, coder.offsets[k] + digit, 1 << ONE_SHIFT, first);
  }

  /**
   * @param {Int16Array | Int32Array} rows
   * @param {number} row
   * @param {number} factor
   * @param {number} [first] unit
   */
  add(rows, row, factor, first = 0) {
    const { sums } = this;
    const { units } = this.coder;
    const start = row * units;
    for (let u = first; u < units; u++) sums[u] += Math.imul(factor, rows[start + u]);
  }
}

/** A lane of audio, frame after frame. */
class Lane extends Context {
  /** @param {TokenCoder} coder */
  constructor(coder) {
    super(coder);
    /** @type {number[][]} digits of the frames before, the newest first */
    this.history = [];
    /** @type {number[]} of this frame */
    this.digits = [];
    this.averages = new Int32Array(coder.averages.length * coder.size);
  }

  /** The sums over what is known of earlier frames. */
  begin() {
    const { coder, averages } = this;
    this.digits = [];
    this.clear();
    this.history.forEach((digits, lag) => this.see(lag, digits));
    const first = coder.lags * (coder.size + 1);
    for (let i = 0; i < averages.length; i++) {
      const input = averages[i] >> AVERAGE_SHIFT;
      if (input) this.add(coder.past, first + i, input);
    }
  }

  /** @override @param {number} k @param {number} digit */
  know(k, digit) {
    super.know(k, digit);
    this.digits.push(digit);
  }

  /** Goes on to the next frame. */
  end() {
    const { coder, averages, digits } = this;
    const seen = new Int32Array(coder.size);
    digits.forEach((digit, k) => (seen[coder.offsets[k] + digit] = 1 << AVERAGE_BITS));
    coder.averages.forEach((shift, a) => {
      const first = a * coder.size;
      for (let i = 0; i < coder.size; i++) {
        averages[first + i] += (seen[i] - averages[first + i]) >> shift;
      }
    });
    this.history.unshift(digits);
    this.history.length = Math.min(this.history.length, coder.lags);
  }
}

/**
 * The entropy coders of a model: one for each set of tables that its files were coded with.
 */
export class CoderSet {
  /** @param {TokenCoder[]} coders the newest last */
  constructor(coders) {
    if (!coders.length) throw new EntropyError('a set of no coders');
    this.newest = coders[coders.length - 1];
    this.codebookSize = this.newest.codebookSize;
    if (coders.some((coder) => coder.codebookSize !== this.codebookSize)) {
      throw new EntropyError('tables for different codebooks');
    }
    this.coders = new Map(coders.map((coder) => [coder.id, coder]));
  }

  /**
   * Codes a block with the newest tables.
   *
   * @param {Uint32Array} tokens frame by frame
   * @param {number} channels
   * @param {number | null} [columns] of an image
   */
  pack(tokens, channels, columns = null) {
    return this.newest.pack(tokens, channels, columns);
  }

  /**
   * Decodes a block with the tables that it was coded with.
   *
   * @param {Uint8Array} payload
   * @param {number} nFrames
   * @param {number} channels
   * @param {number | null} [columns] of an image
   * @returns {Uint32Array} tokens frame by frame
   * @throws {EntropyError} no such tables, or damage
   */
  unpack(payload, nFrames, channels, columns = null) {
    const id = hex(payload.subarray(0, ID_BYTES));
    const coder = this.coders.get(id);
    if (!coder) {
      const known = [...this.coders.keys()].join(', ');
      throw new EntropyError(`coded with other entropy tables (${id}; the model has ${known})`);
    }
    return coder.unpack(payload, nFrames, channels, columns);
  }
}

/**
 * A tables file: safetensors with the settings as metadata.
 *
 * @param {Uint8Array} bytes
 * @typedef {object} Facts
 * @property {number[]} levels
 * @property {number[]} averages
 * @property {number} lags
 * @property {number} lane
 * @property {number[][] | null} neighbours
 * @property {number[]} tile
 * @typedef {{shape: number[], values: Int16Array | Int32Array}} Table
 * @returns {{facts: Facts, arrays: Record<string, Table>}}
 */
function parseTables(bytes) {
  if (bytes.length > MAX_TABLES_BYTES) throw new EntropyError(`more than ${MAX_TABLES_BYTES} bytes`);
  try {
    const size = Number(new DataView(bytes.buffer, bytes.byteOffset, 8).getBigUint64(0, true));
    const text = new TextDecoder('utf-8', { fatal: true }).decode(bytes.subarray(8, 8 + size));
    const { __metadata__: meta, ...entries } = JSON.parse(text);
    if (meta.format !== FORMAT && meta.format !== IMAGE_FORMAT) {
      throw new EntropyError(`tables of format '${meta.format}', which is not known here`);
    }
    const image = meta.format === IMAGE_FORMAT;
    const neighbours = image ? JSON.parse(meta.neighbours) : null;
    /** @type {Facts} */
    const facts = {
      levels: JSON.parse(meta.levels),
      averages: image ? [] : JSON.parse(meta.averages),
      lags: image ? neighbours.length : Number(meta.lags),
      lane: image ? 1 : Number(meta.lane),
      neighbours,
      tile: image ? JSON.parse(meta.tile) : [1, 1],
    };
    const { levels, averages, lags, lane, tile } = facts;
    const numbers = [levels, averages, tile, neighbours ?? []].flat(2);
    const pairs = [tile, ...(neighbours ?? [])].every((pair) => pair.length === 2);
    if (!levels.length || !pairs || ![...numbers, lags, lane].every(Number.isInteger)) {
      throw new RangeError();
    }
    const data = bytes.subarray(8 + size);
    /** @type {Record<string, Table>} */
    const arrays = {};
    for (const [name, entry] of Object.entries(entries)) arrays[name] = table(entry, data);
    return { facts, arrays };
  } catch (error) {
    if (error instanceof EntropyError) throw error;
    throw new EntropyError('not tables of an entropy coder');
  }
}

/** @param {any} entry @param {Uint8Array} data @returns {Table} */
function table(entry, data) {
  const [start, end] = entry.data_offsets;
  if (!(start >= 0 && start <= end && end <= data.length)) {
    throw new EntropyError('the tables end too early');
  }
  const copy = data.slice(start, end).buffer;
  const kinds = { I16: Int16Array, I32: Int32Array };
  const values = new kinds[/** @type {'I16' | 'I32'} */ (entry.dtype)](copy);
  const count = entry.shape.reduce((/** @type {number} */ a, /** @type {number} */ b) => a * b, 1);
  if (count !== values.length) throw new RangeError();
  return { shape: entry.shape, values };
}

/** @param {Uint8Array} bytes */
export function hex(bytes) {
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0')).join('');
}
