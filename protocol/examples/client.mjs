// A client for Tensorwire servers in one file. It follows ../SPEC.md and shares no code with the
// reference implementation; "§" names the sections of that text.
// Node 20 or later, nothing but its standard library.
//
//   node client.mjs --vectors ../vectors                 check every golden frame and exchange
//   node client.mjs HOST:PORT generate MODEL PROMPT [JSON params]
//   node client.mjs HOST:PORT embed MODEL TEXT...
//   node client.mjs HOST:PORT infer MODEL '{"x": {"dtype": "F32", "shape": [2], "data": [1, 2]}}'

import { randomBytes } from "node:crypto";
import { readFileSync } from "node:fs";
import net from "node:net";
import path from "node:path";
import { pathToFileURL } from "node:url";

// -- §4 kinds, §12 limits, §13 errors -------------------------------------------------------------

const KINDS = {
  HELLO: 0x01, WELCOME: 0x02, AUTH: 0x03, PING: 0x04, PONG: 0x05, GOAWAY: 0x06, CREDIT: 0x07,
  REQ: 0x10, DATA: 0x11, CANCEL: 0x12, RESUME: 0x13,
  RES: 0x20, EVT: 0x21, EVB: 0x22, ERR: 0x23, ACK: 0x24, END: 0x25,
  SUBMIT: 0x60, STEP: 0x61, HEARTBEAT: 0x62, DRAIN: 0x63, LOAD: 0x64, SHM: 0x65,
};
const NAMES = new Map(Object.entries(KINDS).map(([name, number]) => [number, name]));
const BOTH_WAYS = ["AUTH", "PING", "PONG", "GOAWAY", "ERR", "DATA"];
const ALLOWED = {
  "c>s": new Set([...BOTH_WAYS, "HELLO", "CREDIT", "REQ", "CANCEL", "RESUME"]),
  "s>c": new Set([...BOTH_WAYS, "WELCOME", "CREDIT", "RES", "EVT", "EVB", "ACK", "END"]),
  "g>w": new Set([...BOTH_WAYS, "HELLO", "CANCEL", "SUBMIT", "DRAIN", "LOAD", "SHM"]),
  "w>g": new Set([...BOTH_WAYS, "WELCOME", "RES", "ACK", "END", "STEP", "HEARTBEAT", "SHM"]),
};
const FEATURES_OF = {
  AUTH: ["auth"], CREDIT: ["credit", "body"], DATA: ["body"], RESUME: ["resume"], LOAD: ["reserved"], SHM: ["shm"],
};
const ON_STREAM_0 = new Set(["HELLO", "WELCOME", "AUTH", "PING", "PONG", "GOAWAY", "EVB", "STEP", "HEARTBEAT", "DRAIN", "LOAD"]);
const WITH_SEGMENTS = new Set(["REQ", "RES", "SUBMIT"]);
const WITH_AUX = new Set([...WITH_SEGMENTS, "DATA", "ERR", "GOAWAY"]);
const FLAG_END = 1, FLAG_BODY = 4, FIRST_OPTIONAL_KIND = 0x80;
const HEADER_BYTES = 16, ALIGNMENT = 64, MIN_FRAME_BYTES = 4096;
const PREFACE = Buffer.from([0x94, 0x54, 0x57, 0x31, 0x0d, 0x0a, 0x1a, 0x0a]);

const CLIENT_LIMITS = {
  frame_bytes: 1114112, message_bytes: 268435456, client_meta_bytes: 16384, server_meta_bytes: 262144, preauth_bytes: 4096,
  preauth_frames: 4, preauth_out_bytes: 1024, meta_depth: 16, container_items: 4096, key_bytes: 64, segments: 64,
  inline_bytes: 1024, tensor_dims: 16, streams: 512, handshake_s: 5.0, ping_after_s: 20.0,
  dead_after_s: 60.0, ping_interval_s: 1.0, ping_burst: 8, fault_burst: 200, faults_per_s: 50.0,
  frame_grace_s: 10.0, frame_bytes_per_s: 65536, send_high_water_bytes: 262144,
  send_hard_bytes: 4194304,
};
const WORKER_LIMITS = {
  ...CLIENT_LIMITS, client_meta_bytes: 1048576, server_meta_bytes: 1048576, container_items: 65536,
  message_bytes: 8589934592, preauth_bytes: 65536, streams: 8192, fault_burst: 65536, faults_per_s: 65536.0,
  frame_grace_s: 60.0, send_hard_bytes: 67108864,
};
const WITH_FRACTION = new Set(["handshake_s", "ping_after_s", "dead_after_s", "ping_interval_s", "faults_per_s", "frame_grace_s"]);

const CODES = {
  CONNECTION_LOST: 0x0100, FRAME_TOO_LARGE: 0x0102, UNKNOWN_KIND: 0x0103, FRAMING: 0x0104,
  FLOOD: 0x0105, VERSION: 0x0106, HANDSHAKE_TIMEOUT: 0x0107, SEQUENCE: 0x0109, PEER_SILENT: 0x010a,
  BAD_META: 0x0201, BAD_TENSOR: 0x0202, TOO_LARGE: 0x0206, UNSUPPORTED: 0x0207,
  INTERNAL: 0x0407, DEADLINE: 0x0408, CANCELLED: 0x0409,
};

export class WireError extends Error {
  constructor(code, message, { scope = "request", retryable = false, executed = "no", retryAfterMs = null, logId = null } = {}) {
    super(message);
    Object.assign(this, { code, scope, retryable, executed, retryAfterMs, logId });
  }
}

const fail = (name, message) => { throw new WireError(CODES[name], message); };
const failConnection = (name, message) => {
  throw new WireError(CODES[name], message, { scope: "connection", executed: "maybe" });
};

// -- §5 MessagePack -------------------------------------------------------------------------------

/** A float; integers are plain numbers, or BigInt where a number would not be exact. */
export class Float {
  constructor(value) { this.value = value; }
  valueOf() { return this.value; }
  toJSON() { return this.value; }
}

const exact = (big) => (big >= Number.MIN_SAFE_INTEGER && big <= Number.MAX_SAFE_INTEGER ? Number(big) : big);
// ignoreBOM: U+FEFF is a character like others.
const UTF8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

class Unpacker {
  constructor(bytes, limits, onExt) {
    Object.assign(this, { bytes, limits, onExt, at: 0 });
    this.view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  }

  whole() {
    const value = this.value(0);
    if (this.at !== this.bytes.length) fail("BAD_META", "bytes behind the object");
    return value;
  }

  take(count) {
    if (count > this.bytes.length - this.at) fail("BAD_META", "the meta is cut short");
    this.at += count;
    return this.at - count;
  }

  u8() { return this.view.getUint8(this.take(1)); }
  u16() { return this.view.getUint16(this.take(2)); }
  u32() { return this.view.getUint32(this.take(4)); }

  value(depth) {
    const type = this.u8();
    if (type < 0x80) return type;
    if (type < 0x90) return this.map(type & 15, depth);
    if (type < 0xa0) return this.array(type & 15, depth);
    if (type < 0xc0) return this.str(type & 31);
    if (type >= 0xe0) return type - 256;
    switch (type) {
      case 0xc0: return null;
      case 0xc2: return false;
      case 0xc3: return true;
      case 0xc4: return this.bin(this.u8());
      case 0xc5: return this.bin(this.u16());
      case 0xc6: return this.bin(this.u32());
      case 0xc7: return this.ext(this.u8());
      case 0xc8: return this.ext(this.u16());
      case 0xc9: return this.ext(this.u32());
      case 0xca: return new Float(this.view.getFloat32(this.take(4)));
      case 0xcb: return new Float(this.view.getFloat64(this.take(8)));
      case 0xcc: return this.u8();
      case 0xcd: return this.u16();
      case 0xce: return this.u32();
      case 0xcf: return exact(this.view.getBigUint64(this.take(8)));
      case 0xd0: return this.view.getInt8(this.take(1));
      case 0xd1: return this.view.getInt16(this.take(2));
      case 0xd2: return this.view.getInt32(this.take(4));
      case 0xd3: return exact(this.view.getBigInt64(this.take(8)));
      case 0xd4: return this.ext(1);
      case 0xd5: return this.ext(2);
      case 0xd6: return this.ext(4);
      case 0xd7: return this.ext(8);
      case 0xd8: return this.ext(16);
      case 0xd9: return this.str(this.u8());
      case 0xda: return this.str(this.u16());
      case 0xdb: return this.str(this.u32());
      case 0xdc: return this.array(this.u16(), depth);
      case 0xdd: return this.array(this.u32(), depth);
      case 0xde: return this.map(this.u16(), depth);
      case 0xdf: return this.map(this.u32(), depth);
      default: return fail("BAD_META", "a byte that means nothing");
    }
  }

  bin(length) {
    const start = this.take(length);
    return Buffer.from(this.bytes.subarray(start, start + length));
  }

  str(length) {
    const start = this.take(length);
    try {
      return UTF8.decode(this.bytes.subarray(start, start + length));
    } catch {
      return fail("BAD_META", "a text is not UTF-8");
    }
  }

  ext(length) {
    const code = this.view.getInt8(this.take(1));
    return this.onExt(code, this.bin(length));
  }

  // A container of n elements needs n bytes at least: that bounds the loops before they allocate.
  enter(length, depth) {
    if (length > this.limits.container_items || length > this.bytes.length - this.at) {
      fail("BAD_META", "a container has too many elements");
    }
    if (depth >= this.limits.meta_depth) fail("BAD_META", "nested too deep");
    return depth + 1;
  }

  array(length, depth) {
    const inner = this.enter(length, depth);
    const items = [];
    for (let i = 0; i < length; i++) items.push(this.value(inner));
    return items;
  }

  map(length, depth) {
    const inner = this.enter(length, depth);
    const pairs = new Map();
    for (let i = 0; i < length; i++) {
      const key = this.value(inner);
      if (typeof key !== "string" || Buffer.byteLength(key) > this.limits.key_bytes) {
        fail("BAD_META", "a key is no short text");
      }
      if (pairs.has(key)) fail("BAD_META", "a map has the same key twice");
      pairs.set(key, this.value(inner));
    }
    return pairs;
  }
}

class Packer {
  constructor(onTensor) {
    this.onTensor = onTensor;
    this.parts = [];
  }

  done() { return Buffer.concat(this.parts); }

  put(size, write) {
    const part = Buffer.alloc(size);
    write(part);
    this.parts.push(part);
  }

  /** A type byte, then a length or number in as many bytes as the type says. */
  sized(type, bytes, number) {
    this.put(1 + bytes, (part) => {
      part[0] = type;
      if (bytes) part.writeUIntBE(number, 1, bytes);
    });
  }

  value(value) {
    if (value === null || value === undefined) this.sized(0xc0, 0);
    else if (typeof value === "boolean") this.sized(value ? 0xc3 : 0xc2, 0);
    else if (typeof value === "bigint") this.integer(value);
    else if (typeof value === "number" && Number.isSafeInteger(value)) this.integer(BigInt(value));
    else if (typeof value === "number") this.float(value);
    else if (value instanceof Float) this.float(value.value);
    else if (typeof value === "string") this.str(value);
    else if (value instanceof Tensor) this.ext(1, this.onTensor(value));
    else if (value instanceof Uint8Array) this.bin(value);
    else if (Array.isArray(value)) this.array(value);
    else if (value instanceof Map) this.map([...value]);
    else if (typeof value === "object") this.map(Object.entries(value));
    else fail("BAD_META", `a ${typeof value} cannot be sent`);
    return this;
  }

  float(value) {
    this.put(9, (part) => {
      part[0] = 0xcb;
      part.writeDoubleBE(value, 1);
    });
  }

  integer(big) {
    if (big >= 0n && big < 128n) this.sized(Number(big), 0);
    else if (big < 0n && big >= -32n) this.sized(256 + Number(big), 0);
    else if (big >= 0n && big < 2n ** 8n) this.sized(0xcc, 1, Number(big));
    else if (big >= 0n && big < 2n ** 16n) this.sized(0xcd, 2, Number(big));
    else if (big >= 0n && big < 2n ** 32n) this.sized(0xce, 4, Number(big));
    else if (big >= 0n && big < 2n ** 64n) this.put(9, (part) => { part[0] = 0xcf; part.writeBigUInt64BE(big, 1); });
    else if (big < 0n && big >= -(2n ** 7n)) this.sized(0xd0, 1, Number(big) + 2 ** 8);
    else if (big < 0n && big >= -(2n ** 15n)) this.sized(0xd1, 2, Number(big) + 2 ** 16);
    else if (big < 0n && big >= -(2n ** 31n)) this.sized(0xd2, 4, Number(big) + 2 ** 32);
    else if (big < 0n && big >= -(2n ** 63n)) this.put(9, (part) => { part[0] = 0xd3; part.writeBigInt64BE(big, 1); });
    else fail("BAD_META", "an integer of more than 64 bits");
  }

  /** The shortest head of several: [bytes of the length, type]. */
  head(length, forms) {
    const [bytes, type] = forms.find(([size]) => length < 2 ** (8 * size));
    this.sized(type, bytes, length);
  }

  str(text) {
    if (!text.isWellFormed()) fail("BAD_META", "a text holds half a surrogate pair");
    const bytes = Buffer.from(text);
    if (bytes.length < 32) this.sized(0xa0 | bytes.length, 0);
    else this.head(bytes.length, [[1, 0xd9], [2, 0xda], [4, 0xdb]]);
    this.parts.push(bytes);
  }

  bin(bytes) {
    this.head(bytes.length, [[1, 0xc4], [2, 0xc5], [4, 0xc6]]);
    this.parts.push(bytes);
  }

  ext(code, bytes) {
    const fixed = [1, 2, 4, 8, 16].indexOf(bytes.length);
    if (fixed >= 0) this.sized(0xd4 + fixed, 0);
    else this.head(bytes.length, [[1, 0xc7], [2, 0xc8], [4, 0xc9]]);
    this.parts.push(Buffer.from([code]), bytes);
  }

  array(items) {
    if (items.length < 16) this.sized(0x90 | items.length, 0);
    else this.head(items.length, [[2, 0xdc], [4, 0xdd]]);
    for (const item of items) this.value(item);
  }

  map(pairs) {
    if (pairs.length < 16) this.sized(0x80 | pairs.length, 0);
    else this.head(pairs.length, [[2, 0xde], [4, 0xdf]]);
    for (const [key, item] of pairs) {
      this.str(key);
      this.value(item);
    }
  }
}

const pack = (value, onTensor = () => fail("BAD_TENSOR", "no tensor may stand here")) =>
  new Packer(onTensor).value(value).done();

// -- §6 tensors -----------------------------------------------------------------------------------

const DTYPES = {
  F64: [8, Float64Array], F32: [4, Float32Array], F16: [2, null], BF16: [2, null],
  F8_E4M3: [1, null], F8_E5M2: [1, null],
  I64: [8, BigInt64Array], I32: [4, Int32Array], I16: [2, Int16Array], I8: [1, Int8Array],
  U64: [8, BigUint64Array], U32: [4, Uint32Array], U16: [2, Uint16Array], U8: [1, Uint8Array],
  BOOL: [1, Uint8Array],
};
const isIndex = (v) => (typeof v === "number" && v >= 0) || (typeof v === "bigint" && v >= 0n);

export class Tensor {
  /** `data` are the bytes, little-endian, in C order. */
  constructor(dtype, shape, data) { Object.assign(this, { dtype, shape, data }); }

  static of(dtype, shape, numbers) {
    const values = DTYPES[dtype][1].from(numbers);
    return new Tensor(dtype, shape, Buffer.from(values.buffer, values.byteOffset, values.byteLength));
  }

  /** The values; of dtypes that JavaScript does not have, the bytes. */
  values() {
    const Values = DTYPES[this.dtype][1] ?? Uint8Array;
    return new Values(Uint8Array.from(this.data).buffer);
  }
}

/** What turns descriptors of one frame into tensors. */
function tensorReader(segments, limits) {
  const used = new Set();
  return (code, payload) => {
    if (code === -1) fail("BAD_META", "timestamps are no values here");
    if (code !== 1) fail("BAD_TENSOR", `ext type ${code} is not allowed`);
    let descriptor;
    try {
      descriptor = new Unpacker(payload, limits, () => fail("BAD_TENSOR", "ext in a descriptor")).whole();
    } catch {
      fail("BAD_TENSOR", "a descriptor is not readable");
    }
    if (!Array.isArray(descriptor) || descriptor.length !== 3) fail("BAD_TENSOR", "a descriptor is [dtype, shape, ref]");
    const [dtype, shape, ref] = descriptor;
    if (typeof dtype !== "string" || !Object.hasOwn(DTYPES, dtype)) fail("BAD_TENSOR", "unknown dtype");
    if (!Array.isArray(shape) || shape.length > limits.tensor_dims || !shape.every(isIndex)) fail("BAD_TENSOR", "bad shape");
    let bytes;
    if (Buffer.isBuffer(ref)) {
      if (ref.length > limits.inline_bytes) fail("BAD_TENSOR", "an inline tensor is too large");
      bytes = ref;
    } else {
      if (typeof ref !== "number" || ref < 0 || ref >= segments.length) fail("BAD_TENSOR", "ref names no segment");
      if (used.has(ref)) fail("BAD_TENSOR", "two tensors name one segment");
      used.add(ref);
      bytes = segments[ref];
    }
    const product = (dims) => dims.reduce((all, n) => all * BigInt(n), BigInt(DTYPES[dtype][0]));
    if (product(shape) !== BigInt(bytes.length)) fail("BAD_TENSOR", "shape and bytes differ");
    if (product(shape.filter((n) => n)) >= 2n ** 63n) fail("BAD_TENSOR", "a shape beyond what is possible");
    return new Tensor(dtype, shape, bytes);
  };
}

// -- §7 metas -------------------------------------------------------------------------------------

const bad = (what) => fail("BAD_META", `${what} is not as it must be`);
const isU32 = (v) => typeof v === "number" && v >= 0 && v <= 0xffffffff;
const isI32 = (v) => typeof v === "number" && v >= -(2 ** 31) && v < 2 ** 31;
const isStr = (v) => typeof v === "string";
const isBin = (v) => Buffer.isBuffer(v);
const isListOf = (check) => (v) => Array.isArray(v) && v.every(check);
const isNumber = (v) => typeof v === "number" || typeof v === "bigint" || v instanceof Float;

function holdsTensor(value) {
  if (value instanceof Tensor) return true;
  if (value instanceof Map) return [...value.values()].some(holdsTensor);
  return Array.isArray(value) && value.some(holdsTensor);
}

function isPlainMap(value) {
  if (!(value instanceof Map)) return false;
  return holdsTensor(value) ? fail("BAD_TENSOR", "no tensor may stand here") : true;
}

const NO_DEFAULT = Symbol("required");
const req = (name, check) => ({ name, check, initial: NO_DEFAULT });
const opt = (name, check, initial = () => null) => ({ name, check, initial });
const emptyMap = () => new Map();
const map = (name) => opt(name, isPlainMap, emptyMap);
const numbers = (name) => opt(name, (v) => v instanceof Map && [...v.values()].every(isNumber), emptyMap);
const tensorMap = (name) => opt(name, (v) => v instanceof Map, emptyMap);
const key = req("key", (v) => isBin(v) && v.length === 16);
const priority = opt("priority", (v) => typeof v === "number" && v >= -100 && v <= 100, () => 0);
/** A map of which an empty one is the same as none. */
const noneIfEmpty = (name) => ({ ...opt(name, isPlainMap), read: (v) => (v?.size ? v : null) });
const packIds = (ids) => {
  const packed = Buffer.alloc(4 * ids.length);
  ids.forEach((id, i) => packed.writeInt32LE(id, 4 * i));
  return packed;
};
const unpackIds = (packed) => Array.from({ length: packed.length / 4 }, (_, i) => packed.readInt32LE(4 * i));
const isPackedIds = (v) => isBin(v) && v.length % 4 === 0;
const idsField = (name, initial) => ({
  ...opt(name, isPackedIds, initial),
  read: (v) => (Buffer.isBuffer(v) ? unpackIds(v) : v),
  write: (v) => (v === null ? null : packIds(v)),
});

const COLUMNS = [
  req("first_indexes", isListOf(isU32)), opt("counts", isListOf(isU32)), req("tokens", isListOf(isI32)),
  req("texts", isListOf(isStr)), noneIfEmpty("extra"),
];
const GREETING = [req("version", isU32), req("features", isListOf(isStr)), map("limits"), opt("software", isStr, () => "")];
const LAYOUTS = {
  HELLO: [...GREETING, noneIfEmpty("auth")],
  WELCOME: [...GREETING, opt("session", isBin, () => Buffer.alloc(0)), noneIfEmpty("auth")],
  AUTH: [{ ...map("payload"), isWritten: true }],
  GOAWAY: [req("last_stream", isU32), opt("grace_ms", isU32, () => 0), opt("alternatives", isListOf(isStr), () => [])],
  REQ: [
    req("op", isStr), key, opt("model", isStr), tensorMap("inputs"), map("params"),
    opt("deadline_ms", isU32), opt("credit", isU32), priority, opt("trace", isStr),
  ],
  CANCEL: [req("reason", isStr)],
  RESUME: [key, req("next_index", isU32), opt("next_char", isU32, () => 0), opt("credit", isU32)],
  RES: [{ ...tensorMap("outputs"), isWritten: true }, numbers("usage"), numbers("timings"), map("extra")],
  EVT: [req("index", isU32), req("tokens", isListOf(isI32)), req("text", isStr), noneIfEmpty("extra")],
  EVB: [req("streams", isListOf(isU32)), ...COLUMNS],
  ERR: [
    req("message", isStr), req("retryable", (v) => typeof v === "boolean"),
    req("executed", (v) => ["no", "maybe", "yes"].includes(v)), opt("retry_after_ms", isU32),
    opt("log_id", isStr), map("detail"),
  ],
  ACK: [opt("prompt_tokens", isU32), idsField("prompt_ids")],
  END: [
    req("finish", (v) => ["stop", "length", "cancelled", "deadline"].includes(v)), req("count", isU32),
    req("checksum", isU32), numbers("usage"), numbers("timings"), map("extra"),
  ],
  SUBMIT: [
    req("op", isStr), key, req("attempt", (v) => isU32(v) && v >= 1), opt("model", isStr), tensorMap("inputs"),
    map("params"), opt("deadline_ms", isU32), priority, idsField("so_far", () => []),
    opt("tenant", isStr, () => ""),
  ],
  STEP: [req("streams", isListOf(isU32)), req("attempts", isListOf(isU32)), ...COLUMNS],
  HEARTBEAT: [req("state", isStr), opt("steps", isU32, () => 0), map("load"), opt("card", isPlainMap), opt("detail", isStr)],
  DRAIN: [req("grace_ms", isU32)],
  LOAD: [{ ...map("payload"), isWritten: true }],
  SHM: [{ ...map("payload"), isWritten: true }],
};

/** The message of a frame's meta; throws BAD_META or BAD_TENSOR. */
function readMeta(frame, limits) {
  const { name, stream } = frame;
  const head = ON_STREAM_0.has(name) ? { kind: name } : { kind: name, stream };
  if (name === "DATA") {
    return { ...head, segment: frame.aux, payload: frame.segments[0], last: Boolean(frame.flags & FLAG_END) };
  }
  const meta = new Unpacker(frame.meta, limits, tensorReader(frame.segments, limits)).whole();
  if (name === "PING" || name === "PONG") {
    return isBin(meta) && meta.length === 8 ? { ...head, payload: meta } : bad(name);
  }
  if (name === "CREDIT") return isU32(meta) && meta >= 1 ? { ...head, amount: meta } : bad(name);
  if (!Array.isArray(meta)) bad("the meta");
  const fields = LAYOUTS[name];
  const needed = fields.reduce((most, f, i) => (f.initial === NO_DEFAULT || f.isWritten ? i + 1 : most), 0);
  if (meta.length < needed) bad("the number of fields");
  if (name === "ERR" || name === "GOAWAY") head.code = frame.aux;
  for (const [i, field] of fields.entries()) {
    let value = meta[i] ?? null;
    if (value !== null) {
      if (!field.check(value)) bad(`${name} ${field.name}`);
    } else if (field.initial === NO_DEFAULT) {
      bad(`${name} ${field.name}`);
    } else {
      value = field.initial();
    }
    head[field.name] = field.read ? field.read(value) : value;
  }
  if (name === "EVB" || name === "STEP") checkColumns(head);
  return head;
}

function checkColumns({ streams, attempts = streams, first_indexes, counts, tokens, texts }) {
  const n = streams.length;
  const isEven = [attempts, first_indexes, counts ?? streams, texts].every((column) => column.length === n);
  const total = counts ? counts.reduce((sum, count) => sum + count, 0) : n;
  if (!isEven || tokens.length !== total) bad("the columns of a batch");
}

// -- §3 frames ------------------------------------------------------------------------------------

const padding = (offset) => (ALIGNMENT - (offset % ALIGNMENT)) % ALIGNMENT;

/** The bytes of a message's frame. */
export function encode(message, limits = CLIENT_LIMITS) {
  const { kind } = message;
  const segments = [];
  let meta = Buffer.alloc(0), flags = 0, aux = 0;
  const onTensor = (tensor) => {
    const isInline = tensor.data.length <= limits.inline_bytes;
    if (!isInline) segments.push(tensor.data);
    return pack([tensor.dtype, tensor.shape, isInline ? tensor.data : segments.length - 1]);
  };
  if (kind === "DATA") {
    aux = message.segment;
    flags = message.last ? FLAG_END : 0;
  } else if (kind === "PING" || kind === "PONG") {
    meta = pack(message.payload);
  } else if (kind === "CREDIT") {
    meta = pack(message.amount);
  } else {
    const values = LAYOUTS[kind].map((field) => {
      const value = message[field.name] ?? (field.initial === NO_DEFAULT ? null : field.initial());
      return field.write ? field.write(value) : value;
    });
    meta = pack(values, WITH_SEGMENTS.has(kind) ? onTensor : undefined);
    if (kind === "ERR" || kind === "GOAWAY") aux = message.code;
  }
  if (segments.length > limits.segments) fail("TOO_LARGE", "too many tensors in one message");
  const parts = [];
  for (const segment of segments) {
    const length = Buffer.alloc(8);
    length.writeBigUInt64LE(BigInt(segment.length));
    parts.push(length);
    aux += 1;
  }
  parts.push(meta);
  if (kind === "DATA") parts.push(message.payload);
  let at = HEADER_BYTES + parts.reduce((sum, part) => sum + part.length, 0);
  for (const segment of segments) {
    const pad = padding(at);
    parts.push(Buffer.alloc(pad), segment);
    at += pad + segment.length;
  }
  const header = Buffer.alloc(HEADER_BYTES);
  header.writeUInt32LE(at - HEADER_BYTES, 0);
  header[4] = KINDS[kind];
  header[5] = flags;
  header.writeUInt16LE(aux, 6);
  header.writeUInt32LE(message.stream ?? 0, 8);
  header.writeUInt32LE(meta.length, 12);
  return Buffer.concat([header, ...parts]);
}

// -- §15.3 bodies ---------------------------------------------------------------------------------

const BODY_BYTES = 1 << 20, WINDOW_BYTES = 1 << 20, DATA_BYTES = 1 << 20;

/** A message that is too large for a frame, on its way out: its head, and DATA as the server allows it. */
class Outgoing {
  constructor(stream, frame, peerFrameBytes) {
    const count = frame.readUInt16LE(6);
    const lengths = Array.from({ length: count }, (_, i) => Number(frame.readBigUInt64LE(HEADER_BYTES + 8 * i)));
    let at = HEADER_BYTES + 8 * count + frame.readUInt32LE(12);
    this.head = Buffer.from(frame.subarray(0, at));
    this.head.writeUInt32LE(at - HEADER_BYTES, 0);
    this.head[5] |= FLAG_BODY;
    this.segments = lengths.map((length) => {
      const start = at + padding(at);
      at = start + length;
      return frame.subarray(start, at);
    });
    this.left = lengths.reduce((sum, length) => sum + length, 0);
    this.most = Math.min(DATA_BYTES, peerFrameBytes); // of one DATA frame
    Object.assign(this, { stream, size: this.left, segment: 0, at: 0, allowed: WINDOW_BYTES, isDone: false });
  }

  /** The frames that may leave now. */
  * frames() {
    while (!this.isDone && (this.allowed > 0 || !this.left)) {
      while (this.segment + 1 < this.segments.length && this.at === this.segments[this.segment].length) {
        this.segment += 1;
        this.at = 0;
      }
      const payload = this.segments[this.segment].subarray(this.at, this.at + Math.min(this.most, this.allowed));
      this.at += payload.length;
      this.left -= payload.length;
      this.allowed -= payload.length;
      this.isDone = !this.left;
      yield encode({ kind: "DATA", stream: this.stream, segment: this.segment, payload, last: this.isDone });
    }
  }

  /** The end of a body whose rest is not sent. */
  end() { return encode({ kind: "DATA", stream: this.stream, segment: this.segment, payload: Buffer.alloc(0), last: true }); }
}

/** A message whose segments arrive as DATA. */
class Incoming {
  constructor(frame, limits) {
    if (!frame.aux || frame.aux > limits.segments) failConnection("FRAMING", "a body of no or too many segments");
    this.left = frame.lengths.reduce((sum, length) => sum + length, 0);
    if (this.left > limits.message_bytes) failConnection("FRAMING", "an answer is larger than was allowed");
    Object.assign(this, { frame, limits, parts: frame.lengths.map(() => []), segment: 0, room: frame.lengths[0] });
    this.#skipFull();
  }

  #skipFull() {
    while (!this.room && this.segment + 1 < this.frame.lengths.length) this.room = this.frame.lengths[++this.segment];
  }

  /** Take one DATA; the whole message behind the last one, else null. */
  take({ segment, payload, last }) {
    const size = payload.length;
    if (segment !== this.segment || size > this.room || (!size && !last)) failConnection("SEQUENCE", "DATA that is not due");
    this.left -= size;
    if (last !== (this.left === 0)) failConnection("SEQUENCE", "a body ends at its last byte");
    this.parts[segment].push(Buffer.from(payload));
    this.room -= size;
    this.#skipFull();
    if (!last) return null;
    this.frame.segments = this.parts.map((parts) => Buffer.concat(parts));
    try {
      return readMeta(this.frame, this.limits);
    } catch (error) {
      return failConnection("FRAMING", error.message);
    }
  }
}

/** §11: bytes in any pieces become messages, or a WireError says what is wrong. */
export class Receiver {
  constructor(direction, { limits = null, features = [], inHandshake = false } = {}) {
    const isClientLink = direction === "c>s" || direction === "s>c";
    this.direction = direction;
    this.limits = limits ?? (isClientLink ? CLIENT_LIMITS : WORKER_LIMITS);
    this.features = new Set(features);
    this.inHandshake = inHandshake; // of an answerer: HELLO is still awaited
    this.lastStream = 0;
    this.chunks = [];
    this.size = 0;
  }

  push(bytes) {
    this.chunks.push(bytes);
    this.size += bytes.length;
  }

  /** The next message, null until more bytes are there. Errors have a scope, and a stream of theirs. */
  next() {
    for (;;) {
      const frame = this.#nextFrame();
      if (frame === null) return null;
      if (frame.kind >= FIRST_OPTIONAL_KIND) {
        if (this.inHandshake) failConnection("UNKNOWN_KIND", "nothing but the greeting is heard first");
        continue;
      }
      return this.#admit(frame);
    }
  }

  #front(count) {
    if (this.chunks[0].length < count) this.chunks = [Buffer.concat(this.chunks)];
    return this.chunks[0];
  }

  #nextFrame() {
    if (this.size < HEADER_BYTES) return null;
    const bodyBytes = this.#front(HEADER_BYTES).readUInt32LE(0);
    const { frame_bytes: most, preauth_bytes: first } = this.limits;
    if (bodyBytes > (this.inHandshake ? Math.min(most, first) : most)) {
      failConnection("FRAME_TOO_LARGE", `a frame of ${bodyBytes} bytes was announced`);
    }
    const total = HEADER_BYTES + bodyBytes;
    if (this.size < total) return null;
    const whole = this.#front(total);
    this.chunks[0] = whole.subarray(total);
    if (!this.chunks[0].length) this.chunks.shift();
    this.size -= total;
    return cutFrame(whole.subarray(0, total), this.limits.segments);
  }

  #admit(frame) {
    const { name, stream } = frame;
    const features = FEATURES_OF[name];
    if (!ALLOWED[this.direction].has(name) || (features && !features.some((f) => this.features.has(f)))) {
      failConnection("UNKNOWN_KIND", `kind ${frame.kind} is not accepted here`);
    }
    if (stream && ON_STREAM_0.has(name)) failConnection("FRAMING", `${name} belongs on stream 0`);
    if (frame.flags & FLAG_BODY && this.features.has("body")) return { kind: "BODY", stream, frame };
    const isOpening = name === "REQ" || name === "SUBMIT";
    if (isOpening && stream <= this.lastStream) failConnection("SEQUENCE", "stream numbers must rise");
    if (isOpening) this.lastStream = stream;
    try {
      if (isOpening && frame.flags & FLAG_BODY && !this.features.has("body")) fail("UNSUPPORTED", "no bodies here");
      const isUp = this.direction === "c>s" || this.direction === "g>w";
      const most = isUp ? this.limits.client_meta_bytes : this.limits.server_meta_bytes;
      if (frame.meta.length > most) fail("TOO_LARGE", "the meta is too large");
      if (WITH_SEGMENTS.has(name) && frame.aux > this.limits.segments) fail("BAD_TENSOR", "too many segments");
      return readMeta(frame, this.limits);
    } catch (error) {
      if (!(error instanceof WireError)) throw error;
      if (!isOpening) failConnection("FRAMING", `${name}: ${error.message}`);
      throw Object.assign(error, { scope: "stream", stream });
    }
  }
}

function cutFrame(whole, maxSegments) {
  const kind = whole[4], flags = whole[5], aux = whole.readUInt16LE(6);
  const stream = whole.readUInt32LE(8), metaBytes = whole.readUInt32LE(12);
  if (kind >= FIRST_OPTIONAL_KIND) return { kind };
  const name = NAMES.get(kind);
  if (name === undefined) failConnection("UNKNOWN_KIND", `unknown kind ${kind}`);
  const allowedFlags = (WITH_SEGMENTS.has(name) ? FLAG_BODY : 0) | (name === "DATA" ? FLAG_END : 0);
  if (flags & ~allowedFlags) failConnection("FRAMING", "flags that may not be set");
  if (aux && !WITH_AUX.has(name)) failConnection("FRAMING", "aux must be 0");
  const count = WITH_SEGMENTS.has(name) ? aux : 0;
  const metaStart = HEADER_BYTES + 8 * count, metaEnd = metaStart + metaBytes;
  if (metaEnd > whole.length) failConnection("FRAMING", "the meta is longer than the body");
  const frame = { kind, name, flags, aux, stream, meta: whole.subarray(metaStart, metaEnd), segments: [], lengths: [] };
  if (name === "DATA") {
    if (metaBytes) failConnection("FRAMING", "DATA has no meta");
    frame.segments.push(whole.subarray(metaEnd));
  } else if (!count || flags & FLAG_BODY) {
    if (metaEnd !== whole.length) failConnection("FRAMING", "bytes behind the meta");
    for (let i = 0; i < count && count <= maxSegments; i++) frame.lengths.push(Number(whole.readBigUInt64LE(HEADER_BYTES + 8 * i)));
  } else if (count <= maxSegments) {
    cutSegments(frame, whole, count, metaEnd);
  }
  return frame;
}

function cutSegments(frame, whole, count, metaEnd) {
  let at = metaEnd;
  for (let i = 0; i < count; i++) {
    const length = whole.readBigUInt64LE(HEADER_BYTES + 8 * i);
    const start = at + padding(at);
    if (BigInt(start) + length > BigInt(whole.length)) failConnection("FRAMING", "a segment is longer than the body");
    if (whole.subarray(at, start).some((byte) => byte)) failConnection("FRAMING", "padding is not zero");
    at = start + Number(length);
    frame.segments.push(whole.subarray(start, at));
  }
  if (at !== whole.length) failConnection("FRAMING", "bytes behind the last segment");
}

// -- §9, §10, §14: the client's end of a connection, without a socket and without a clock ----------

/** §7.1 */
export function checksum(ids) {
  let crc = 0xffffffff;
  for (const byte of packIds(ids)) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return (crc ^ 0xffffffff) >>> 0;
}

export class Connection {
  constructor({ features = [], limits = {}, software = "" } = {}) {
    this.limits = { ...CLIENT_LIMITS, ...limits };
    this.peerLimits = CLIENT_LIMITS;
    this.state = "CONNECTING";
    this.error = null;
    this.isLeaving = false; // GOAWAY was received
    this.lastStream = 0;
    this.nextIndex = new Map(); // of each open stream
    this.receiver = new Receiver("s>c", { limits: this.limits });
    this.out = [PREFACE];
    this.incoming = new Map(); // bodies, by stream
    this.outgoing = new Map();
    this.heardAt = this.pingedAt = this.bornAt = 0;
    this.pings = { left: this.limits.ping_burst, at: 0 };
    const announced = new Map(Object.entries(limits));
    this.#emit({ kind: "HELLO", version: 1, features, limits: announced, software });
  }

  takeOutput() {
    const out = Buffer.concat(this.out);
    this.out = [];
    return out;
  }

  /** Queue a REQ on the next stream; returns its number. */
  request(fields) {
    const stream = fields.stream ?? this.lastStream + 1;
    this.send({ kind: "REQ", key: randomBytes(16), ...fields, stream });
    return stream;
  }

  send(message) {
    if (this.state === "CLOSED") throw this.error ?? new WireError(CODES.CONNECTION_LOST, "the connection is closed");
    const inlineBytes = Math.min(CLIENT_LIMITS.inline_bytes, this.peerLimits.inline_bytes);
    let frame = encode(message, { ...this.peerLimits, inline_bytes: inlineBytes });
    const { frame_bytes: mostBody, client_meta_bytes: mostMeta, message_bytes: mostSegments } = this.peerLimits;
    const isLarge = message.kind === "REQ" && frame.length - HEADER_BYTES > Math.min(BODY_BYTES, mostBody);
    const body = isLarge && this.receiver.features.has("body") ? new Outgoing(message.stream, frame, mostBody) : null;
    if (body) {
      if (body.size > mostSegments) fail("TOO_LARGE", "the server does not accept so many bytes of tensors");
      frame = body.head;
    }
    if (frame.length - HEADER_BYTES > mostBody || frame.readUInt32LE(12) > mostMeta) {
      fail("TOO_LARGE", "the server does not accept a message of this size");
    }
    if (message.kind === "REQ") {
      if (this.isLeaving) fail("CONNECTION_LOST", "the server takes nothing new on this connection");
      this.lastStream = message.stream;
      this.nextIndex.set(message.stream, 0);
    }
    this.out.push(frame);
    if (body) this.outgoing.set(message.stream, body);
    if (body) this.#sendBody(body);
    if (message.kind === "CANCEL") this.#stopBody(message.stream);
  }

  #sendBody(body) {
    this.out.push(...body.frames());
    if (body.isDone) this.outgoing.delete(body.stream);
  }

  #stopBody(stream) {
    const body = this.outgoing.get(stream);
    if (body) this.out.push(body.end());
    this.outgoing.delete(stream);
  }

  /** Take bytes from the server; returns the messages they completed. */
  feed(bytes, now) {
    const messages = [];
    if (this.state === "CLOSED") return messages;
    this.heardAt = now;
    this.receiver.push(bytes);
    try {
      while (this.state !== "CLOSED") {
        const message = this.receiver.next();
        if (message === null) break;
        const heard = this.#take(message, now);
        if (heard) messages.push(heard === true ? message : heard);
      }
    } catch (error) {
      if (!(error instanceof WireError)) throw error;
      this.fail(error);
    }
    return messages;
  }

  tick(now) {
    const { handshake_s, ping_after_s, dead_after_s } = this.limits;
    if (this.state === "CONNECTING" && now - this.bornAt >= handshake_s) {
      this.fail(new WireError(CODES.HANDSHAKE_TIMEOUT, "no WELCOME in time", { retryable: true }));
    }
    if (this.state !== "OPEN") return;
    if (now - this.heardAt >= dead_after_s) {
      this.fail(new WireError(CODES.PEER_SILENT, "nothing was heard for too long", { retryable: true, executed: "maybe" }));
    } else if (now - this.heardAt >= ping_after_s && now - this.pingedAt >= ping_after_s) {
      this.pingedAt = now;
      this.#emit({ kind: "PING", payload: Buffer.alloc(8) });
    }
  }

  fail(error) {
    if (this.state === "CLOSED") return;
    const { code, message, retryable, executed } = error;
    this.#emit({ kind: "ERR", stream: 0, code, message, retryable, executed });
    this.close(error);
  }

  close(error = null) {
    if (this.state === "CLOSED") return;
    this.state = "CLOSED";
    this.error = error;
  }

  #emit(message) { this.out.push(encode(message, this.limits)); }

  /** Whether the message is for the application; or another one, which it has completed. */
  #take(message, now) {
    const { kind, stream } = message;
    if (kind === "ERR" && stream === 0) {
      this.close(errorOf(message));
      return true;
    }
    if (this.state === "CONNECTING") {
      if (kind !== "WELCOME") failConnection("SEQUENCE", `${kind} before WELCOME`);
      return this.#greet(message);
    }
    switch (kind) {
      case "WELCOME":
        return failConnection("SEQUENCE", "a second WELCOME");
      case "PING":
        return this.#answerPing(message, now);
      case "PONG":
        return false;
      case "GOAWAY":
        this.isLeaving = true;
        return true;
      case "EVT":
        this.#advance(stream, message.index, message.tokens.length);
        return true;
      case "EVB":
        for (const event of eventsOf(message)) this.#advance(event.stream, event.index, event.tokens.length);
        return true;
      case "CREDIT": {
        const body = this.outgoing.get(stream);
        if (body) body.allowed += message.amount;
        if (body) this.#sendBody(body);
        return false;
      }
      case "BODY":
        if (!this.nextIndex.has(stream)) failConnection("SEQUENCE", `RES for stream ${stream}, which is not open`);
        this.incoming.set(stream, new Incoming(message.frame, this.limits));
        return false;
      case "DATA": {
        const body = this.incoming.get(stream);
        if (!body) failConnection("SEQUENCE", `DATA on stream ${stream}, where none is due`);
        const whole = body.take(message);
        if (whole) this.incoming.delete(stream);
        return whole && this.#take(whole, now) && whole;
      }
      default: // ACK, RES, ERR, END
        if (!this.nextIndex.has(stream)) failConnection("SEQUENCE", `${kind} for stream ${stream}, which is not open`);
        if (kind === "END" && message.count !== this.nextIndex.get(stream)) failConnection("SEQUENCE", "END counts other tokens");
        if (kind !== "ACK") this.nextIndex.delete(stream);
        if (kind !== "ACK") this.#stopBody(stream);
        return true;
    }
  }

  #greet({ version, features, limits }) {
    if (version !== 1) failConnection("VERSION", `the server speaks version ${version}`);
    const said = {};
    for (const [name, value] of limits) {
      const isFit = isIndex(value) || (WITH_FRACTION.has(name) && value instanceof Float && value >= 0 && value < Infinity);
      if (isFit && Object.hasOwn(CLIENT_LIMITS, name)) said[name] = Number(value);
    }
    this.peerLimits = { ...CLIENT_LIMITS, ...said };
    if (Math.min(this.peerLimits.frame_bytes, this.peerLimits.client_meta_bytes) < MIN_FRAME_BYTES) {
      failConnection("FRAMING", "the server accepts too little");
    }
    this.receiver.features = new Set(features);
    this.state = "OPEN";
    return true;
  }

  #advance(stream, index, count) {
    const expected = this.nextIndex.get(stream);
    if (expected !== index) failConnection("SEQUENCE", `stream ${stream} went on at token ${index}, not ${expected}`);
    this.nextIndex.set(stream, index + count);
  }

  #answerPing({ payload }, now) {
    const { ping_burst, ping_interval_s } = this.limits;
    const left = Math.min(this.pings.left + (now - this.pings.at) / ping_interval_s, ping_burst);
    if (left < 1) failConnection("FLOOD", "too many pings");
    this.pings = { left: left - 1, at: now };
    this.#emit({ kind: "PONG", payload });
    return false;
  }
}

/** The events of an EVT or EVB. */
function eventsOf(message) {
  if (message.kind === "EVT") return [message];
  let at = 0;
  return message.streams.map((stream, i) => {
    const count = message.counts?.[i] ?? 1;
    const tokens = message.tokens.slice(at, (at += count));
    return { stream, index: message.first_indexes[i], tokens, text: message.texts[i] };
  });
}

const errorOf = ({ code, message, retryable, executed, retry_after_ms, log_id }) =>
  new WireError(code, message, { retryable, executed, retryAfterMs: retry_after_ms, logId: log_id });

// -- the client -----------------------------------------------------------------------------------

const DEADLINE_GRACE_MS = 1000; // the server's own END may take so long to arrive
const TICK_MS = 500;
const CLOSE_PATIENCE_MS = 5000; // for the server to read the last words

/** What arrives for one stream, in order, for one reader. */
class Inbox {
  #messages = [];
  #wake = null;

  put(message) {
    this.#messages.push(message);
    this.#wake?.();
  }

  async next() {
    while (!this.#messages.length) await new Promise((resolve) => { this.#wake = resolve; });
    const message = this.#messages.shift();
    if (message instanceof Error) throw message;
    return message;
  }
}

/** One streamed answer: iterate over its deltas; `end` is there when they are over. */
export class Generation {
  constructor(call) {
    this.tokens = [];
    this.text = "";
    this.end = null;
    this.#call = call;
  }

  #call;

  async *[Symbol.asyncIterator]() {
    try {
      for (;;) {
        const message = await this.#call.next();
        if (message.kind === "END") return this.#finish(message);
        if (message.kind === "RES") throw new WireError(CODES.INTERNAL, "one result instead of a stream");
        if (message.kind === "ACK") continue;
        this.tokens.push(...message.tokens);
        this.text += message.text;
        yield { index: message.index, tokens: message.tokens, text: message.text };
      }
    } finally {
      this.#call.leave(); // a reader that stops early stops the server
    }
  }

  /** §7.2: with param `logprobs`, how likely each token was, and the likeliest in its place. */
  get logprobs() {
    return logprobsOf(this.end?.extra.get("logprobs"));
  }

  /** The same for the prompt, with param `prompt_logprobs`. */
  get promptLogprobs() {
    return logprobsOf(this.end?.extra.get("prompt_logprobs"));
  }

  #finish(end) {
    if (checksum(this.tokens) !== end.checksum) throw new WireError(CODES.SEQUENCE, "the tokens are not those that were sent");
    this.end = end;
    throwIfCut(end);
  }
}

/** [{ logprob, token (a prompt's only), top: [[token, logprob], …] }, …], or null. */
function logprobsOf(said) {
  if (!said) return null;
  const column = (name, read) => {
    const bytes = said.get(name) ?? Buffer.alloc(0);
    return Array.from({ length: bytes.length / 4 }, (_, i) => bytes[read](4 * i));
  };
  const own = column("token_logprobs", "readFloatLE");
  const topIds = column("top_ids", "readInt32LE"), top = column("top_logprobs", "readFloatLE");
  const tokens = column("token_ids", "readInt32LE");
  const width = own.length ? topIds.length / own.length : 0;
  return own.map((logprob, i) => ({
    ...(tokens.length ? { token: tokens[i] } : {}),
    logprob,
    top: Array.from({ length: width }, (_, k) => [topIds[i * width + k], top[i * width + k]]),
  }));
}

function throwIfCut({ finish, count }) {
  if (finish === "cancelled" || finish === "deadline") {
    const code = finish === "deadline" ? CODES.DEADLINE : CODES.CANCELLED;
    throw new WireError(code, `ended by ${finish} after ${count} tokens`, { executed: count ? "yes" : "maybe" });
  }
}

export class Client {
  #socket;
  #connection;
  #inboxes = new Map();
  #timer;

  /** Connect to "HOST:PORT" or the path of a Unix socket; resolves when the server has greeted. */
  static connect(address) {
    return new Promise((resolve, reject) => {
      const client = new Client();
      const options = address.includes("/")
        ? { path: address }
        : { host: address.slice(0, address.lastIndexOf(":")).replace(/^\[|\]$/g, ""), port: Number(address.slice(address.lastIndexOf(":") + 1)) };
      client.#open(net.connect({ ...options, noDelay: true }), () => resolve(client), reject);
    });
  }

  #open(socket, onGreeted, onFailed) {
    const now = () => performance.now() / 1000;
    const connection = (this.#connection = new Connection({ software: "client.mjs/1", features: ["body"] }));
    connection.bornAt = now();
    this.#socket = socket;
    this.#timer = setInterval(() => this.#turn(() => connection.tick(now())), TICK_MS);
    socket.on("connect", () => this.#turn(() => {}));
    socket.on("data", (bytes) => this.#turn(() => {
      for (const message of connection.feed(bytes, now())) {
        if (message.kind === "WELCOME") onGreeted();
        this.#deliver(message);
      }
    }));
    let cause = null;
    socket.on("error", (error) => { cause = error; });
    socket.on("close", () => {
      const message = cause?.message ?? "the server closed the connection";
      connection.close(new WireError(CODES.CONNECTION_LOST, message, { retryable: true, executed: "maybe" }));
      this.#turn(() => {});
      onFailed(connection.error);
    });
  }

  /** Do something with the connection, then write what it has to say. */
  #turn(action) {
    action();
    const out = this.#connection.takeOutput();
    if (out.length && this.#socket.writable) this.#socket.write(out);
    if (this.#connection.state !== "CLOSED") return;
    clearInterval(this.#timer);
    this.#socket.end();
    setTimeout(() => this.#socket.destroy(), CLOSE_PATIENCE_MS).unref();
    const error = this.#connection.error ?? new WireError(CODES.CONNECTION_LOST, "the client was closed");
    for (const inbox of this.#inboxes.values()) inbox.put(error);
    this.#inboxes.clear();
  }

  #deliver(message) {
    if (message.kind === "EVB" || message.kind === "EVT") {
      for (const event of eventsOf(message)) this.#inboxes.get(event.stream)?.put(event);
      return;
    }
    const inbox = this.#inboxes.get(message.stream);
    if (!inbox) return;
    if (message.kind !== "ACK") this.#inboxes.delete(message.stream);
    inbox.put(message.kind === "ERR" ? errorOf(message) : message);
  }

  /** Send a REQ; returns how to read its answer and how to lose interest in it. */
  #call(op, { model = null, inputs = {}, params = {}, timeoutMs = null, priority = 0 }) {
    const inbox = new Inbox();
    let stream = 0, timer;
    this.#turn(() => {
      stream = this.#connection.request({ op, model, inputs, params, deadline_ms: timeoutMs, priority });
      this.#inboxes.set(stream, inbox);
    });
    const leave = (reason = "cancelled") => {
      clearTimeout(timer);
      if (!this.#inboxes.delete(stream) || this.#connection.state === "CLOSED") return;
      this.#turn(() => this.#connection.send({ kind: "CANCEL", stream, reason }));
    };
    if (timeoutMs !== null) {
      timer = setTimeout(() => {
        leave("deadline");
        inbox.put(new WireError(CODES.DEADLINE, "no answer in time", { executed: "maybe" }));
      }, timeoutMs + DEADLINE_GRACE_MS);
    }
    return { next: () => inbox.next(), leave };
  }

  async #unary(op, options) {
    const call = this.#call(op, options);
    try {
      for (;;) {
        const message = await call.next();
        if (message.kind === "RES") return message;
        if (message.kind === "END") throwIfCut(message);
        if (message.kind !== "ACK") throw new WireError(CODES.INTERNAL, "a stream instead of one result");
      }
    } finally {
      call.leave();
    }
  }

  /** Continue a prompt (text or token ids): an async iterator of {index, tokens, text}. */
  generate(model, prompt, params = {}, options = {}) {
    const inputs = typeof prompt === "string" ? { prompt: asText(prompt) } : { ids: Tensor.of("I32", [prompt.length], prompt) };
    return new Generation(this.#call("generate", { model, inputs, params, ...options }));
  }

  /** One Float32Array for each text. */
  async embed(model, texts, params = {}, options = {}) {
    const { outputs } = await this.#unary("embed", { model, inputs: { texts: asTexts(texts) }, params, ...options });
    const embeddings = outputs.get("embeddings");
    const [rows, size] = embeddings.shape;
    const values = embeddings.values();
    return Array.from({ length: rows }, (_, i) => values.subarray(i * size, (i + 1) * size));
  }

  /** Run a model on named tensors and texts; returns its outputs by name. */
  async infer(model, inputs, params = {}, options = {}) {
    const { outputs } = await this.#unary("infer", { model, inputs, params, ...options });
    return Object.fromEntries(outputs);
  }

  close() {
    this.#connection.close();
    this.#turn(() => {});
  }
}

const LONG_TEXT_BYTES = 4096;

/** §8: long text travels beside the meta. */
function asText(text) {
  const bytes = Buffer.from(text);
  return bytes.length > LONG_TEXT_BYTES ? new Tensor("U8", [bytes.length], bytes) : text;
}

function asTexts(texts) {
  const all = texts.map((text) => Buffer.from(text));
  const joined = Buffer.concat(all);
  if (joined.length <= LONG_TEXT_BYTES && texts.length <= 256) return texts;
  return [new Tensor("U8", [joined.length], joined), Tensor.of("I32", [all.length], all.map((bytes) => bytes.length))];
}

// -- ../vectors/README.md -------------------------------------------------------------------------

function tagged(value) {
  if (value instanceof Tensor) return { $tensor: [value.dtype, value.shape.map(tagged), value.data.toString("hex")] };
  if (value instanceof Uint8Array) return { $bytes: Buffer.from(value).toString("hex") };
  if (value instanceof Float) {
    const double = Buffer.alloc(8);
    double.writeDoubleBE(value.value);
    return { $float: double.toString("hex") };
  }
  if (typeof value === "bigint") return { $int: String(value) };
  if (Array.isArray(value)) return value.map(tagged);
  if (value instanceof Map) return new Map([...value].map(([name, item]) => [name, tagged(item)]));
  if (value !== null && typeof value === "object") return tagged(new Map(Object.entries(value)));
  return value;
}

function untagged(value) {
  if (Array.isArray(value)) return value.map(untagged);
  if (value === null || typeof value !== "object") return value;
  if (value.$tensor) return new Tensor(value.$tensor[0], value.$tensor[1], Buffer.from(value.$tensor[2], "hex"));
  if (value.$bytes !== undefined) return Buffer.from(value.$bytes, "hex");
  if (value.$float) return new Float(Buffer.from(value.$float, "hex").readDoubleBE());
  if (value.$int) return BigInt(value.$int);
  return new Map(Object.entries(value).map(([name, item]) => [name, untagged(item)]));
}

const untaggedMessage = (json) => Object.fromEntries(untagged(json));

/** JSON with sorted names, so that equal values are equal texts. */
function canonical(value) {
  if (Array.isArray(value)) return `[${value.map(canonical).join()}]`;
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  const pairs = value instanceof Map ? [...value] : Object.entries(value);
  return `{${pairs.map(([name, item]) => `${JSON.stringify(name)}:${canonical(item)}`).sort().join()}}`;
}

function expectEqual(found, wanted, what) {
  const [a, b] = [canonical(found), canonical(wanted)];
  if (a !== b) throw new Error(`${what}\n    found  ${a}\n    wanted ${b}`);
}

/** Bytes whole, byte by byte, and cut in two at every offset. */
function* waysToCut(bytes) {
  yield [bytes];
  yield Array.from(bytes, (_, i) => bytes.subarray(i, i + 1));
  for (let at = 1; at < bytes.length; at++) yield [bytes.subarray(0, at), bytes.subarray(at)];
}

const limitsFor = ({ direction, limits = {} }) => ({ ...(/[cs]/.test(direction) ? CLIENT_LIMITS : WORKER_LIMITS), ...limits });

function receive(vector, pieces) {
  const inHandshake = vector.hex.slice(8, 10) === "01" && vector.direction === "c>s";
  const features = vector.feature ? [vector.feature] : [];
  const receiver = new Receiver(vector.direction, { limits: limitsFor(vector), features, inHandshake });
  const messages = [];
  for (const piece of pieces) {
    receiver.push(piece);
    for (let message = receiver.next(); message !== null; message = receiver.next()) messages.push(message);
  }
  if (receiver.size) throw new Error("the bytes stop inside a frame");
  return tagged(messages);
}

const EXACT = new Set(["EVB", "STEP"]);

function checkFrame(vector) {
  const golden = Buffer.from(vector.hex, "hex");
  for (const pieces of waysToCut(golden)) {
    if (vector.ok) {
      expectEqual(receive(vector, pieces), vector.ok, "decoded");
      continue;
    }
    let refusal = null;
    try {
      receive(vector, pieces);
    } catch (error) {
      if (!(error instanceof WireError)) throw error;
      refusal = { code: error.code, scope: error.scope };
    }
    expectEqual(refusal, { code: vector.err.code, scope: vector.err.scope }, "refused");
  }
  if (!vector.ok || vector.encode === false) return;
  const messages = vector.ok.map(untaggedMessage);
  const bytes = Buffer.concat(messages.map((message) => encode(message, limitsFor(vector))));
  expectEqual(receive(vector, [bytes]), vector.ok, "decoded again");
  const isExact = EXACT.has(vector.ok[0]?.kind);
  const until = isExact ? golden.length : HEADER_BYTES;
  expectEqual(bytes.subarray(0, until).toString("hex"), golden.subarray(0, until).toString("hex"), "encoded");
}

function checkScript(script) {
  const lengths = script.steps.filter((step) => "peer" in step).map((step) => step.peer.length / 2);
  for (let at = -1; at <= Math.max(0, ...lengths); at++) runScript(script, at);
}

function runScript(script, at) {
  const connection = new Connection({ features: script.features, limits: script.limits });
  let now = 0, out = Buffer.alloc(0), heard = [];
  const takeOutput = () => { out = Buffer.concat([out, connection.takeOutput()]); };
  const actions = {
    peer(hex) {
      const bytes = Buffer.from(hex, "hex");
      const pieces = at < 0 ? Array.from(bytes, (_, i) => bytes.subarray(i, i + 1)) : [bytes.subarray(0, at), bytes.subarray(at)];
      for (const piece of pieces) if (piece.length) heard.push(...connection.feed(piece, now));
    },
    app(json) { connection.send(untaggedMessage(json)); },
    wait_s(seconds) { connection.tick((now += seconds)); },
    hears(wanted) {
      expectEqual(tagged(heard), wanted, "heard");
      heard = [];
    },
    sends_bytes(hex) {
      takeOutput();
      expectEqual(out.subarray(0, hex.length / 2).toString("hex"), hex, "sent");
      out = out.subarray(hex.length / 2);
    },
    sends(wanted) {
      takeOutput();
      const sent = receive({ direction: "c>s", hex: "" }, [out]).map((message, i) => {
        for (const [name, value] of Object.entries(wanted[i] ?? {})) if (value?.$any) message.set(name, value);
        return message;
      });
      expectEqual(sent, wanted, "sent");
      out = Buffer.alloc(0);
    },
    closed(wanted) {
      expectEqual(connection.state === "CLOSED", wanted !== false, "closed");
      if (wanted) expectEqual(connection.error?.code ?? null, wanted.code, "closed because of");
    },
  };
  for (const [number, step] of script.steps.entries()) {
    const [[what, value]] = Object.entries(step);
    try {
      actions[what](value);
    } catch (error) {
      error.message = `step ${number} (${what}), cut at ${at}: ${error.message}`;
      throw error;
    }
  }
  takeOutput();
  if (out.length || heard.length) throw new Error("something was sent or heard that the script does not have");
}

function checkVectors(folder) {
  const load = (name) => readFileSync(path.join(folder, name), "utf8").trimEnd().split("\n").map((line) => JSON.parse(line));
  const frames = load("frames.jsonl");
  const scripts = load("scripts.jsonl").filter((script) => script.role === "client");
  const failures = [];
  const check = (vector, run) => {
    try {
      run(vector);
    } catch (error) {
      failures.push(`${vector.name}: ${error.message}`);
    }
  };
  for (const vector of frames) check(vector, checkFrame);
  for (const script of scripts) check(script, checkScript);
  for (const failure of failures) console.error(`FAILED ${failure}`);
  const count = (test) => frames.filter(test).length;
  console.log(`${count((v) => v.ok)} good frames, ${count((v) => v.err)} bad frames, ${scripts.length} client scripts, ${failures.length} failed`);
  return failures.length ? 1 : 0;
}

// -- the command line -----------------------------------------------------------------------------

const plain = (value) => {
  if (value instanceof Tensor) return { dtype: value.dtype, shape: value.shape, data: Array.from(value.values(), Number) };
  return value;
};
const asInput = (value) => (value?.dtype ? Tensor.of(value.dtype, value.shape, value.dtype.endsWith("64") && value.dtype !== "F64" ? value.data.map(BigInt) : value.data) : value);

async function main([address, command, model, ...rest]) {
  const client = await Client.connect(address);
  const print = (value) => console.log(JSON.stringify(value, (_, item) => (item instanceof Map ? Object.fromEntries(item) : plain(item))));
  try {
    if (command === "generate") {
      const generation = client.generate(model, rest[0], JSON.parse(rest[1] ?? "{}"));
      for await (const delta of generation) print(delta);
      const { finish, count, usage } = generation.end;
      const { text, logprobs, promptLogprobs } = generation;
      print({ finish, count, usage, text, ...(logprobs && { logprobs }), ...(promptLogprobs && { promptLogprobs }) });
    } else if (command === "embed") {
      for (const vector of await client.embed(model, rest)) print(Array.from(vector));
    } else if (command === "infer") {
      const inputs = Object.entries(JSON.parse(rest[0])).map(([name, value]) => [name, asInput(value)]);
      print(await client.infer(model, Object.fromEntries(inputs)));
    } else {
      throw new Error(`unknown command ${command}; known are generate, embed, infer`);
    }
  } finally {
    client.close();
  }
}

if (process.argv[1] && import.meta.url === pathToFileURL(process.argv[1]).href) {
  const words = process.argv.slice(2);
  if (words[0] === "--vectors" && words[1]) {
    process.exitCode = checkVectors(words[1]);
  } else if (words.length >= 3) {
    main(words).catch((error) => {
      const code = error.code > 0 ? ` (0x${error.code.toString(16).padStart(4, "0")})` : "";
      console.error(`error${code}: ${error.message}`);
      process.exitCode = 1;
    });
  } else {
    console.error("usage: node client.mjs --vectors DIR | HOST:PORT generate|embed|infer MODEL ...");
    process.exitCode = 2;
  }
}
