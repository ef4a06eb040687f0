// A client of the Tensorwire protocol, version 1, in one file and without dependencies (Node 20 or later).
// It was written from SPEC.md and the vectors alone, by somebody who had seen no other code of this project, and is
// kept that way: what it cannot know from there is a fault of SPEC.md. The sections below carry its names and numbers.
//
//   node client.mjs ADDRESS generate MODEL PROMPT [JSON params]
//   node client.mjs ADDRESS embed MODEL TEXT...
//   node client.mjs ADDRESS infer MODEL '{"x": {"dtype": "F32", "shape": [2], "data": [1, 2]}}'
//   node client.mjs --vectors DIR
//
// ADDRESS is HOST:PORT or the path of a Unix socket. A token is taken from TENSORWIRE_TOKEN.
//
// `Connection` is the protocol without a socket and without a clock: bytes and times go in, messages and bytes
// come out. It plays every role, because the test vectors test every role; for the answering ones it does
// what a connection has to do, not what a server has to do.

import { randomBytes } from "node:crypto";
import { once } from "node:events";
import { readFileSync } from "node:fs";
import net from "node:net";
import { join } from "node:path";
import { setTimeout as pause } from "node:timers/promises";
import { pathToFileURL } from "node:url";

const VERSION = 1;
const SOFTWARE = "client.mjs/1";
const MIB = 1 << 20;

// ---- 13. Errors -------------------------------------------------------------------------------------------

// name: [number, retryable, executed]
const ERRORS = {};
define(true, "maybe", {
  CONNECTION_LOST: 0x0100, SLOW_CONSUMER: 0x0108, PEER_SILENT: 0x010a, WORKER_LOST: 0x0401, OUT_OF_MEMORY: 0x0402,
});
define(false, "no", {
  BAD_PREFACE: 0x0101, FRAME_TOO_LARGE: 0x0102, UNKNOWN_KIND: 0x0103, FRAMING: 0x0104, VERSION: 0x0106,
  BAD_META: 0x0201, BAD_TENSOR: 0x0202, UNKNOWN_OP: 0x0203, UNKNOWN_MODEL: 0x0204, BAD_PARAMS: 0x0205,
  TOO_LARGE: 0x0206, UNSUPPORTED: 0x0207, KEY_REUSED: 0x0208, UNKNOWN_KEY: 0x0209, UNAUTHENTICATED: 0x0303,
  FORBIDDEN: 0x0304, HASH_MISMATCH: 0x0501, MISSING_CHUNKS: 0x0502, PATH_REFUSED: 0x0503, STORAGE_FULL: 0x0504,
});
define(true, "no", {
  FLOOD: 0x0105, HANDSHAKE_TIMEOUT: 0x0107, BUSY: 0x0301, DRAINING: 0x0302, QUOTA: 0x0305, MODEL_LOADING: 0x0306,
});
define(false, "maybe", {
  SEQUENCE: 0x0109, MODEL_ERROR: 0x0403, NUMERIC: 0x0404, POISONED: 0x0405, OUTPUT_TOO_LARGE: 0x0406,
  INTERNAL: 0x0407, DEADLINE: 0x0408, CANCELLED: 0x0409,
});

function define(retryable, executed, codes) {
  for (const [name, code] of Object.entries(codes)) ERRORS[name] = [code, retryable, executed];
}

const ERROR_NAMES = new Map(Object.entries(ERRORS).map(([name, [code]]) => [code, name]));

// An error of the protocol. On stream 0 it ends the connection, on another that stream alone.
export class WireError extends Error {
  constructor({ code, message, retryable, executed, stream, log_id = null }) {
    super(message);
    Object.assign(this, { code, retryable, executed, stream, log_id });
    this.name = ERROR_NAMES.get(code) ?? `error 0x${code.toString(16).padStart(4, "0")}`;
  }

  toMessage() {
    const { stream, code, message, retryable, executed, log_id } = this;
    const detail = new Map();
    return { kind: "ERR", stream, code, message, retryable, executed, retry_after_ms: null, log_id, detail };
  }
}

function wireError(name, message, stream = 0) {
  const [code, retryable, executed] = ERRORS[name];
  return new WireError({ code, message, retryable, executed, stream });
}

// ---- 12. Negotiation and limits ---------------------------------------------------------------------------

// name: [client link, worker link]
const LIMITS = {
  frame_bytes: [1_114_112, 1_114_112], message_bytes: [268_435_456, 8_589_934_592],
  client_meta_bytes: [16_384, 1_048_576], server_meta_bytes: [262_144, 1_048_576], preauth_bytes: [4_096, 65_536],
  preauth_frames: [4, 4], preauth_out_bytes: [1_024, 1_024], meta_depth: [16, 16], container_items: [4_096, 65_536],
  key_bytes: [64, 64], segments: [64, 64], inline_bytes: [1_024, 1_024], tensor_dims: [16, 16],
  streams: [512, 8_192], handshake_s: [5, 5], ping_after_s: [20, 20], dead_after_s: [60, 60],
  ping_interval_s: [1, 1], ping_burst: [8, 8], fault_burst: [200, 65_536], faults_per_s: [50, 65_536],
  frame_grace_s: [10, 60], frame_bytes_per_s: [65_536, 65_536], send_high_water_bytes: [262_144, 262_144],
  send_pause_bytes: [2_097_152, 2_097_152], send_stuck_s: [10, 10], send_hard_bytes: [4_194_304, 67_108_864],
};
// Those whose default has a fraction in the table of the SPEC: they may be floats, all others may not.
const FRACTIONAL = new Set([
  "handshake_s", "ping_after_s", "dead_after_s", "ping_interval_s", "faults_per_s", "frame_grace_s", "send_stuck_s",
]);

// Less than this may not be announced, so that a WELCOME and an ERR always fit.
const LEAST_BYTES = 4096;

const metaLimit = (fromOpener) => (fromOpener ? "client_meta_bytes" : "server_meta_bytes");

function defaultLimits(worker) {
  return Object.fromEntries(Object.entries(LIMITS).map(([name, values]) => [name, values[worker ? 1 : 0]]));
}

// What the peer announced: unknown names and unusable values leave the default in place.
function readLimits(announced, worker) {
  const limits = defaultLimits(worker);
  for (const [name, value] of announced) {
    const usable = isInteger(value) || (value instanceof Float && FRACTIONAL.has(name));
    const number = Number(value);
    if (usable && Object.hasOwn(LIMITS, name) && Number.isFinite(number) && number >= 0) limits[name] = number;
  }
  return limits;
}

function writeLimits(limits, names) {
  return new Map(names.map((name) => [name, FRACTIONAL.has(name) ? new Float(limits[name]) : limits[name]]));
}

// ---- 5. MessagePack ---------------------------------------------------------------------------------------
//
// nil is null, integers are numbers (bigints beyond 2^53), floats are Float, bin is a Buffer, maps are Map,
// tensors are Tensor. Float keeps 1.0 apart from 1: where an integer is asked for, a float is refused.

class Float {
  constructor(value) { this.value = value; }
  valueOf() { return this.value; }
}

// A meta that breaks a rule of sections 5 to 7. Who reads it decides whose error that is.
class MetaError extends Error {}
class TensorError extends MetaError {}

function isInteger(value) {
  return typeof value === "bigint" || Number.isInteger(value);
}

function shrink(big) {
  const number = Number(big);
  return Number.isSafeInteger(number) ? number : big;
}

const utf8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
const EXT_TIMESTAMP = -1;
const EXT_TENSOR = 1;

class Reader {
  constructor(bytes, limits) {
    this.bytes = bytes;
    this.limits = limits;
    this.at = 0;
    this.tensors = null; // reads tensors, while the reader is in a slot for them
  }

  // The one object that these bytes hold.
  whole() {
    const value = this.value(0);
    this.end();
    return value;
  }

  // The fields of a positional array; `read` is called for each, in order.
  positional(read) {
    const head = this.byte();
    const fix = head >> 4 === 0x9;
    if (!fix && head !== 0xdc && head !== 0xdd) throw new MetaError("the meta is no array");
    const fields = this.array(fix ? head & 0x0f : this.uint(head === 0xdc ? 2 : 4), 0, read);
    this.end();
    return fields;
  }

  end() {
    if (this.at !== this.bytes.length) throw new MetaError("bytes remain behind the meta's object");
  }

  // `depth` counts the containers around the value.
  value(depth) {
    const head = this.byte();
    if (head < 0x80) return head;
    if (head < 0x90) return this.map(head & 0x0f, depth);
    if (head < 0xa0) return this.array(head & 0x0f, depth);
    if (head < 0xc0) return this.text(head & 0x1f);
    if (head >= 0xe0) return head - 0x100;
    switch (head) {
      case 0xc0: return null;
      case 0xc2: return false;
      case 0xc3: return true;
      case 0xc4: case 0xc5: case 0xc6: return this.take(this.uint(1 << (head - 0xc4)));
      case 0xc7: case 0xc8: case 0xc9: return this.ext(this.uint(1 << (head - 0xc7)), depth);
      case 0xca: return new Float(this.take(4).readFloatBE());
      case 0xcb: return new Float(this.take(8).readDoubleBE());
      case 0xcc: case 0xcd: case 0xce: return this.uint(1 << (head - 0xcc));
      case 0xcf: return shrink(this.take(8).readBigUInt64BE());
      case 0xd0: case 0xd1: case 0xd2: return this.int(1 << (head - 0xd0));
      case 0xd3: return shrink(this.take(8).readBigInt64BE());
      case 0xd4: case 0xd5: case 0xd6: case 0xd7: case 0xd8: return this.ext(1 << (head - 0xd4), depth);
      case 0xd9: case 0xda: case 0xdb: return this.text(this.uint(1 << (head - 0xd9)));
      case 0xdc: case 0xdd: return this.array(this.uint(head === 0xdc ? 2 : 4), depth);
      case 0xde: case 0xdf: return this.map(this.uint(head === 0xde ? 2 : 4), depth);
      default: throw new MetaError("a byte that begins nothing in MessagePack");
    }
  }

  take(count) {
    if (count > this.bytes.length - this.at) throw new MetaError("the meta ends too early");
    this.at += count;
    return this.bytes.subarray(this.at - count, this.at);
  }

  byte() { return this.take(1)[0]; }
  uint(size) { return this.take(size).readUIntBE(0, size); }
  int(size) { return this.take(size).readIntBE(0, size); }

  text(length) {
    const bytes = this.take(length);
    try {
      return utf8.decode(bytes);
    } catch {
      throw new MetaError("a text is not UTF-8");
    }
  }

  // Checks a container before anything is allocated for it; `objects` have to fit into the bytes that are left.
  enter(items, objects, depth) {
    if (depth >= this.limits.meta_depth) throw new MetaError("too many containers inside one another");
    if (items > this.limits.container_items) throw new MetaError("a container has too many items");
    if (objects > this.bytes.length - this.at) throw new MetaError("a container promises more than there is");
  }

  array(count, depth, read = () => this.value(depth + 1)) {
    this.enter(count, count, depth);
    const items = [];
    for (let i = 0; i < count; i++) items.push(read(i));
    return items;
  }

  map(count, depth) {
    this.enter(count, 2 * count, depth);
    const map = new Map();
    for (let i = 0; i < count; i++) {
      const key = this.key();
      if (map.has(key)) throw new MetaError("a map has a key twice");
      map.set(key, this.value(depth + 1));
    }
    return map;
  }

  key() {
    const head = this.byte();
    const fix = head >> 5 === 0x5;
    if (!fix && (head < 0xd9 || head > 0xdb)) throw new MetaError("a key is no text");
    const length = fix ? head & 0x1f : this.uint(1 << (head - 0xd9));
    if (length > this.limits.key_bytes) throw new MetaError("a key is too long");
    return this.text(length);
  }

  ext(length, depth) {
    const type = this.take(1).readInt8();
    const payload = this.take(length);
    if (type === EXT_TIMESTAMP) throw new MetaError("a timestamp");
    if (type === EXT_TENSOR && depth === 1) throw new MetaError("a tensor in place of a field");
    if (type !== EXT_TENSOR || !this.tensors) throw new TensorError("a tensor or ext type where none may be");
    return this.tensors.read(payload);
  }
}

// Writes everything in its shortest form. Tensors above `inlineBytes` go to `segments`.
class Writer {
  constructor(inlineBytes) {
    this.inlineBytes = inlineBytes;
    this.chunks = [];
    this.segments = [];
  }

  bytes() { return Buffer.concat(this.chunks); }

  value(value) {
    if (value === null || value === undefined) this.push(0xc0);
    else if (typeof value === "boolean") this.push(value ? 0xc3 : 0xc2);
    else if (isInteger(value)) this.integer(value);
    else if (typeof value === "number" || value instanceof Float) this.float(Number(value));
    else if (typeof value === "string") this.text(value);
    else if (value instanceof Uint8Array) this.binary(value);
    else if (Array.isArray(value)) this.array(value);
    else if (value instanceof Map) this.map(value);
    else if (value instanceof Tensor) this.tensor(value);
    else throw new TypeError(`${typeof value} cannot be written as MessagePack`);
  }

  push(...bytes) { this.chunks.push(Buffer.from(bytes)); }

  // A byte of format, and a number behind it.
  number(head, value, size) {
    const chunk = Buffer.alloc(1 + size);
    chunk[0] = head;
    if (size === 8) chunk.writeBigUInt64BE(BigInt.asUintN(64, BigInt(value)), 1);
    else if (value < 0) chunk.writeIntBE(Number(value), 1, size);
    else chunk.writeUIntBE(Number(value), 1, size);
    this.chunks.push(chunk);
  }

  integer(value) {
    if (value < -(2n ** 63n) || value >= 2n ** 64n) throw new RangeError(`${value} does not fit into 64 bits`);
    if (value >= -0x20 && value < 0x80) return this.push(Number(value) & 0xff);
    const fits = (bits) => (value < 0 ? value >= -(2 ** (bits - 1)) : value < 2 ** bits);
    const form = 3 - [32, 16, 8].filter(fits).length; // 1, 2, 4 or 8 bytes
    this.number((value < 0 ? 0xd0 : 0xcc) + form, value, 1 << form);
  }

  float(value) {
    const chunk = Buffer.alloc(9, 0xcb);
    chunk.writeDoubleBE(value, 1);
    this.chunks.push(chunk);
  }

  // `heads` are the formats for lengths of 8, 16 and 32 bits; a null has none.
  length(length, [head8, head16, head32]) {
    if (head8 && length < 0x100) this.number(head8, length, 1);
    else if (length < 0x10000) this.number(head16, length, 2);
    else this.number(head32, length, 4);
  }

  text(value) {
    const bytes = Buffer.from(value, "utf8");
    if (bytes.length < 32) this.push(0xa0 | bytes.length);
    else this.length(bytes.length, [0xd9, 0xda, 0xdb]);
    this.chunks.push(bytes);
  }

  binary(value) {
    this.length(value.length, [0xc4, 0xc5, 0xc6]);
    this.chunks.push(value);
  }

  array(items) {
    if (items.length < 16) this.push(0x90 | items.length);
    else this.length(items.length, [null, 0xdc, 0xdd]);
    for (const item of items) this.value(item);
  }

  map(map) {
    if (map.size < 16) this.push(0x80 | map.size);
    else this.length(map.size, [null, 0xde, 0xdf]);
    for (const [key, value] of map) {
      this.text(key);
      this.value(value);
    }
  }

  tensor({ dtype, shape, bytes }) {
    const inline = bytes.length <= this.inlineBytes;
    const descriptor = new Writer(0);
    descriptor.array([dtype, shape, inline ? bytes : this.segments.length]);
    if (!inline) this.segments.push(bytes);
    const payload = descriptor.bytes();
    const fix = [1, 2, 4, 8, 16].indexOf(payload.length);
    if (fix >= 0) this.push(0xd4 + fix);
    else this.length(payload.length, [0xc7, 0xc8, 0xc9]);
    this.push(EXT_TENSOR);
    this.chunks.push(payload);
  }
}

// ---- 6. Tensors -------------------------------------------------------------------------------------------

// Floats of 8 and 16 bits: bits of exponent and mantissa; `finite` ones have no infinities and one NaN.
const F16 = { exponent: 5, mantissa: 10 };
const BF16 = { exponent: 8, mantissa: 7 };
const F8_E4M3 = { exponent: 4, mantissa: 3, finite: true };
const F8_E5M2 = { exponent: 5, mantissa: 2 };

// How an element is read from a DataView and written to it, by the names of DataView's methods.
const native = (size, type) => ({
  size, read: (view, at) => view[`get${type}`](at, true), write: (view, at, x) => view[`set${type}`](at, x, true),
});
const big = (type) => {
  const { size, read, write } = native(8, type);
  return { size, read: (view, at) => shrink(read(view, at)), write: (view, at, x) => write(view, at, BigInt(x)) };
};
const small = (size, format) => {
  const { read, write } = native(size, size === 2 ? "Uint16" : "Uint8");
  const pack = (view, at, x) => write(view, at, packFloat(Number(x), format));
  return { size, read: (view, at) => unpackFloat(read(view, at), format), write: pack };
};

const DTYPES = {
  F64: native(8, "Float64"), F32: native(4, "Float32"), F16: small(2, F16), BF16: small(2, BF16),
  F8_E4M3: small(1, F8_E4M3), F8_E5M2: small(1, F8_E5M2),
  I64: big("BigInt64"), I32: native(4, "Int32"), I16: native(2, "Int16"), I8: native(1, "Int8"),
  U64: big("BigUint64"), U32: native(4, "Uint32"), U16: native(2, "Uint16"), U8: native(1, "Uint8"),
  BOOL: native(1, "Uint8"),
};

function unpackFloat(bits, { exponent, mantissa, finite }) {
  const bias = 2 ** (exponent - 1) - 1;
  const sign = bits >> (exponent + mantissa) ? -1 : 1;
  const high = (bits >> mantissa) & (2 ** exponent - 1);
  const low = bits & (2 ** mantissa - 1);
  const top = high === 2 ** exponent - 1;
  if (top && finite && low === 2 ** mantissa - 1) return NaN;
  if (top && !finite) return low ? NaN : sign * Infinity;
  return high ? sign * 2 ** (high - bias) * (1 + low / 2 ** mantissa) : sign * 2 ** (1 - bias) * (low / 2 ** mantissa);
}

// Rounds to the nearest, ties to even. What is too large becomes infinity, or NaN where there is none.
function packFloat(value, { exponent, mantissa, finite }) {
  const bias = 2 ** (exponent - 1) - 1;
  const sign = value < 0 || Object.is(value, -0) ? 2 ** (exponent + mantissa) : 0;
  const infinity = finite ? 2 ** (exponent + mantissa) - 1 : (2 ** exponent - 1) * 2 ** mantissa;
  if (Number.isNaN(value)) return finite ? infinity : infinity + 2 ** (mantissa - 1);
  const size = Math.abs(value);
  if (size === Infinity) return sign + infinity;
  const power = Math.max(exponentOf(size), 1 - bias);
  const steps = size / 2 ** (power - mantissa);
  const floor = Math.floor(steps);
  const up = steps - floor > 0.5 || (steps - floor === 0.5 && floor % 2 === 1);
  // A mantissa that rounds up to the next power of two carries into the exponent by itself.
  return sign + Math.min((power + bias - 1) * 2 ** mantissa + floor + (up ? 1 : 0), infinity);
}

function exponentOf(value) {
  const bits = Buffer.alloc(8);
  bits.writeDoubleBE(value);
  return ((bits.readUInt16BE() >> 4) & 0x7ff) - 1023;
}

class Tensor {
  // `bytes` as on the wire; null while they are still to come (feature `body`)
  constructor(dtype, shape, bytes) {
    Object.assign(this, { dtype, shape, bytes });
  }

  static of(dtype, shape, data) {
    if (!Object.hasOwn(DTYPES, dtype)) throw new TypeError(`${JSON.stringify(dtype)} is no dtype`);
    const { size, write } = DTYPES[dtype];
    if (shape.reduce((product, n) => product * n, 1) !== data.length) {
      throw new TypeError(`a tensor of shape [${shape}] cannot have ${data.length} elements`);
    }
    const bytes = Buffer.alloc(size * data.length);
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
    data.forEach((x, i) => write(view, i * size, x));
    return new Tensor(dtype, shape, bytes);
  }

  data() {
    const { size, read } = DTYPES[this.dtype];
    const view = new DataView(this.bytes.buffer, this.bytes.byteOffset, this.bytes.length);
    return Array.from({ length: this.bytes.length / size }, (_, i) => read(view, i * size));
  }
}

// The segments of one frame, and which tensors are in them.
class SegmentTable {
  constructor(lengths, limits) {
    Object.assign(this, { lengths, limits });
    this.tensors = new Map();
  }

  // A tensor from the payload of its ext. Everything is checked here, before its bytes are there.
  read(payload) {
    const [dtype, shape, ref] = this.descriptor(payload);
    const size = this.byteCount(dtype, shape);
    if (ref instanceof Uint8Array) {
      if (ref.length > this.limits.inline_bytes) throw new TensorError("a tensor inside the meta is too large");
      if (ref.length !== size) throw new TensorError("a tensor's bytes are not what its shape needs");
      return new Tensor(dtype, shape, ref);
    }
    if (!isInteger(ref) || !(ref in this.lengths)) throw new TensorError("a tensor names no segment of its frame");
    if (this.tensors.has(ref)) throw new TensorError("two tensors name one segment");
    if (this.lengths[ref] !== size) throw new TensorError("a segment's bytes are not what its tensor's shape needs");
    const tensor = new Tensor(dtype, shape, null);
    this.tensors.set(ref, tensor);
    return tensor;
  }

  fill(index, bytes) {
    const tensor = this.tensors.get(index);
    if (tensor) tensor.bytes = bytes; // a segment that no tensor names is ignored
  }

  descriptor(payload) {
    let fields;
    try {
      fields = new Reader(payload, this.limits).whole();
    } catch (error) {
      throw error instanceof MetaError ? new TensorError(error.message) : error;
    }
    if (!Array.isArray(fields) || fields.length !== 3) throw new TensorError("a tensor is no array of three");
    return fields;
  }

  byteCount(dtype, shape) {
    if (typeof dtype !== "string" || !Object.hasOwn(DTYPES, dtype)) throw new TensorError("an unknown dtype");
    if (!Array.isArray(shape) || shape.length > this.limits.tensor_dims) throw new TensorError("a shape that is none");
    let count = 1n;
    let bound = BigInt(DTYPES[dtype].size); // holds for tensors without elements, too
    for (const n of shape) {
      if (!isInteger(n) || n < 0) throw new TensorError("a dimension that is no integer from 0 up");
      count *= BigInt(n);
      if (n) bound *= BigInt(n);
    }
    if (bound >= 2n ** 63n) throw new TensorError("a tensor's dimensions are too large");
    return Number(count) * DTYPES[dtype].size;
  }
}

// ---- 7. Metas ---------------------------------------------------------------------------------------------

// Types of fields: each checks what was read and returns what the message shows.

const want = (test, what) => (value) => {
  if (!test(value)) throw new MetaError(`${what} is asked for`);
  return value;
};
const between = (low, high) => (value) => typeof value === "number" && value >= low && value <= high;
const isBytes = (value) => value instanceof Uint8Array;
const isMap = (value) => value instanceof Map;
const isNumber = (value) => isInteger(value) || value instanceof Float;

const integer = (low, high) => want(between(low, high), `an integer from ${low} to ${high}`);
const u32 = integer(0, 0xffffffff);
const amount = integer(1, 0xffffffff);
const text = want((value) => typeof value === "string", "text");
const bool = want((value) => typeof value === "boolean", "true or false");
const bytes = want(isBytes, "bin");
const bin = (length) => want((value) => isBytes(value) && value.length === length, `bin of ${length} bytes`);
const texts = want((value) => Array.isArray(value) && value.every((x) => typeof x === "string"), "an array of text");
const listOf = (low, high) => {
  const fits = between(low, high);
  return want((value) => Array.isArray(value) && value.every(fits), `an array of integers from ${low} to ${high}`);
};
const u32s = listOf(0, 0xffffffff);
const tokenIds = listOf(-0x80000000, 0x7fffffff);
const map = want(isMap, "a map");
const numbers = want((value) => isMap(value) && [...value.values()].every(isNumber), "a map of numbers");
const mapOrNone = (value) => (map(value).size ? value : null);
const oneOf = (...names) => want((value) => names.includes(value), names.join(" or "));
const packedIds = (value) => {
  want((bin) => isBytes(bin) && bin.length % 4 === 0, "bin of token ids")(value);
  return Array.from({ length: value.length / 4 }, (_, i) => value.readInt32LE(4 * i));
};

function packIds(tokens) {
  const bytes = Buffer.alloc(4 * tokens.length);
  tokens.forEach((token, i) => bytes.writeInt32LE(token, 4 * i));
  return bytes;
}

const REQUIRED = Symbol("required");
const emptyMap = () => new Map();
const emptyList = () => [];

// A field, and what holds when it is absent or nil. `slot`: tensors may be in it.
function field(name, type, fallback = REQUIRED, slot = false) {
  return { name, type, fallback, slot };
}

const KEY = field("key", bin(16));
const OP = field("op", text);
const PRIORITY = field("priority", integer(-100, 100), 0);
const PAYLOAD = field("payload", map, emptyMap);
const AUTH = field("auth", map, null);
const CREDIT = field("credit", u32, null);
const EXTRA = field("extra", mapOrNone, null);
const GREETING = [
  field("version", u32), field("features", texts), field("limits", map, emptyMap), field("software", text, ""),
];
const REQUEST = [
  field("model", text, null), field("inputs", map, emptyMap, true), field("params", map, emptyMap),
  field("deadline_ms", u32, null),
];
const EVENTS = [
  field("first_indexes", u32s), field("counts", u32s, null), field("tokens", tokenIds), field("texts", texts), EXTRA,
];
const USAGE = [field("usage", numbers, emptyMap), field("timings", numbers, emptyMap), field("extra", map, emptyMap)];

const FIELDS = {
  HELLO: [...GREETING, AUTH],
  WELCOME: [...GREETING, field("session", bytes, () => Buffer.alloc(0)), AUTH],
  AUTH: [PAYLOAD],
  GOAWAY: [field("last_stream", u32), field("grace_ms", u32, 0), field("alternatives", texts, emptyList)],
  REQ: [OP, KEY, ...REQUEST, CREDIT, PRIORITY, field("trace", text, null)],
  CANCEL: [field("reason", text)],
  RESUME: [KEY, field("next_index", u32), field("next_char", u32, 0), CREDIT],
  RES: [field("outputs", map, emptyMap, true), ...USAGE],
  EVT: [field("index", u32), field("tokens", tokenIds), field("text", text), EXTRA],
  EVB: [field("streams", u32s), ...EVENTS],
  ERR: [
    field("message", text), field("retryable", bool), field("executed", oneOf("no", "maybe", "yes")),
    field("retry_after_ms", u32, null), field("log_id", text, null), field("detail", map, emptyMap),
  ],
  ACK: [field("prompt_tokens", u32, null), field("prompt_ids", packedIds, null)],
  END: [
    field("finish", oneOf("stop", "length", "cancelled", "deadline")), field("count", u32), field("checksum", u32),
    ...USAGE,
  ],
  SUBMIT: [OP, KEY, field("attempt", amount), ...REQUEST, PRIORITY, field("so_far", packedIds, emptyList), field("tenant", text, "")],
  STEP: [field("streams", u32s), field("attempts", u32s), ...EVENTS],
  HEARTBEAT: [
    field("state", text), field("steps", u32, 0), field("load", map, emptyMap),
    field("card", map, null), field("detail", text, null),
  ],
  DRAIN: [field("grace_ms", u32)],
  LOAD: [PAYLOAD],
  SHM: [PAYLOAD],
};

// Metas that are no array but one value.
const SINGLE = { PING: field("payload", bin(8)), PONG: field("payload", bin(8)), CREDIT: field("amount", amount) };

function readField({ name, type, fallback }, value) {
  if (value !== null && value !== undefined) return type(value);
  if (fallback === REQUIRED) throw new MetaError(`${name} is missing`);
  return typeof fallback === "function" ? fallback() : fallback;
}

// The fields of a message from its meta, with defaults filled in.
function readMeta(kind, bytes, limits, segments) {
  const reader = new Reader(bytes, limits);
  if (kind in SINGLE) return { [SINGLE[kind].name]: SINGLE[kind].type(reader.whole()) };
  const fields = FIELDS[kind];
  const values = reader.positional((i) => {
    reader.tensors = fields[i]?.slot ? segments : null;
    return reader.value(1);
  });
  // These may be nil, which elsewhere means the same as absent; here they have to be written.
  if (["outputs", "payload"].includes(fields[0].name) && !values.length) throw new MetaError("no field at all");
  const message = {};
  fields.forEach((each, i) => (message[each.name] = readField(each, values[i])));
  if (kind === "EVB" || kind === "STEP") checkColumns(message);
  return message;
}

function checkColumns({ streams, attempts = streams, first_indexes, counts, tokens, texts: each }) {
  const columns = [attempts, first_indexes, counts ?? streams, each];
  if (columns.some((column) => column.length !== streams.length)) throw new MetaError("columns differ in length");
  const sum = counts ? counts.reduce((total, n) => total + n, 0) : streams.length;
  if (tokens.length !== sum) throw new MetaError("the counts do not add up to the tokens");
}

// A positional array is written in full: trailing defaults cost a byte each and spare every reader a question.
function writeMeta(message, writer) {
  const single = SINGLE[message.kind];
  if (single) return writer.value(message[single.name]);
  const value = ({ name, type }) => (type === packedIds && message[name] ? packIds(message[name]) : message[name]);
  writer.array(FIELDS[message.kind].map(value));
}

// 7.1 Checksum

const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let bit = 0; bit < 8; bit++) n = n & 1 ? (n >>> 1) ^ 0xedb88320 : n >>> 1;
  return n >>> 0;
});

function checksum(tokens) {
  let crc = 0xffffffff;
  for (const byte of packIds(tokens)) crc = (crc >>> 8) ^ CRC_TABLE[(crc ^ byte) & 0xff];
  return (crc ^ 0xffffffff) >>> 0;
}

// ---- 4. Kinds ---------------------------------------------------------------------------------------------

const END_FLAG = 0x01;
const BODY_FLAG = 0x04;

// [number, who sends it on a client link, and on a worker link, features of which it needs one]
const KIND_TABLE = {
  HELLO: [0x01, "opener", "opener"], WELCOME: [0x02, "answerer", "answerer"], AUTH: [0x03, "both", "both", "auth"],
  PING: [0x04, "both", "both"], PONG: [0x05, "both", "both"], GOAWAY: [0x06, "both", "both"],
  CREDIT: [0x07, "both", "nobody", "credit", "body"], REQ: [0x10, "opener", "nobody"],
  DATA: [0x11, "both", "both", "body"], CANCEL: [0x12, "opener", "opener"],
  RESUME: [0x13, "opener", "nobody", "resume"], RES: [0x20, "answerer", "answerer"],
  EVT: [0x21, "answerer", "nobody"], EVB: [0x22, "answerer", "nobody"], ERR: [0x23, "both", "both"],
  ACK: [0x24, "answerer", "answerer"], END: [0x25, "answerer", "answerer"], SUBMIT: [0x60, "nobody", "opener"],
  STEP: [0x61, "nobody", "answerer"], HEARTBEAT: [0x62, "nobody", "answerer"], DRAIN: [0x63, "nobody", "opener"],
  LOAD: [0x64, "nobody", "opener", "reserved"], SHM: [0x65, "nobody", "both", "shm"],
};
const ON_STREAM_0 = ["HELLO", "WELCOME", "AUTH", "PING", "PONG", "GOAWAY", "EVB", "STEP", "HEARTBEAT", "DRAIN", "LOAD"];
const OPENING = ["REQ", "SUBMIT", "RESUME"];
const TERMINAL = ["RES", "END", "ERR"];
const WITH_SEGMENTS = ["REQ", "RES", "SUBMIT"];

const KINDS = new Map(Object.entries(KIND_TABLE).map(([name, [number, onClientLink, onWorkerLink, ...features]]) => {
  const segments = WITH_SEGMENTS.includes(name);
  const code = name === "ERR" || name === "GOAWAY";
  const flags = segments ? BODY_FLAG : name === "DATA" ? END_FLAG : 0;
  const aux = segments || code || name === "DATA";
  const zero = ON_STREAM_0.includes(name);
  return [number, { name, senders: [onClientLink, onWorkerLink], features, zero, segments, code, flags, aux }];
}));
const OPTIONAL_KINDS = 0x80;

// ---- 3. The frame -----------------------------------------------------------------------------------------

const PREFACE = Buffer.from([0x94, 0x54, 0x57, 0x31, 0x0d, 0x0a, 0x1a, 0x0a]);
const HEADER_BYTES = 16;
const ALIGNMENT = 64;

const aligned = (offset) => Math.ceil(offset / ALIGNMENT) * ALIGNMENT;

const sumOf = (lengths) => lengths.reduce((sum, length) => sum + length, 0);

function buildFrame(header, table, meta, rest) {
  const head = Buffer.alloc(HEADER_BYTES + 8 * table.length);
  const frame = Buffer.concat([head, meta, ...rest]);
  frame.writeUInt32LE(frame.length - HEADER_BYTES, 0);
  frame.writeUInt8(header.number, 4);
  frame.writeUInt8(header.flags, 5);
  frame.writeUInt16LE(header.aux, 6);
  frame.writeUInt32LE(header.stream, 8);
  frame.writeUInt32LE(meta.length, 12);
  table.forEach((length, i) => frame.writeBigUInt64LE(BigInt(length), HEADER_BYTES + 8 * i));
  return frame;
}

// Segments with the pads before them; `offset` is counted from the first byte of the header.
function pad(segments, offset) {
  return segments.flatMap((segment) => {
    const zeros = Buffer.alloc(aligned(offset) - offset);
    offset += zeros.length + segment.length;
    return [zeros, segment];
  });
}

// The frame of a message under the limits of who receives it, and the segments that follow it in DATA (15.3).
function encode(message, limits, { fromOpener, body = false }) {
  const [number] = KIND_TABLE[message.kind];
  const { stream = 0 } = message;
  if (message.kind === "DATA") {
    const header = { number, flags: message.last ? END_FLAG : 0, aux: message.segment, stream };
    return { frame: buildFrame(header, [], Buffer.alloc(0), [message.payload]), later: [] };
  }
  const writer = new Writer(limits.inline_bytes);
  writeMeta(message, writer);
  const { segments } = writer;
  const meta = writer.bytes();
  const table = segments.map((segment) => segment.length);
  const rest = pad(segments, HEADER_BYTES + 8 * table.length + meta.length);
  const size = 8 * table.length + meta.length + sumOf(rest.map((part) => part.length));
  const whole = size <= Math.min(limits.frame_bytes, body ? MIB : Infinity);
  const fits = meta.length <= limits[metaLimit(fromOpener)] && table.length <= limits.segments;
  if (!fits || (!whole && !(body && table.length && sumOf(table) <= limits.message_bytes))) {
    throw wireError("TOO_LARGE", "the message is larger than the peer accepts", stream);
  }
  const header = { number, flags: whole ? 0 : BODY_FLAG, aux: message.code ?? table.length, stream };
  return { frame: buildFrame(header, table, meta, whole ? rest : []), later: whole ? [] : segments };
}

// ---- 11. Receiving a frame --------------------------------------------------------------------------------

// Bytes that have arrived. They are joined only when a whole part of a frame is there.
class Inbox {
  chunks = [];
  length = 0;

  push(bytes) {
    this.chunks.push(bytes);
    this.length += bytes.length;
  }

  take(count) {
    if (this.chunks.length !== 1) this.chunks = [Buffer.concat(this.chunks)];
    const [all] = this.chunks;
    this.chunks = [all.subarray(count)];
    this.length -= count;
    return all.subarray(0, count);
  }
}

// Steps 1 to 8 in `next`, and what steps 10 and 11 say about metas in `decode`. The caller does what needs its
// state in between.
class Receiver {
  constructor({ fromOpener, worker, limits, features = new Set() }) {
    Object.assign(this, { fromOpener, worker, limits, features });
    this.greeting = true; // until HELLO or WELCOME
    this.lastStream = 0;
    this.inbox = new Inbox();
    this.header = null; // of the frame that is arriving
    this.now = 0;
    this.began = null; // when its first byte arrived
  }

  push(bytes, now = 0) {
    this.inbox.push(bytes);
    this.now = now;
    this.began ??= now;
  }

  // How large the unfinished frame is, as far as that is known.
  frameBytes() {
    return this.header ? HEADER_BYTES + this.header.bodyBytes : 0;
  }

  next() {
    for (;;) {
      if (!this.header && this.inbox.length >= HEADER_BYTES) this.readHeader(this.inbox.take(HEADER_BYTES));
      if (!this.header || this.inbox.length < this.header.bodyBytes) return null;
      const { header } = this;
      const body = this.inbox.take(header.bodyBytes);
      this.header = null;
      this.began = this.inbox.length ? this.now : null;
      if (header.number < OPTIONAL_KINDS) return this.layout(header, body);
      if (this.greeting) throw wireError("UNKNOWN_KIND", "an optional kind before the greeting");
    }
  }

  readHeader(bytes) {
    const [bodyBytes, stream, metaBytes] = [0, 8, 12].map((at) => bytes.readUInt32LE(at));
    const { frame_bytes, preauth_bytes } = this.limits;
    const limit = this.greeting && this.fromOpener ? Math.min(frame_bytes, preauth_bytes) : frame_bytes;
    if (bodyBytes > limit) throw this.toldInText(bytes) ?? wireError("FRAME_TOO_LARGE", `a frame of ${bodyBytes} bytes`);
    const [number, aux] = [bytes[4], bytes.readUInt16LE(6)];
    if (KINDS.get(number)?.segments && aux > this.limits.segments) throw wireError("FRAMING", `${aux} segments`);
    this.header = { bodyBytes, number, flags: bytes[5], aux, stream, metaBytes };
  }

  // Section 2: in place of the first frame, an answerer of another kind may say in text what it is.
  toldInText(bytes) {
    const text = Buffer.concat([bytes, ...this.inbox.chunks]).toString("latin1");
    if (!this.greeting || this.fromOpener || !/^(tensorwire:|HTTP\/)/.test(text)) return null;
    return wireError("BAD_PREFACE", `the peer speaks another protocol; it says: ${text.split(/[\r\n]/)[0].slice(0, 200)}`);
  }

  // Steps 4 to 8, and the number of a stream from step 10.
  layout({ number, flags, aux, stream, metaBytes }, body) {
    const kind = KINDS.get(number);
    if (!kind) throw wireError("UNKNOWN_KIND", `kind 0x${number.toString(16)}`);
    if (flags & ~kind.flags) throw wireError("FRAMING", `flags 0x${flags.toString(16)} on ${kind.name}`);
    if (aux && !kind.aux) throw wireError("FRAMING", `aux on ${kind.name}`);
    const hasBody = (flags & BODY_FLAG) !== 0;
    if (hasBody && !aux) throw wireError("FRAMING", "BODY without segments");
    const count = kind.segments ? aux : 0;
    const metaEnd = 8 * count + metaBytes;
    const more = kind.name === "DATA" ? metaBytes === 0 : count > 0 && !hasBody; // than the meta
    if (metaEnd > body.length || (!more && metaEnd < body.length)) throw wireError("FRAMING", "meta and body disagree");
    const frame = { kind, stream, aux, meta: body.subarray(8 * count, metaEnd), count, hasBody };
    if (kind.name === "DATA") Object.assign(frame, { payload: body, last: (flags & END_FLAG) !== 0 });
    this.cutSegments(frame, body, metaEnd);
    this.checkKind(kind, stream);
    if (OPENING.includes(kind.name) && !this.greeting) this.claim(stream);
    return frame;
  }

  cutSegments(frame, body, metaEnd) {
    const lengths = Array.from({ length: frame.count }, (_, i) => Number(body.readBigUInt64LE(8 * i)));
    frame.table = new SegmentTable(lengths, this.limits);
    if (frame.hasBody || !frame.count) return;
    let at = HEADER_BYTES + metaEnd;
    frame.segments = lengths.map((length) => {
      const start = aligned(at);
      const end = start + length;
      if (end > HEADER_BYTES + body.length) throw wireError("FRAMING", "a segment beyond the body");
      const pad = body.subarray(at - HEADER_BYTES, start - HEADER_BYTES);
      if (pad.some((byte) => byte !== 0)) throw wireError("FRAMING", "a pad that is not zero");
      at = end;
      return body.subarray(start - HEADER_BYTES, end - HEADER_BYTES);
    });
    if (at !== HEADER_BYTES + body.length) throw wireError("FRAMING", "bytes behind the last segment");
  }

  checkKind({ name, senders, features, zero }, stream) {
    const sender = senders[this.worker ? 1 : 0];
    const allowed = sender === "both" || sender === (this.fromOpener ? "opener" : "answerer");
    // Before the greeting no feature is known, and its kind is not due anyway.
    const negotiated = !features.length || this.greeting || features.some((feature) => this.features.has(feature));
    if (!allowed || !negotiated) throw wireError("UNKNOWN_KIND", `${name} may not be sent here`);
    if (zero && stream) throw wireError("FRAMING", `${name} on a stream`);
  }

  // The numbers of new streams rise. A number that was refused is used up, too.
  claim(stream) {
    if (stream <= this.lastStream) throw wireError("SEQUENCE", `stream ${stream} is not above ${this.lastStream}`);
    this.lastStream = stream;
  }

  decode(frame) {
    const { kind, stream, aux, payload, last } = frame;
    if (kind.name === "DATA") return { kind: "DATA", stream, segment: aux, payload, last };
    const ofRequest = OPENING.includes(kind.name);
    const problem = this.tooLarge(frame);
    if (problem) throw ofRequest ? wireError(...problem, stream) : wireError("FRAMING", problem[1]);
    try {
      const fields = readMeta(kind.name, frame.meta, this.limits, frame.table);
      frame.segments?.forEach((segment, i) => frame.table.fill(i, segment));
      return { kind: kind.name, ...(kind.zero ? {} : { stream }), ...(kind.code ? { code: aux } : {}), ...fields };
    } catch (error) {
      if (!(error instanceof MetaError)) throw error;
      if (!ofRequest) throw wireError("FRAMING", `${kind.name}: ${error.message}`);
      throw wireError(error instanceof TensorError ? "BAD_TENSOR" : "BAD_META", error.message, stream);
    }
  }

  // Step 10: name and text of an error of the request. For an answer the same is an error of the connection.
  tooLarge({ hasBody, meta, table }) {
    if (hasBody && !this.features.has("body")) return ["UNSUPPORTED", "BODY without the feature"];
    if (meta.length > this.limits[metaLimit(this.fromOpener)]) return ["TOO_LARGE", "the meta is too large"];
    if (hasBody && sumOf(table.lengths) > this.limits.message_bytes) return ["TOO_LARGE", "the body is too large"];
    return null;
  }
}

// ---- 15.3 Feature `body` ----------------------------------------------------------------------------------

// A message whose segments arrive in DATA frames.
class Body {
  constructor(message, table) {
    Object.assign(this, { message, table });
    this.segment = -1;
    this.due = sumOf(table.lengths); // bytes that are still to come
    this.advance();
  }

  // To the next segment with bytes; behind the last one nothing is left.
  advance() {
    const { lengths } = this.table;
    this.parts = [];
    this.left = 0;
    while (!this.left && this.segment < lengths.length - 1) {
      this.left = lengths[++this.segment];
      if (!this.left) this.table.fill(this.segment, Buffer.alloc(0));
    }
  }

  // True when the message is complete.
  take({ segment, payload, last }) {
    if (segment !== this.segment || payload.length > this.left || !(payload.length || last)) {
      throw wireError("SEQUENCE", "DATA that is not due");
    }
    this.parts.push(payload);
    this.left -= payload.length;
    this.due -= payload.length;
    if (payload.length && !this.left) {
      this.table.fill(segment, Buffer.concat(this.parts));
      this.advance();
    }
    if (last !== (this.left === 0)) throw wireError("SEQUENCE", "END is not on the DATA with the last byte");
    return last;
  }
}

// A body that is not wanted (any more): what comes of it is thrown away. `due` bytes may have been on their way.
class Refused {
  constructor(due) { this.due = due; }

  // True if this DATA is a fault.
  take({ payload, last }) {
    this.due -= payload.length;
    return !last && (this.due < 0 || !payload.length);
  }
}

// A body on its way out: the first MiB may go at once, the rest needs credit.
class Upload {
  constructor(segments) {
    Object.assign(this, { segments, index: 0, at: 0, credit: MIB });
    this.skipFull();
  }

  skipFull() {
    while (this.index < this.segments.length - 1 && this.at === this.segments[this.index].length) {
      this.index += 1;
      this.at = 0;
    }
  }

  // The next DATA, or null while there is no credit. Of segments without bytes there is one, which is the end.
  next(stream, most) {
    const { index: segment, segments } = this;
    const payload = segments[segment].subarray(this.at, this.at + Math.min(most, this.credit));
    if (!payload.length && segments[segment].length) return null;
    this.at += payload.length;
    this.credit -= payload.length;
    this.skipFull();
    return { kind: "DATA", stream, segment, payload, last: this.at === segments[this.index].length };
  }
}

// ---- 14. Time and closing ---------------------------------------------------------------------------------

// What may be done `burst` times at once, and `perSecond` times in the long run.
class Bucket {
  constructor(burst, perSecond) {
    Object.assign(this, { burst, perSecond, level: burst, at: 0 });
  }

  take(now) {
    this.level = Math.min(this.burst, this.level + (now - this.at) * this.perSecond);
    this.at = now;
    if (this.level < 1) return false;
    this.level -= 1;
    return true;
  }
}

// Errors on a stream that are the opener's doing, besides all of class 0x02.
const FAULTS = ["UNAUTHENTICATED", "FORBIDDEN", "POISONED", "OUTPUT_TOO_LARGE"].map((name) => ERRORS[name][0]);
const isFault = (code) => code >> 8 === 0x02 || FAULTS.includes(code);

// ---- 9. Life of a connection, 10. Life of a request -------------------------------------------------------

const OPENERS = ["client", "dispatcher"]; // the others are "server" and "worker"
const WORKER_LINK = ["dispatcher", "worker"];
const STRANGERS = "tensorwire: this port speaks the Tensorwire protocol, version 1, not what was sent\n";

class Connection {
  // `hear` is called with each message for the application, `limits` are those that differ from the defaults.
  constructor({ role, features = [], limits = {}, auth = null, hear }) {
    Object.assign(this, { offered: features, auth, hear });
    this.opener = OPENERS.includes(role);
    this.worker = WORKER_LINK.includes(role);
    this.limits = { ...defaultLimits(this.worker), ...limits };
    this.peerLimits = defaultLimits(this.worker);
    this.receiver = new Receiver({ fromOpener: !this.opener, worker: this.worker, limits: this.limits });
    this.pings = new Bucket(this.limits.ping_burst, 1 / this.limits.ping_interval_s);
    this.faults = new Bucket(this.limits.fault_burst, this.limits.faults_per_s);
    this.streams = new Map(); // the open ones: {next, attempt} where this side hears events
    this.bodies = new Map(); // arriving: stream to Body or Refused
    this.uploads = new Map(); // leaving: stream to Upload
    this.lastStream = 0; // that this side opened
    this.leaving = false; // the peer has sent GOAWAY
    this.early = []; // what an answerer was given to send before the greeting
    this.out = []; // bytes to send
    this.error = undefined; // once it is closed: why
    this.now = this.heardAt = this.askedAt = 0;
    this.state = this.opener ? "CONNECTING" : "PREFACE";
    this.preface = 0; // bytes of it that have come
    if (this.opener) {
      this.out.push(PREFACE);
      this.transmit({ kind: "HELLO", ...this.greeting(features, writeLimits(this.limits, Object.keys(limits))), auth });
    }
  }

  get features() { return this.receiver.features; }

  greeting(features, limits) {
    return { version: VERSION, features, limits, software: SOFTWARE };
  }

  receive(bytes, now) {
    this.now = this.heardAt = now;
    this.guarded(() => {
      if (this.state === "PREFACE") bytes = this.readPreface(bytes);
      if (this.error === undefined && bytes.length) this.receiver.push(bytes, now);
      for (let frame; this.error === undefined && (frame = this.receiver.next()); ) this.dispatch(frame);
    });
  }

  // The timers.
  tick(now) {
    this.now = now;
    this.guarded(() => {
      if (this.state === "OPEN") this.watch();
      else if (now > this.limits.handshake_s) throw wireError("HANDSHAKE_TIMEOUT", "the greeting took too long");
    });
  }

  // Sends a message of the application.
  send(message, now) {
    this.now = now;
    if (this.error !== undefined) throw wireError("CONNECTION_LOST", "the connection is closed");
    if (!this.opener && this.state !== "OPEN") return this.early.push(message);
    const packed = this.encode(message);
    if (OPENING.includes(message.kind)) this.open(message);
    this.push(packed, message);
    if (message.kind === "CANCEL") this.stopUpload(message.stream);
    if (this.opener || !TERMINAL.includes(message.kind)) return;
    this.streams.delete(message.stream);
    if (message.kind === "ERR" && isFault(message.code)) this.guarded(() => this.countFault());
  }

  open({ stream, attempt, so_far = [], next_index = so_far.length }) {
    if (this.leaving) throw wireError("DRAINING", "the server takes no more requests on this connection");
    if (stream <= this.lastStream) throw new RangeError(`stream ${stream} was used before`);
    this.lastStream = stream;
    this.streams.set(stream, { next: next_index, attempt });
  }

  encode(message) {
    return encode(message, this.peerLimits, { fromOpener: this.opener, body: this.features.has("body") });
  }

  transmit(message) {
    this.push(this.encode(message), message);
  }

  push({ frame, later }, { stream }) {
    this.out.push(frame);
    if (!later.length) return;
    this.uploads.set(stream, new Upload(later));
    this.upload(stream);
  }

  upload(stream) {
    const upload = this.uploads.get(stream);
    const most = Math.min(MIB, this.peerLimits.frame_bytes);
    for (let data; upload && (data = upload.next(stream, most)); ) {
      this.transmit(data);
      if (data.last) return this.uploads.delete(stream);
    }
  }

  // Where the rest of a body is not wanted any more, its end is sent instead.
  stopUpload(stream) {
    const upload = this.uploads.get(stream);
    if (!upload) return;
    this.uploads.delete(stream);
    this.transmit({ kind: "DATA", stream, segment: upload.index, payload: Buffer.alloc(0), last: true });
  }

  // Runs what may end the connection. After that nothing is read or sent any more.
  guarded(action) {
    if (this.error !== undefined) return;
    try {
      action();
    } catch (error) {
      if (!(error instanceof WireError)) throw error;
      const flood = error.code === ERRORS.FLOOD[0] && !this.opener && this.state === "OPEN";
      if (flood) {
        const last_stream = this.receiver.lastStream;
        this.transmit({ kind: "GOAWAY", code: error.code, last_stream, grace_ms: 0, alternatives: [] });
      }
      if (error.code !== ERRORS.BAD_PREFACE[0]) this.transmit(error.toMessage());
      this.close(error);
    }
  }

  close(error) {
    this.state = "CLOSED";
    this.error = error;
  }

  // The bytes behind the preface. The first one that differs decides.
  readPreface(bytes) {
    const part = bytes.subarray(0, PREFACE.length - this.preface);
    if (!part.equals(PREFACE.subarray(this.preface, this.preface + part.length))) {
      this.out.push(Buffer.from(STRANGERS));
      this.close(wireError("BAD_PREFACE", "the first bytes were not the preface"));
    }
    this.preface += part.length;
    if (this.preface === PREFACE.length && this.error === undefined) this.state = "HANDSHAKE";
    return bytes.subarray(part.length);
  }

  watch() {
    const { limits, now } = this;
    const { began } = this.receiver;
    const time = limits.frame_grace_s + this.receiver.frameBytes() / limits.frame_bytes_per_s;
    if (!this.opener && began !== null && now > began + time) throw wireError("FLOOD", "a frame trickles");
    if (!this.opener && this.features.has("passive")) return;
    if (now - this.heardAt >= limits.dead_after_s) throw wireError("PEER_SILENT", "nothing was heard for too long");
    if (now - Math.max(this.heardAt, this.askedAt) < limits.ping_after_s) return;
    this.askedAt = now;
    this.transmit({ kind: "PING", payload: Buffer.alloc(8) });
  }

  countFault() {
    if (!this.opener && !this.faults.take(this.now)) throw wireError("FLOOD", "too many faults");
  }

  dispatch(frame) {
    const { kind: { name }, stream } = frame;
    if (name === "ERR" && stream === 0) {
      const message = this.receiver.decode(frame);
      this.hear(message);
      return this.close(new WireError(message));
    }
    if (this.state !== "OPEN") return this.greet(frame);
    if (name === "HELLO" || name === "WELCOME" || (name === "ERR" && !this.opener)) {
      throw wireError("SEQUENCE", `${name} is not due`);
    }
    if (OPENING.includes(name)) return this.accept(frame);
    this.act(this.receiver.decode(frame), frame);
  }

  greet(frame) {
    const due = this.opener ? "WELCOME" : "HELLO";
    if (frame.kind.name !== due) throw wireError("SEQUENCE", `${frame.kind.name} before ${due}`);
    const message = this.receiver.decode(frame);
    if (message.version !== VERSION) throw wireError("VERSION", `version ${message.version} is not spoken here`);
    this.peerLimits = readLimits(message.limits, this.worker);
    if (Math.min(this.peerLimits.frame_bytes, this.peerLimits[metaLimit(this.opener)]) < LEAST_BYTES) {
      throw wireError("FRAMING", `frame_bytes and the limit of metas are at least ${LEAST_BYTES}`);
    }
    if (this.opener && message.auth?.size && !this.auth) {
      throw wireError("UNAUTHENTICATED", "the server asks for a token: set TENSORWIRE_TOKEN");
    }
    const common = message.features.filter((feature) => this.offered.includes(feature));
    this.receiver.features = new Set(common);
    this.receiver.greeting = false;
    this.state = "OPEN";
    this.hear(message);
    if (this.opener) return;
    const limits = writeLimits(this.limits, Object.keys(LIMITS));
    this.transmit({ kind: "WELCOME", ...this.greeting(common, limits), session: randomBytes(8), auth: null });
    for (const early of this.early) this.send(early, this.now);
  }

  // What a message in state OPEN means for the connection, by the tables of sections 9 and 10.
  act(message, frame) {
    const { kind, stream } = message;
    switch (kind) {
      case "PING":
        if (!this.pings.take(this.now)) throw wireError("FLOOD", "too many pings");
        return this.transmit({ kind: "PONG", payload: message.payload });
      case "PONG":
        return this.countFault();
      case "GOAWAY":
        this.countFault();
        this.leaving = true;
        return this.hear(message);
      case "CANCEL": return this.cancelled(message);
      case "CREDIT": return this.credited(message);
      case "DATA": return this.hasData(message);
      case "EVT":
        this.advance(stream, message.index, message.tokens.length);
        return this.hear(message);
      case "EVB":
      case "STEP": return this.hasEvents(message);
      case "ACK": case "RES": case "END": case "ERR":
        if (this.answers(message)) return this.answered(message, frame);
        if (frame.hasBody) this.bodies.set(stream, new Refused(sumOf(frame.table.lengths)));
        return undefined;
      default: return this.hear(message);
    }
  }

  // A request: what is wrong with it is its own failure, not the connection's.
  accept(frame) {
    const { stream, hasBody } = frame;
    let message;
    try {
      if (this.streams.size >= this.limits.streams) throw wireError("BUSY", "too many streams are open", stream);
      message = this.receiver.decode(frame);
    } catch (error) {
      if (!(error instanceof WireError)) throw error;
      return this.refuse(error, hasBody ? MIB : null);
    }
    this.streams.set(stream, {});
    if (hasBody) this.bodies.set(stream, new Body(message, frame.table));
    else this.hear(message);
  }

  // `due`: so much of its body may have been on its way; null: it has none.
  refuse(error, due) {
    this.streams.delete(error.stream);
    if (due !== null) this.bodies.set(error.stream, new Refused(due));
    this.transmit(error.toMessage());
    // BUSY of the whole server is not the opener's doing; too many streams on one connection are.
    if (isFault(error.code) || error.code === ERRORS.BUSY[0]) this.countFault();
  }

  cancelled(message) {
    const { stream, reason } = message;
    this.countFault();
    const body = this.bodies.get(stream);
    if (body instanceof Body) {
      const error = wireError(reason === "deadline" ? "DEADLINE" : "CANCELLED", "the body had not come", stream);
      error.executed = "no";
      this.refuse(error, Math.min(body.due, MIB));
    } else if (this.streams.has(stream)) this.hear(message);
  }

  credited(message) {
    const { stream, amount } = message;
    if (!this.opener) return this.streams.has(stream) ? this.hear(message) : this.countFault();
    const upload = this.uploads.get(stream);
    if (!upload) return undefined;
    upload.credit = Math.min(upload.credit + amount, 0xffffffff);
    return this.upload(stream);
  }

  hasData(data) {
    const body = this.bodies.get(data.stream);
    if (body === undefined) throw wireError("SEQUENCE", `no body is due on stream ${data.stream}`);
    if (body instanceof Refused) {
      if (body.take(data)) this.countFault();
      if (data.last) this.bodies.delete(data.stream);
    } else if (body.take(data)) {
      this.bodies.delete(data.stream);
      if (this.opener) this.finish(data.stream);
      this.hear(body.message);
    }
  }

  // Each event goes on where its stream was. A gateway ignores those of earlier attempts.
  hasEvents(message) {
    const attempt = (stream) => this.streams.get(stream)?.attempt;
    const events = splitEvents(message).filter((event) => !this.worker || event.attempt === attempt(event.stream));
    for (const { stream, index, tokens } of events) this.advance(stream, index, tokens.length);
    if (events.length || !this.worker) this.hear(message);
  }

  advance(stream, index, count) {
    const open = this.openStream(stream);
    if (index !== open?.next) throw wireError("SEQUENCE", `token ${index} on stream ${stream} is not due`);
    open.next += count;
  }

  // The stream of an answer, while nothing but the body of a RES may come on it any more: none.
  openStream(stream) {
    return this.bodies.has(stream) ? undefined : this.streams.get(stream);
  }

  // False for what a gateway drops because it gave up the stream or the attempt.
  answers({ stream, extra }) {
    const open = this.openStream(stream);
    if (!open && !this.worker) throw wireError("SEQUENCE", `an answer on stream ${stream}, which is not open`);
    return open !== undefined && (!this.worker || (extra?.get("attempt") ?? open.attempt) === open.attempt);
  }

  answered(message, frame) {
    const { kind, stream } = message;
    const { next } = this.streams.get(stream);
    if (kind === "END" && message.count !== next) {
      throw wireError("SEQUENCE", `${message.count} tokens at the end, not ${next}`);
    }
    if (frame.hasBody) return this.bodies.set(stream, new Body(message, frame.table));
    if (kind !== "ACK") this.finish(stream);
    this.hear(message);
  }

  // A terminal frame may come before a body has left.
  finish(stream) {
    this.streams.delete(stream);
    this.stopUpload(stream);
  }
}

// The events of EVB or STEP, one by one.
function splitEvents({ streams, attempts, first_indexes, counts, tokens, texts }) {
  let at = 0;
  return streams.map((stream, i) => {
    const count = counts ? counts[i] : 1;
    at += count;
    const event = { stream, index: first_indexes[i], tokens: tokens.slice(at - count, at), text: texts[i] };
    return attempts ? { ...event, attempt: attempts[i] } : event;
  });
}

// ---- A client over TCP ------------------------------------------------------------------------------------

const CONNECT_MS = 5000;
const LINGER_MS = 2000; // for how long an ERR that was sent may still be read by the peer (section 14)
const TICK_MS = 250;
const DEADLINE_GRACE_MS = 1000; // the server's own END may take so long (section 14)

// A queue with one reader that waits.
class Channel {
  queue = [];
  error = null;
  wake = () => {};

  push(item) {
    this.queue.push(item);
    this.wake();
  }

  fail(error) {
    this.error ??= error;
    this.wake();
  }

  async next() {
    while (!this.queue.length) {
      if (this.error) throw this.error;
      await new Promise((resolve) => (this.wake = resolve));
    }
    return this.queue.shift();
  }
}

// A connection with its socket and its clock.
class Session {
  // Waits for WELCOME, so that requests go out under the server's limits, and RESUME only where it is understood.
  // `onLeft` is called once nothing more should be asked here.
  static async open({ auth, ...where }, onLeft) {
    const socket = net.connect({ ...where, noDelay: true });
    try {
      await once(socket, "connect", { signal: AbortSignal.timeout(CONNECT_MS) });
    } catch (error) {
      socket.destroy();
      onLeft();
      throw wireError("CONNECTION_LOST", `no connection to ${where.path ?? where.host} (${error.code ?? error.message})`);
    }
    const session = new Session(socket, auth, onLeft);
    await session.greeted.next();
    return session;
  }

  constructor(socket, auth, onLeft) {
    Object.assign(this, { socket, onLeft, started: performance.now() });
    this.greeted = new Channel();
    this.calls = new Map(); // stream: Channel
    this.stream = 0;
    const hear = (message) => this.hear(message);
    this.connection = new Connection({ role: "client", features: ["resume", "body"], auth, hear });
    this.timer = setInterval(() => this.step((now) => this.connection.tick(now)), TICK_MS);
    socket.on("data", (bytes) => this.step((now) => this.connection.receive(bytes, now)));
    socket.on("error", () => {}); // "close" follows
    socket.on("close", () => this.close(wireError("CONNECTION_LOST", "the connection was lost")));
    this.step(() => {});
  }

  // Lets the connection act, and sends what comes of it.
  step(action) {
    try {
      action((performance.now() - this.started) / 1000);
    } finally {
      for (const bytes of this.connection.out.splice(0)) {
        if (this.socket.writable) this.socket.write(bytes);
      }
    }
    if (this.connection.error !== undefined) this.close(this.connection.error);
  }

  hear(message) {
    if (message.kind === "WELCOME") this.greeted.push(message);
    else if (message.kind === "GOAWAY") this.onLeft();
    else if (message.kind === "EVB") {
      for (const event of splitEvents(message)) this.calls.get(event.stream)?.push({ kind: "EVT", ...event });
    } else this.calls.get(message.stream)?.push(message);
  }

  // The frames that answer a request, up to the terminal one; ERR is thrown. Whoever stops before that cancels.
  async *call(message, leftMs = null) {
    const stream = ++this.stream;
    const channel = new Channel();
    let [reason, ended, timer] = ["cancelled", false, null];
    this.calls.set(stream, channel);
    if (leftMs !== null) {
      timer = setTimeout(() => {
        reason = "deadline";
        channel.fail(wireError("DEADLINE", "no answer in time", stream));
      }, leftMs + DEADLINE_GRACE_MS);
    }
    try {
      this.step((now) => this.connection.send({ ...message, stream }, now));
      while (!ended) {
        const answer = await channel.next();
        ended = TERMINAL.includes(answer.kind);
        if (answer.kind === "ERR") throw new WireError(answer);
        yield answer;
      }
    } finally {
      clearTimeout(timer);
      this.calls.delete(stream);
      const open = this.connection.error === undefined && this.connection.streams.has(stream);
      if (open) this.step((now) => this.connection.send({ kind: "CANCEL", stream, reason }, now));
    }
  }

  close(error = null) {
    if (this.connection.error === undefined) this.connection.close(error);
    this.onLeft();
    clearInterval(this.timer);
    for (const channel of [this.greeted, ...this.calls.values()]) channel.fail(error);
    this.socket.end();
    setTimeout(() => this.socket.destroy(), LINGER_MS).unref();
  }
}

// ---- 8. Operations ----------------------------------------------------------------------------------------

const TEXT_AS_TENSOR = 4096; // from so many bytes on: the limit of metas does not count segments
const IDS_AS_TENSOR = 256;
const ATTEMPTS = 6; // to go on with an answer whose connection was lost: some 6 s, a little above the grace of 15.1
const FIRST_PAUSE_MS = 100;

function textInput(prompt) {
  const bytes = Buffer.from(prompt);
  return bytes.length > TEXT_AS_TENSOR ? new Tensor("U8", [bytes.length], bytes) : prompt;
}

function textsInput(texts) {
  const parts = texts.map((each) => Buffer.from(each));
  const bytes = Buffer.concat(parts);
  if (bytes.length <= TEXT_AS_TENSOR && parts.length <= IDS_AS_TENSOR) return texts;
  return [new Tensor("U8", [bytes.length], bytes), Tensor.of("I32", [parts.length], parts.map((part) => part.length))];
}

const idsInput = (ids) => (ids.length > IDS_AS_TENSOR ? Tensor.of("I32", [ids.length], ids) : ids);

// One request under one key, however often it has to be sent.
class Call {
  constructor(op, model, inputs, params, timeoutMs) {
    this.request = {
      kind: "REQ", op, key: randomBytes(16), model, inputs, params, deadline_ms: null, credit: null, priority: 0, trace: null,
    };
    this.until = timeoutMs === null ? null : performance.now() + timeoutMs;
  }

  leftMs() {
    return this.until === null ? null : Math.max(0, Math.ceil(this.until - performance.now()));
  }

  // As it is sent now.
  message() {
    return { ...this.request, deadline_ms: this.leftMs() };
  }
}

// What the server ended without a result.
function throwIfCut({ finish, count }) {
  if (finish !== "cancelled" && finish !== "deadline") return;
  const error = wireError(finish === "deadline" ? "DEADLINE" : "CANCELLED", `ended by ${finish} after ${count} tokens`);
  throw Object.assign(error, { executed: count ? "yes" : "maybe" });
}

// A streamed answer: iterate over its events {index, tokens, text}; `end` is there behind the last one. A lost connection
// is replaced and the answer gone on with (15.1), if the server has `resume`: then neither tokens nor text come twice.
export class Generation {
  tokens = [];
  text = "";
  end = null;

  constructor(client, call) {
    Object.assign(this, { client, call });
  }

  async *[Symbol.asyncIterator]() {
    let message = this.call.message();
    let resumes = false;
    for (let attempt = 0; ; attempt++) {
      try {
        const session = await this.client.session();
        resumes = session.connection.features.has("resume");
        for await (const part of session.call(message, this.call.leftMs())) {
          if (part.kind === "END") return this.finish(part);
          if (part.kind === "RES") throw wireError("INTERNAL", "one result instead of a stream");
          if (part.kind !== "EVT") continue;
          attempt = 0; // only what is new is progress: an ACK comes again on each connection
          for (const token of part.tokens) this.tokens.push(token);
          this.text += part.text;
          yield { index: part.index, tokens: part.tokens, text: part.text };
        }
      } catch (error) {
        message = this.next(error, message);
        if (!message || !resumes || attempt >= ATTEMPTS) throw error;
      }
      await pause(FIRST_PAUSE_MS * 2 ** attempt * (0.5 + Math.random()));
    }
  }

  // What to send on a new connection, null if the error is final.
  next(error, message) {
    if (!(error instanceof WireError)) return null;
    const next_char = Array.from(this.text).length; // code points, not UTF-16 units
    const nothing = !this.tokens.length && !next_char;
    const unknown = error.code === ERRORS.UNKNOWN_KEY[0] && message.kind === "RESUME";
    if (!unknown && (error.stream || !error.retryable)) return null;
    // The same key makes sure that the request does not run twice.
    if (nothing) return this.call.message();
    if (unknown) return null;
    return { kind: "RESUME", key: this.call.request.key, next_index: this.tokens.length, next_char, credit: null };
  }

  finish(end) {
    if (end.checksum !== checksum(this.tokens)) throw wireError("SEQUENCE", "the tokens are not those that were sent");
    this.end = end;
    throwIfCut(end);
  }

  // 7.2: how likely each token was, and the likeliest in its place; null where that was not asked for.
  get logprobs() { return logprobsOf(this.end?.extra.get("logprobs")); }
  get promptLogprobs() { return logprobsOf(this.end?.extra.get("prompt_logprobs")); }
}

// [{logprob, token (of a prompt only), top: [[token, logprob], ...]}, ...]
function logprobsOf(columns) {
  if (!columns) return null;
  const column = (name, dtype) => {
    const bytes = columns.get(name) ?? Buffer.alloc(0);
    return new Tensor(dtype, [bytes.length / 4], bytes).data();
  };
  const [own, top] = [column("token_logprobs", "F32"), column("top_logprobs", "F32")];
  const [tokens, topIds] = [column("token_ids", "I32"), column("top_ids", "I32")];
  const k = own.length ? topIds.length / own.length : 0;
  return own.map((logprob, i) => ({
    ...(tokens.length ? { token: tokens[i] } : {}),
    logprob,
    top: Array.from({ length: k }, (_, j) => [topIds[i * k + j], top[i * k + j]]),
  }));
}

// A server, asked over one connection, which is made anew when it is lost.
export class Client {
  // "HOST:PORT" or the path of a Unix socket; resolves when the server has greeted.
  static async connect(address, { token } = {}) {
    const client = new Client(parseAddress(address, token));
    await client.session();
    return client;
  }

  constructor(address) {
    Object.assign(this, { address, opening: null, sessions: new Set() });
  }

  session() {
    if (!this.opening) {
      const opening = Session.open(this.address, () => {
        if (this.opening === opening) this.opening = null;
      });
      this.opening = opening;
      opening.then((session) => this.sessions.add(session), () => {});
    }
    return this.opening;
  }

  // Continues a prompt: text or token ids.
  generate(model, prompt, params = {}, { timeoutMs = null } = {}) {
    const inputs = typeof prompt === "string" ? [["prompt", textInput(prompt)]] : [["ids", idsInput(prompt)]];
    return new Generation(this, new Call("generate", model, new Map(inputs), fromPlain(params), timeoutMs));
  }

  // An array of numbers for each text.
  async embed(model, texts, params = {}, options = {}) {
    const outputs = await this.unary("embed", model, new Map([["texts", textsInput(texts)]]), params, options);
    const { shape: [rows, size], ...embeddings } = outputs.get("embeddings");
    const numbers = new Tensor(embeddings.dtype, [rows, size], embeddings.bytes).data();
    return Array.from({ length: rows }, (_, i) => numbers.slice(i * size, (i + 1) * size));
  }

  // Named tensors ({dtype, shape, data}) and texts in, named tensors out.
  async infer(model, inputs, params = {}, options = {}) {
    return toPlain(await this.unary("infer", model, fromPlain(inputs), params, options));
  }

  async unary(op, model, inputs, params, { timeoutMs = null }) {
    const call = new Call(op, model, inputs, fromPlain(params), timeoutMs);
    const session = await this.session();
    for await (const answer of session.call(call.message(), call.leftMs())) {
      if (answer.kind === "RES") return answer.outputs;
      if (answer.kind === "END") throwIfCut(answer);
      if (answer.kind !== "ACK") throw wireError("INTERNAL", "a stream instead of one result");
    }
    throw wireError("INTERNAL", "no result"); // never: a call ends with a terminal frame, or throws
  }

  close() {
    for (const session of this.sessions) session.close();
  }
}

// ---- Test vectors (vectors/README.md) ---------------------------------------------------------------------

const SPECIAL = {
  $int: (digits) => shrink(BigInt(digits)),
  $float: (hex) => new Float(Buffer.from(hex, "hex").readDoubleBE()),
  $bytes: (hex) => Buffer.from(hex, "hex"),
  $tensor: ([dtype, shape, hex]) => new Tensor(dtype, shape.map(fromJson), Buffer.from(hex, "hex")),
};

function fromJson(json) {
  if (Array.isArray(json)) return json.map(fromJson);
  if (json === null || typeof json !== "object") return json;
  const entries = Object.entries(json);
  const [[name, value] = []] = entries;
  if (entries.length === 1 && Object.hasOwn(SPECIAL, name)) return SPECIAL[name](value);
  return new Map(entries.map(([key, item]) => [key, fromJson(item)]));
}

function toJson(value) {
  if (typeof value === "bigint") return { $int: String(value) };
  if (value instanceof Float) {
    const bits = Buffer.alloc(8);
    bits.writeDoubleBE(value.value);
    return { $float: bits.toString("hex") };
  }
  if (value instanceof Uint8Array) return { $bytes: value.toString("hex") };
  if (value instanceof Tensor) return { $tensor: [value.dtype, value.shape.map(toJson), value.bytes.toString("hex")] };
  if (Array.isArray(value)) return value.map(toJson);
  if (value instanceof Map) return Object.fromEntries([...value].map(([key, item]) => [key, toJson(item)]));
  return value;
}

const messageFromJson = (json) => Object.fromEntries(fromJson(json));
const messageToJson = (message) => toJson(new Map(Object.entries(message)));

function fits(expected, actual) {
  if (expected?.$any) return true;
  if (expected === null || actual === null || typeof expected !== "object" || typeof actual !== "object") {
    return expected === actual;
  }
  const keys = Object.keys(expected);
  return Array.isArray(expected) === Array.isArray(actual) && keys.length === Object.keys(actual).length
    && keys.every((key) => Object.hasOwn(actual, key) && fits(expected[key], actual[key]));
}

function check(expected, actual, what) {
  if (!fits(expected, actual)) throw new Error(`${what}: ${JSON.stringify(actual)}, not ${JSON.stringify(expected)}`);
}

// Ways to cut bytes: whole, byte by byte, and in two at every offset.
function cuts(longest) {
  const inTwo = (_, i) => (bytes) => [bytes.subarray(0, i + 1), bytes.subarray(i + 1)];
  const single = (bytes) => Array.from(bytes, (_, i) => bytes.subarray(i, i + 1));
  return [(bytes) => [bytes], single, ...Array.from({ length: Math.max(longest - 1, 0) }, inTwo)];
}

function vectorReceiver({ direction, hex, limits, feature }) {
  const fromOpener = direction === "c>s" || direction === "g>w";
  const worker = direction.includes("w");
  const features = new Set(feature ? [feature] : []);
  const receiver = new Receiver({ fromOpener, worker, limits: { ...defaultLimits(worker), ...limits }, features });
  const first = KINDS.get(parseInt(hex.slice(8, 10), 16))?.name;
  receiver.greeting = first === (fromOpener ? "HELLO" : "WELCOME");
  return receiver;
}

// What comes out of a frame vector: messages, or the error.
function receiveVector(vector, parts) {
  const receiver = vectorReceiver(vector);
  const ok = [];
  try {
    for (const part of parts) {
      receiver.push(part);
      for (let frame; (frame = receiver.next()); ) ok.push(messageToJson(receiver.decode(frame)));
    }
  } catch (error) {
    if (!(error instanceof WireError)) throw error;
    return { err: { code: error.code, name: error.name, scope: error.stream ? "stream" : "connection" } };
  }
  return { ok };
}

function encodeVector(vector, bytes) {
  const { fromOpener, limits } = vectorReceiver(vector);
  const frames = vector.ok.map((json) => encode(messageFromJson(json), limits, { fromOpener }).frame);
  check({ ok: vector.ok }, receiveVector(vector, frames), "encoded and read again");
  let at = 0;
  for (const [i, frame] of frames.entries()) {
    const same = ["EVB", "STEP"].includes(vector.ok[i].kind) ? frame.length : HEADER_BYTES;
    check(bytes.subarray(at, at + same).toString("hex"), frame.subarray(0, same).toString("hex"), "encoded");
    at += HEADER_BYTES + bytes.readUInt32LE(at);
  }
}

function runFrame(vector) {
  const bytes = Buffer.from(vector.hex, "hex");
  const expected = vector.err ? { err: vector.err } : { ok: vector.ok };
  for (const cut of cuts(bytes.length)) check(expected, receiveVector(vector, cut(bytes)), "read");
  if (vector.ok && vector.encode !== false) encodeVector(vector, bytes);
}

// Runs the steps of a script, with the bytes of its peer cut in one way.
class Script {
  constructor({ role, features, limits, steps }, cut) {
    Object.assign(this, { steps, cut, heard: [], sent: Buffer.alloc(0), now: 0 });
    const hear = (message) => this.heard.push(messageToJson(message));
    this.connection = new Connection({ role, features, limits, hear });
  }

  run() {
    this.steps.forEach((step, i) => {
      const [[name, value]] = Object.entries(step);
      this[name](value, `step ${i}, ${name}`);
    });
    this.hears([], "heard at the end");
    this.sends([], "sent at the end");
  }

  peer(hex) { for (const part of this.cut(Buffer.from(hex, "hex"))) this.connection.receive(part, this.now); }
  app(json) { this.connection.send(messageFromJson(json), this.now); }
  hears(expected, what) { check(expected, this.heard.splice(0), what); }

  wait_s(seconds) {
    this.now += seconds;
    this.connection.tick(this.now);
  }

  // The frames that have left, read as the peer would read them.
  sends(expected, what) {
    this.collect();
    const { opener, worker, features } = this.connection;
    const receiver = new Receiver({ fromOpener: opener, worker, limits: defaultLimits(worker), features });
    receiver.greeting = false;
    receiver.push(this.sent);
    const messages = [];
    for (let frame; (frame = receiver.next()); ) messages.push(messageToJson(receiver.decode(frame)));
    this.sent = receiver.inbox.take(receiver.inbox.length);
    check(expected, messages, what);
    check(0, this.sent.length, `${what}: bytes behind the frames`);
  }

  sends_bytes(hex, what) {
    this.collect();
    check(hex, this.sent.subarray(0, hex.length / 2).toString("hex"), what);
    this.sent = this.sent.subarray(hex.length / 2);
  }

  collect() {
    this.sent = Buffer.concat([this.sent, ...this.connection.out.splice(0)]);
  }

  closed(expected, what) {
    const { error } = this.connection;
    check(expected, error === undefined ? false : { code: error?.code ?? null }, what);
  }
}

function runScript(script) {
  const lengths = script.steps.map(({ peer = "" }) => peer.length / 2);
  for (const cut of cuts(Math.max(...lengths))) new Script(script, cut).run();
}

function runVectors(directory) {
  const read = (file) => readFileSync(join(directory, file), "utf8").trim().split("\n").map((line) => JSON.parse(line));
  const [frames, scripts] = [read("frames.jsonl"), read("scripts.jsonl")];
  let failed = 0;
  for (const vector of [...frames, ...scripts]) {
    try {
      if (vector.steps) runScript(vector);
      else runFrame(vector);
    } catch (error) {
      failed += 1;
      console.error(`FAILED ${vector.name}: ${error.message}`);
    }
  }
  const bad = frames.filter((vector) => vector.err).length;
  console.log(`${frames.length - bad} good frames, ${bad} bad frames, ${scripts.length} scripts; ${failed} failed`);
  return failed === 0;
}

// ---- The command line -------------------------------------------------------------------------------------

const HELP = `usage: node client.mjs ADDRESS generate MODEL PROMPT [JSON params]
       node client.mjs ADDRESS embed MODEL TEXT...
       node client.mjs ADDRESS infer MODEL JSON
       node client.mjs --vectors DIR`;

// Values as JSON for people: tensors with numbers; what JSON has no numbers for is text.
function toPlain(value) {
  if (value instanceof Tensor) return { dtype: value.dtype, shape: value.shape, data: value.data().map(toPlain) };
  if (value instanceof Map) return Object.fromEntries([...value].map(([name, item]) => [name, toPlain(item)]));
  if (Array.isArray(value)) return value.map(toPlain);
  if (value instanceof Float) return toPlain(value.value);
  if (value?.constructor === Object) return toPlain(new Map(Object.entries(value)));
  if (typeof value === "bigint" || (typeof value === "number" && !Number.isFinite(value))) return String(value);
  return toJson(value);
}

function fromPlain(value) {
  if (Array.isArray(value)) return value.map(fromPlain);
  if (value === null || typeof value !== "object") return value;
  if (value.dtype && value.shape && value.data) return Tensor.of(value.dtype, value.shape, value.data);
  return new Map(Object.entries(value).map(([name, item]) => [name, fromPlain(item)]));
}

const print = (value) => console.log(JSON.stringify(toPlain(value)));

const COMMANDS = {
  async generate(client, model, prompt, params = "{}") {
    const generation = client.generate(model, prompt, JSON.parse(params));
    for await (const event of generation) print(event);
    const { text, logprobs, promptLogprobs, end: { finish, count, usage } } = generation;
    print({ finish, count, usage, text, ...(logprobs && { logprobs }), ...(promptLogprobs && { promptLogprobs }) });
  },

  async embed(client, model, ...texts) {
    for (const vector of await client.embed(model, texts)) print(vector);
  },

  async infer(client, model, inputs) {
    print(await client.infer(model, JSON.parse(inputs)));
  },
};

// The method `token` needs TLS, a Unix socket or loopback (15.2); this client has no TLS.
function parseAddress(target, token) {
  const auth = token ? new Map([["method", "token"], ["token", token]]) : null;
  if (target.includes("/")) return { path: target, auth };
  const [, bracketed, name, port] = /^(?:\[([^\]]+)\]|([^:]+)):(\d+)$/.exec(target) ?? [];
  if (!port) throw new Error(`${target} is neither HOST:PORT nor a path`);
  const host = bracketed ?? name;
  if (token && host !== "localhost" && host !== "::1" && !host.startsWith("127.")) {
    throw new Error("a token is sent over loopback only, because this client has no TLS");
  }
  return { host, port: Number(port), auth };
}

async function main([target, command, ...rest]) {
  if (target === "--vectors" && command) {
    process.exitCode = runVectors(command) ? 0 : 1;
    return;
  }
  if (!Object.hasOwn(COMMANDS, command ?? "") || rest.length < 2) throw new Error(HELP);
  const client = await Client.connect(target, { token: process.env.TENSORWIRE_TOKEN });
  try {
    await COMMANDS[command](client, ...rest);
  } finally {
    client.close();
  }
}

if (process.argv[1] && import.meta.url === pathToFileURL(process.argv[1]).href) {
  main(process.argv.slice(2)).catch((error) => {
    const number = error instanceof WireError ? ` (0x${error.code.toString(16).padStart(4, "0")})` : "";
    console.error(`${error.name}${number}: ${error.message}`);
    process.exitCode = 1;
  });
}
