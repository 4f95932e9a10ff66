import { put16, put32, u16 } from './bytes.js';

/** Bytes before the question (RFC 1035 section 4.1.1). */
const HEADER = 12;
const MAX_NAME = 255;

export const ResponseCode = { NO_ERROR: 0, FORMAT: 1, SERVER_FAILURE: 2, NO_SUCH_NAME: 3, REFUSED: 5 } as const;
export const RecordType = { A: 1, PTR: 12, AAAA: 28 } as const;
const CLASS_INTERNET = 1;

/** Bits of the flags word: response, and what a response takes over of its query. */
const RESPONSE = 0x8000;
const RECURSION_AVAILABLE = 0x0080;
const KEPT = 0x7900; // opcode and recursion desired
const POINTER_TO_NAME = 0xc000 | HEADER;

export interface Question {
  /** Lower case, without the last dot; bytes that are not printable, dots and backslashes are `\DDD`. */
  readonly name: string;
  readonly type: number;
  readonly internet: boolean;
  /** Where the question ends in the message. */
  readonly end: number;
}

/** Whether a message is long enough to be answered, and is not an answer itself. */
export function isQuery(message: Uint8Array): boolean {
  return message.length >= HEADER && (u16(message, 2) & RESPONSE) === 0;
}

/** Whether a message may be the answer to a query. */
export function isAnswerTo(message: Uint8Array, query: Uint8Array): boolean {
  return message.length >= HEADER && u16(message, 0) === u16(query, 0) && (u16(message, 2) & RESPONSE) !== 0;
}

/** @returns the only question of a query; undefined when there are more or less, or it is malformed. */
export function parseQuestion(message: Uint8Array): Question | undefined {
  if (u16(message, 4) !== 1) return undefined;
  let name = '';
  let at = HEADER;
  for (;;) {
    const length = message[at++];
    if (length === undefined || length > 63 || at + length > message.length || at - HEADER > MAX_NAME) return undefined;
    if (length === 0) break;
    if (name) name += '.';
    for (const end = at + length; at < end; at++) name += character(message[at] as number);
  }
  if (at + 4 > message.length) return undefined;
  return { name, type: u16(message, at), internet: u16(message, at + 2) === CLASS_INTERNET, end: at + 4 };
}

function character(byte: number): string {
  if (byte > 32 && byte < 127 && byte !== 46 && byte !== 92) return String.fromCharCode(byte).toLowerCase();
  return `\\${String(byte).padStart(3, '0')}`;
}

/** A response with records of the question's type and name. @param data one entry a record. */
export function respond(
  query: Uint8Array,
  question: Question | undefined,
  code: number,
  data: readonly Uint8Array[] = [],
  ttl = 0,
): Buffer {
  const size = data.reduce((sum, record) => sum + 12 + record.length, 0);
  const end = question?.end ?? HEADER;
  const response = Buffer.alloc(end + size);
  response.set(query.subarray(0, end));
  put16(response, 2, RESPONSE | RECURSION_AVAILABLE | (u16(query, 2) & KEPT) | code);
  put16(response, 4, question ? 1 : 0);
  put16(response, 6, data.length);
  put32(response, 8, 0);
  let at = end;
  for (const record of data) {
    put16(response, at, POINTER_TO_NAME);
    put16(response, at + 2, question?.type ?? 0);
    put16(response, at + 4, CLASS_INTERNET);
    put32(response, at + 6, ttl);
    put16(response, at + 10, record.length);
    response.set(record, at + 12);
    at += 12 + record.length;
  }
  return response;
}

/** A name as labels; undefined when it cannot be one. */
export function encodeName(name: string): Uint8Array | undefined {
  const labels = name.replace(/\.$/, '').split('.');
  const bytes = Buffer.concat(
    labels.map((label) => Buffer.from(`${String.fromCharCode(label.length)}${label}`, 'latin1')),
  );
  if (bytes.length >= MAX_NAME || labels.some((label) => label.length === 0 || label.length > 63)) return undefined;
  return Buffer.concat([bytes, Buffer.of(0)]);
}
