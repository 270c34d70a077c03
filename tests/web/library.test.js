import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { readdirSync } from 'node:fs';
import { test } from 'node:test';

import {
  EntropyError,
  NoCoderError,
  PacketError,
  PacketFormat,
  TokenCoder,
  TokenFileError,
  loadModel,
  makeHeader,
  readTokens,
  resample,
  verify,
  writeTokens,
} from '../../web/index.js';
import { sha256 } from '../../web/sha256.js';
import { readWav, writeWav } from '../../web/wav.js';
import { RESOURCES, bundled, codecOf, coderFor, json, resource } from './support.js';

const bytesOf = (text) => new Uint8Array(Buffer.from(text, 'hex'));

// ---- token files

test('the vectors of the format are read, and written to the same bytes', async () => {
  const names = {
    codebook_size: 'codebookSize',
    hop_length: 'hopLength',
    n_samples: 'nSamples',
    original_rate: 'originalRate',
    sample_rate: 'sampleRate',
  };
  const old = await json('tok/vectors.json');
  const vectors = { ...old, ...(await json('tok/vectors-2.json')) };
  for (const [name, facts] of Object.entries(vectors)) {
    const bytes = await resource(`tok/${name}.tok`);
    const { header, tokens } = readTokens(bytes);
    const { tokens: expected, known = true, fingerprint, block_frames, ...fields } = facts;
    assert.deepEqual(tokens.map((row) => [...row]), expected);
    assert.deepEqual(header.identity, bytesOf(fingerprint));
    for (const [field, value] of Object.entries(fields)) {
      assert.equal(header[names[field] ?? field], value, `${name}: ${field}`);
    }
    if (name in old) assert.equal(header.blockFrames, block_frames);
    else if (known) assert.deepEqual(writeTokens(header, tokens), bytes);
    assert.equal(verify(bytes).blocks, Math.ceil(header.nFrames / header.blockFrames));
  }
});

test('the golden files of all models have the tokens that they always had', async () => {
  const { files } = await json('golden/golden.json');
  const there = readdirSync(`${RESOURCES}golden`).filter((name) => name.endsWith('.tok'));
  assert.deepEqual(Object.keys(files).sort(), there.sort());
  for (const [name, facts] of Object.entries(files)) {
    const bytes = await resource(`golden/${name}`);
    const { header, tokens } = readTokens(bytes, { coder: await coderFor(bytes) });
    const hash = createHash('sha256');
    for (const row of tokens) hash.update(BigInt64Array.from(Array.from(row, BigInt)));
    assert.equal(hash.digest('hex'), facts.tokens, name);
    assert.deepEqual([tokens.length, tokens[0].length], facts.shape);
    assert.equal(header.model, facts.model);
  }
});

test('files with the newest tables are written again to the same bytes', async () => {
  for (const name of ['speech-3k-4', 'speech-1k-3', 'speech-vp-16384-3', 'image-fsp-4']) {
    const bytes = await resource(`golden/${name}.tok`);
    const coder = await coderFor(bytes);
    const { header, tokens } = readTokens(bytes, { coder });
    assert.deepEqual(writeTokens(header, tokens, { coder }), bytes, name);
  }
});

test('every flipped bit and every shorter or longer file is an error', async () => {
  const names = ['mono', 'stereo-piped', 'rgba', 'numbered-2', 'short-2', 'stereo-piped-2', 'rgba-2'];
  for (const path of names.map((name) => `tok/${name}.tok`)) {
    const bytes = await resource(path);
    for (let bit = 0; bit < 8 * bytes.length; bit++) {
      const changed = bytes.slice();
      changed[bit >> 3] ^= 1 << (bit & 7);
      assert.throws(() => readTokens(changed), TokenFileError, `${path}, bit ${bit}`);
    }
    for (let size = 0; size < bytes.length; size++) {
      assert.throws(() => readTokens(bytes.subarray(0, size)), TokenFileError);
    }
    assert.throws(() => readTokens(Uint8Array.of(...bytes, 0)), /data after the end/);
  }
});

test('a block that the bits of a larger file fill is read and written', () => {
  const nFrames = 65_535;
  const header = makeHeader({
    kind: 'audio', model: 'm', identity: new Uint8Array(16), channels: 2, sampleRate: 16000,
    originalRate: 16000, nSamples: nFrames * 96, hopLength: 96, codebookSize: 250_047,
    blockFrames: nFrames,
  });
  const tokens = [0, 1].map((c) =>
    Uint32Array.from({ length: nFrames }, (_, i) => (i * 7919 + c) % 250_047),
  );
  assert.deepEqual(readTokens(writeTokens(header, tokens)).tokens, tokens);
});

test('tokens that do not fit are refused, and so is more than the reader may take', async () => {
  const bytes = await resource('tok/mono.tok');
  const { header, tokens } = readTokens(bytes);
  assert.throws(() => writeTokens(header, [tokens[0].subarray(1)]), /not 1 x 10/);
  assert.throws(() => writeTokens(header, [tokens[0].with(0, 117_649)]), /token 117649 is not in/);
  assert.throws(() => makeHeader({ ...header, channels: 0 }), /channels 0 is not/);
  assert.throws(() => makeHeader({ ...header, model: 'a\n' }), /^TokenFileError: model name 'a\\n' /);
  assert.throws(() => readTokens(bytes, { maxTokens: 9 }), /block 2: more than 9 tokens/);
});

test('entropy-coded files need the tables of their model', async () => {
  const bytes = await resource('golden/speech-3k-1.tok');
  assert.throws(() => readTokens(bytes), NoCoderError);
  const { coder } = await bundled('speech-1k');
  assert.throws(() => readTokens(bytes, { coder }), /other .* \(492a; the model has 2f9d\)/);
});

// ---- entropy coding

test('the payloads of the entropy coder never change', async () => {
  for (const kind of ['', 'image-']) {
    const coder = new TokenCoder(await resource(`entropy/${kind}tables.safetensors`));
    for (const { tokens, payload, columns = null } of await json(`entropy/${kind}payloads.json`)) {
      const flat = Uint32Array.from(tokens.flat());
      const channels = tokens[0].length;
      assert.equal(Buffer.from(coder.pack(flat, channels, columns)).toString('hex'), payload);
      assert.deepEqual(coder.unpack(bytesOf(payload), tokens.length, channels, columns), flat);
      for (const other of [payload.slice(0, -4), `${payload}0000`]) {
        const read = () => coder.unpack(bytesOf(other), tokens.length, channels, columns);
        assert.throws(read, EntropyError);
      }
    }
  }
});

test('tables with a flaw are refused', async () => {
  const bytes = await resource('entropy/tables.safetensors');
  for (let at = 0; at < 600; at += 3) {
    const changed = bytes.slice();
    changed[at] ^= 4;
    try {
      new TokenCoder(changed);
    } catch (error) {
      assert.ok(error instanceof EntropyError, `byte ${at}: ${error.stack}`);
    }
  }
  assert.throws(() => new TokenCoder(bytes.subarray(0, 700)), EntropyError);
  assert.throws(() => new TokenCoder(new Uint8Array(3)), EntropyError);
});

// ---- packets

test('the vectors of packets are read and written, and every flipped bit is noticed', async () => {
  for (const { format: fields, sequence, groups, packet } of await json('packets.json')) {
    const { space, codebook_size: codebookSize, ...others } = fields;
    const format = new PacketFormat({ space: bytesOf(space), codebookSize, ...others });
    const bytes = bytesOf(packet);
    assert.equal(Buffer.from(format.pack(sequence, groups)).toString('hex'), packet);
    assert.deepEqual(format.unpack(bytes), { sequence, groups });
    for (let bit = 0; bit < 8 * bytes.length; bit++) {
      const changed = bytes.slice();
      changed[bit >> 3] ^= 1 << (bit & 7);
      assert.throws(() => format.unpack(changed), PacketError);
    }
  }
});

// ---- models and codecs

test('SHA-256 is that of others', () => {
  for (const n of [0, 1, 55, 56, 63, 64, 65, 119, 120, 1000]) {
    const bytes = Uint8Array.from({ length: n }, (_, i) => i * 31);
    assert.equal(
      Buffer.from(sha256(bytes)).toString('hex'),
      createHash('sha256').update(bytes).digest('hex'),
    );
  }
});

test('a changed or foreign model is refused', async () => {
  const model = await bundled('speech-3k');
  const config = JSON.stringify(model.config);
  const reader = (text, files = {}) => async (name) =>
    name === 'config.json' ? new TextEncoder().encode(text) : (files[name] ?? new Uint8Array(9));
  await assert.rejects(loadModel(reader(config)), /damaged or changed/);
  await assert.rejects(loadModel(reader('{}')), /not that of a native model/);
  await assert.rejects(loadModel(reader('{')), /not JSON/);
  const foreign = JSON.stringify({ ...model.config, strides: undefined });
  await assert.rejects(loadModel(reader(foreign)), /not that of a native model/);
});

test('streams in pieces of any length give what the whole gives', async () => {
  const codec = await codecOf('speech-3k');
  for (const n of [0, 1, 95, 96, 97, 2500]) {
    const samples = Float32Array.from({ length: n }, (_, i) => 0.3 * Math.sin(i / 5) ** 3);
    const [whole] = await codec.encode([samples]);
    assert.equal(whole.length, Math.ceil(n / 96));
    const [decoded] = await codec.decode([whole], n);
    assert.equal(decoded.length, n);
    const encoder = codec.encoderStream();
    const decoder = codec.decoderStream();
    const heard = [];
    for (let i = 0; i < n; i += 700) {
      const tokens = await encoder.push([samples.subarray(i, i + 700)]);
      heard.push(...(await decoder.push(tokens))[0]);
    }
    heard.push(...(await decoder.push(await encoder.flush()))[0], ...(await decoder.flush())[0]);
    assert.ok(decoded.every((value, i) => Math.abs(value - heard[i]) < 1e-4));
    assert.equal(heard.length, 96 * whole.length);
  }
});

test('a file of another model is refused by name', async () => {
  const codec = await codecOf('speech-3k');
  const other = await resource('golden/speech-1k-1.tok');
  await assert.rejects(codec.decodeFile(other), /made by the model 'speech-1k', whose tokens/);
  const own = await resource('golden/speech-3k-3.tok');
  const { header, tokens } = readTokens(own, { coder: codec.model.coder });
  const strange = writeTokens(makeHeader({ ...header, identity: new Uint8Array(16) }), tokens);
  await assert.rejects(codec.decodeFile(strange), /made by other weights .* token space 00000000/);
});

// ---- sound

test('resampling keeps tones below the lower rate and removes those above', () => {
  const tone = (hz, rate, n) =>
    Float32Array.from({ length: n }, (_, i) => Math.sin((2 * Math.PI * hz * i) / rate));
  const error = (a, b) => Math.max(...a.slice(400, -400).map((x, i) => Math.abs(x - b[i + 400])));
  for (const pair of ['48000 16000', '44100 16000', '16000 44100', '22050 16000', '8000 16000']) {
    const [from, to] = pair.split(' ').map(Number);
    for (const hz of [100, 1000, 3400]) {
      const n = from / 5;
      const found = resample(tone(hz, from, n), from, to);
      assert.equal(found.length, Math.ceil((n * to) / from));
      assert.ok(error(found, tone(hz, to, found.length)) < 1e-4, `${pair}, ${hz} Hz`);
    }
  }
  const high = resample(tone(9_000, 48_000, 9_600), 48_000, 16_000);
  assert.ok(Math.max(...high.slice(400, -400).map(Math.abs)) < 1e-4);
});

test('WAV files are read and written exactly', () => {
  const channels = [0, 1].map((c) =>
    Float32Array.from({ length: 100 }, (_, i) => ((i * 321 + c) % 65536) / 32768 - 1),
  );
  assert.deepEqual(readWav(writeWav(channels, 44_100)), { channels, rate: 44_100 });
  assert.equal(readWav(writeWav(channels, 44_100).subarray(0, 200)), null);
  assert.equal(readWav(new Uint8Array(50)), null);
});
