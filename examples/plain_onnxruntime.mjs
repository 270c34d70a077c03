// Encode and decode with ONNX Runtime alone; vpcodec need not be installed.
//
//     npm install onnxruntime-web
//     node plain_onnxruntime.mjs MODEL_FOLDER IN.f32 OUT.f32
//
// MODEL_FOLDER is that of a native audio model, such as checkpoints/speech-3k. IN.f32 and OUT.f32 hold
// float32 samples at the model's rate, mono; `ffmpeg -i IN -ac 1 -ar 16000 -f f32le IN.f32` makes them.
// The graphs are steps: each input `past.X` takes the output `next.X` of the step before.
import { readFileSync, writeFileSync } from 'node:fs';
import * as ort from 'onnxruntime-web'; // or 'onnxruntime-node'

ort.env.wasm.numThreads = 1; // a frame is too little work for more
const [folder, source, target] = process.argv.slice(2);
const { strides, decoder_delay: delay } = JSON.parse(readFileSync(`${folder}/config.json`, 'utf8'));
const hop = strides.reduce((a, b) => a * b);
const externalData = [{ path: 'model.safetensors', data: readFileSync(`${folder}/model.safetensors`) }];

async function run(part, type, data, chunk) {
  const session = await ort.InferenceSession.create(readFileSync(`${folder}/${part}.onnx`), { externalData });
  const zeros = (shape) => new ort.Tensor('float32', new Float32Array(shape.reduce((a, b) => a * b)), shape);
  let state = session.inputMetadata.slice(1).map(({ name, shape }) => [name, zeros([1, ...shape.slice(1)])]);
  const results = [];
  for (let i = 0; i < data.length; i += chunk) { // any number of whole frames gives the same tokens
    const x = new ort.Tensor(type, data.slice(i, i + chunk), [1, Math.min(chunk, data.length - i)]);
    const found = await session.run({ [session.inputNames[0]]: x, ...Object.fromEntries(state) });
    results.push(...found[session.outputNames[0]].data);
    state = session.outputNames.slice(1).map((name) => [name.replace('next.', 'past.'), found[name]]);
  }
  return results;
}

const samples = new Float32Array(new Uint8Array(readFileSync(source)).buffer);
const padded = new Float32Array(Math.ceil(samples.length / hop) * hop); // whole frames
padded.set(samples);
const tokens = await run('encoder', 'float32', padded, 100 * hop);
// The decoder is some frames late: repeat the last token to get the end, and drop the beginning.
const extended = BigInt64Array.from([...tokens, ...Array(delay).fill(tokens.at(-1))]);
const decoded = (await run('decoder', 'int64', extended, 100)).slice(delay * hop).slice(0, samples.length);
writeFileSync(target, Float32Array.from(decoded));
console.log(`${target}: ${tokens.length} tokens, ${decoded.length} samples`);
