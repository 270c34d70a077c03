/**
 * The `.tok` container: reading, writing and checking whole files. Files of versions 1 and 2 are
 * read, those of version 2 are written.
 *
 * docs/token-format.md describes every byte. A file is refused for the same reasons, in the same
 * words, as by the Python package; damaged files are not recovered here.
 *
 * @module
 */

const MAGIC = [0x89, 0x54, 0x4f, 0x4b, 0x0d, 0x0a, 0x1a, 0x0a];
const VERSION = 2;
const ONE_BLOCK = 1; // forms of a file of version 2
const BLOCKS = 2;
const IDENTITY_BYTES = 8; // in files of version 2; version 1 has all 16
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

const FIXED_BYTES = 55; // of the header of version 1, up to the model name
const MAX_VARINT_BYTES = 8;
const BLOCK_BYTES = 10;
const TRAILER_BYTES = 20; // before the index
const TAIL_BYTES = 8; // after it
const PRINTABLE = /^(?:[^\p{C}\p{Z}]| )*$/u;
const UNKNOWN = 2n ** 64n - 1n; // samples in the header of a piped file
const STRIDE = 0x9e3779b1;
const UNSTRIDE = 0x0e8b2f51;

/**
 * Models that a header of version 2 names by a number. Files need these entries as they are, for
 * ever.
 *
 * @type {Record<number, {
 *   kind: 'audio' | 'image', name: string, hopLength: number, codebookSize: number, rate: number}>}
 */
const NUMBERED = {
  16: { kind: 'audio', name: 'speech-3k', hopLength: 96, codebookSize: 250_047, rate: 16_000 },
  17: { kind: 'audio', name: 'speech-vp-16384', hopLength: 96, codebookSize: 16_384, rate: 16_000 },
  18: { kind: 'audio', name: 'speech-1k', hopLength: 270, codebookSize: 117_649, rate: 16_000 },
  19: { kind: 'image', name: 'image-fsp', hopLength: 8, codebookSize: 15_360, rate: 0 },
  20: { kind: 'audio', name: 'speech-6k', hopLength: 48, codebookSize: 250_047, rate: 16_000 },
};
const REVISION = /^@([2-9]|[1-9][0-9]|1[0-9][0-9]|2[0-4][0-9]|25[0-5])$/;

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
 * @property {Uint8Array} identity the first 8 or all 16 bytes of what identifies the token space, or
 *   in early files the model
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
 * @property {(tokens: Uint32Array, channels: number, columns: number | null) => Uint8Array} pack
 *   tokens frame by frame; of an image, with its frames in a row
 * @property {(payload: Uint8Array, nFrames: number, channels: number, columns: number | null) =>
 *   Uint32Array} unpack
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
  if (!(identity instanceof Uint8Array) || ![IDENTITY_BYTES, 16].includes(identity.length)) {
    throw new TokenFileError(`the identity is not ${IDENTITY_BYTES} or 16 bytes`);
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
 * What a file begins with.
 *
 * @typedef {object} Beginning
 * @property {TokenHeader} header
 * @property {number} size of the header, or of the whole file if it has one block
 * @property {{coding: number, payload: Uint8Array} | null} only the block, if it has one
 */

/**
 * The header of a token file; in files of one block also that block.
 *
 * @param {Uint8Array} bytes the whole file
 * @returns {Beginning}
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
  if (bytes.length < MAGIC.length + 2) throw ends();
  const [form, version] = bytes.subarray(MAGIC.length);
  if (version > VERSION) {
    throw new TokenFileError(`format version ${version} is newer than ${VERSION}`);
  }
  if (version < 2) return readHeader1(bytes);
  if (form !== ONE_BLOCK && form !== BLOCKS) {
    throw new TokenFileError(`form ${form} is neither one block nor several`);
  }
  const fields = new Fields(bytes, MAGIC.length + 2);
  const values = parseFields(fields);
  return form === ONE_BLOCK ? readOneBlock(fields, values) : readRest(fields, values);
}

/** @param {Uint8Array} bytes @returns {Beginning} */
function readHeader1(bytes) {
  if (bytes.length < FIXED_BYTES) throw ends();
  const nameBytes = bytes[FIXED_BYTES - 1];
  if (nameBytes > MAX_MODEL_BYTES) throw longName();
  const end = FIXED_BYTES + nameBytes;
  if (bytes.length < end + 4) throw ends();
  const view = viewOf(bytes);
  if (crc32(bytes.subarray(0, end)) !== view.getUint32(end, true)) {
    throw new TokenFileError('the header is damaged');
  }
  const kind = KINDS[/** @type {1 | 2} */ (bytes[10])];
  if (!kind) throw unknownKind(bytes[10]);
  const total = view.getBigUint64(20, true);
  const own = [view.getUint32(12, true), view.getUint32(16, true)];
  own.push(/** @type {any} */ (total === UNKNOWN ? null : toNumber(total)));
  const header = makeHeader(/** @type {any} */ ({
    kind,
    model: decodeName(bytes.subarray(FIXED_BYTES, end)),
    identity: bytes.slice(38, 54),
    channels: bytes[11],
    hopLength: view.getUint32(28, true),
    codebookSize: view.getUint32(32, true) + 1,
    blockFrames: view.getUint16(36, true),
    ...(kind === 'audio'
      ? { sampleRate: own[0], originalRate: own[1], nSamples: own[2] }
      : { width: own[0], height: own[1], components: own[2] }),
  }));
  return { header, size: end + 4, only: null };
}

/** Reads the fields of a header of version 2 one after the other. */
class Fields {
  /** @param {Uint8Array} bytes @param {number} first */
  constructor(bytes, first) {
    this.bytes = bytes;
    this.size = first;
  }

  /** @param {number} n */
  take(n) {
    if (this.bytes.length < this.size + n) throw ends();
    this.size += n;
    return this.bytes.slice(this.size - n, this.size);
  }

  byte() {
    return this.take(1)[0];
  }

  /** A number in LEB128. @returns {any} a bigint where a number would not be exact */
  varint() {
    let value = 0n;
    for (let shift = 0n; shift < 7 * MAX_VARINT_BYTES; shift += 7n) {
      const byte = this.byte();
      value |= BigInt(byte & 127) << shift;
      if (byte < 128) return toNumber(value);
    }
    throw new TokenFileError('a number in the header is too long');
  }

  /** Whether the CRC-32 that follows is that of all bytes before it. */
  hasChecksum() {
    const crc = crc32(this.bytes.subarray(0, this.size));
    return viewOf(this.take(4)).getUint32(0, true) === crc;
  }
}

/** The fields that both forms of version 2 begin with. @param {Fields} fields @returns {any} */
function parseFields(fields) {
  const code = fields.byte();
  let kind = KINDS[/** @type {1 | 2} */ (code)];
  /** @type {any} */
  let own;
  if (NUMBERED[code]) {
    const { name, rate, ...others } = NUMBERED[code];
    const revision = fields.byte();
    if (!revision) throw new TokenFileError('the header is damaged');
    own = { ...others, rate, model: revision === 1 ? name : `${name}@${revision}` };
    ({ kind } = others);
  } else if (kind) {
    const size = fields.byte();
    if (size > MAX_MODEL_BYTES) throw longName();
    const model = decodeName(fields.take(size));
    const hopLength = fields.varint();
    const top = fields.varint();
    const codebookSize = typeof top === 'bigint' ? top + 1n : top + 1;
    own = { model, hopLength, codebookSize, rate: kind === 'audio' ? fields.varint() : 0 };
  } else {
    throw unknownKind(code);
  }
  const { rate, ...shared } = own;
  shared.kind = kind;
  shared.identity = fields.take(IDENTITY_BYTES);
  if (kind === 'audio') {
    const channels = fields.varint();
    const originalRate = fields.varint() || rate;
    const total = fields.varint();
    const nSamples = !total ? null : typeof total === 'bigint' ? total - 1n : total - 1;
    return { ...shared, sampleRate: rate, channels, originalRate, nSamples };
  }
  const components = fields.varint();
  const width = fields.varint();
  const height = fields.varint();
  return { ...shared, components, width, height, channels: 2 - (Number(components) % 2) };
}

/** @param {Fields} fields @param {any} values @returns {Beginning} */
function readRest(fields, values) {
  const blockFrames = fields.varint();
  if (!fields.hasChecksum()) throw new TokenFileError('the header is damaged');
  return { header: makeHeader({ ...values, blockFrames }), size: fields.size, only: null };
}

/** @param {Fields} fields @param {any} values @returns {Beginning} */
function readOneBlock(fields, values) {
  if (values.nSamples === null) {
    throw new TokenFileError('the header of a file of one block has no length');
  }
  const short = makeHeader({ ...values, blockFrames: 1 });
  const nFrames = /** @type {number} */ (short.nFrames);
  const header = makeHeader({ ...short, blockFrames: Math.max(1, nFrames) });
  const coding = fields.byte();
  const length = fields.varint();
  checkCoding(coding, length, nFrames, header, 'block 0');
  if (fields.bytes.length < fields.size + length + 4) {
    throw new TokenFileError('block 0: the file ends inside it');
  }
  const payload = fields.take(length);
  if (!fields.hasChecksum()) throw new TokenFileError('block 0: the checksum is wrong');
  return { header, size: fields.size, only: { coding, payload } };
}

/**
 * @param {number} coding
 * @param {number} length of the payload
 * @param {number} frames
 * @param {TokenHeader} header
 * @param {string} place
 */
function checkCoding(coding, length, frames, { channels, codebookSize }, place) {
  if (coding !== RAW && coding !== ENTROPY) {
    throw new TokenFileError(`${place}: unknown coding id ${coding}`);
  }
  if (length > Math.ceil((frames * channels * bitLength(codebookSize - 1)) / 8)) {
    throw new TokenFileError(`${place}: ${length} bytes are too many for ${frames} frames`);
  }
}

function ends() {
  return new TokenFileError('the file ends inside its header');
}

function longName() {
  return new TokenFileError(`the model name has more than ${MAX_MODEL_BYTES} bytes`);
}

/** @param {number} kind */
function unknownKind(kind) {
  return new TokenFileError(
    `kind ${kind} is neither audio (1) nor an image (2) nor a numbered model`,
  );
}

/** A header of version 2, up to what depends on the form. @param {TokenHeader} header */
function packHeader(header) {
  const { kind, model, hopLength, codebookSize, nFrames, blockFrames } = header;
  const rate = header.kind === 'audio' ? header.sampleRate : 0;
  const name = new TextEncoder().encode(model);
  const bytes = [...MAGIC, /** @type {number} */ (nFrames) <= blockFrames ? ONE_BLOCK : BLOCKS, 2];
  const numbered = Object.entries(NUMBERED).find(([, entry]) => {
    const values = [entry.kind, entry.hopLength, entry.codebookSize, entry.rate];
    return (
      String(values) === String([kind, hopLength, codebookSize, rate]) &&
      model.startsWith(entry.name) &&
      (model === entry.name || REVISION.test(model.slice(entry.name.length)))
    );
  });
  if (numbered) {
    const revision = model.slice(numbered[1].name.length + 1) || 1;
    bytes.push(Number(numbered[0]), Number(revision));
  } else {
    bytes.push(kind === 'audio' ? 1 : 2, name.length, ...name);
    pushLeb128(bytes, hopLength);
    pushLeb128(bytes, codebookSize - 1);
    if (rate) pushLeb128(bytes, rate);
  }
  bytes.push(...header.identity.subarray(0, IDENTITY_BYTES));
  const numbers =
    header.kind === 'audio'
      ? [
          header.channels,
          header.originalRate === rate ? 0 : header.originalRate,
          /** @type {number} */ (header.nSamples) + 1,
        ]
      : [header.components, header.width, header.height];
  for (const value of numbers) pushLeb128(bytes, value);
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
  const beginning = readHeader(bytes);
  const { header } = beginning;
  /** @type {Uint32Array[]} */
  const parts = [];
  let total = 0;
  const read = walk(bytes, beginning, (coding, payload, nFrames) => {
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
        : /** @type {Coder} */ (coder).unpack(payload, nFrames, header.channels, columnsOf(header)),
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
  const beginning = readHeader(bytes);
  const { header } = beginning;
  return walk(bytes, beginning, (coding, payload, nFrames) => {
    if (coding === RAW) rawValue(payload, nFrames * header.channels, header.codebookSize);
  });
}

/**
 * Goes through the blocks and the trailer.
 *
 * @param {Uint8Array} bytes
 * @param {Beginning} beginning
 * @param {(coding: number, payload: Uint8Array, nFrames: number) => void} visit is told each block
 */
function walk(bytes, { header, size, only }, visit) {
  /** @type {(number: number, ...block: [number, Uint8Array, number]) => void} */
  const visited = (number, ...block) => {
    try {
      visit(...block);
    } catch (error) {
      if (error instanceof NoCoderError) throw error;
      const text = error instanceof Error ? error.message : error;
      throw new TokenFileError(`block ${number}: ${text}`);
    }
  };
  if (only) {
    const { coding, payload } = only;
    if (header.nFrames) visited(0, coding, payload, header.nFrames);
    if (bytes.length > size) throw new TokenFileError('there is data after the end of the file');
    return { header, blocks: header.nFrames ? 1 : 0, payloadBytes: payload.length };
  }
  const view = viewOf(bytes);
  const { blockFrames } = header;
  let position = size;
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
    checkCoding(coding, length, frames, header, place);
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
    visited(number, coding, payload, frames);
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
  const nSamples = toNumber(view.getBigUint64(12, true));
  if (header.nSamples !== null && header.nSamples !== nSamples) {
    throw new TokenFileError(`n_samples is ${nSamples}, in the header ${header.nSamples}`);
  }
  const whole =
    header.nSamples === null ? makeHeader(/** @type {any} */ ({ ...header, nSamples })) : header;
  if (toNumber(view.getBigUint64(4, true)) !== whole.nFrames) {
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
  const beginning = packHeader(header);
  if (nFrames <= blockFrames) {
    const { coding, payload } = pack(interleaved(tokens, 0, nFrames, header), header, coder);
    beginning.push(coding);
    pushLeb128(beginning, payload.length);
    return withChecksum([Uint8Array.from(beginning), payload]);
  }
  pushLeb128(beginning, blockFrames);
  const parts = [withChecksum([Uint8Array.from(beginning)])];
  /** @type {number[]} */
  const index = [];
  for (let start = 0; start < nFrames; start += blockFrames) {
    const frames = Math.min(blockFrames, nFrames - start);
    const block = interleaved(tokens, start, frames, header);
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
 * Tokens frame by frame.
 *
 * @param {ArrayLike<number>[]} rows one per channel
 * @param {number} start
 * @param {number} frames
 * @param {TokenHeader} header
 */
function interleaved(rows, start, frames, { channels, codebookSize }) {
  const tokens = new Uint32Array(frames * channels);
  for (let i = 0; i < tokens.length; i++) {
    const token = rows[i % channels][start + Math.floor(i / channels)];
    if (!Number.isInteger(token) || token < 0 || token >= codebookSize) {
      throw new TokenFileError(`token ${token} is not in 0 to ${codebookSize - 1}`);
    }
    tokens[i] = token;
  }
  return tokens;
}

/** Frames in a row of an image; null: audio. @param {TokenHeader} header */
function columnsOf(header) {
  return header.kind === 'image' ? header.columns : null;
}

/**
 * The coding that makes tokens shorter.
 *
 * @param {Uint32Array} tokens frame by frame
 * @param {TokenHeader} header
 * @param {Coder | null} coder
 */
function pack(tokens, header, coder) {
  const { channels, codebookSize } = header;
  if (!tokens.length) return { coding: RAW, payload: new Uint8Array(0) };
  const payload = coder?.pack(tokens, channels, columnsOf(header));
  if (payload && payload.length < rawBytes(codebookSize, tokens.length)) {
    return { coding: ENTROPY, payload };
  }
  return { coding: RAW, payload: packRaw(tokens, codebookSize) };
}

/** @param {Uint8Array[]} parts */
function withChecksum(parts) {
  const bytes = joined([...parts, new Uint8Array(4)]);
  const end = bytes.length - 4;
  viewOf(bytes).setUint32(end, crc32(bytes.subarray(0, end)), true);
  return bytes;
}

/**
 * @param {Uint32Array} tokens frame by frame
 * @param {number} frames
 * @param {number} number of the block
 * @param {TokenHeader} header
 * @param {Coder | null} coder
 */
function packBlock(tokens, frames, number, header, coder) {
  const { coding, payload } = pack(tokens, header, coder);
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

/** A bigint where a number would not be exact, which no bound allows. @param {bigint} value */
function toNumber(value) {
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
  for (; value > 127; value = Math.floor(value / 128)) target.push((value % 128) + 128);
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
