/**
 * The `.tok` container, format version 1: reading, writing and checking whole files.
 *
 * docs/token-format.md describes every byte. A file is refused for the same reasons, in the same
 * words, as by the Python package; damaged files are not recovered here.
 *
 * @module
 */

const MAGIC = [0x89, 0x54, 0x4f, 0x4b, 0x0d, 0x0a, 0x1a, 0x0a];
const VERSION = 1;
const KINDS = { 1: 'audio', 2: 'image' };
const RAW = 0;
const ENTROPY = 1;
const TRAILER = 255;

const MAX_MODEL_BYTES = 64;
const MAX_RATE = 2 ** 24;
const MAX_SAMPLES = 2 ** 48;
const MAX_SIDE = 2 ** 20;
const MAX_PIXELS = 2 ** 32;
const MAX_BLOCKS = 2 ** 20;
const MAX_BLOCK_TOKENS = 2 ** 17;
const MAX_INDEX_BYTES = 3 * MAX_BLOCKS;
const MAX_TOKENS = 2 ** 24; // of all channels, that `readTokens` takes into memory

const FIXED_BYTES = 55; // of the header, up to the model name
const BLOCK_BYTES = 10;
const TRAILER_BYTES = 20; // before the index
const TAIL_BYTES = 8; // after it
const PRINTABLE = /^(?:[^\p{C}\p{Z}]| )*$/u;
const UNKNOWN = 2n ** 64n - 1n; // samples in the header of a piped file
const STRIDE = 0x9e3779b1;
const UNSTRIDE = 0x0e8b2f51;

/** Damage in a token file, or misuse of the format; one line, without the name of the file. */
export class TokenFileError extends Error {
  name = 'TokenFileError';
}

/** The tokens are entropy coded, and there is no coder. */
export class NoCoderError extends TokenFileError {
  name = 'NoCoderError';
}

/**
 * The fields that audio and images share.
 *
 * @typedef {object} SharedFields
 * @property {string} model name, 1 to 64 bytes of printable UTF-8
 * @property {Uint8Array} identity 16 bytes: the token space, or in early files the model
 * @property {number} channels 1 to 255
 * @property {number} hopLength samples of a frame, or pixels along its side
 * @property {number} codebookSize 2 to 2^32
 * @property {number} [blockFrames] frames in every block but the last; 512
 */
/**
 * @typedef {object} AudioFields
 * @property {'audio'} kind
 * @property {number} sampleRate of the model, Hz
 * @property {number} originalRate of the source, Hz
 * @property {number | null} nSamples of the source, per channel; null: see the trailer
 */
/**
 * @typedef {object} ImageFields
 * @property {'image'} kind
 * @property {number} width pixels of the upright source
 * @property {number} height
 * @property {number} components of the source: 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA
 */
/**
 * @typedef {Readonly<Required<SharedFields> & AudioFields & {
 *   nFrames: number | null, modelSamples: number | null}>} AudioHeader
 */
/**
 * @typedef {Readonly<Required<SharedFields> & ImageFields & {
 *   nFrames: number, nSamples: number, rows: number, columns: number}>} ImageHeader
 */
/** @typedef {AudioHeader | ImageHeader} TokenHeader */

/**
 * An entropy coder of a model's tokens, such as those of `entropy.js`.
 *
 * @typedef {object} Coder
 * @property {number} codebookSize
 * @property {(tokens: Uint32Array, channels: number) => Uint8Array} pack tokens frame by frame
 * @property {(payload: Uint8Array, nFrames: number, channels: number) => Uint32Array} unpack
 */

// ------------------------------------------------------------------------------------- header

/**
 * A checked header.
 *
 * @param {SharedFields & (AudioFields | ImageFields)} fields
 * @returns {TokenHeader}
 * @throws {TokenFileError} a value out of bounds
 */
export function makeHeader(fields) {
  const shared = { blockFrames: 512, ...fields };
  const { model, identity, channels, blockFrames } = shared;
  if (typeof model !== 'string' || !PRINTABLE.test(model)) {
    throw new TokenFileError(`model name ${quoted(String(model))} is not printable text`);
  }
  const nameBytes = new TextEncoder().encode(model).length;
  if (nameBytes < 1 || nameBytes > MAX_MODEL_BYTES) {
    throw new TokenFileError(`model name ${quoted(model)} is not 1 to ${MAX_MODEL_BYTES} bytes`);
  }
  if (!(identity instanceof Uint8Array) || identity.length !== 16) {
    throw new TokenFileError('the identity is not 16 bytes');
  }
  const audio = shared.kind === 'audio';
  if (audio) {
    checkBounds('sample_rate', shared.sampleRate, 1, MAX_RATE);
    checkBounds('original_rate', shared.originalRate, 1, MAX_RATE);
    if (shared.nSamples !== null) checkBounds('n_samples', shared.nSamples, 0, MAX_SAMPLES);
  } else {
    checkBounds('width', shared.width, 1, MAX_SIDE);
    checkBounds('height', shared.height, 1, MAX_SIDE);
    checkBounds('components', shared.components, 1, 4);
  }
  checkBounds('channels', channels, 1, 255);
  checkBounds('hop_length', shared.hopLength, 1, 2 ** 20);
  checkBounds('codebook_size', shared.codebookSize, 2, 2 ** 32);
  checkBounds('block_frames', blockFrames, 1, 2 ** 16 - 1);
  if (blockFrames * channels > MAX_BLOCK_TOKENS) {
    throw new TokenFileError(
      `block_frames ${blockFrames} times ${channels} channels is more than ` +
        `${MAX_BLOCK_TOKENS} tokens`,
    );
  }
  const header = audio ? audioHeader(shared) : imageHeader(shared);
  if ((header.nFrames ?? 0) > MAX_BLOCKS * blockFrames) {
    throw new TokenFileError(`n_frames ${header.nFrames} needs more than ${MAX_BLOCKS} blocks`);
  }
  if (header.kind === 'image') {
    const { width, height, components } = header;
    if (width * height > MAX_PIXELS) {
      throw new TokenFileError(
        `width ${width} times height ${height} is more than ${MAX_PIXELS} pixels`,
      );
    }
    if (channels !== 2 - (components % 2)) {
      throw new TokenFileError(`channels ${channels} does not fit ${components} components`);
    }
  }
  return Object.freeze(header);
}

/** @param {any} fields @returns {AudioHeader} */
function audioHeader(fields) {
  const { sampleRate, originalRate, nSamples, hopLength } = fields;
  if (nSamples === null) return { ...fields, modelSamples: null, nFrames: null };
  const modelSamples = ceilDiv(BigInt(nSamples) * BigInt(sampleRate), BigInt(originalRate));
  const nFrames = Number(ceilDiv(modelSamples, BigInt(hopLength)));
  return { ...fields, modelSamples: Number(modelSamples), nFrames };
}

/** @param {any} fields @returns {ImageHeader} */
function imageHeader(fields) {
  const { width, height, hopLength } = fields;
  const columns = Math.ceil(width / hopLength);
  const rows = Math.ceil(height / hopLength);
  return { ...fields, rows, columns, nFrames: rows * columns, nSamples: width * height };
}

/**
 * Samples after resampling, ceil(nSamples * to / from).
 *
 * @param {number} nSamples
 * @param {number} from Hz
 * @param {number} to Hz
 */
export function resampledLength(nSamples, from, to) {
  return Number(ceilDiv(BigInt(nSamples) * BigInt(to), BigInt(from)));
}

/** @param {bigint} a @param {bigint} b */
function ceilDiv(a, b) {
  return (a + b - 1n) / b;
}

/** @param {string} name @param {any} value @param {number} low @param {number} high */
function checkBounds(name, value, low, high) {
  if (!Number.isInteger(value) || value < low || value > high) {
    const shown = value === null ? 'None' : String(value);
    throw new TokenFileError(`${name} ${shown} is not an integer from ${low} to ${high}`);
  }
}

/**
 * Text between quotes, with what cannot be printed escaped, as Python writes it.
 *
 * @param {string} text
 */
function quoted(text) {
  const short = /** @type {Record<string, string>} */ ({ '\n': '\\n', '\r': '\\r', '\t': '\\t' });
  const mark = text.includes("'") && !text.includes('"') ? '"' : "'";
  const escaped = Array.from(text, (char) => {
    if (char === mark || char === '\\') return `\\${char}`;
    if (short[char]) return short[char];
    if (PRINTABLE.test(char)) return char;
    const code = /** @type {number} */ (char.codePointAt(0));
    const [letter, digits] = code < 2 ** 8 ? ['x', 2] : code < 2 ** 16 ? ['u', 4] : ['U', 8];
    return `\\${letter}${code.toString(16).padStart(Number(digits), '0')}`;
  });
  return mark + escaped.join('') + mark;
}

/**
 * How each version lays out its header. A file says which version a reader must at least know.
 *
 * @type {Record<number, {
 *   size: (bytes: Uint8Array) => number,
 *   parse: (bytes: Uint8Array) => TokenHeader}>}
 */
const LAYOUTS = {
  1: {
    size(bytes) {
      const nameBytes = bytes[FIXED_BYTES - 1];
      if (nameBytes > MAX_MODEL_BYTES) {
        throw new TokenFileError(`the model name has more than ${MAX_MODEL_BYTES} bytes`);
      }
      return FIXED_BYTES + nameBytes + 4;
    },
    parse(bytes) {
      const view = viewOf(bytes);
      const end = bytes.length - 4;
      if (crc32(bytes.subarray(0, end)) !== view.getUint32(end, true)) {
        throw new TokenFileError('the header is damaged');
      }
      const kind = KINDS[/** @type {1 | 2} */ (bytes[10])];
      if (!kind) throw new TokenFileError(`kind ${bytes[10]} is neither audio (1) nor an image (2)`);
      const total = getUint64(view, 20);
      const own = [view.getUint32(12, true), view.getUint32(16, true)];
      own.push(/** @type {any} */ (total === UNKNOWN ? null : total));
      const fields =
        kind === 'audio'
          ? { sampleRate: own[0], originalRate: own[1], nSamples: own[2] }
          : { width: own[0], height: own[1], components: own[2] };
      return makeHeader(/** @type {any} */ ({
        kind,
        model: decodeName(bytes.subarray(FIXED_BYTES, end)),
        identity: bytes.slice(38, 54),
        channels: bytes[11],
        hopLength: view.getUint32(28, true),
        codebookSize: view.getUint32(32, true) + 1,
        blockFrames: view.getUint16(36, true),
        ...fields,
      }));
    },
  },
};

/**
 * The header of a token file, and where its first block begins.
 *
 * @param {Uint8Array} bytes the file, or its beginning
 * @returns {{header: TokenHeader, size: number}}
 * @throws {TokenFileError} not a token file, or its header is damaged
 */
export function readHeader(bytes) {
  if (!bytes.length) throw new TokenFileError('the file is empty');
  const differs = (/** @type {number} */ n) =>
    MAGIC.slice(0, n).some((byte, i) => i < bytes.length && bytes[i] !== byte);
  if (differs(MAGIC.length)) {
    const changed = bytes.length >= 4 && !differs(4);
    throw new TokenFileError(
      `not a token file${changed ? '; it was changed by a text-mode transfer' : ''}`,
    );
  }
  if (bytes.length < FIXED_BYTES) throw new TokenFileError('the file ends inside its header');
  const minimum = bytes[9];
  if (minimum > VERSION) {
    throw new TokenFileError(`format version ${minimum} is newer than ${VERSION}`);
  }
  const layout = LAYOUTS[Math.max(1, minimum)];
  const size = layout.size(bytes);
  if (bytes.length < size) throw new TokenFileError('the file ends inside its header');
  return { header: layout.parse(bytes.subarray(0, size)), size };
}

/** @param {TokenHeader} header @returns {Uint8Array} */
function packHeader(header) {
  const name = new TextEncoder().encode(header.model);
  const bytes = new Uint8Array(FIXED_BYTES + name.length + 4);
  const view = viewOf(bytes);
  bytes.set(MAGIC);
  const audio = header.kind === 'audio';
  bytes.set([VERSION, VERSION, audio ? 1 : 2, header.channels], 8);
  const own = audio
    ? [header.sampleRate, header.originalRate, header.nSamples]
    : [header.width, header.height, header.components];
  view.setUint32(12, /** @type {number} */ (own[0]), true);
  view.setUint32(16, /** @type {number} */ (own[1]), true);
  view.setBigUint64(20, own[2] === null ? UNKNOWN : BigInt(own[2]), true);
  view.setUint32(28, header.hopLength, true);
  view.setUint32(32, header.codebookSize - 1, true);
  view.setUint16(36, header.blockFrames, true);
  bytes.set(header.identity, 38);
  bytes[54] = name.length;
  bytes.set(name, FIXED_BYTES);
  const end = bytes.length - 4;
  view.setUint32(end, crc32(bytes.subarray(0, end)), true);
  return bytes;
}

// ------------------------------------------------------------------------------------- reading

/**
 * All tokens of a file.
 *
 * @param {Uint8Array} bytes the whole file
 * @param {{coder?: Coder | null, maxTokens?: number}} [options] the entropy coder of the model, if
 *   it has one
 * @returns {{tokens: Uint32Array[], header: TokenHeader}} one array per channel; the header with
 *   the number of samples
 * @throws {TokenFileError} damage, or more than `maxTokens`
 * @throws {NoCoderError} entropy coded, and no coder
 */
export function readTokens(bytes, { coder = null, maxTokens = MAX_TOKENS } = {}) {
  const { header, size } = readHeader(bytes);
  /** @type {Uint32Array[]} */
  const parts = [];
  let total = 0;
  const read = walk(bytes, header, size, (coding, payload, nFrames) => {
    total += nFrames * header.channels;
    if (total > maxTokens) throw new TokenFileError(`more than ${maxTokens} tokens`);
    if (coding === ENTROPY && !coder) {
      throw new NoCoderError(
        `entropy coded: needs the entropy tables of the model ${quoted(header.model)}`,
      );
    }
    parts.push(
      coding === RAW
        ? unpackRaw(payload, nFrames * header.channels, header.codebookSize)
        : /** @type {Coder} */ (coder).unpack(payload, nFrames, header.channels),
    );
  });
  const { channels } = header;
  const tokens = Array.from({ length: channels }, () => new Uint32Array(total / channels));
  let frame = 0;
  for (const part of parts) {
    for (let i = 0; i < part.length; frame++) {
      for (let c = 0; c < channels; c++) tokens[c][frame] = part[i++];
    }
  }
  return { tokens, header: read.header };
}

/**
 * Checks a whole file for damage. Entropy-coded blocks are checked by their checksums alone.
 *
 * @param {Uint8Array} bytes the whole file
 * @returns {{header: TokenHeader, blocks: number, payloadBytes: number}}
 * @throws {TokenFileError} the first damage
 */
export function verify(bytes) {
  const { header, size } = readHeader(bytes);
  return walk(bytes, header, size, (coding, payload, nFrames) => {
    if (coding === RAW) rawValue(payload, nFrames * header.channels, header.codebookSize);
  });
}

/**
 * Goes through the blocks and the trailer.
 *
 * @param {Uint8Array} bytes
 * @param {TokenHeader} header
 * @param {number} position of the first block
 * @param {(coding: number, payload: Uint8Array, nFrames: number) => void} visit is told each block
 */
function walk(bytes, header, position, visit) {
  const view = viewOf(bytes);
  const { channels, blockFrames } = header;
  const bits = bitLength(header.codebookSize - 1);
  /** @type {number[]} */
  const index = [];
  let { nFrames } = header;
  let payloadBytes = 0;
  let number = 0;
  for (; ; number++) {
    const place = `block ${number}`;
    if (bytes.length - position < BLOCK_BYTES) {
      throw new TokenFileError(`${place}: the file ends before a block or trailer`);
    }
    const word = view.getUint32(position, true);
    const coding = word & 255;
    const length = word >>> 8;
    if (coding === TRAILER) break;
    const frames = view.getUint16(position + 4, true);
    if (coding !== RAW && coding !== ENTROPY) {
      throw new TokenFileError(`${place}: unknown coding id ${coding}`);
    }
    if (length > Math.ceil((frames * channels * bits) / 8)) {
      throw new TokenFileError(`${place}: ${length} bytes are too many for ${frames} frames`);
    }
    if (frames < 1 || frames > blockFrames) {
      throw new TokenFileError(`${place}: ${frames} frames are not 1 to ${blockFrames}`);
    }
    const end = position + BLOCK_BYTES + length;
    if (end > bytes.length) throw new TokenFileError(`${place}: the file ends inside it`);
    const payload = bytes.subarray(position + BLOCK_BYTES, end);
    const crc = crc32(payload, crc32(bytes.subarray(position, position + 6)));
    const found = Math.imul(crc ^ view.getUint32(position + 6, true), UNSTRIDE) >>> 0;
    if (found !== number || number >= MAX_BLOCKS) {
      throw new TokenFileError(`${place}: the checksum is wrong`);
    }
    const start = number * blockFrames;
    const due = nFrames === null ? blockFrames : Math.min(blockFrames, nFrames - start);
    if (frames > due || (frames < due && nFrames !== null)) {
      throw new TokenFileError(`${place}: ${frames} frames where ${due} are due`);
    }
    try {
      visit(coding, payload, frames);
    } catch (error) {
      if (error instanceof NoCoderError) throw error;
      throw new TokenFileError(`${place}: ${error instanceof Error ? error.message : error}`);
    }
    if (frames < blockFrames) nFrames = start + frames;
    pushLeb128(index, end - position);
    payloadBytes += length;
    position = end;
  }
  const total = readTrailer(bytes.subarray(position), header, index, number, nFrames);
  return { header: total, blocks: number, payloadBytes };
}

/**
 * @param {Uint8Array} bytes from the trailer to the end of the file
 * @param {TokenHeader} header
 * @param {number[]} index what the trailer must say of the blocks
 * @param {number} blocks how many there were
 * @param {number | null} nFrames in them; null: all were full
 * @returns {TokenHeader} with the number of samples
 */
function readTrailer(bytes, header, index, blocks, nFrames) {
  const view = viewOf(bytes);
  const word = view.getUint32(0, true);
  const indexBytes = word >>> 8;
  if (indexBytes > MAX_INDEX_BYTES) throw new TokenFileError('the trailer is damaged');
  if (indexBytes !== index.length) {
    throw new TokenFileError('the trailer does not agree with the blocks');
  }
  const size = TRAILER_BYTES + indexBytes + TAIL_BYTES;
  if (bytes.length < size) throw new TokenFileError('the file ends inside its trailer');
  const tail = size - TAIL_BYTES;
  const crc = crc32(bytes.subarray(0, size - 4));
  if (view.getUint32(tail, true) !== word || view.getUint32(size - 4, true) !== crc) {
    throw new TokenFileError('the trailer is damaged');
  }
  const nSamples = getUint64(view, 12);
  if (header.nSamples !== null && header.nSamples !== nSamples) {
    throw new TokenFileError(`n_samples is ${nSamples}, in the header ${header.nSamples}`);
  }
  const whole =
    header.nSamples === null ? makeHeader(/** @type {any} */ ({ ...header, nSamples })) : header;
  if (getUint64(view, 4) !== whole.nFrames) {
    throw new TokenFileError('the trailer does not agree with the header');
  }
  const entries = bytes.subarray(TRAILER_BYTES, tail);
  const count = entries.reduce((n, byte) => n + (byte < 128 ? 1 : 0), 0);
  if (count !== Math.ceil(whole.nFrames / header.blockFrames)) {
    throw new TokenFileError('the trailer is inconsistent');
  }
  const due = nFrames ?? Math.max(whole.nFrames, blocks * header.blockFrames);
  if (whole.nFrames !== due || entries.some((byte, i) => byte !== index[i])) {
    throw new TokenFileError('the trailer does not agree with the blocks');
  }
  if (bytes.length > size) throw new TokenFileError('there is data after the end of the file');
  return whole;
}

// ------------------------------------------------------------------------------------- writing

/**
 * A token file.
 *
 * @param {TokenHeader} header from `makeHeader`, with the number of samples
 * @param {ArrayLike<number>[]} tokens one array of `nFrames` integers per channel
 * @param {{coder?: Coder | null}} [options] the entropy coder of the model, for a shorter file
 * @returns {Uint8Array}
 * @throws {TokenFileError} tokens that do not fit the header
 */
export function writeTokens(header, tokens, { coder = null } = {}) {
  const { channels, codebookSize, blockFrames, nFrames } = header;
  if (coder && coder.codebookSize !== codebookSize) {
    throw new TokenFileError('the coder is for another codebook');
  }
  if (nFrames === null) throw new TokenFileError('n_samples is not in the header');
  if (tokens.length !== channels || tokens.some((row) => row.length !== nFrames)) {
    throw new TokenFileError(`tokens are not ${channels} x ${nFrames}`);
  }
  const parts = [packHeader(header)];
  /** @type {number[]} */
  const index = [];
  for (let start = 0; start < nFrames; start += blockFrames) {
    const frames = Math.min(blockFrames, nFrames - start);
    const block = new Uint32Array(frames * channels);
    for (let i = 0; i < block.length; i++) {
      const token = tokens[i % channels][start + Math.floor(i / channels)];
      if (!Number.isInteger(token) || token < 0 || token >= codebookSize) {
        throw new TokenFileError(`token ${token} is not in 0 to ${codebookSize - 1}`);
      }
      block[i] = token;
    }
    parts.push(packBlock(block, frames, start / blockFrames, header, coder));
    pushLeb128(index, parts[parts.length - 1].length);
  }
  const trailer = new Uint8Array(TRAILER_BYTES + index.length + TAIL_BYTES);
  const view = viewOf(trailer);
  const word = TRAILER + index.length * 256;
  view.setUint32(0, word, true);
  view.setBigUint64(4, BigInt(nFrames), true);
  view.setBigUint64(12, BigInt(/** @type {number} */ (header.nSamples)), true);
  trailer.set(index, TRAILER_BYTES);
  view.setUint32(trailer.length - TAIL_BYTES, word, true);
  view.setUint32(trailer.length - 4, crc32(trailer.subarray(0, trailer.length - 4)), true);
  parts.push(trailer);
  return joined(parts);
}

/**
 * @param {Uint32Array} tokens frame by frame
 * @param {number} frames
 * @param {number} number of the block
 * @param {TokenHeader} header
 * @param {Coder | null} coder
 */
function packBlock(tokens, frames, number, { codebookSize, channels }, coder) {
  let coding = ENTROPY;
  let payload = coder?.pack(tokens, channels);
  if (!payload || payload.length >= rawBytes(codebookSize, tokens.length)) {
    coding = RAW;
    payload = packRaw(tokens, codebookSize);
  }
  const block = new Uint8Array(BLOCK_BYTES + payload.length);
  const view = viewOf(block);
  view.setUint32(0, coding + payload.length * 256, true);
  view.setUint16(4, frames, true);
  const crc = crc32(payload, crc32(block.subarray(0, 6)));
  view.setUint32(6, crc ^ Math.imul(number, STRIDE), true);
  block.set(payload, BLOCK_BYTES);
  return block;
}

// ------------------------------------------------------------------------------------- raw coding

/** @type {Map<string, bigint>} */
const powers = new Map();

/** @param {number} base @param {number} exponent */
function power(base, exponent) {
  const key = `${base} ${exponent}`;
  let value = powers.get(key);
  if (value === undefined) {
    if (powers.size >= 64) powers.clear();
    value = BigInt(base) ** BigInt(exponent);
    powers.set(key, value);
  }
  return value;
}

/**
 * Bytes that tokens take as one mixed-radix integer.
 *
 * @param {number} codebookSize
 * @param {number} nTokens
 */
export function rawBytes(codebookSize, nTokens) {
  return Math.ceil((power(codebookSize, nTokens) - 1n).toString(16).length / 2);
}

/** Tokens that one double holds exactly. @param {number} codebookSize */
function limbTokens(codebookSize) {
  return Math.max(1, Math.floor(52 / bitLength(codebookSize - 1)));
}

/** @param {Uint32Array} tokens @param {number} codebookSize */
function packRaw(tokens, codebookSize) {
  let digits = limbTokens(codebookSize);
  /** @type {bigint[]} */
  let values = [];
  for (let start = 0; start < tokens.length; start += digits) {
    let limb = 0;
    for (let i = Math.min(start + digits, tokens.length) - 1; i >= start; i--) {
      limb = limb * codebookSize + tokens[i];
    }
    values.push(BigInt(limb));
  }
  for (; values.length > 1; digits *= 2) {
    const base = power(codebookSize, digits);
    values = Array.from({ length: Math.ceil(values.length / 2) }, (_, i) =>
      2 * i + 1 < values.length ? values[2 * i] + base * values[2 * i + 1] : values[2 * i],
    );
  }
  const size = rawBytes(codebookSize, tokens.length);
  const hex = values[0].toString(16).padStart(2 * size, '0');
  return Uint8Array.from({ length: size }, (_, i) =>
    parseInt(hex.slice(2 * (size - 1 - i), 2 * (size - i)), 16),
  );
}

/**
 * The mixed-radix integer in a payload.
 *
 * @param {Uint8Array} payload
 * @param {number} nTokens
 * @param {number} codebookSize
 */
function rawValue(payload, nTokens, codebookSize) {
  const hex = Array.from(payload, (byte) => byte.toString(16).padStart(2, '0'));
  const value = BigInt(`0x${hex.reverse().join('') || '0'}`);
  if (
    payload.length !== rawBytes(codebookSize, nTokens) ||
    value >= power(codebookSize, nTokens)
  ) {
    throw new TokenFileError('the payload does not encode that many tokens');
  }
  return value;
}

/** @param {Uint8Array} payload @param {number} nTokens @param {number} codebookSize */
function unpackRaw(payload, nTokens, codebookSize) {
  const digits = limbTokens(codebookSize);
  const limbs = Math.ceil(nTokens / digits);
  const tokens = new Uint32Array(nTokens);
  /** @param {bigint} value @param {number} first @param {number} count of limbs */
  const split = (value, first, count) => {
    if (count > 1) {
      let half = 1;
      while (half * 2 < count) half *= 2;
      const base = power(codebookSize, half * digits);
      const high = value / base;
      split(value - high * base, first, half);
      split(high, first + half, count - half);
      return;
    }
    let limb = Number(value);
    const end = Math.min((first + 1) * digits, nTokens);
    for (let i = first * digits; i < end; i++) {
      tokens[i] = limb % codebookSize;
      limb = (limb - tokens[i]) / codebookSize; // exact
    }
  };
  split(rawValue(payload, nTokens, codebookSize), 0, limbs);
  return tokens;
}

// ------------------------------------------------------------------------------------- bytes

const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n;
});

/**
 * CRC-32 as in zlib.
 *
 * @param {Uint8Array} bytes
 * @param {number} [before] of the bytes before them
 */
function crc32(bytes, before = 0) {
  let crc = ~before;
  for (let i = 0; i < bytes.length; i++) crc = CRC_TABLE[(crc ^ bytes[i]) & 255] ^ (crc >>> 8);
  return ~crc >>> 0;
}

/** @param {Uint8Array} bytes */
function viewOf(bytes) {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

/**
 * A bigint where a number would not be exact, which no bound allows.
 *
 * @param {DataView} view
 * @param {number} offset
 */
function getUint64(view, offset) {
  const value = view.getBigUint64(offset, true);
  return value > BigInt(Number.MAX_SAFE_INTEGER) ? value : Number(value);
}

/** @param {Uint8Array} bytes */
function decodeName(bytes) {
  try {
    return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    throw new TokenFileError('the model name is not UTF-8');
  }
}

/** @param {number} value below 2^32 */
function bitLength(value) {
  return 32 - Math.clz32(value);
}

/** @param {number[]} target @param {number} value */
function pushLeb128(target, value) {
  for (; value > 127; value >>>= 7) target.push((value & 127) | 128);
  target.push(value);
}

/** @param {Uint8Array[]} parts */
function joined(parts) {
  const bytes = new Uint8Array(parts.reduce((n, part) => n + part.length, 0));
  let position = 0;
  for (const part of parts) {
    bytes.set(part, position);
    position += part.length;
  }
  return bytes;
}
