import { createHash, randomBytes } from 'node:crypto';
import { describe, expect, test } from 'vitest';
import { ConsoleRig, NO_MULTIPORT } from './rig.js';

const MiB = 1 << 20;
const sha256 = (...parts: readonly Uint8Array[]) => {
  const hash = createHash('sha256');
  for (const part of parts) hash.update(part);
  return hash.digest('hex');
};
const text = (done: readonly { data: Uint8Array; written: number }[]) =>
  done.map(({ data, written }) => Buffer.from(data.subarray(0, written)).toString());

/** What `read` gives until it has given so much. */
async function collect(rig: ConsoleRig, length: number, read: () => Uint8Array): Promise<Buffer> {
  const parts: Uint8Array[] = [];
  let total = 0;
  await rig.until(() => {
    const part = read();
    parts.push(part);
    total += part.length;
    return total >= length;
  });
  return Buffer.concat(parts);
}

describe('5.3.6 output', () => {
  test('a buffer of any shape reaches the host in order; used length is 0', () => {
    using rig = ConsoleRig.open('hvc0', 'a');
    const pieces = [0, 1, 2, 511, 4096, 1, 32768].map((length) => randomBytes(length));
    for (const indirect of [false, true]) {
      expect(rig.transmitq(1).request(pieces, { indirect }).written).toBe(0);
      expect(sha256(rig.host(1).read())).toBe(sha256(...pieces));
    }
  });

  test('a whole queue at once', () => {
    using rig = ConsoleRig.open('hvc0', 'a');
    const pieces = Array.from({ length: 64 }, (_, i) => randomBytes(1 + i * 40));
    for (const piece of pieces) rig.transmitq(1).add([piece]);
    rig.transmitq(1).notify();
    expect(rig.transmitq(1).completions()).toHaveLength(64);
    expect(sha256(rig.host(1).read())).toBe(sha256(...pieces));
  });

  test('works for a port that the guest does not say it has open', () => {
    using rig = ConsoleRig.ready(['hvc0', 'a']);
    rig.transmitq(1).request([Buffer.from('early')]);
    expect(rig.host(1).read().toString()).toBe('early');
  });

  test('what the device must not be given in a transmitq does no harm', () => {
    using rig = ConsoleRig.open('hvc0', 'a');
    const { written, data } = rig.transmitq(1).request([Buffer.from('text'), 8]);
    expect([written, ...data]).toEqual([0, 0, 0, 0, 0, 0, 0, 0, 0]);
    rig.transmitq(1).request([16]);
    rig.transmitq(1).request([new Uint8Array()]);
    expect(rig.host(1).read().toString()).toBe('text');
  });

  test('a reader that is slow keeps the guest waiting, and gets every byte', async () => {
    using rig = ConsoleRig.open('hvc0', 'a');
    const queue = rig.transmitq(1);
    const sent = createHash('sha256');
    let left = 8 * MiB;
    let available = 0;
    const give = () => {
      available -= queue.completions().length;
      for (; available < 16 && left > 0; available++) {
        const chunk = randomBytes(Math.min(left, 32768));
        left -= chunk.length;
        sent.update(chunk);
        queue.add([chunk.subarray(0, 777), chunk.subarray(777)], { indirect: true });
      }
      queue.notify();
    };
    give();
    expect(available).toBe(16);
    await rig.settle();
    give();
    const waiting = left;
    await rig.settle();
    give();
    expect(left).toBe(waiting); // nobody reads: nothing goes on
    const handled = rig.handled;
    await rig.settle();
    expect(rig.handled).toBe(handled); // nor is the thread busy

    let total = 0;
    const received = createHash('sha256');
    await rig.until(() => {
      const part = rig.host(1).read(50_000);
      received.update(part);
      total += part.length;
      give();
      return total === 8 * MiB;
    });
    expect(received.digest('hex')).toBe(sent.digest('hex'));
    await rig.until(() => {
      give();
      return available === 0;
    });
  });

  test('one buffer that is larger than any socket', async () => {
    using rig = ConsoleRig.open('hvc0', 'a');
    const data = randomBytes(5 * MiB + 13);
    const queue = rig.transmitq(1);
    queue.send([data.subarray(0, 3 * MiB), data.subarray(3 * MiB)]);
    expect(queue.completions()).toEqual([]);
    const received = await collect(rig, data.length, () => rig.host(1).read());
    expect(sha256(received)).toBe(sha256(data));
    expect(await queue.completed(1, () => rig.pump())).toMatchObject([{ written: 0 }]);
  });

  test('a reader that comes late finds the beginning', async () => {
    using rig = ConsoleRig.ready(['hvc0'], { features: NO_MULTIPORT });
    const lines = Array.from({ length: 3 }, (_, i) => randomBytes(150_000 + i));
    for (const line of lines) rig.transmitq(0).send([line]);
    await rig.settle();
    const received = await collect(rig, 450_003, () => rig.host(0).read());
    expect(sha256(received)).toBe(sha256(...lines));
  });

  test('is discarded once the reader is gone, however much it is', async () => {
    using rig = ConsoleRig.open('hvc0', 'a');
    const queue = rig.transmitq(1);
    const waiting = [randomBytes(2 * MiB), randomBytes(3 * MiB)];
    for (const piece of waiting) queue.send([piece]);
    expect(queue.completions()).toEqual([]);
    rig.host(1).close();
    await rig.until(() => queue.completions().length === 2 || queue.usedIndex === 2);
    queue.request([randomBytes(4 * MiB)]);
    queue.request([Buffer.from('more')]);
  });
});

describe('5.3.6 input', () => {
  test('fills buffers as far as it comes; used length says how far', () => {
    using rig = ConsoleRig.open('hvc0', 'a');
    const queue = rig.receiveq(1);
    queue.add([3, 4]);
    queue.add([100]);
    queue.add([100], { indirect: true });
    queue.notify();
    rig.host(1).write('0123456789');
    rig.pump();
    expect(text(queue.completions())).toEqual(['0123456', '789']);
    rig.host(1).write('x');
    rig.pump();
    expect(text(queue.completions())).toEqual(['x']);
  });

  test('what the device must not be given in a receiveq does no harm', () => {
    using rig = ConsoleRig.open('hvc0', 'a');
    const queue = rig.receiveq(1);
    const readable = new Uint8Array(8).fill(0x52);
    queue.add([readable]);
    queue.add([0]);
    queue.add([readable, 8]);
    queue.notify();
    rig.host(1).write('input');
    rig.pump();
    expect(queue.completions().map(({ written }) => written)).toEqual([0, 0, 5]);
    expect(rig.streams[1]?.inputEnded).toBe(false);
  });

  test('waits in the socket while the guest has the port closed', async () => {
    using rig = ConsoleRig.ready(['hvc0', 'a']);
    rig.receiveq(1).send([100]);
    rig.host(1).write('early ');
    await rig.settle();
    rig.setUpPorts();
    await rig.settle();
    expect(text(rig.receiveq(1).completions())).toEqual(['early ']);
    rig.setOpen(1, false);
    rig.receiveq(1).send([100]);
    rig.host(1).write('later');
    await rig.settle();
    expect(rig.receiveq(1).completions()).toEqual([]);
    rig.setOpen(1, true);
    rig.pump();
    expect(text(rig.receiveq(1).completions())).toEqual(['later']);
  });

  test('a guest that is slow keeps the host waiting, and gets every byte', async () => {
    using rig = ConsoleRig.open('hvc0', 'a');
    const data = randomBytes(6 * MiB);
    let written = rig.host(1).write(data);
    await rig.settle();
    expect(rig.host(1).write(data.subarray(written))).toBe(0); // no buffers: the socket is all there is
    expect(written).toBeLessThan(MiB);

    const queue = rig.receiveq(1);
    let free = 16;
    const received = await collect(rig, data.length, () => {
      for (; free > 0; free--) queue.add([1000, 3096], { indirect: true });
      queue.notify();
      written += rig.host(1).write(data.subarray(written));
      const done = queue.completions();
      free += done.length;
      return Buffer.concat(done.map((c) => c.data.subarray(0, c.written)));
    });
    expect(sha256(received)).toBe(sha256(data));
  });

  test('no event while there is input but no buffer, nor while there is a buffer but no input', async () => {
    using rig = ConsoleRig.open('hvc0', 'a');
    rig.host(1).write('input');
    await rig.settle();
    rig.receiveq(0).send([10]);
    const handled = rig.handled;
    await rig.settle();
    expect(rig.handled).toBe(handled);
    expect(rig.driver.interrupts).toBeGreaterThan(0);
    rig.driver.acknowledge();
    rig.receiveq(1).send([10]);
    expect(text(rig.receiveq(1).completions())).toEqual(['input']);
    expect(rig.driver.level).toBe(true);
  });

  test('the writer’s end is no end of the port: output goes on', async () => {
    using rig = ConsoleRig.open('hvc0', 'a');
    rig.host(1).write('bye');
    rig.host(1).endWriting();
    rig.receiveq(1).add([10]);
    rig.receiveq(1).add([10]);
    rig.receiveq(1).notify();
    await rig.settle();
    expect(text(rig.receiveq(1).completions())).toEqual(['bye']);
    const handled = rig.handled;
    await rig.settle();
    expect(rig.handled).toBe(handled);
    expect(rig.control()).toEqual([]);
    rig.transmitq(1).request([Buffer.from('heard')]);
    expect(rig.host(1).read().toString()).toBe('heard');
    rig.host(1).close();
    await rig.settle();
    expect(rig.control()).toHaveLength(1);
  });
});

describe('several ports at once', () => {
  test('each has its own bytes, whatever the order and whoever is slow', async () => {
    using rig = ConsoleRig.open('hvc0', 'a', 'hvc1', 'b');
    // Port 1 is stuck in both directions.
    rig.transmitq(1).send([randomBytes(MiB)]);
    rig.host(1).write(randomBytes(MiB));
    const ids = [3, 0, 2];
    const down = ids.map(() => randomBytes(300_000));
    const up = ids.map(() => randomBytes(300_000));
    const written = ids.map(() => 0);
    const got = ids.map(() => [] as Uint8Array[]);
    const heard = ids.map(() => [] as Uint8Array[]);
    const length = (parts: readonly Uint8Array[]) => parts.reduce((sum, part) => sum + part.length, 0);
    ids.forEach((id, i) => {
      rig.transmitq(id).send([up[i] as Uint8Array]);
      for (let n = 0; n < 16; n++) rig.receiveq(id).add([4096]);
      rig.receiveq(id).notify();
    });
    await rig.until(() => {
      ids.forEach((id, i) => {
        written[i] = (written[i] ?? 0) + rig.host(id).write((down[i] as Uint8Array).subarray(written[i]));
        for (const { data, written: n } of rig.receiveq(id).completions()) {
          got[i]?.push(data.subarray(0, n));
          rig.receiveq(id).send([4096]);
        }
        heard[i]?.push(rig.host(id).read());
      });
      return ids.every((_, i) => length(got[i] ?? []) >= 300_000 && length(heard[i] ?? []) >= 300_000);
    });
    ids.forEach((_, i) => {
      expect(sha256(...(got[i] ?? []))).toBe(sha256(down[i] as Uint8Array));
      expect(sha256(...(heard[i] ?? []))).toBe(sha256(up[i] as Uint8Array));
    });
    expect(rig.transmitq(1).completions()).toEqual([]);
  });
});

describe('work at a time', () => {
  /** A reader that is always as quick as the guest. */
  const swallow = (rig: ConsoleRig) => {
    const moved: number[] = [];
    rig.io.transfer = (_operation, _fd, _offset, segments) => {
      moved.push(segments.length);
      return segments.length;
    };
    return moved;
  };
  const sum = (numbers: readonly number[]) => numbers.reduce((total, n) => total + n, 0);

  test('output is written a MiB at a time, in one buffer or many', async () => {
    using rig = ConsoleRig.open('hvc0', 'a');
    const moved = swallow(rig);
    const queue = rig.transmitq(1);
    const page = rig.driver.allocate(MiB);
    queue.writeDescriptor(queue.descriptors, 0, page, 3.5 * MiB, 0, 0);
    queue.makeAvailable(0);
    for (let i = 1; i < 64; i++) {
      queue.writeDescriptor(queue.descriptors, i, page, MiB / 8, 0, 0);
      queue.makeAvailable(i);
    }
    queue.notify();
    const total = 3.5 * MiB + (63 * MiB) / 8;
    expect(sum(moved)).toBe(MiB);
    const before = rig.handled;
    await rig.until(() => {
      expect(sum(moved)).toBeLessThanOrEqual(MiB * (1 + rig.handled - before));
      return sum(moved) === total;
    });
    expect(queue.usedIndex).toBe(64);
  });

  test('a guest that notifies without cause reads no socket', () => {
    using rig = ConsoleRig.open('hvc0', 'a');
    rig.receiveq(1).send([100]);
    const moved = swallow(rig);
    for (let i = 0; i < 10; i++) {
      rig.receiveq(1).notify();
      rig.transmitq(1).notify();
    }
    expect(moved).toEqual([]);
  });
});

describe('a reset in the middle', () => {
  test('forgets what was half sent, and keeps the sockets', async () => {
    using rig = ConsoleRig.open('hvc0', 'a');
    const half = randomBytes(2 * MiB);
    rig.transmitq(1).send([half]);
    rig.receiveq(1).send([100]);
    rig.reinitialize();
    await rig.settle();
    const sent = rig.host(1).read();
    expect(sent.length).toBeLessThan(half.length);
    expect(sent.equals(half.subarray(0, sent.length))).toBe(true);
    rig.host(1).write('kept');
    await rig.settle();
    rig.setUpPorts();
    rig.transmitq(1).request([Buffer.from('whole')]);
    expect(rig.host(1).read().toString()).toBe('whole');
    rig.receiveq(1).send([100]);
    expect(text(rig.receiveq(1).completions())).toEqual(['kept']);
  });

  test('of the machine: a new device has the ports as they are', async () => {
    using rig = ConsoleRig.open('hvc0', 'a');
    rig.streams[0]?.resize({ rows: 24, columns: 80 });
    rig.transmitq(1).send([randomBytes(2 * MiB)]);
    rig.receiveq(1).send([100]);
    rig.powerOn();
    rig.host(1).write('for the next');
    await rig.settle();
    rig.host(1).read();
    rig.reinitialize();
    expect([...rig.driver.readConfig(0, 4)]).toEqual([80, 0, 24, 0]);
    rig.setUpPorts();
    await rig.settle();
    expect(rig.host(1).read()).toHaveLength(0);
    rig.receiveq(1).send([100]);
    expect(text(rig.receiveq(1).completions())).toEqual(['for the next']);
  });
});

describe('the end of the guest', () => {
  /** What its machine's thread does then. */
  const end = async (rig: ConsoleRig, id: number): Promise<Buffer> => {
    for (const stream of rig.streams) stream.end();
    rig.driver.transport.reset();
    const stream = rig.streams[id] as NonNullable<(typeof rig.streams)[number]>;
    stream.drain(rig.events);
    const parts: Buffer[] = [];
    while (!stream.drained) {
      rig.pump();
      parts.push(rig.host(id).read(70_000));
      await new Promise((resolve) => setTimeout(resolve, 1));
    }
    return Buffer.concat([...parts, rig.host(id).read()]);
  };

  test('what it wrote last reaches a slow reader', async () => {
    using rig = ConsoleRig.open('hvc0', 'a');
    const pieces = Array.from({ length: 10 }, () => randomBytes(100_000));
    for (const piece of pieces) rig.transmitq(1).send([piece]);
    expect(sha256(await end(rig, 1))).toBe(sha256(...pieces));
  });

  test('but no more than 4 MiB of what was not in the socket', async () => {
    using rig = ConsoleRig.open('hvc0', 'a');
    const memory = rig.driver.allocate(2 * MiB);
    const queue = rig.transmitq(1);
    for (let i = 0; i < 32; i++) {
      queue.writeDescriptor(queue.descriptors, i, memory, 2 * MiB, 0, 0);
      queue.makeAvailable(i);
    }
    queue.notify();
    const length = (await end(rig, 1)).length;
    expect(length).toBeGreaterThan(4 * MiB);
    expect(length).toBeLessThan(5 * MiB);
  });

  test('a chain that the guest made shorter meanwhile does no harm', async () => {
    using rig = ConsoleRig.open('hvc0', 'a');
    const queue = rig.transmitq(1);
    const head = queue.send([randomBytes(2 * MiB)]);
    queue.writeDescriptor(queue.descriptors, head, 0x1000, 10, 0, 0);
    const sent = (await end(rig, 1)).length;
    expect(sent).toBeLessThan(2 * MiB);

    using again = ConsoleRig.open('hvc0', 'a');
    const chains = again.transmitq(1);
    const first = chains.send([randomBytes(2 * MiB)]);
    chains.writeDescriptor(chains.descriptors, first, 0x1000, 10, 0, 0);
    again.host(1).read();
    expect(await chains.completed(1, () => again.pump())).toHaveLength(1);
    chains.request([Buffer.from('next')]);
    expect(again.host(1).read().toString()).toBe('next');
  });

  test('a reader that is gone ends it', async () => {
    using rig = ConsoleRig.open('hvc0', 'a');
    rig.transmitq(1).send([randomBytes(2 * MiB)]);
    rig.streams[1]?.end();
    rig.host(1).close();
    const stream = rig.streams[1] as NonNullable<(typeof rig.streams)[number]>;
    stream.drain(rig.events);
    await rig.until(() => stream.drained);
  });
});
