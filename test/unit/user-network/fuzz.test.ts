import { setImmediate as turn } from 'node:timers/promises';
import { expect, test } from 'vitest';
import { encodeOffloads } from '#dist/backends/frame-stream-format.js';
import { Random } from '../../kvm/assist/random.js';
import { Guest } from './guest.js';
import { arp, checksum, DNS, ethernet, GATEWAY, GUEST, icmpEcho, ip, ipv4, tcp, udp } from './packets.js';
import { eventually, HostServer } from './support.js';

const CASES = Number(process.env.TSVISOR_CASES ?? 20_000);

/** Small limits, so that a run meets them. */
const TUNING = {
  connections: 64,
  halfOpen: 16,
  receiveBuffer: 32 * 1024,
  sendBuffer: 32 * 1024,
  totalBuffer: 256 * 1024,
  minimumTimeout: 5,
  firstTimeout: 5,
  maximumTimeout: 40,
  retries: 5,
  timeWait: 10,
  linger: 50,
  keepAlive: 100,
  udpMappings: 16,
  udpFlows: 8,
  udpIdle: 200,
  udpPending: 4096,
  dnsQueries: 8,
  dnsTimeout: 20,
  reassemblies: 4,
  reassemblyTimeout: 50,
  sweep: 20,
};

class Fuzzer {
  readonly #random: Random;
  readonly #port: number;
  readonly #guest: Guest;
  /** What the network said last for each port of the guest: to answer it nearly right. */
  readonly #seen = new Map<number, { sequence: number; acknowledgement: number; length: number }>();

  constructor(random: Random, guest: Guest, port: number) {
    this.#random = random;
    this.#guest = guest;
    this.#port = port;
    guest.tcp.input = ({ destinationPort, sequence, acknowledgement, flags, payload }) => {
      this.#seen.set(destinationPort, { sequence, acknowledgement, length: payload.length + (flags & 3 ? 1 : 0) });
    };
  }

  next(): void {
    const random = this.#random;
    const choice = random.below(100);
    if (choice === 0) this.#guest.setOffloads(random.below(4));
    else if (choice === 1) this.#guest.socket.write(encodeOffloads(this.#guest.offloads));
    else this.#guest.sendFrame(this.#mutate(this.#frame()), this.#header());
  }

  #noise(length: number): Buffer {
    return Buffer.from(this.#random.fill(new Uint8Array(length)));
  }

  #header(): Buffer {
    if (this.#random.chance(70)) return Buffer.alloc(12);
    if (this.#random.chance(50)) return Guest.offloadHeader(1460, this.#random.chance(50));
    return this.#noise(12);
  }

  #frame(): Buffer {
    const random = this.#random;
    const data = this.#noise(random.below(random.pick([2, 64, 1460, 1460, 30_000])));
    const address = random.pick([GATEWAY, GATEWAY, GATEWAY, DNS, '10.0.2.77', '127.0.0.1', '255.255.255.255']);
    switch (random.below(12)) {
      case 0:
        return ethernet(0x0806, arp(random.below(4), random.pick([GUEST, '0.0.0.0', GATEWAY]), address));
      case 1:
        return ethernet(0x0800, icmpEcho(address, 1, 1, data));
      case 2:
        return ethernet(0x0800, udp(address, random.pick([53, 67, 9, this.#port]), 1000 + random.below(40), data));
      case 3:
        return ethernet(0x0800, udp(DNS, 53, 1000 + random.below(8), this.#dnsQuery()));
      case 4:
        return ethernet(0x0800, udp('255.255.255.255', 67, 68, this.#dhcp(), { source: '0.0.0.0' }));
      case 5: {
        const fragment = random.pick([0x2000, 0x2000, 0]) | random.below(random.pick([4, 200, 8192]));
        const payload = data.subarray(0, data.length & ~7);
        return ethernet(0x0800, ipv4(address, random.pick([17, 6, 1]), payload, { id: random.below(8), fragment }));
      }
      default:
        return ethernet(0x0800, this.#segment(data));
    }
  }

  #dnsQuery(): Buffer {
    const head = Buffer.from([
      0,
      this.#random.below(256),
      1,
      0,
      0,
      this.#random.pick([1, 1, 1, 0, 2]),
      0,
      0,
      0,
      0,
      0,
      0,
    ]);
    const tail = this.#noise(this.#random.below(300));
    const name = Buffer.from('\x04fuzz\x07invalid\x00\x00\x0f\x00\x01', 'latin1');
    return Buffer.concat([head, this.#random.chance(50) ? name : tail]);
  }

  #dhcp(): Buffer {
    const message = Buffer.concat([Buffer.alloc(240), this.#noise(this.#random.below(80))]);
    message.set([1, 1, 6, 0]);
    message.writeUInt32BE(0x63825363, 236);
    if (message.length > 243) message.set([53, 1, 1 + this.#random.below(8)], 240);
    return message;
  }

  #segment(data: Buffer): Buffer {
    const random = this.#random;
    const sourcePort = 20_000 + random.below(100);
    const destinationPort = random.pick([this.#port, this.#port, this.#port, 53, 1]);
    const seen = this.#seen.get(sourcePort);
    const near = () => random.pick([0, 0, 0, 0, 1, -1, 1460, -100, 70_000, 0x8000_0000]);
    const flags = random.pick([2, 2, 16, 16, 16, 16, 24, 24, 24, 17, 4, 20, 18, 0, 63, random.below(256)]);
    const options = this.#noise(4 * random.below(random.pick([1, 3, 10])));
    const payload = flags & 2 ? Buffer.alloc(0) : data.subarray(0, random.pick([0, 0, 1, data.length]));
    const fields = { sourcePort, destinationPort, flags, options, payload, window: random.pick([0, 1, 1000, 65535]) };
    const sequence = (seen?.acknowledgement ?? random.u32()) + near();
    const acknowledgement = seen ? seen.sequence + seen.length + near() : random.u32();
    const address = destinationPort === 53 ? DNS : GATEWAY;
    return tcp(address, { ...fields, sequence, acknowledgement });
  }

  /** Breaks a frame here and there; often the IPv4 checksum is made right again, so that it gets further. */
  #mutate(frame: Buffer): Buffer {
    const random = this.#random;
    if (random.chance(60)) return frame;
    const bytes = random.chance(20) ? frame.subarray(0, random.below(frame.length + 1)) : Buffer.from(frame);
    for (let i = random.below(4); i > 0 && bytes.length > 0; i--) {
      const at = random.below(random.pick([bytes.length, Math.min(bytes.length, 60)]));
      bytes[at] = random.pick([0, 255, random.u32(), (bytes[at] as number) ^ (1 << random.below(8))]);
    }
    if (bytes.length >= 34 && random.chance(80)) {
      const length = Math.min(bytes.length - 14, Math.max(20, ((bytes[14] as number) & 15) * 4));
      bytes.writeUInt16BE(0, 24);
      bytes.writeUInt16BE(checksum(bytes.subarray(14, 14 + length)), 24);
      if (random.chance(20)) ip(random.pick([GUEST, GATEWAY, '0.0.0.0'])).copy(bytes, 26);
    }
    return bytes;
  }
}

test(`${CASES} hostile frames`, async () => {
  const random = new Random();
  const problems: unknown[] = [];
  const onProblem = (problem: unknown) => problems.push(problem);
  process.on('uncaughtException', onProblem);
  process.on('unhandledRejection', onProblem);
  try {
    await using host = await HostServer.open((socket) => {
      const choice = random.below(4);
      if (choice === 0) socket.end('x'.repeat(random.below(200_000)));
      else if (choice === 1) socket.pipe(socket);
      else if (choice === 2)
        socket.pause(); // never reads
      else socket.resume().on('end', () => socket.end());
    });
    await using guest = await Guest.open({
      resolvers: [],
      tuning: TUNING,
      // What the guest asks of the world outside this test, it does not get.
      allow: ({ protocol, address, port }) =>
        random.chance(2)
          ? new Promise((resolve) => setTimeout(resolve, 5, random.chance(50)))
          : protocol !== 'dns' && address === GATEWAY && (port === host.port || port === 9),
    });
    const fuzzer = new Fuzzer(random, guest, host.port);
    const { counters } = guest.network;
    for (let i = 0; i < CASES; i++) {
      fuzzer.next();
      if (i % 20 !== 0) continue;
      if (guest.socket.writableNeedDrain) await eventually(() => !guest.socket.writableNeedDrain);
      await turn();
      expect(problems).toEqual([]);
      expect(counters.tcpNow).toBeLessThanOrEqual(TUNING.connections);
      expect(counters.udpMappingsNow).toBeLessThanOrEqual(TUNING.udpMappings);
      expect(counters.tcpBufferedNow).toBeGreaterThanOrEqual(0);
      expect(counters.tcpBufferedNow).toBeLessThanOrEqual(TUNING.totalBuffer + TUNING.connections * 64 * 1024);
    }
    // The guest is silent now: all goes away by itself, and the network still works.
    await eventually(() => counters.udpMappingsNow === 0);
    await eventually(() => counters.tcpNow === 0);
    expect(counters.tcpBufferedNow).toBe(0);
    guest.setOffloads(0);
    guest.announce();
    guest.send(icmpEcho(GATEWAY, 77, 1, Buffer.from('alive')));
    await guest.nextDatagram((d) => d.protocol === 1 && d.payload[0] === 0 && d.payload.readUInt16BE(4) === 77);
    expect(counters.tcpOpened).toBeGreaterThan(Math.min(20, CASES / 1000)); // it went deep
    expect(problems).toEqual([]);
  } catch (error) {
    throw new Error(`TSVISOR_SEED=${random.seed}: ${(error as Error).message}`, { cause: error });
  } finally {
    process.off('uncaughtException', onProblem);
    process.off('unhandledRejection', onProblem);
  }
});
