/**
 * The library for the tests in Python: node tool.js COMMAND ARGUMENTS.
 *
 *     outcomes FILE       of token files in one file, each behind its size (u32): per file, the
 *                         SHA-256 of the tokens (int64, channels first), or the error
 *     packets FILE        the same for packets; the first is the format, as JSON
 *     write FILE OUT      a token file from JSON: fields of the header, tokens, and whether the
 *                         coder of the model is used
 *     rates FILE...       the sample rates that sound files state
 *     encode MODEL (IN.wav OUT.tok)...
 *     decode MODEL (IN.tok OUT.wav)...
 *     encode-image MODEL (IN.raw HEIGHT WIDTH COMPONENTS OUT.tok)...
 *     decode-image MODEL (IN.tok OUT.raw)...
 */

import { createHash } from 'node:crypto';
import { readFileSync, writeFileSync } from 'node:fs';

import { PacketFormat, makeHeader, readTokens, writeTokens } from '../../web/index.js';
import { rateOf } from '../../web/sound.js';
import { readWav, writeWav } from '../../web/wav.js';
import { bundled, codecOf, coderFor } from './support.js';

/** @param {string} path */
const read = (path) => new Uint8Array(readFileSync(path));

/** The parts of a file, each behind its size. @param {string} path */
function* parts(path) {
  const bytes = read(path);
  const view = new DataView(bytes.buffer, bytes.byteOffset);
  for (let at = 0; at < bytes.length; ) {
    const size = view.getUint32(at, true);
    yield bytes.slice(at + 4, at + 4 + size);
    at += 4 + size;
  }
}

/** @param {unknown} error */
function message(error) {
  const known = ['TokenFileError', 'NoCoderError', 'PacketError'];
  if (!(error instanceof Error) || !known.includes(error.name)) throw error;
  return { error: error.message };
}

/** @param {ArrayLike<number>[]} rows */
function digest(rows) {
  const hash = createHash('sha256');
  for (const row of rows) hash.update(BigInt64Array.from(Array.from(row, BigInt)));
  return hash.digest('hex');
}

/** @type {Record<string, (...args: string[]) => unknown>} */
const commands = {
  async outcomes(path) {
    const found = [];
    for (const bytes of parts(path)) {
      try {
        found.push({ tokens: digest(readTokens(bytes, { coder: await coderFor(bytes) }).tokens) });
      } catch (error) {
        found.push(message(error));
      }
    }
    return found;
  },

  packets(path) {
    const [first, ...packets] = parts(path);
    const fields = JSON.parse(new TextDecoder().decode(first));
    const format = new PacketFormat({ ...fields, space: Uint8Array.from(fields.space) });
    return packets.map((bytes) => {
      try {
        return format.unpack(bytes);
      } catch (error) {
        return message(error);
      }
    });
  },

  async write(path, target) {
    const { fields, tokens, coder } = JSON.parse(readFileSync(path, 'utf8'));
    const header = makeHeader({ ...fields, identity: Uint8Array.from(fields.identity) });
    const options = coder ? { coder: (await bundled(fields.model)).coder } : {};
    writeFileSync(target, writeTokens(header, tokens, options));
  },

  rates(...paths) {
    return paths.map((path) => rateOf(read(path)));
  },

  async encode(model, ...pairs) {
    const codec = await codecOf(model);
    for (let i = 0; i < pairs.length; i += 2) {
      const { channels, rate } = /** @type {any} */ (readWav(read(pairs[i])));
      writeFileSync(pairs[i + 1], await codec.encodeFile(channels, rate));
    }
  },

  async decode(model, ...pairs) {
    const codec = await codecOf(model);
    for (let i = 0; i < pairs.length; i += 2) {
      const { channels, rate } = await codec.decodeFile(read(pairs[i]));
      writeFileSync(pairs[i + 1], writeWav(channels, rate));
    }
  },

  async 'encode-image'(model, ...files) {
    const codec = await codecOf(model);
    for (let i = 0; i < files.length; i += 5) {
      const [height, width, components] = files.slice(i + 1, i + 4).map(Number);
      const picture = { data: read(files[i]), width, height, components };
      writeFileSync(files[i + 4], await codec.encodeFile(picture));
    }
  },

  async 'decode-image'(model, ...pairs) {
    const codec = await codecOf(model);
    for (let i = 0; i < pairs.length; i += 2) {
      const { picture } = await codec.decodeFile(read(pairs[i]));
      writeFileSync(pairs[i + 1], picture.data);
    }
  },
};

const [command, ...args] = process.argv.slice(2);
const result = await commands[command](...args);
if (result !== undefined) process.stdout.write(JSON.stringify(result));
