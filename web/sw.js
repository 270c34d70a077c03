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

/** Keeps what is not kept yet. @param {string[]} addresses */
async function keep(addresses) {
  const cache = await caches.open(CACHE);
  const kept = await Promise.all(addresses.map((address) => cache.match(address)));
  await cache.addAll(addresses.filter((_, i) => !kept[i]));
}

/** From the network, and kept anew; or else what was kept. @param {any} event */
async function answer(event) {
  const { request } = event;
  const cache = await caches.open(CACHE);
  let response;
  try {
    response = await fetch(request);
  } catch (error) {
    const kept = await cache.match(request, { ignoreSearch: true });
    if (kept) return kept;
    throw error;
  }
  if (response.status === 200) event.waitUntil(cache.put(request, response.clone()));
  return response;
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
    event.respondWith(answer(event));
  }
});
