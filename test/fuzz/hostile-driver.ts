import { feature } from '#dist/virtio/device.js';
import * as abi from '#dist/virtio/generated/virtio.js';
import type { Random } from '../kvm/assist/random.js';
import { type Descriptor, DriverRing } from './driver-ring.js';
import { type FuzzMachine, LOW_END, RAM, Violation } from './machine.js';
import type { Request, Subject } from './target.js';

const { VRING_DESC_F_NEXT: NEXT, VRING_DESC_F_WRITE: WRITE, VRING_DESC_F_INDIRECT: INDIRECT } = abi;
const { VIRTIO_CONFIG_S_DRIVER_OK: DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK: FEATURES_OK } = abi;
const ACKNOWLEDGED = abi.VIRTIO_CONFIG_S_ACKNOWLEDGE | abi.VIRTIO_CONFIG_S_DRIVER;
const VERSION_1 = feature(abi.VIRTIO_F_VERSION_1);
const SIZES = [1, 2, 4, 8, 8, 16, 16, 32, 64];
/** Where there are many. */
const SMALL_SIZES = [1, 2, 4, 8, 8, 16, 16];
/** Below are rings, above buffers: mostly. */
const BUFFERS = 0x6000;
/** How much a driver does against the rules, in relation to what the numbers here say. */
const WILDNESS = [0, 0.1, 1, 1, 3];
/** How often a lawful driver looks for memory that no request has. */
const TRIES = 20;
const HUGE = [
  2n ** 32n - 1n,
  2n ** 32n,
  2n ** 52n,
  2n ** 53n - 1n,
  2n ** 53n,
  2n ** 63n,
  2n ** 64n - 4096n,
  2n ** 64n - 1n,
];
const LENGTHS = [
  0,
  1,
  2,
  15,
  16,
  17,
  511,
  512,
  513,
  4095,
  4096,
  0x1_0000,
  0x7fff_ffff,
  0x8000_0000,
  0xffff_fff0,
  2 ** 32 - 1,
];

/** A driver that knows the rules and breaks some of them now and then; in some cases none. */
export class HostileDriver {
  /** It keeps to the rules: every request of it must be served. */
  readonly lawful: boolean;
  readonly #machine: FuzzMachine;
  readonly #subject: Subject;
  readonly #random: Random;
  readonly #wildness: number;
  #rings: DriverRing[] = [];
  #indirect = false;
  #eventIndex = false;
  #ringsEnd = 0;
  readonly #operations: readonly (readonly [weight: number, operation: () => string])[];
  readonly #weights: number;

  constructor(machine: FuzzMachine, subject: Subject, random: Random) {
    this.#machine = machine;
    this.#subject = subject;
    this.#random = random;
    const wild = random.pick(WILDNESS);
    this.#wildness = wild;
    this.lawful = wild === 0;
    this.#operations = [
      [360, () => this.#request()],
      [140, () => this.#notify(this.#subject.queue(random))],
      [20, () => this.#notify(random.pick([random.below(20), 0xffff, 0x1_0000, 0xffff_ffff, random.u32()]))],
      [30, () => this.#askForInterrupts()],
      [60 * wild, () => this.#pokeRing()],
      [30 * wild, () => this.#pokeMemory()],
      [20 * wild, () => this.#jump()],
      [80, () => this.#acknowledge()],
      [30, () => this.#readConfig()],
      [20, () => this.#writeConfig()],
      [30 * wild, () => this.#register()],
      [20 * wild, () => this.#playStatus()],
      [10 * wild, () => this.#stopQueue()],
      [8, () => this.#reset()],
      [10, () => this.initialize()],
      [160, () => this.#subject.hostEvent(random)],
      [15, () => this.#move()],
    ];
    this.#weights = this.#operations.reduce((sum, [weight]) => sum + weight, 0);
  }

  /** One operation of the guest, or of the host. @throws Violation */
  step(): void {
    const { trace } = this.#machine;
    this.#machine.perform(() => {
      const at = trace?.push('…') ?? 0;
      const what = this.#choose()();
      if (trace) trace[at - 1] = what;
    });
  }

  /** Once the host has done all it has to do: what a lawful driver asked for is done. @throws Violation */
  checkServed(): void {
    if (!this.lawful || !this.#machine.live) return;
    for (const ring of this.#rings) {
      if (!this.#subject.serves(ring.index) || ring.inFlight === 0) continue;
      throw new Violation(`${ring.inFlight} requests of queue ${ring.index} were not served`);
    }
  }

  /** Whether to break a rule that is broken so often, in percent. */
  #odd(percent: number): boolean {
    return this.#random.below(10_000) < 100 * percent * this.#wildness;
  }

  #choose(): () => string {
    const random = this.#random;
    if (this.#subject.held) return () => this.#subject.hostEvent(random);
    // A device that does nothing finds nothing.
    if (!this.#machine.live && random.chance(70)) return () => this.initialize();
    let left = random.below(this.#weights);
    for (const [weight, operation] of this.#operations) {
      if (left < weight) return operation;
      left -= weight;
    }
    throw new Error('no operation');
  }

  /** Section 3.1.1, nearly always with a good end. */
  initialize(): string {
    const { driver } = this.#machine;
    const random = this.#random;
    if (!this.#odd(5)) driver.status = 0;
    driver.status = ACKNOWLEDGED;
    let features = driver.offered;
    for (const bit of [abi.VIRTIO_RING_F_EVENT_IDX, abi.VIRTIO_RING_F_INDIRECT_DESC]) {
      if (random.chance(40)) features &= ~feature(bit);
    }
    if (random.chance(30)) features &= random.u64() | VERSION_1 | (random.chance(80) ? 0x7000_0000n : 0n);
    if (this.#odd(2)) features ^= feature(random.below(128));
    driver.writeFeatures(features);
    driver.status = ACKNOWLEDGED | FEATURES_OK;
    if (!(driver.status & FEATURES_OK)) {
      features = VERSION_1 | (features & 0x3000_0000n);
      driver.writeFeatures(features);
      driver.status = ACKNOWLEDGED | FEATURES_OK;
    }
    this.#rings = [];
    this.#ringsEnd = 0;
    this.#indirect = (features & feature(abi.VIRTIO_RING_F_INDIRECT_DESC)) !== 0n;
    this.#eventIndex = (features & feature(abi.VIRTIO_RING_F_EVENT_IDX)) !== 0n;
    const queues = driver.device.queueSizes.map((maximum, index) => {
      if (this.#odd(1)) return 'none';
      return this.#setUpQueue(index, maximum);
    });
    if (!this.#odd(2)) driver.status |= DRIVER_OK;
    return `initialize, features 0x${features.toString(16)}, queues ${queues.join(' ')}`;
  }

  #setUpQueue(index: number, maximum: number): string {
    const { driver, guest } = this.#machine;
    const random = this.#random;
    const sizes = driver.device.queueSizes.length > 4 ? SMALL_SIZES : SIZES;
    const size = this.#odd(1) ? random.pick([0, 3, 2 * maximum, 0x8000]) : Math.min(maximum, random.pick(sizes));
    const place = (length: number, alignment: number) => {
      if (this.#odd(1)) return this.#address(length);
      // Over another ring, or anywhere.
      const other = this.#rings.length > 0 && this.#odd(3) ? random.pick(this.#rings) : undefined;
      if (other) return BigInt(this.#partOf(other) + alignment * random.below(4)) & ~BigInt(alignment - 1);
      const free = Math.ceil(this.#ringsEnd / alignment) * alignment;
      if (free + length > BUFFERS || this.#odd(3))
        return BigInt(random.below((LOW_END - length) / alignment) * alignment);
      this.#ringsEnd = free + length;
      return BigInt(free);
    };
    const clamped = Math.min(size, 0x400);
    const placed = [place(16 * clamped, 16), place(6 + 2 * clamped, 2), place(6 + 8 * clamped, 4)];
    driver.write32(abi.VIRTIO_MMIO_QUEUE_SEL, index);
    driver.write32(abi.VIRTIO_MMIO_QUEUE_NUM, size);
    const registers = [abi.VIRTIO_MMIO_QUEUE_DESC_LOW, abi.VIRTIO_MMIO_QUEUE_AVAIL_LOW, abi.VIRTIO_MMIO_QUEUE_USED_LOW];
    registers.forEach((register, i) => {
      const gpa = placed[i] as bigint;
      driver.write32(register, Number(gpa & 0xffff_ffffn));
      driver.write32(register + 4, Number(gpa >> 32n));
    });
    const [descriptors, available, used] = placed.map(Number) as [number, number, number];
    const placement = { index, size, descriptors, available, used };
    if (guest.contains(available, 6 + 2 * size) && guest.contains(used, 6 + 8 * size)) {
      // The device starts at 0, whatever is there.
      if (!this.#odd(3)) {
        guest.zero(available, 6 + 2 * size);
        guest.zero(used, 6 + 8 * size);
      }
      if (guest.contains(descriptors, 16 * size) && size > 0) {
        this.#rings.push(new DriverRing(guest, placement, this.#eventIndex));
      }
    }
    driver.write32(abi.VIRTIO_MMIO_QUEUE_READY, 1);
    return `${size}@${placed.map((gpa) => gpa.toString(16)).join('/')}`;
  }

  #request(): string {
    const random = this.#random;
    const ring = this.#ring(this.#subject.queue(random));
    if (!ring) return 'no such queue';
    const what: string[] = [];
    for (let n = random.chance(70) ? 1 : 1 + random.below(5); n > 0; n--) {
      if (ring.inFlight >= ring.size && !this.#odd(5)) break;
      if (!this.#place(ring, this.#subject.request(random, ring.index), what)) break;
    }
    const wanted = ring.show();
    if (this.lawful ? wanted : random.chance(80)) this.#notify(ring.index);
    return `requests in queue ${ring.index}: ${what.join('; ')}`;
  }

  /** Makes a request available. @returns false where a lawful driver finds no room for it. */
  #place(ring: DriverRing, request: Request, what: string[]): boolean {
    const random = this.#random;
    const out = this.#buffers(request.out.length, 0);
    const chain = [...out, ...this.#buffers(request.in, WRITE)];
    if (chain.length === 0) chain.push({ gpa: 0n, length: 0, flags: 0, next: 0 });
    const buffers = [...chain];
    // Some of the descriptors in the ring, the others in an indirect table.
    const whole = random.chance(60) || !(this.#indirect || this.#odd(2));
    const direct = whole ? chain.length : random.below(Math.min(3, chain.length));
    const inner = chain.splice(direct);
    if (inner.length > 0) {
      const table = { gpa: this.#tableFor(inner.length), length: 16 * inner.length, flags: INDIRECT, next: 0 };
      chain.push(table);
      buffers.push(table);
    }
    const free = ring.reclaim();
    if (this.lawful && (free.length < chain.length || !this.#apart(buffers))) return false;
    this.#fill(out, request.out);
    const at = chain.map(() => free.splice(random.below(free.length), 1)[0] ?? random.below(ring.size));
    const own = [...at];
    if (inner.length > 0) {
      this.#link(inner, (i) => i);
      this.#mutate(inner);
      ring.write(inner, [], Number(chain.at(-1)?.gpa));
    }
    this.#link(chain, (i) => at[i] as number);
    this.#mutate(chain);
    ring.write(chain, at);
    const head = this.#odd(1) ? random.below(ring.size + 1) : (at[0] as number);
    ring.offer(head, own, buffers);
    if (this.#machine.trace) {
      const show = ({ gpa, length, flags, next }: Descriptor) => `${gpa.toString(16)}+${length}/${flags}>${next}`;
      what.push(`${head}: ${chain.map(show).join(' ')} of ${Buffer.from(request.out.subarray(0, 40)).toString('hex')}`);
    }
    return true;
  }

  /** Whether buffers have all their memory for themselves. */
  #apart(buffers: readonly Descriptor[]): boolean {
    return buffers.every(({ gpa, length }, i) => {
      const end = gpa + BigInt(length);
      const others = buffers.slice(i + 1);
      if (others.some((other) => gpa < other.gpa + BigInt(other.length) && other.gpa < end)) return false;
      return !this.#rings.some((ring) => ring.covers(gpa, length));
    });
  }

  #link(chain: Descriptor[], at: (i: number) => number): void {
    chain.forEach((descriptor, i) => {
      if (i === chain.length - 1) return;
      descriptor.flags |= NEXT;
      descriptor.next = at(i + 1);
    });
  }

  #mutate(chain: Descriptor[]): void {
    const random = this.#random;
    while (this.#odd(5)) {
      const descriptor = random.pick(chain);
      switch (random.below(5)) {
        case 0:
          descriptor.gpa = this.#address(descriptor.length);
          break;
        case 1:
          descriptor.length = random.chance(70) ? random.pick(LENGTHS) : random.u32();
          break;
        case 2:
          descriptor.flags ^= random.chance(90) ? 1 << random.below(3) : random.u32() & 0xffff;
          break;
        case 3:
          descriptor.next = random.chance(70) ? random.below(chain.length + 1) : random.u32() & 0xffff;
          break;
        default:
          chain.splice(random.below(chain.length + 1), 0, { ...random.pick(chain) });
      }
    }
  }

  #buffers(total: number, flags: number): Descriptor[] {
    return this.#pieces(total).map((length) => ({ gpa: this.#address(length), length, flags, next: 0 }));
  }

  /** Puts bytes into buffers, as far as these are memory. */
  #fill(buffers: readonly Descriptor[], bytes: Uint8Array): void {
    const { guest } = this.#machine;
    let at = 0;
    for (const { gpa, length } of buffers) {
      if (guest.contains(Number(gpa), length)) guest.write(Number(gpa), bytes.subarray(at, at + length));
      at += length;
    }
  }

  #pieces(total: number): number[] {
    const random = this.#random;
    const pieces: number[] = [];
    for (let left = total; left > 0; ) {
      const length = pieces.length < 5 && random.chance(50) ? random.below(Math.min(left, 600) + 1) : left;
      pieces.push(length);
      left -= length;
    }
    return pieces;
  }

  #tableFor(count: number): bigint {
    const random = this.#random;
    if (this.lawful || this.#odd(3)) return this.#address(16 * count);
    return BigInt(BUFFERS + random.below(LOW_END - BUFFERS - 16 * count));
  }

  /** Nearly always RAM. */
  #address(length: number): bigint {
    const random = this.#random;
    if (this.lawful) return this.#ownAddress(length);
    const kind = random.below(100);
    if (!this.#odd(8) && length < LOW_END - BUFFERS) return BigInt(BUFFERS + random.below(LOW_END - BUFFERS - length));
    if (kind < 20 && length < LOW_END) return BigInt(random.below(LOW_END - length));
    if (kind < 50) {
      const region = random.pick(RAM);
      const gpa = BigInt(region.gpa + region.size - length + (random.chance(60) ? 0 : random.below(3) - 1));
      return gpa & 0xffff_ffff_ffff_ffffn;
    }
    const ring = this.#rings.length > 0 ? random.pick(this.#rings) : undefined;
    if (kind < 75 && ring) return BigInt(this.#partOf(ring) + random.below(32));
    if (kind < 85) return BigInt(2 ** 32 + random.below(0x4000));
    return random.chance(50) ? random.pick(HUGE) : random.u64();
  }

  /** Memory that no request in flight has, if there is some. */
  #ownAddress(length: number): bigint {
    let gpa = 0n;
    for (let n = 0; n < TRIES; n++) {
      gpa = BigInt(BUFFERS + this.#random.below(Math.max(1, LOW_END - BUFFERS - length)));
      if (!this.#rings.some((ring) => ring.covers(gpa, length))) return gpa;
    }
    return gpa;
  }

  #partOf({ descriptors, available, used }: DriverRing): number {
    return this.#random.pick([descriptors, available, used]);
  }

  #ring(index: number): DriverRing | undefined {
    return this.#rings.find((ring) => ring.index === index);
  }

  #notify(index: number): string {
    this.#machine.driver.write32(abi.VIRTIO_MMIO_QUEUE_NOTIFY, index);
    return `notify ${index}`;
  }

  #askForInterrupts(): string {
    const random = this.#random;
    const { guest } = this.#machine;
    if (this.#rings.length === 0) return 'no rings';
    const { index, available, used, size } = random.pick(this.#rings);
    guest.writeU16(available, random.below(3));
    const event = (guest.readU16(used + 2) + random.below(5) - 1) & 0xffff;
    guest.writeU16(available + 4 + 2 * size, event);
    return `queue ${index}: used_event ${event} and flags`;
  }

  /** Changes what is in a ring, as if another vCPU did. */
  #pokeRing(): string {
    const random = this.#random;
    const { guest } = this.#machine;
    if (this.#rings.length === 0) return 'no rings';
    const ring = random.pick(this.#rings);
    const { descriptors, available, used, size } = ring;
    const at = random.below(size);
    const value = random.chance(50) ? random.below(2 * size + 2) : random.u32() & 0xffff;
    switch (random.below(5)) {
      case 0:
        guest.writeU64(descriptors + 16 * at, this.#address(16));
        return `queue ${ring.index}: descriptor ${at} elsewhere`;
      case 1:
        guest.writeU32(descriptors + 16 * at + 8, random.pick(LENGTHS));
        return `queue ${ring.index}: length of descriptor ${at}`;
      case 2:
        guest.writeU16(descriptors + 16 * at + 12 + 2 * random.below(2), value & 7);
        return `queue ${ring.index}: flags or next of descriptor ${at}: ${value & 7}`;
      case 3:
        guest.writeU16(available + 4 + 2 * at, value);
        return `queue ${ring.index}: available ${at}: ${value}`;
      default:
        guest.writeU16(used + 2 * random.below(3 + 4 * size), value);
        return `queue ${ring.index}: used ring`;
    }
  }

  #pokeMemory(): string {
    const random = this.#random;
    const length = 1 + random.below(64);
    const gpa = random.below(LOW_END - length);
    this.#machine.guest.write(gpa, random.fill(new Uint8Array(length)));
    return `memory ${gpa.toString(16)}+${length}`;
  }

  #jump(): string {
    const random = this.#random;
    const ring = this.#ring(this.#subject.queue(random));
    if (!ring) return 'no such queue';
    const steps = random.pick([-1, 1, 2, ring.size, ring.size + 1, 0x8000, random.u32()]);
    ring.availIndex = (ring.availIndex + steps) & 0xffff;
    this.#machine.guest.writeU16(ring.available + 2, ring.availIndex);
    if (random.chance(70)) this.#notify(ring.index);
    return `queue ${ring.index}: available index ${ring.availIndex}`;
  }

  #acknowledge(): string {
    const bits = this.#random.pick([1, 3, 3, this.#random.u32()]);
    this.#machine.driver.write32(abi.VIRTIO_MMIO_INTERRUPT_ACK, bits);
    return `acknowledge ${bits}`;
  }

  #readConfig(): string {
    const random = this.#random;
    const [offset, width] = [random.below(random.chance(90) ? 96 : 0xf00 - 8), random.pick([1, 2, 4, 8])];
    this.#machine.driver.readConfig(offset, width);
    return `read ${width} of configuration ${offset}`;
  }

  #writeConfig(): string {
    const random = this.#random;
    const { writableConfig } = this.#subject;
    const field = writableConfig && random.chance(60);
    const offset = field ? random.pick(writableConfig) : random.below(random.chance(90) ? 96 : 0xf00 - 8);
    const width = field && random.chance(70) ? 1 : random.pick([1, 2, 4, 8]);
    this.#machine.driver.writeConfig(offset, random.fill(new Uint8Array(width)));
    return `write ${width} of configuration ${offset}`;
  }

  #register(): string {
    const random = this.#random;
    const { transport } = this.#machine.driver;
    const offset = random.chance(80) ? 4 * random.below(64) : random.below(0x1000 - 8);
    const data = random.fill(new Uint8Array(random.chance(80) ? 4 : random.pick([1, 2, 8])));
    if (random.chance(50)) transport.read(offset, data);
    else transport.write(offset, data);
    return `register ${offset.toString(16)}, ${data.length} bytes`;
  }

  #playStatus(): string {
    const random = this.#random;
    const { driver } = this.#machine;
    const value = random.chance(70)
      ? driver.status | (1 << random.below(8))
      : random.u32() & (random.chance(50) ? 0xff : -1);
    driver.status = value >>> 0;
    return `status ${value}`;
  }

  #stopQueue(): string {
    const { driver } = this.#machine;
    const queue = this.#subject.queue(this.#random);
    driver.write32(abi.VIRTIO_MMIO_QUEUE_SEL, queue);
    driver.write32(abi.VIRTIO_MMIO_QUEUE_READY, this.#random.below(2));
    return `ready bit of queue ${queue}`;
  }

  /** The machine is saved and goes on as another; now and then its state is damaged on the way. */
  #move(): string {
    const machine = this.#machine;
    const { renew } = this.#subject;
    if (!renew) return 'nothing';
    const what: string[] = [];
    const damage = (state: object) => what.push(damageOf(state, this.#random));
    const outcome = machine.move(renew.bind(this.#subject), this.#odd(20) ? damage : undefined);
    return ['saved and restored', ...what, outcome].join(': ');
  }

  #reset(): string {
    this.#machine.driver.status = 0;
    return 'reset';
  }
}

/** Gives one field of a state another value. @returns which. */
function damageOf(state: object, random: Random): string {
  let at = state as Record<string, unknown>;
  const path: string[] = [];
  for (;;) {
    const names = Object.keys(at);
    const name = names.length > 0 ? random.pick(names) : undefined;
    if (name === undefined) return 'nothing';
    path.push(name);
    const value = at[name];
    if (typeof value === 'object' && value !== null && random.chance(95)) {
      at = value as Record<string, unknown>;
      continue;
    }
    const numbers = [0, 1, 2, 7, 16, 64, 0xff, 0xffff, 0x1_0000, 2 ** 32 - 1, 2 ** 32, 2 ** 53, -1, 0.5, random.u32()];
    at[name] =
      typeof value === 'number' && random.chance(90)
        ? random.pick([...numbers, value + 1, value - 1])
        : random.pick([true, false, null, 'ff', '', [], {}, [1], ...numbers]);
    return `${path.join('.')} = ${JSON.stringify(at[name])}`;
  }
}
