/**
 * The library of the page: token files, entropy coding, models, packets and codecs.
 *
 * @module
 */

export { AudioCodec, ImageCodec, MAX_PIXELS, openCodec } from './codec.js';
export { CoderSet, EntropyError, TokenCoder } from './entropy.js';
export { ModelError, loadModel, readFrom } from './model.js';
export { PacketError, PacketFormat } from './packets.js';
export { resample } from './resample.js';
export {
  NoCoderError,
  TokenFileError,
  makeHeader,
  readHeader,
  readTokens,
  resampledLength,
  verify,
  writeTokens,
} from './tokenfile.js';
