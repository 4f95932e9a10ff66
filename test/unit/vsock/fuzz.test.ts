import { once } from 'node:events';
import { setImmediate as turn } from 'node:timers/promises';
import { expect, test } from 'vitest';
import type { VsockStream } from '#dist/index.js';
import { Random } from '../../kvm/assist/random.js';
import { FakeGuest } from './fake-guest.js';
import { Op, type Packet, pattern } from './packets.js';

const CASES = Number(process.env.TSVISOR_CASES ?? 20_000);
/** Ports of the host that are listened on. */
const LISTENED = [5000, 5001];

/** A guest that knows what connections there are and says anything about them, and a host that uses its streams. */
class Fuzzer {
  readonly streams = new Set<VsockStream>();
  readonly #random: Random;
  readonly #guest: FakeGuest;
  /** What the host said last of each connection: to answer it nearly right. */
  readonly #seen = new Map<string, Packet>();
  #generation = 1;

  constructor(random: Random, guest: FakeGuest) {
    this.#random = random;
    this.#guest = guest;
    guest.onPacket = (packet) => {
      if (packet.op === Op.RST) this.#seen.delete(`${packet.srcPort} ${packet.dstPort}`);
      else this.#seen.set(`${packet.srcPort} ${packet.dstPort}`, packet);
    };
    for (const port of LISTENED) {
      void (async () => {
        for await (const stream of guest.host.listen(port)) this.#use(stream);
      })();
    }
  }

  async next(): Promise<void> {
    const random = this.#random;
    const choice = random.below(1000);
    if (choice === 0) await this.#guest.driver((this.#generation++ & 3) !== 0);
    else if (choice < 60) this.#connect();
    else if (choice < 120) this.#act();
    else this.#guest.send(this.#packet());
    if (random.chance(3)) await turn();
  }

  #packet(): Partial<Packet> {
    const random = this.#random;
    const known = [...this.#seen.values()];
    if (known.length === 0 || random.chance(10)) {
      const dstPort = random.chance(80) ? random.pick(LISTENED) : random.u32();
      return { srcPort: random.below(2000), dstPort, op: random.chance(80) ? Op.REQUEST : random.below(10) };
    }
    const of = random.pick(known);
    const answer = of.op === Op.REQUEST && random.chance(80);
    const op = answer
      ? Op.RESPONSE
      : random.pick([Op.RW, Op.RW, Op.RW, Op.CREDIT_UPDATE, Op.SHUTDOWN, random.below(9)]);
    return {
      srcPort: of.dstPort,
      dstPort: of.srcPort,
      op,
      payload: pattern(op === Op.RW ? random.below(random.chance(90) ? 2000 : 65_536) : 0),
      flags: random.chance(80) ? random.below(4) : random.u32(),
      bufAlloc: random.pick([0, 1, 1000, 65_536, 0xffff_ffff]),
      fwdCnt: random.chance(97) ? 0 : random.u32(),
      ...(random.chance(1) && { type: random.below(5) }),
    };
  }

  #connect(): void {
    const signal = AbortSignal.timeout(50);
    this.#guest.host.connect(this.#random.below(3000), { signal }).then(
      (stream) => this.#use(stream),
      (error) => {
        if (error.code !== 'ERR_VSOCK' && error !== signal.reason) throw error;
      },
    );
  }

  #use(stream: VsockStream): void {
    this.streams.add(stream);
    stream.on('close', () => this.streams.delete(stream));
    if (this.#random.chance(70)) stream.resume();
    if (this.#random.chance(50)) stream.pipe(stream);
  }

  #act(): void {
    const { streams } = this;
    if (streams.size === 0) return;
    const stream = this.#random.pick([...streams]);
    const choice = this.#random.below(5);
    if (choice === 0) stream.destroy();
    else if (choice === 1) stream.end();
    else if (choice === 2) stream.read();
    else if (!stream.writableEnded) stream.write(pattern(this.#random.below(20_000)));
  }
}

test('a guest that says anything neither harms the host nor stops it', async () => {
  const random = new Random();
  try {
    await using guest = await FakeGuest.make();
    const fuzzer = new Fuzzer(random, guest);
    const before = process.memoryUsage().arrayBuffers;
    for (let n = 0; n < CASES; n++) await fuzzer.next();
    await turn();
    expect(fuzzer.streams.size).toBeLessThanOrEqual(1024);
    expect(process.memoryUsage().arrayBuffers - before).toBeLessThan(200 << 20);
    // What it did is forgotten: a connection works.
    await guest.driver(true);
    guest.onPacket = undefined;
    guest.packets.length = 0;
    const { stream, ports } = await guest.connected(70_000);
    guest.send({ ...ports, payload: pattern(10) });
    expect((await once(stream, 'data'))[0]).toHaveLength(10);
  } catch (error) {
    throw new Error(`seed ${random.seed}`, { cause: error });
  }
});
