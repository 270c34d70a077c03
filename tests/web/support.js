/** What the tests of the library share: models from checkpoints/, and the runtime of the page. */

import { readFile, readdir } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';

import { loadModel, openCodec, readHeader } from '../../web/index.js';
import { knows } from '../../web/model.js';
import * as ort from '../../web/vendor/ort.wasm.min.mjs';

export const ROOT = fileURLToPath(new URL('../../', import.meta.url));
export const RESOURCES = `${ROOT}tests/resources/`;

ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmPaths = new URL('../../web/vendor/', import.meta.url).href;

/** @param {string} path below tests/resources */
export async function resource(path) {
  return new Uint8Array(await readFile(RESOURCES + path));
}

/** @param {string} path below tests/resources */
export async function json(path) {
  return JSON.parse(await readFile(RESOURCES + path, 'utf8'));
}

const models = new Map();

/** A bundled model. @param {string} name */
export function bundled(name) {
  if (!models.has(name)) {
    const folder = `${ROOT}checkpoints/${name}/`;
    models.set(
      name,
      loadModel(async (file) => new Uint8Array(await readFile(folder + file))),
    );
  }
  return models.get(name);
}

/** A codec of a bundled model. @param {string} name */
export async function codecOf(name) {
  return openCodec(await bundled(name), ort);
}

/** The coder for a token file: that of the bundled model with its token space. */
export async function coderFor(bytes) {
  const identity = Buffer.from(readHeader(bytes).header.identity).toString('hex');
  for (const name of await readdir(`${ROOT}checkpoints`)) {
    const model = await bundled(name);
    if (knows(model, identity)) return model.coder;
  }
  return null;
}
