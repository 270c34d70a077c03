/**
 * Packets of fixed size for live links, as docs/packets.md describes them.
 *
 * @module
 */

const VERSION = 0;
const HEADER_BYTES = 4;
const CHECKSUM_BYTES = 2;

/** Bytes that are not a packet of this format, or were changed on the way. */
export class PacketError extends Error {
  name = 'PacketError';
}

/** The layout that both ends of a link agree on. */
export class PacketFormat {
  /**
   * @param {object} fields
   * @param {Uint8Array} fields.space 16 bytes: the token space of the model
   * @param {number} fields.codebookSize of the model
   * @param {number} [fields.channels] of the audio
   * @param {number} [fields.frames] tokens per channel and packet
   * @param {number} [fields.redundancy] packets before that each packet repeats, 0 to 15
   */
  constructor({ space, codebookSize, channels = 1, frames = 3, redundancy = 0 }) {
    const bounds = /** @type {[string, number, number, number][]} */ ([
      ['channels', channels, 1, 255],
      ['frames', frames, 1, 255],
      ['redundancy', redundancy, 0, 15],
      ['codebookSize', codebookSize, 2, 2 ** 32],
    ]);
    for (const [name, value, low, high] of bounds) {
      if (!Number.isInteger(value) || value < low || value > high) {
        throw new RangeError(`${name} must be ${low} to ${high}, not ${value}`);
      }
    }
    this.space = space;
    this.codebookSize = codebookSize;
    this.channels = channels;
    this.frames = frames;
    this.redundancy = redundancy;
    this.tokenBits = 32 - Math.clz32(codebookSize - 1);
    const bits = (1 + redundancy) * channels * frames * this.tokenBits;
    /** Size of every packet. */
    this.nBytes = HEADER_BYTES + Math.ceil(bits / 8) + CHECKSUM_BYTES;
  }

  /**
   * A packet.
   *
   * @param {number} sequence number of the packet; taken modulo 65,536
   * @param {number[][][]} groups 1 + redundancy times tokens (channels, frames): of this packet,
   *   then of the ones before it, newest first
   * @returns {Uint8Array}
   */
  pack(sequence, groups) {
    if (groups.length !== 1 + this.redundancy) {
      throw new RangeError(`a packet holds ${1 + this.redundancy} groups, got ${groups.length}`);
    }
    const packet = new Uint8Array(this.nBytes);
    packet[0] = (VERSION << 4) | this.redundancy;
    packet[1] = this.space[0];
    packet[2] = sequence >> 8;
    packet[3] = sequence;
    let bit = 8 * HEADER_BYTES;
    for (const group of groups) {
      if (group.length !== this.channels || group.some((row) => row.length !== this.frames)) {
        throw new RangeError(`a packet holds ${this.channels} x ${this.frames} tokens`);
      }
      for (let frame = 0; frame < this.frames; frame++) {
        for (const row of group) {
          const token = row[frame];
          if (!Number.isInteger(token) || token < 0 || token >= this.codebookSize) {
            throw new RangeError(`token ${token} is outside [0, ${this.codebookSize})`);
          }
          for (let i = this.tokenBits - 1; i >= 0; i--, bit++) {
            packet[bit >> 3] |= ((token >>> i) & 1) << (7 - (bit & 7));
          }
        }
      }
    }
    const end = packet.length - CHECKSUM_BYTES;
    const checksum = crc16(packet.subarray(0, end), crc16(this.space));
    packet[end] = checksum >> 8;
    packet[end + 1] = checksum;
    return packet;
  }

  /**
   * A packet that was received.
   *
   * @param {Uint8Array} data
   * @returns {{sequence: number, groups: number[][][]}} groups as for `pack`
   * @throws {PacketError} of another size, version, redundancy or model; changed on the way; or a
   *   token out of range
   */
  unpack(data) {
    if (data.length !== this.nBytes) {
      throw new PacketError(`a packet has ${this.nBytes} bytes, got ${data.length}`);
    }
    const end = data.length - CHECKSUM_BYTES;
    const checksum = crc16(data.subarray(0, end), crc16(this.space));
    if (checksum !== ((data[end] << 8) | data[end + 1])) {
      const other = data[1] === this.space[0] ? '' : ', or made by another model';
      throw new PacketError(`wrong checksum${other}`);
    }
    if (data[0] !== ((VERSION << 4) | this.redundancy)) {
      throw new PacketError(
        `version ${data[0] >> 4} with redundancy ${data[0] & 15}, expected ${VERSION} with ` +
          `${this.redundancy}`,
      );
    }
    if (data[1] !== this.space[0]) {
      throw new PacketError('its first byte of the token space is wrong');
    }
    let bit = 8 * HEADER_BYTES;
    const next = () => (data[bit >> 3] >> (7 - (bit++ & 7))) & 1;
    let highest = 0;
    const groups = Array.from({ length: 1 + this.redundancy }, () => {
      /** @type {number[][]} */
      const group = Array.from({ length: this.channels }, () => []);
      for (let frame = 0; frame < this.frames; frame++) {
        for (const row of group) {
          let token = 0;
          for (let i = 0; i < this.tokenBits; i++) token = token * 2 + next();
          highest = Math.max(highest, token);
          row.push(token);
        }
      }
      return group;
    });
    while (bit < 8 * end) if (next()) throw new PacketError('its padding is not zero');
    if (highest >= this.codebookSize) {
      throw new PacketError(`token ${highest} is outside [0, ${this.codebookSize})`);
    }
    return { sequence: (data[2] << 8) | data[3], groups };
  }
}

/**
 * CRC-16 of CCITT, polynomial 0x1021.
 *
 * @param {Uint8Array} bytes
 * @param {number} [before] of the bytes before them
 */
function crc16(bytes, before = 0xffff) {
  let crc = before;
  for (const byte of bytes) {
    crc ^= byte << 8;
    for (let k = 0; k < 8; k++) crc = crc & 0x8000 ? ((crc << 1) ^ 0x1021) & 0xffff : crc << 1;
  }
  return crc;
}
