/** Keeps what the page has loaded, for when there is no network. */

const CACHE = 'vpcodec-1';
const SHELL = [
  './', 'style.css', 'icon.svg', 'site.webmanifest', 'models.json',
  'app.js', 'worker.js', 'recorder.js', 'codec.js', 'entropy.js', 'model.js', 'player.js',
  'resample.js', 'sha256.js', 'sound.js', 'spectrogram.js', 'tokenfile.js', 'wav.js',
  'vendor/ort.wasm.min.mjs', 'vendor/ort-wasm-simd-threaded.mjs',
  'vendor/ort-wasm-simd-threaded.wasm',
];

/** @type {any} */
const worker = self;

/** @param {string[]} addresses */
async function keep(addresses) {
  const cache = await caches.open(CACHE);
  await cache.addAll(addresses);
}

/** From the network, or else what was kept. @param {Request} request */
async function answer(request) {
  const cache = await caches.open(CACHE);
  try {
    const response = await fetch(request);
    if (response.ok) await cache.put(request, response.clone());
    return response;
  } catch (error) {
    const kept = await cache.match(request, { ignoreSearch: true });
    if (kept) return kept;
    throw error;
  }
}

worker.addEventListener('install', (/** @type {any} */ event) => {
  worker.skipWaiting();
  event.waitUntil(keep(SHELL));
});

worker.addEventListener('activate', (/** @type {any} */ event) => {
  event.waitUntil(worker.clients.claim());
});

worker.addEventListener('message', (/** @type {any} */ event) => {
  event.waitUntil(keep(event.data.keep));
});

worker.addEventListener('fetch', (/** @type {any} */ event) => {
  const { method, url } = event.request;
  if (method === 'GET' && new URL(url).origin === location.origin) {
    event.respondWith(answer(event.request));
  }
});
