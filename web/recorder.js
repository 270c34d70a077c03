/** Hands the samples of the microphone, mixed to one channel, to the page. */
class Recorder extends AudioWorkletProcessor {
  /** @param {Float32Array[][]} inputs */
  process([input]) {
    if (input.length) {
      const mono = input[0].slice();
      for (const other of input.slice(1)) other.forEach((value, i) => (mono[i] += value));
      this.port.postMessage(mono.map((value) => value / input.length));
    }
    return true;
  }
}
registerProcessor('recorder', Recorder);
