import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { addon, type Mapping } from '#dist/kvm/addon.js';
import { EPOLLIN, MAP_ANONYMOUS, MAP_PRIVATE, PROT_READ, PROT_WRITE } from '#dist/kvm/generated/abi.js';
import { mapMemory } from '#dist/kvm/kvm.js';
import { FdEvents } from '#dist/machine/fd-events.js';
import { MachineRings } from '#dist/machine/polled-rings.js';
import { type LoopMember, RunLoop } from '#dist/machine/run-loop.js';
import { GuestMemory } from '#dist/memory/guest-memory.js';
import { BUFFERS, Ring, WRITE } from '../../support/virtio/ring.js';

const RAM = 4 << 20;
const SIZE = 8;
const REGISTERS = 0xd000_0000;

let loop: RunLoop;
let machines: Polled[];

/** A machine of one queue, whose device gives back each chain at once. The test is its vCPU. */
class Polled implements LoopMember {
  waiter: LoopMember['waiter'];
  due = false;
  failure: Error | undefined;
  readonly mapping: Mapping = mapMemory(RAM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 'a test');
  readonly memory = new GuestMemory([{ gpa: 0, buffer: this.mapping.buffer }]);
  readonly events = new FdEvents<LoopMember>(loop.host, loop.tokens, this);
  readonly rings = new MachineRings(loop, this.events, []);
  readonly ring: Ring;
  /** Of each time that the device was told of work. */
  readonly polled: boolean[] = [];
  /** What it does then. */
  onWork = () => this.serve();

  constructor(eventIndex = true) {
    machines.push(this);
    this.rings.powerOn([[0, this.mapping]]);
    this.ring = new Ring(SIZE, { eventIndex, memory: this.memory });
    for (let i = 0; i < SIZE; i++) this.ring.describe(i, { gpa: BUFFERS, length: 1, flags: WRITE });
    this.ring.queue.pollBy(this.rings.ofDevice(REGISTERS), 0, (polled) => {
      this.polled.push(polled);
      this.onWork();
    });
    loop.admit(this);
    this.rings.setRunning(true);
  }

  serve(): void {
    const { queue } = this.ring;
    for (let chain = queue.pop(); chain; chain = queue.pop()) queue.push(chain, 0);
    queue.publish();
  }

  /** Whether its driver would notify of the next chain, by the words of section 2.7.10.1. */
  get wouldNotify(): boolean {
    return this.ring.availEvent === this.memory.readU16(this.ring.state.available + 2);
  }

  fail(error: Error): void {
    this.failure = error;
  }

  rest(): void {}
}

beforeEach(() => {
  loop = new RunLoop(true);
  machines = [];
});
afterEach(() => {
  for (const { rings, mapping } of machines) {
    rings.powerOff();
    mapping.unmap();
  }
  loop[Symbol.dispose]();
});

/** Nothing has come: the loop is about to sleep. */
function sleep(): void {
  expect(loop.turn(true)).toBe(false);
}

describe('a queue that its device has found empty', () => {
  test('is looked at, and its driver need not notify', () => {
    const machine = new Polled();
    machine.ring.offer(0);
    machine.serve();
    for (let request = 2; request <= 70_000; request++) {
      if (machine.wouldNotify !== (request % 0x1_0000 === 1)) throw new Error(`request ${request}`); // comes around
      machine.ring.offer(0);
      loop.turn(true);
      if (machine.ring.usedIndex !== request % 0x1_0000) throw new Error(`request ${request} was not seen`);
    }
    expect(machine.polled).toHaveLength(69_999);
    expect(machine.polled).not.toContain(false);
  });

  test('has its driver notify once the thread is about to sleep, and is polled no more', () => {
    const machine = new Polled();
    machine.ring.offer(0);
    machine.serve();
    expect(machine.wouldNotify).toBe(false);
    sleep();
    expect(machine.wouldNotify).toBe(true);
    machine.ring.offer(0);
    expect(loop.turn(false)).toBe(false);
    machine.serve(); // as it is notified
    machine.ring.offer(0);
    expect(loop.turn(true)).toBe(true);
    expect(machine.polled).toEqual([true]);
  });

  test('is served when something comes after the last look and before the driver is asked to notify', () => {
    const machine = new Polled();
    machine.ring.offer(0);
    machine.serve();
    const writeU16 = machine.memory.writeU16.bind(machine.memory);
    machine.memory.writeU16 = (gpa, value) => {
      machine.memory.writeU16 = writeU16;
      machine.ring.offer(0); // the driver saw the old avail_event
      writeU16(gpa, value);
    };
    sleep();
    expect(machine.ring.usedIndex).toBe(2);
  });

  test('is not polled where the driver notifies of everything', () => {
    const machine = new Polled(false);
    machine.ring.offer(0);
    machine.serve();
    machine.ring.offer(0);
    expect(loop.turn(false)).toBe(false);
  });

  test('of which the guest moves the index by anything is broken as by a notification', () => {
    for (const index of [SIZE + 2, 0x8000, 0]) {
      const machine = new Polled();
      machine.ring.offer(0);
      machine.serve();
      machine.ring.availIndex = index;
      expect(loop.turn(true)).toBe(true);
      expect(machine.ring.broken).toHaveLength(1);
      machine.ring.availIndex = 5;
      expect(loop.turn(false)).toBe(false);
    }
  });

  test('is forgotten when it is closed', () => {
    const machine = new Polled();
    machine.serve();
    machine.ring.queue.close();
    machine.ring.offer(0);
    expect(loop.turn(false)).toBe(false);
    expect(machine.polled).toEqual([]);
  });
});

describe('a machine that stands still', () => {
  test('has the memory that it would have had without, and nothing is looked at any more', () => {
    const [machine, other] = [new Polled(), new Polled()];
    other.rings.powerOff(); // it is not polled
    for (const { ring } of [machine, other]) ring.offer(0);
    for (const each of [machine, other]) each.serve();
    const same = () => Buffer.from(machine.mapping.buffer).equals(Buffer.from(other.mapping.buffer));
    expect(same()).toBe(false);
    machine.rings.setRunning(false);
    expect(same()).toBe(true);
    for (const { ring } of [machine, other]) ring.offer(0);
    expect(loop.turn(false)).toBe(false);
    expect(same()).toBe(true);
    expect(machine.polled).toEqual([]);
  });

  test('hears when it goes on of what was made available before, and nobody would notify of', () => {
    const machine = new Polled();
    machine.ring.offer(0);
    machine.serve();
    machine.ring.offer(0);
    machine.rings.setRunning(false);
    expect(loop.turn(false)).toBe(false);
    expect(machine.ring.usedIndex).toBe(1);
    machine.rings.setRunning(true);
    machine.rings.setRunning(false); // stands still again at once
    loop.turn(false);
    expect(machine.ring.usedIndex).toBe(1);
    machine.rings.setRunning(true);
    loop.turn(false);
    expect(machine.ring.usedIndex).toBe(2);
  });

  test('has its devices ask for notifications', () => {
    const machine = new Polled();
    machine.rings.setRunning(false);
    machine.ring.offer(0);
    machine.serve();
    expect(machine.wouldNotify).toBe(true);
  });
});

describe('rings of several machines', () => {
  test('that never rest keep neither each other nor descriptors from being seen', () => {
    const busy = [new Polled(), new Polled(), new Polled()];
    for (const machine of busy) {
      // Its guest adds another while the device serves the last.
      machine.onWork = () => {
        machine.serve();
        machine.ring.offer(0);
      };
      machine.ring.offer(0);
      machine.serve();
      machine.ring.offer(0);
    }
    const fd = addon.eventfd(1);
    let events = 0;
    const watch = (busy[0] as Polled).events.add(fd, () => {
      events++;
      watch(EPOLLIN); // it is never read, and so ready at once
    });
    watch(EPOLLIN);
    let turns = 0;
    while (events < 3) {
      loop.turn(true);
      turns++;
    }
    expect(turns).toBeGreaterThan(3);
    const [most, least] = [Math.max, Math.min].map((of) => of(...busy.map(({ polled }) => polled.length)));
    expect((most as number) - (least as number)).toBeLessThanOrEqual(1);
    (busy[0] as Polled).events.close();
    addon.close(fd);
  });

  test('are looked at by the dozen; the drivers of more notify', () => {
    const many = Array.from({ length: 40 }, () => new Polled());
    for (const { ring } of many) ring.offer(0);
    for (const machine of many) machine.serve();
    expect(many.filter(({ wouldNotify }) => wouldNotify)).toHaveLength(8);
    sleep();
    expect(many.filter(({ wouldNotify }) => wouldNotify)).toHaveLength(40);
  });

  test('of which one throws fail that machine alone', () => {
    const [bad, good] = [new Polled(), new Polled()];
    for (const machine of [bad, good]) {
      machine.ring.offer(0);
      machine.serve();
    }
    bad.memory.readU16 = () => {
      throw new Error('its memory is lost');
    };
    sleep();
    expect([bad.failure?.message, good.failure]).toEqual(['its memory is lost', undefined]);
    expect(good.wouldNotify).toBe(true);
  });
});

describe('the addon', () => {
  test('takes no ring that is not in its mapping', () => {
    const mapping = mapMemory(4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 'a test');
    for (const offset of [-2, 1, 4095, 4096, 2 ** 40]) {
      expect(() => loop.host.attachRing(mapping, offset, 0, [], 0, 0), `${offset}`).toThrow('no ring');
    }
    const ring = loop.host.attachRing(mapping, 4094, 7, [], 0, 0);
    mapping.unmap();
    expect(() => loop.host.attachRing(mapping, 0, 0, [], 0, 0)).toThrow('no ring');
    loop.host.detachRing(ring);
    loop.host.detachRing(ring);
    loop.host.detachRing(1e6);
  });

  test('reads of a table only what is there', () => {
    const table = new Int32Array([1000, 5, 1, -1, 1, 2 ** 31 - 1, 1]);
    loop.host.poll(table);
    expect(loop.host.next(false)).toBe(-11);
    expect(() => loop.host.poll(new Int32Array(0))).toThrow('empty');
  });
});
