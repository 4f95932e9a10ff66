import { describe, expect, test } from 'vitest';
import { ByteQueue } from '#dist/backends/byte-queue.js';
import {
  encodeOffloads,
  FrameStreamDecoder,
  MAX_FRAME_LENGTH,
  putFrameLength,
} from '#dist/backends/frame-stream-format.js';
import { fold, sum16 } from '#dist/backends/user-network/checksum.js';
import { Random } from '../../kvm/assist/random.js';
import { checksum } from './packets.js';
import { distinct } from './support.js';

const random = new Random();
const seed = `TSVISOR_SEED=${random.seed}`;

describe('the stream format', () => {
  function collect(allocate?: (length: number) => Uint8Array) {
    const frames: Buffer[] = [];
    const controls: Buffer[] = [];
    const sink = {
      frame: (bytes: Uint8Array) => void frames.push(Buffer.from(bytes)),
      control: (bytes: Uint8Array) => void controls.push(Buffer.from(bytes)),
    };
    return { frames, controls, decoder: new FrameStreamDecoder(sink, allocate) };
  }

  function encode(frame: Uint8Array): Buffer {
    const message = Buffer.alloc(4 + frame.length);
    putFrameLength(message, 0, frame.length);
    message.set(frame, 4);
    return message;
  }

  test('messages are the same however the stream is cut', () => {
    const sizes = [0, 1, 12, 60, 1514, MAX_FRAME_LENGTH, 3, 0, 40_000];
    const messages = sizes.map((size) => distinct(size));
    const stream = Buffer.concat([...messages.flatMap((m) => [encodeOffloads(3), encode(m)]), encodeOffloads(0)]);
    for (let i = 0; i < 300; i++) {
      const { frames, controls, decoder } = collect();
      for (let at = 0; at < stream.length; ) {
        const end = at + 1 + random.below(random.pick([3, 100, 5000, 200_000]));
        expect(decoder.push(stream.subarray(at, end))).toBe(true);
        at = end;
      }
      expect(frames.length === messages.length && frames.every((f, k) => f.equals(messages[k] as Buffer)), seed).toBe(
        true,
      );
      expect(controls).toEqual([...messages.map(() => Buffer.from([1, 3])), Buffer.from([1, 0])]);
    }
  });

  test('what is whole in a chunk is a view of it; what is not goes to memory that was asked for', () => {
    const seen: Uint8Array[] = [];
    const asked: number[] = [];
    const memory = new Uint8Array(100);
    const allocate = (length: number) => {
      asked.push(length);
      return memory.subarray(0, length);
    };
    const decoder = new FrameStreamDecoder({ frame: (bytes) => void seen.push(bytes), control: () => {} }, allocate);
    const chunk = Buffer.concat([encode(Buffer.alloc(20, 1)), encode(Buffer.alloc(30, 2)).subarray(0, 10)]);
    decoder.push(chunk);
    decoder.push(Buffer.alloc(24, 2));
    expect(seen.map((bytes) => [bytes.buffer === chunk.buffer, bytes.buffer === memory.buffer])).toEqual([
      [true, false],
      [false, true],
    ]);
    expect(asked).toEqual([30]);
  });

  test('a length above the limit breaks the stream for good', () => {
    for (const word of [MAX_FRAME_LENGTH + 1, 0x7fff_ffff, 0x8000_0041, 0xffff_ffff]) {
      const { frames, decoder } = collect();
      const bytes = Buffer.alloc(4);
      bytes.writeUInt32BE(word);
      expect(decoder.push(encode(Buffer.from('a')))).toBe(true);
      expect(decoder.push(bytes)).toBe(false);
      expect(decoder.push(encode(Buffer.from('b')))).toBe(false);
      expect(frames).toEqual([Buffer.from('a')]);
    }
  });
});

test('the checksum is that of RFC 1071 at every length and alignment', () => {
  for (let i = 0; i < 3000; i++) {
    const bytes = new Uint8Array(random.below(random.pick([20, 300, 70_000])) + 8);
    random.fill(bytes);
    const start = random.below(8);
    const end = start + random.below(bytes.length - start + 1);
    expect(0xffff - sum16(bytes, start, end), `${seed} ${start} ${end}`).toBe(checksum(bytes.subarray(start, end)));
  }
  expect(fold(0xffff_ffff)).toBe(0xffff);
});

describe('the byte queue', () => {
  test('is a queue, for any sizes', () => {
    for (let round = 0; round < 200; round++) {
      const queue = new ByteQueue();
      let model = Buffer.alloc(0);
      for (let i = 0; i < 60; i++) {
        const size = random.below(random.pick([2, 100, 3000, 40_000]));
        const backing = distinct(size + random.pick([0, 0, 100_000]));
        const piece = backing.subarray(0, size);
        if (random.chance(60)) {
          queue.push(piece);
          model = Buffer.concat([model, piece]);
        } else {
          const count = random.below(model.length + 1);
          queue.consume(count);
          model = model.subarray(count);
        }
        expect(queue.length).toBe(model.length);
        const from = random.below(model.length + 1);
        const length = random.below(model.length - from + 1);
        const copy = Buffer.alloc(length + 3);
        queue.copyTo(copy, 3, from, length);
        expect(copy.subarray(3).equals(model.subarray(from, from + length)), seed).toBe(true);
      }
    }
  });

  test('keeps long pieces as they are and does not keep a large buffer for a short one', () => {
    const queue = new ByteQueue();
    const long = Buffer.allocUnsafeSlow(60_000);
    const large = Buffer.allocUnsafeSlow(60_000).subarray(0, 5000);
    queue.push(long);
    queue.push(large);
    for (let i = 0; i < 5000; i++) queue.push(Buffer.from([i]));
    const buffers = new Set<ArrayBufferLike>();
    let parts = 0;
    queue.read(0, queue.length, (part) => {
      parts++;
      buffers.add(part.buffer);
    });
    expect(buffers.has(long.buffer)).toBe(true);
    expect(buffers.has(large.buffer)).toBe(false);
    expect(parts).toBeLessThan(6);
  });
});
