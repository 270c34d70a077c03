/**
 * Plays two versions of one sound, and switches between them at the same position.
 *
 * @module
 */

const FADE = 0.012; // seconds

/** @typedef {'original' | 'decoded'} Version */

export class Player {
  /** @param {() => void} changed is called when it begins, ends or moves */
  constructor(changed) {
    this.changed = changed;
    /** @type {AudioContext | null} */
    this.context = null;
    /** @type {Map<Version, AudioBuffer>} */
    this.buffers = new Map();
    /** @type {Map<Version, {source: AudioBufferSourceNode, gain: GainNode}>} */
    this.nodes = new Map();
    /** @type {Version} */
    this.version = 'decoded';
    this.offset = 0; // where playing began, seconds
    this.began = 0; // when, by the context's clock
    this.duration = 0;
  }

  get playing() {
    return this.nodes.size > 0;
  }

  /** Seconds. */
  get position() {
    const played = this.playing ? /** @type {any} */ (this.context).currentTime - this.began : 0;
    return Math.min(Math.max(0, this.offset + played), this.duration);
  }

  /**
   * Takes other sounds.
   *
   * @param {Partial<Record<Version, Float32Array[]>>} versions
   * @param {number} rate Hz
   */
  load(versions, rate) {
    this.pause();
    this.offset = 0;
    this.buffers.clear();
    for (const version of /** @type {Version[]} */ (['original', 'decoded'])) {
      const channels = versions[version];
      if (!channels) continue;
      const length = Math.max(1, channels[0].length);
      const buffer = new AudioBuffer({ numberOfChannels: channels.length, length, sampleRate: rate });
      channels.forEach((row, c) => buffer.copyToChannel(/** @type {any} */ (row), c));
      this.buffers.set(version, buffer);
      this.duration = channels[0].length / rate;
    }
    if (!this.buffers.has(this.version)) this.version = 'decoded';
    this.changed();
  }

  async play() {
    if (this.playing || !this.buffers.size) return;
    const context = (this.context ??= new AudioContext());
    await context.resume();
    if (this.offset >= this.duration - 0.02) this.offset = 0;
    for (const [version, buffer] of this.buffers) {
      const source = new AudioBufferSourceNode(context, { buffer });
      const gain = new GainNode(context, { gain: version === this.version ? 1 : 0 });
      source.connect(gain).connect(context.destination);
      source.start(0, this.offset);
      source.onended = () => {
        if (this.nodes.get(version)?.source === source) this.pause();
      };
      this.nodes.set(version, { source, gain });
    }
    this.began = context.currentTime;
    this.changed();
  }

  pause() {
    this.offset = this.position;
    for (const { source } of this.nodes.values()) source.stop();
    this.nodes.clear();
    this.changed();
  }

  /** @param {number} seconds */
  async seek(seconds) {
    const goesOn = this.playing;
    if (goesOn) this.pause();
    this.offset = seconds;
    if (goesOn) await this.play();
    this.changed();
  }

  /** @param {Version} version */
  choose(version) {
    if (!this.buffers.has(version)) return;
    this.version = version;
    for (const [name, { gain }] of this.nodes) {
      const now = /** @type {AudioContext} */ (this.context).currentTime;
      gain.gain.setTargetAtTime(name === version ? 1 : 0, now, FADE / 3);
    }
    this.changed();
  }
}
