/**
 * A model folder: config.json, the two ONNX graphs, the weights and the entropy tables.
 *
 * @module
 */

import { CoderSet, TokenCoder, hex } from './entropy.js';
import { sha256 } from './sha256.js';

const MAX_CONFIG_BYTES = 1 << 20;
const MAX_FILE_BYTES = 1 << 30;
const TABLES = /^entropy(-[0-9a-f]{8})?\.safetensors$/;
const FILES = ['model.safetensors', 'encoder.onnx', 'decoder.onnx'];

/** A model that cannot be found, read or trusted; one line. */
export class ModelError extends Error {
  name = 'ModelError';
}

/**
 * Gives the bytes of a file of a folder by its name.
 *
 * @callback ReadFile
 * @param {string} name
 * @param {number} limit more bytes than these are an error
 * @param {(bytes: number) => void} [progress] told the bytes so far
 * @returns {Promise<Uint8Array>}
 */

/**
 * A model in memory.
 *
 * @typedef {object} Model
 * @property {string} name
 * @property {'audio' | 'image'} kind
 * @property {Record<string, any>} config the fields of config.json
 * @property {number} hopLength samples of a frame, or pixels along its side
 * @property {number} codebookSize
 * @property {Uint8Array} space 16 bytes that identify the token space
 * @property {Set<string>} identities of the token files that it decodes, in hexadecimal
 * @property {CoderSet | null} coder
 * @property {Record<'model.safetensors' | 'encoder.onnx' | 'decoder.onnx', Uint8Array>} files
 */

/**
 * Reads a model, and checks each file against its hash.
 *
 * @param {string | URL | ReadFile} folder its address, or what reads its files
 * @param {{progress?: (bytes: number) => void}} [options] told how many bytes have arrived
 * @returns {Promise<Model>}
 * @throws {ModelError} a file is missing, changed or not one of a native model
 */
export async function loadModel(folder, { progress } = {}) {
  const read = typeof folder === 'function' ? folder : readFrom(folder);
  const config = parseConfig(await read('config.json', MAX_CONFIG_BYTES));
  const names = Object.keys(config.files).filter((name) => FILES.includes(name) || TABLES.test(name));
  for (const name of FILES) if (!names.includes(name)) throw new ModelError(`no ${name}`);
  const arrived = new Map();
  const files = await Promise.all(
    names.map(async (name) => {
      const bytes = await read(name, MAX_FILE_BYTES, (n) => {
        arrived.set(name, n);
        progress?.([...arrived.values()].reduce((a, b) => a + b, 0));
      });
      if (hex(sha256(bytes)) !== config.files[name]) {
        throw new ModelError(`${name}: damaged or changed (SHA-256 differs from config.json)`);
      }
      return /** @type {[string, Uint8Array]} */ ([name, bytes]);
    }),
  );
  const tables = files.filter(([name]) => TABLES.test(name)).map(([, bytes]) => bytes);
  const coder = tables.length ? new CoderSet(tables.map((bytes) => new TokenCoder(bytes))) : null;
  const codebookSize = sizeOfCodebook(config.quantizer);
  if (coder && coder.codebookSize !== codebookSize) {
    throw new ModelError(`entropy tables for a codebook of ${coder.codebookSize}`);
  }
  return {
    name: config.name,
    kind: config.kind,
    config,
    hopLength: hopLength(config),
    codebookSize,
    space: bytesOf(config.space),
    identities: identitiesOf(config),
    coder,
    files: /** @type {Model['files']} */ (Object.fromEntries(files)),
  };
}

/**
 * Whether a model decodes token files with an identity, or the beginning of one.
 *
 * @param {Pick<Model, 'identities'>} model
 * @param {string} identity in hexadecimal
 */
export function knows({ identities }, identity) {
  return [...identities].some((other) => other.startsWith(identity));
}

/** All identities of a model. @param {Record<string, any>} config the fields of config.json */
export function identitiesOf({ space, fingerprint, earlier = [] }) {
  return new Set([space, fingerprint, ...earlier].filter(Boolean));
}

/** @param {Uint8Array} bytes @returns {Record<string, any>} */
function parseConfig(bytes) {
  let config;
  try {
    config = JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(bytes));
  } catch {
    throw new ModelError('config.json is not JSON');
  }
  const identities = [config?.fingerprint, config?.space, ...(config?.earlier ?? [])];
  const native =
    typeof config?.name === 'string' &&
    typeof config.files === 'object' &&
    config.files !== null &&
    identities.every((id) => typeof id === 'string' && /^[0-9a-f]{32}$/.test(id)) &&
    (config.kind === 'audio'
      ? Number.isInteger(config.sample_rate) &&
        Number.isInteger(config.decoder_delay) &&
        Array.isArray(config.strides)
      : config.kind === 'image' && Array.isArray(config.dims));
  if (!native || !Number.isInteger(hopLength(config)) || !(sizeOfCodebook(config.quantizer) > 1)) {
    throw new ModelError('config.json is not that of a native model with a token space');
  }
  return config;
}

/** @param {Record<string, any>} config */
function hopLength(config) {
  if (config.kind === 'audio') return product(config.strides);
  return config.patch_size * 2 ** (config.dims.length - 1);
}

/** @param {Record<string, any> | undefined} quantizer */
function sizeOfCodebook(quantizer) {
  if (Array.isArray(quantizer?.levels)) return product(quantizer.levels);
  return quantizer?.codebook_size ?? 2 ** quantizer?.dim;
}

/** @param {number[]} values */
function product(values) {
  return values.reduce((a, b) => a * b, 1);
}

/** @param {string} text hexadecimal */
function bytesOf(text) {
  return Uint8Array.from(text.match(/../g) ?? [], (pair) => parseInt(pair, 16));
}

/**
 * Reads the files of a folder on a server.
 *
 * @param {string | URL} folder its address
 * @returns {ReadFile}
 */
export function readFrom(folder) {
  const base = String(folder).replace(/\/?$/, '/');
  return async (name, limit, progress) => {
    const response = await fetch(base + name);
    if (!response.ok || !response.body) {
      throw new ModelError(`${base + name}: ${response.status} ${response.statusText}`.trim());
    }
    const parts = [];
    let size = 0;
    const reader = response.body.getReader();
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      parts.push(part.value);
      size += part.value.length;
      if (size > limit) throw new ModelError(`${base + name}: more than ${limit} bytes`);
      progress?.(size);
    }
    const bytes = new Uint8Array(size);
    let position = 0;
    for (const part of parts) {
      bytes.set(part, position);
      position += part.length;
    }
    return bytes;
  };
}
