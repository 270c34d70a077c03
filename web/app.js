/** The page: takes files and recordings, hands them to the worker, and shows what comes back. */

import { Player } from './player.js';
import { resample } from './resample.js';
import { Recording, USUAL_RATE, readSound } from './sound.js';
import { writeWav } from './wav.js';

/** @typedef {{name: string, kind: 'audio' | 'image', label: string, note: string}} Entry */
/** @typedef {import('./player.js').Version} Version */
/** @typedef {{columns: number, rows: number, data: Uint8ClampedArray}} Grey */

/** @type {(id: string) => any} */
const $ = (id) => document.getElementById(id);

/** @type {Entry[]} */
let models = [];
/** What is worked on: a sound or a picture to encode again with another model. @type {any} */
let source = null;
/** @type {Partial<Record<Version, Grey>>} */
let spectrograms = {};
/** @type {string[]} */
let addresses = [];
/** @type {Recording | null} */
let recording = null;

// ------------------------------------------------------------------------------------- the worker

/** @type {Worker} */
let worker;
let calls = 0;
/** @type {Map<number, {resolve: (value: any) => void, reject: (error: Error) => void}>} */
const waiting = new Map();

function startWorker() {
  worker = new Worker('worker.js', { type: 'module' });
  worker.onmessage = ({ data: { id, stage, part, result, error } }) => {
    if (stage) {
      if (id === calls) showStage(stage, part);
      return;
    }
    const call = waiting.get(id);
    waiting.delete(id);
    if (error) call?.reject(Object.assign(new Error(error.message), { name: error.name }));
    else call?.resolve(result);
  };
  worker.onerror = (event) => {
    for (const { reject } of waiting.values()) reject(new Error(event.message || 'the worker failed'));
    waiting.clear();
  };
}

/** @param {string} method @param {object} args @returns {Promise<any>} */
function call(method, args) {
  const id = ++calls;
  return new Promise((resolve, reject) => {
    waiting.set(id, { resolve, reject });
    worker.postMessage({ id, method, args });
  });
}

/** Ends what runs; the answer to it never comes. */
function cancel() {
  if (!waiting.size) return;
  worker.terminate();
  waiting.clear();
  startWorker();
  $('work').hidden = true;
}

// ------------------------------------------------------------------------------------- the way of a file

/** @param {'audio' | 'image'} kind */
function chosen(kind) {
  return /** @type {HTMLInputElement} */ (document.querySelector(`[name=${kind}]:checked`)).value;
}

/** @param {File} file */
async function take(file) {
  begin(`Reading ${file.name}`);
  const turn = ++turns;
  try {
    const bytes = new Uint8Array(await file.arrayBuffer());
    const { name, size } = file;
    if (bytes[0] === 0x89 && bytes[1] === 0x54) source = { kind: 'tok', name, bytes };
    else if (/\.tok$/i.test(name)) throw new Error('not a token file');
    else if (await isPicture(file)) source = { kind: 'image', name, size, blob: file };
    else source = { kind: 'audio', name, size, ...(await readSound(bytes)) };
    if (turn === turns) await work();
  } catch (error) {
    if (turn === turns) fail(error, file.name);
  }
}
let turns = 0;

/** @param {File} file */
async function isPicture(file) {
  if (/^(audio|video)\//.test(file.type)) return false;
  try {
    (await createImageBitmap(file)).close();
    return true;
  } catch {
    return false;
  }
}

/** Encodes and decodes the source, and shows the result. */
async function work() {
  const { kind } = source;
  cancel();
  begin('Starting');
  const of = source;
  const result = await (kind === 'tok'
    ? call('decodeFile', { file: of.bytes, models: models.map((entry) => entry.name) })
    : kind === 'image'
      ? call('encodeImage', { model: chosen('image'), blob: of.blob })
      : call('encodeSound', { model: chosen('audio'), channels: of.channels, rate: of.rate }));
  if (of !== source) return;
  $('work').hidden = true;
  show(of, result);
  keepModel(result.model);
}

/** Again, with another model, where that makes a difference. @param {'audio' | 'image'} kind */
function again(kind) {
  if (source?.kind === kind) work().catch((error) => fail(error, source.name));
}

/** @param {string} stage */
function begin(stage) {
  $('problem').hidden = true;
  $('work').hidden = false;
  $('work').scrollIntoView({ block: 'nearest' });
  showStage(stage, null);
}

/** @param {string} stage @param {number | null} part */
function showStage(stage, part) {
  $('stage').textContent = `${stage} …`;
  if (part === null) $('progress').removeAttribute('value');
  else $('progress').value = part;
}

/** @param {unknown} error @param {string} [file] its name */
function fail(error, file) {
  const { name, message } = /** @type {Error} */ (error);
  $('work').hidden = true;
  $('problem').hidden = false;
  let text = `${file ? `${file}: ` : ''}${message}.`;
  if (name === 'NotAllowedError') text = 'The microphone is not allowed here.';
  if (name === 'NotFoundError') text = 'There is no microphone.';
  if (/^block \d/.test(message)) text += ' vpcodec decode --recover saves the rest.';
  $('problem').textContent = text;
}

// ------------------------------------------------------------------------------------- results

/** @param {any} of @param {any} result */
function show(of, result) {
  const { file, header, model, seconds } = result;
  const sound = header.kind === 'audio';
  player.pause();
  addresses.forEach(URL.revokeObjectURL);
  addresses = [];
  $('result').hidden = false;
  $('sound').hidden = !sound;
  $('image').hidden = sound;
  $('result-title').textContent = of.name;
  const stem = of.name.replace(/\.[^.]*$/, '') || 'vpcodec';
  offer($('download-tok'), new Blob([/** @type {any} */ (file)]), `${stem}.tok`);
  $('download-tok').hidden = of.kind === 'tok';
  if (sound) showSound(of, result, stem);
  else showImage(of, result, stem);

  const units = sound ? header.nSamples / header.originalRate : header.nSamples;
  const rate = (/** @type {number} */ bytes) => {
    if (!units) return '';
    const bits = (8 * bytes) / units;
    return sound ? perSecond(bits) : `${bits.toPrecision(3)} bits per pixel`;
  };
  const extent = sound ? duration(units) : `${header.width} × ${header.height}`;
  const figures = [['Tokens', size(file.length), rate(file.length)]];
  if (of.size) figures.unshift(['Original', size(of.size), rate(of.size)]);
  figures.push([sound ? 'Length' : 'Size', extent, sound ? places(header) : parts(header)]);
  figures.push(['Model', model, `${(header.nFrames * header.channels).toLocaleString('en')} tokens`]);
  $('figures').replaceChildren(
    ...figures.map(([term, value, more]) => {
      const group = document.createElement('div');
      const dt = document.createElement('dt');
      const dd = document.createElement('dd');
      const small = document.createElement('small');
      dt.textContent = term;
      dd.textContent = value;
      small.textContent = more;
      dd.append(small);
      group.append(dt, dd);
      return group;
    }),
  );
  const times = of.size / file.length;
  $('summary').replaceChildren();
  if (of.size && times >= 1) {
    const strong = document.createElement('strong');
    strong.textContent = `${times >= 10 ? Math.round(times) : times.toFixed(1)} times smaller`;
    $('summary').append(strong, ` than the original: ${size(file.length)} in place of ${size(of.size)}.`);
  } else if (of.kind === 'tok') {
    $('summary').append(`Decoded from ${size(file.length)}.`);
  }
  const speed = Object.entries(seconds).map(([part, value]) => {
    const ratio = sound ? `, ${(units / value).toPrecision(2)} times real time` : '';
    return `${part === 'encode' ? 'Encoded' : 'decoded'} in ${value.toFixed(2)} s${ratio}`;
  });
  const sentence = `${speed.join('; ')}.`;
  $('speed').textContent = units ? sentence[0].toUpperCase() + sentence.slice(1) : '';
  $('result').dataset.seconds = JSON.stringify(seconds);
  $('result-title').focus({ preventScroll: true });
  $('result').scrollIntoView({ block: 'nearest', behavior: calm() ? 'auto' : 'smooth' });
}

/** @param {any} of @param {any} result @param {string} stem */
function showSound(of, { decoded, rate, pictures }, stem) {
  const versions = { ...(of.channels && { original: of.channels }), decoded };
  if (rate >= 8_000 && rate <= 96_000) player.load(versions, rate);
  else player.load(atUsualRate(versions, rate), USUAL_RATE); // browsers play no others
  spectrograms = pictures;
  $('original-figure').hidden = !pictures.original;
  $('versions').hidden = !pictures.original;
  paint();
  $('seek').max = player.duration;
  const wav = new Blob([/** @type {any} */ (writeWav(decoded, rate))], { type: 'audio/wav' });
  offer($('download-decoded'), wav, `${stem}.decoded.wav`);
  $('download-decoded').textContent = 'Download the decoded WAV';
}

/** @param {Record<string, Float32Array[]>} versions @param {number} rate */
function atUsualRate(versions, rate) {
  const other = (/** @type {Float32Array[]} */ channels) =>
    channels.map((row) => resample(row, rate, USUAL_RATE));
  return Object.fromEntries(Object.entries(versions).map(([name, rows]) => [name, other(rows)]));
}

/** @param {any} of @param {any} result @param {string} stem */
function showImage(of, { original, picture }, stem) {
  const draw = (/** @type {HTMLCanvasElement} */ canvas, /** @type {any} */ image) => {
    canvas.width = image.width;
    canvas.height = image.height;
    canvas.getContext('2d')?.putImageData(new ImageData(image.data, image.width, image.height), 0, 0);
  };
  draw($('decoded-image'), picture);
  if (original) draw($('original-image'), original);
  $('compare').classList.toggle('alone', !original);
  const { width, height } = picture;
  $('compare').style.maxWidth = `min(${3 * width}px, ${(75 * width) / height}vh)`;
  $('download-decoded').textContent = 'Download the decoded PNG';
  $('decoded-image').toBlob((/** @type {Blob} */ blob) => {
    offer($('download-decoded'), blob, `${stem}.decoded.png`);
  });
}

/** @param {HTMLAnchorElement} link @param {Blob} blob @param {string} name */
function offer(link, blob, name) {
  link.href = URL.createObjectURL(blob);
  link.download = name;
  addresses.push(link.href);
}

/** @param {number} bytes */
function size(bytes) {
  if (bytes < 1000) return `${bytes} B`;
  return bytes < 1e6 ? `${(bytes / 1000).toPrecision(3)} kB` : `${(bytes / 1e6).toPrecision(3)} MB`;
}

/** @param {number} bits */
function perSecond(bits) {
  return bits < 1000 ? `${Math.round(bits)} bit/s` : `${Math.round(bits).toLocaleString('en')} bit/s`;
}

/** @param {number} seconds */
function duration(seconds) {
  return seconds < 60 ? `${seconds.toFixed(1)} s` : `${clock(Math.round(seconds))} min`;
}

/** @param {number} seconds a whole number */
function clock(seconds) {
  return `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, '0')}`;
}

/** @param {any} header */
function places({ originalRate, channels }) {
  const named = ['mono', 'stereo'][channels - 1] ?? `${channels} channels`;
  return `${originalRate / 1000} kHz, ${named}`;
}

/** @param {any} header */
function parts({ components }) {
  return `pixels, ${['grey', 'grey and alpha', 'RGB', 'RGB and alpha'][components - 1]}`;
}

function calm() {
  return matchMedia('(prefers-reduced-motion: reduce)').matches;
}

// ------------------------------------------------------------------------------------- sound

const player = new Player(followed);
let frame = 0;

function followed() {
  const { playing, position, duration, version } = player;
  $('play').classList.toggle('playing', playing);
  $('play').setAttribute('aria-label', playing ? 'Pause' : 'Play');
  $('time').textContent = `${clock(Math.floor(position))} / ${clock(Math.floor(duration))}`;
  $('head').style.left = `${duration ? (100 * position) / duration : 0}%`;
  $('seek').value = position;
  $('seek').setAttribute('aria-valuetext', `${position.toFixed(1)} of ${duration.toFixed(1)} seconds`);
  for (const name of ['original', 'decoded']) {
    $(`${name}-figure`).classList.toggle('heard', name === version);
    const radio = document.querySelector(`[name=version][value=${name}]`);
    /** @type {HTMLInputElement} */ (radio).checked = name === version;
  }
  cancelAnimationFrame(frame);
  if (playing) frame = requestAnimationFrame(followed);
}

/** Colours from silence to loud, as RGB. */
function palette() {
  const dark = matchMedia('(prefers-color-scheme: dark)').matches;
  return dark
    ? [[26, 25, 22], [32, 58, 54], [84, 156, 145], [166, 221, 208], [250, 246, 234]]
    : [[246, 242, 234], [203, 224, 216], [104, 165, 153], [31, 106, 99], [14, 42, 41]];
}

function paint() {
  const colours = palette();
  for (const [name, grey] of Object.entries(spectrograms)) {
    const { columns, rows, data } = /** @type {Grey} */ (grey);
    const image = new ImageData(columns, rows);
    for (let x = 0; x < columns; x++) {
      for (let y = 0; y < rows; y++) {
        const value = (data[x * rows + y] / 255) * (colours.length - 1);
        const low = Math.min(Math.floor(value), colours.length - 2);
        const at = 4 * ((rows - 1 - y) * columns + x);
        for (let c = 0; c < 3; c++) {
          image.data[at + c] = colours[low][c] + (value - low) * (colours[low + 1][c] - colours[low][c]);
        }
        image.data[at + 3] = 255;
      }
    }
    const canvas = $(`${name}-spectrogram`);
    canvas.width = columns;
    canvas.height = rows;
    canvas.getContext('2d').putImageData(image, 0, 0);
  }
}

async function record() {
  if (recording) {
    const ended = recording;
    recording = null;
    recordText(null);
    const sound = await ended.stop();
    const bytes = 44 + 2 * sound.channels[0].length;
    source = { kind: 'audio', name: 'Recording', size: bytes, ...sound };
    turns++;
    await work();
    return;
  }
  player.pause();
  recording = await Recording.start((seconds) => recording && recordText(seconds));
  recordText(0);
}

/** @param {number | null} seconds */
function recordText(seconds) {
  $('record').setAttribute('aria-pressed', String(seconds !== null));
  $('record-text').textContent = seconds === null ? 'Record' : `Stop, ${clock(Math.floor(seconds))}`;
}

// ------------------------------------------------------------------------------------- offline

/** Lets the service worker keep a model for when there is no network. @param {string} name */
async function keepModel(name) {
  const registration = await navigator.serviceWorker?.getRegistration();
  const folder = new URL(`models/${name}/`, location.href).href;
  const response = await fetch(`${folder}config.json`);
  const { files } = await response.json();
  const names = ['config.json', ...Object.keys(files)];
  registration?.active?.postMessage({ keep: names.map((file) => folder + file) });
}

async function prepare() {
  await navigator.serviceWorker?.register('sw.js');
  await navigator.serviceWorker?.ready;
  if (!waiting.size) await keepModel(chosen('audio'));
}

// ------------------------------------------------------------------------------------- the page

function listModels() {
  for (const [kind, title] of [['audio', 'Model for sound'], ['image', 'Model for pictures']]) {
    const fieldset = document.createElement('fieldset');
    const legend = document.createElement('legend');
    const chips = document.createElement('div');
    legend.textContent = title;
    chips.className = 'chips';
    models.filter((entry) => entry.kind === kind).forEach((entry, i) => {
      const label = document.createElement('label');
      const input = document.createElement('input');
      const span = document.createElement('span');
      const small = document.createElement('small');
      Object.assign(input, { type: 'radio', name: kind, value: entry.name, checked: i === 0 });
      input.addEventListener('change', () => again(/** @type {any} */ (kind)));
      span.textContent = entry.label;
      small.textContent = entry.note;
      span.append(small);
      label.append(input, span);
      chips.append(label);
    });
    fieldset.append(legend, chips);
    $('models').append(fieldset);
  }
}

function listen() {
  $('choose').addEventListener('click', () => $('file').click());
  $('file').addEventListener('change', () => {
    const [file] = $('file').files;
    $('file').value = '';
    if (file) take(file);
  });
  $('record').addEventListener('click', () => record().catch((error) => fail(error)));
  $('cancel').addEventListener('click', () => {
    turns++;
    cancel();
    $('work').hidden = true;
    $('choose').focus();
  });

  let depth = 0;
  const over = (/** @type {number} */ change) => {
    depth = Math.max(0, depth + change);
    $('drop').classList.toggle('over', depth > 0);
  };
  addEventListener('dragenter', () => over(1));
  addEventListener('dragleave', () => over(-1));
  addEventListener('dragover', (event) => event.preventDefault());
  addEventListener('drop', (event) => {
    event.preventDefault();
    over(-Infinity);
    const file = event.dataTransfer?.files[0];
    if (file) take(file);
  });
  addEventListener('paste', (event) => {
    const file = event.clipboardData?.files[0];
    if (file) take(file);
  });

  $('play').addEventListener('click', () => (player.playing ? player.pause() : player.play()));
  $('seek').addEventListener('input', () => player.seek(Number($('seek').value)));
  $('versions').addEventListener('change', (/** @type {any} */ event) => player.choose(event.target.value));
  $('divide').addEventListener('input', () => {
    $('compare').style.setProperty('--at', `${$('divide').value}%`);
  });
  addEventListener('keydown', (event) => {
    const target = /** @type {HTMLElement} */ (event.target);
    if ($('sound').hidden || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === ' ' && !target.closest('button, a, input, summary')) {
      event.preventDefault();
      $('play').click();
    } else if (event.key === 'x' || event.key === 'X') {
      player.choose(player.version === 'original' ? 'decoded' : 'original');
    }
  });
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', paint);
}

models = await (await fetch('models.json')).json();
listModels();
startWorker();
listen();
document.documentElement.dataset.ready = 'true';
prepare().catch(() => {}); // without it, the page works all the same
