/** Runs the models, so that the page stays alive. */

import { openCodec } from './codec.js';
import { hex } from './entropy.js';
import { identitiesOf, knows, loadModel } from './model.js';
import { resample } from './resample.js';
import { MAX_SAMPLES, TOO_LONG } from './sound.js';
import { ROWS, levels, shades } from './spectrogram.js';
import { TokenFileError, verify } from './tokenfile.js';
import * as ort from './vendor/ort.wasm.min.mjs';

ort.env.wasm.numThreads = 1; // a step is too little work for more
ort.env.wasm.wasmPaths = new URL('vendor/', import.meta.url).href;

const MODELS = new URL('models/', import.meta.url).href;
const VIEW_RATE = 16_000; // of what spectrograms show, Hz
const COLUMNS_PER_SECOND = 125;
const MAX_COLUMNS = 1600;

/** @typedef {(stage: string, part: number | null) => void} Tell */
/** @type {Map<string, Promise<any>>} */
const codecs = new Map();

/** @param {string} name @param {Tell} tell */
async function codecOf(name, tell) {
  let codec = codecs.get(name);
  if (!codec) {
    tell(`Fetching ${name}`, null);
    codec = loadModel(MODELS + name).then((model) => openCodec(model, ort));
    codec.catch(() => codecs.delete(name));
    codecs.set(name, codec);
  }
  return codec;
}

/** Time that something takes, seconds. @template T @param {() => Promise<T>} work */
async function timed(work) {
  const start = performance.now();
  const result = await work();
  return { result, seconds: (performance.now() - start) / 1000 };
}

/** @param {string} stage @param {Tell} tell */
function progress(stage, tell) {
  tell(stage, 0);
  return (/** @type {number} */ done, /** @type {number} */ total) => tell(stage, done / total);
}

/**
 * @param {Record<string, Float32Array[]>} versions
 * @param {number} rate
 */
function pictures(versions, rate) {
  const found = Object.entries(versions).map(([name, channels]) => {
    const mono = channels[0].map(
      (_, i) => channels.reduce((sum, row) => sum + row[i], 0) / channels.length,
    );
    const samples = resample(mono, rate, VIEW_RATE);
    const seconds = samples.length / VIEW_RATE;
    const columns = Math.max(2, Math.min(MAX_COLUMNS, Math.round(seconds * COLUMNS_PER_SECOND)));
    return { name, columns, values: levels(samples, columns) };
  });
  const highest = Math.max(-20, ...found.map(({ values }) => values.reduce((a, b) => Math.max(a, b))));
  return Object.fromEntries(
    found.map(({ name, columns, values }) => [
      name,
      { columns, rows: ROWS, data: shades(values, highest) },
    ]),
  );
}

/** @param {Blob} blob @returns {Promise<import('./codec.js').Picture>} */
async function readPicture(blob) {
  const bitmap = await createImageBitmap(blob);
  const { width, height } = bitmap;
  const canvas = new OffscreenCanvas(width, height);
  const context = /** @type {OffscreenCanvasRenderingContext2D} */ (canvas.getContext('2d'));
  context.drawImage(bitmap, 0, 0);
  const { data } = context.getImageData(0, 0, width, height);
  for (let i = 3; i < data.length; i += 4) {
    if (data[i] !== 255) return { data, width, height, components: 4 };
  }
  const rgb = new Uint8Array(width * height * 3);
  for (let i = 0, j = 0; i < data.length; i += 4) {
    rgb[j++] = data[i];
    rgb[j++] = data[i + 1];
    rgb[j++] = data[i + 2];
  }
  return { data: rgb, width, height, components: 3 };
}

/** Any picture as RGBA. @param {import('./codec.js').Picture} picture */
function shown({ data, width, height, components }) {
  const rgba = new Uint8ClampedArray(width * height * 4);
  const grey = components < 3;
  for (let pixel = 0; pixel < width * height; pixel++) {
    const from = pixel * components;
    for (let c = 0; c < 3; c++) rgba[4 * pixel + c] = data[from + (grey ? 0 : c)];
    rgba[4 * pixel + 3] = components % 2 ? 255 : data[from + components - 1];
  }
  return { data: rgba, width, height };
}

/** @type {Record<string, (args: any, tell: Tell) => Promise<any>>} */
const methods = {
  async encodeSound({ model, channels, rate }, tell) {
    const codec = await codecOf(model, tell);
    tell('Starting the runtime', null);
    await Promise.all([codec.session('encoder'), codec.session('decoder')]);
    const encoded = await timed(() =>
      codec.encodeFile(channels, rate, progress('Encoding', tell)),
    );
    const file = encoded.result;
    const decoded = await timed(() => codec.decodeFile(file, progress('Decoding', tell)));
    return {
      model,
      file,
      header: decoded.result.header,
      rate,
      decoded: decoded.result.channels,
      pictures: pictures({ original: channels, decoded: decoded.result.channels }, rate),
      seconds: { encode: encoded.seconds, decode: decoded.seconds },
    };
  },

  async encodeImage({ model, blob }, tell) {
    const picture = await readPicture(blob);
    const codec = await codecOf(model, tell);
    const encoded = await timed(() => codec.encodeFile(picture, progress('Encoding', tell)));
    const file = encoded.result;
    const decoded = await timed(() => codec.decodeFile(file, progress('Decoding', tell)));
    return {
      model,
      file,
      header: decoded.result.header,
      original: shown(picture),
      picture: shown(decoded.result.picture),
      seconds: { encode: encoded.seconds, decode: decoded.seconds },
    };
  },

  /** A token file, with whichever of the models has its token space. */
  async decodeFile({ file, models }, tell) {
    const { header } = verify(file);
    if (header.kind === 'audio') {
      const length = Math.max(header.nSamples ?? 0, header.modelSamples ?? 0);
      if (length * header.channels > MAX_SAMPLES) throw new TokenFileError(TOO_LONG);
    }
    const identity = hex(header.identity);
    const order = models.toSorted((/** @type {string} */ a) => (a === header.model ? -1 : 0));
    for (const name of order) {
      const response = await fetch(`${MODELS}${name}/config.json`);
      const config = response.ok ? await response.json() : {};
      if (!knows({ identities: identitiesOf(config) }, identity)) continue;
      const codec = await codecOf(name, tell);
      const { result, seconds } = await timed(() =>
        codec.decodeFile(file, progress('Decoding', tell)),
      );
      const found = { model: name, file, header: result.header, seconds: { decode: seconds } };
      if (header.kind === 'image') return { ...found, picture: shown(result.picture) };
      return {
        ...found,
        rate: result.rate,
        decoded: result.channels,
        pictures: pictures({ decoded: result.channels }, result.rate),
      };
    }
    throw new TokenFileError(`made by the model '${header.model}', which is not among those here`);
  },
};

self.onmessage = async ({ data: { id, method, args } }) => {
  /** @type {Tell} */
  const tell = (stage, part) => self.postMessage({ id, stage, part });
  try {
    self.postMessage({ id, result: await methods[method](args, tell) });
  } catch (error) {
    const { name, message } = error instanceof Error ? error : new Error(String(error));
    self.postMessage({ id, error: { name, message } });
  }
};
