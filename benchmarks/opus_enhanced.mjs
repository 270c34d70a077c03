// Opus forced to wideband, decoded with the enhancement of libopus 1.5 (LACE, NoLACE) or without.
//
//   npm install ogg-opus-decoder @wasm-audio-decoders/opus-ml
//   node benchmarks/opus_enhanced.mjs RECORDINGS OUT 6 nolace
//   vpcodec score RECORDINGS opus@6k-nolace=OUT
//
// Encodes each .flac and .wav of the folder RECORDINGS at that many kbit/s, writes 48 kHz WAV files
// of 16 bits to OUT, and prints the mean bit rate of the Ogg files. By itself, opusenc takes
// narrowband at 6 and 8 kbit/s. Needs opusenc; run it where the packages are installed.
import { execFileSync } from "node:child_process";
import { mkdirSync, readdirSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join, parse } from "node:path";

const { OggOpusDecoder } = createRequire(join(process.cwd(), "x"))("ogg-opus-decoder");
const [source, target, bitrate, enhancement] = process.argv.slice(2);
if (!["none", "lace", "nolace"].includes(enhancement)) {
  console.error("usage: node opus_enhanced.mjs RECORDINGS OUT KBIT/S none|lace|nolace");
  process.exit(2);
}
const SET_BANDWIDTH = "4008=1103"; // OPUS_BANDWIDTH_WIDEBAND
const SET_SIGNAL = "4024=3001"; // OPUS_SIGNAL_VOICE

/** A mono WAV file of 16 bits. */
function wav(samples, rate) {
  const data = Buffer.alloc(44 + 2 * samples.length);
  data.write("RIFF", 0);
  data.writeUInt32LE(36 + 2 * samples.length, 4);
  data.write("WAVEfmt ", 8);
  [16, 1 | (1 << 16), rate, 2 * rate, 2 | (16 << 16)].forEach((x, i) =>
    data.writeUInt32LE(x, 16 + 4 * i));
  data.write("data", 36);
  data.writeUInt32LE(2 * samples.length, 40);
  samples.forEach((x, i) =>
    data.writeInt16LE(Math.round(32767 * Math.max(-1, Math.min(1, x))), 44 + 2 * i));
  return data;
}

mkdirSync(target, { recursive: true });
const rates = [];
for (const name of readdirSync(source).filter((x) => /\.(flac|wav)$/.test(x)).sort()) {
  const ogg = execFileSync("opusenc", [
    "--quiet", "--bitrate", bitrate,
    "--set-ctl-int", SET_BANDWIDTH, "--set-ctl-int", SET_SIGNAL, join(source, name), "-",
  ]);
  const decoder = new OggOpusDecoder({ speechQualityEnhancement: enhancement });
  await decoder.ready;
  const { channelData, samplesDecoded, sampleRate, errors } = await decoder.decodeFile(ogg);
  decoder.free();
  if (errors.length) throw new Error(`${name}: ${errors[0].message}`);
  writeFileSync(join(target, `${parse(name).name}.wav`), wav(channelData[0], sampleRate));
  rates.push((8 * ogg.length * sampleRate) / samplesDecoded);
}
console.log(`${rates.length} files, mean ${Math.round(rates.reduce((a, b) => a + b) / rates.length)} bit/s`);
