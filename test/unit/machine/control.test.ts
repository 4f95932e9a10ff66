import { MessageChannel, receiveMessageOnPort } from 'node:worker_threads';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { PENDING } from '#dist/backends/disk/disk.js';
import type { IoRequest } from '#dist/backends/guest-io.js';
import { addon } from '#dist/kvm/addon.js';
import { Control } from '#dist/machine/control.js';
import { FdEvents } from '#dist/machine/fd-events.js';
import type { HostServices } from '#dist/machine/host-services.js';
import type { ControlRequest, MachineMessage } from '#dist/machine/messages.js';
import type { UserDevices } from '#dist/machine/user-devices/user-devices.js';
import type { VirtualMachine } from '#dist/machine/virtual-machine.js';

/** Tokens, in the order in which Control asks for them. */
const TIMER = 0;
const DOORBELL = 1;
/** The first request to this machine. */
const FIRST = 5;

/** A machine thread whose machine, disks and timers do what the test says. */
class Rig {
  readonly #port = new MessageChannel();
  #timer = -1;
  readonly #events = new FdEvents({
    attachVcpu: () => 0,
    detachVcpu: () => {},
    setRunnable: () => {},
    poll: () => {},
    attachRing: () => 0,
    detachRing: () => {},
    watch: (fd, token) => {
      if (token === TIMER) this.#timer = fd;
      return 0;
    },
    unwatch: () => 0,
    next: () => -9,
    failure: () => 9,
    settle: () => 0,
    close: () => {},
  });
  readonly #doorbell = addon.eventfd(0);
  holds = 0;
  /** Who waits for the devices to come to rest. */
  readonly quiet: (() => void)[] = [];
  readonly syncs: IoRequest[] = [];
  /** What sync() says. */
  outcome = PENDING;
  readonly control: Control;
  #id = FIRST - 1;

  constructor() {
    const disk = { path: 'disk.img', sync: (request: IoRequest) => this.#sync(request) };
    const host = {
      events: this.#events,
      drives: [{ path: 'iso', sync: () => 0 }, disk],
      holdVcpus: () => {
        this.holds++;
        return () => this.holds--;
      },
      statistics: { snapshot: () => ({}) },
      get end() {
        return undefined;
      },
    };
    this.control = new Control(this.machine(), 'paused', host as unknown as HostServices, {} as UserDevices, {
      port: this.#port.port1,
      doorbell: this.#doorbell,
      firstRequest: FIRST,
    });
  }

  machine(): VirtualMachine {
    const whenQuiet = (callback: () => void) => this.quiet.push(callback);
    return { whenQuiet, settle: () => true } as unknown as VirtualMachine;
  }

  /** @returns its id. */
  ask(command: ControlRequest['command'], id = ++this.#id): number {
    this.#port.port2.postMessage({ id, command } satisfies ControlRequest);
    addon.write(this.#doorbell, new Uint8Array(new BigUint64Array([1n]).buffer), 0, 8);
    this.#events.dispatch(DOORBELL);
    return id;
  }

  /** The time that was set is over. */
  async expire(): Promise<void> {
    addon.timerfdSet(this.#timer, 1);
    for (let expired = false; !expired; ) {
      await new Promise((resolve) => setTimeout(resolve, 2));
      const before = this.holds;
      this.#events.dispatch(TIMER);
      expired = this.holds !== before;
    }
  }

  /** The devices have come to rest. */
  rest(): void {
    for (const callback of this.quiet.splice(0)) callback();
  }

  /** The answers since the last time: `id`, or `id: why not`. */
  answers(): string[] {
    const all: string[] = [];
    for (let m = receiveMessageOnPort(this.#port.port2); m; m = receiveMessageOnPort(this.#port.port2)) {
      const message = m.message as MachineMessage;
      if (message.type === 'reply') all.push(String(message.id));
      if (message.type === 'refusal') all.push(`${message.id}: ${message.error.code} ${message.error.message}`);
    }
    return all;
  }

  close(): void {
    this.control[Symbol.dispose]();
    this.#port.port1.close();
    addon.close(this.#doorbell);
  }

  #sync(request: IoRequest): number {
    this.syncs.push(request);
    return this.outcome;
  }
}

test('a request that was meant for the machine before on the thread is dropped', () => {
  const rig = new Rig();
  rig.ask('release', FIRST - 1);
  expect(rig.answers()).toEqual([]);
  const id = rig.ask('query');
  expect(rig.answers()).toEqual([String(id)]);
  rig.close();
});

describe('a machine is held for a snapshot', () => {
  let rig: Rig;
  beforeEach(() => {
    rig = new Rig();
  });
  afterEach(() => rig.close());

  test('when its devices have come to rest, its disks are flushed, and they have come to rest again', () => {
    const id = rig.ask('hold');
    expect([rig.holds, rig.syncs.length, rig.answers()]).toEqual([1, 0, []]);
    rig.rest();
    expect([rig.syncs.length, rig.answers()]).toEqual([1, []]);
    rig.syncs[0]?.ioDone(0);
    expect(rig.answers()).toEqual([]);
    rig.rest();
    expect(rig.answers()).toEqual([String(id)]);
    expect(rig.holds).toBe(1);
    rig.ask('release');
    expect(rig.holds).toBe(0);
  });

  test.each([
    ['at once', -5],
    ['later', PENDING],
  ])('a disk that fails to be flushed %s is told, and the guest goes on', (_, outcome) => {
    rig.outcome = outcome;
    const id = rig.ask('hold');
    rig.rest();
    if (outcome === PENDING) rig.syncs[0]?.ioDone(-5);
    const why = 'snapshot: drives[1]: disk.img cannot be flushed: EIO; the guest’s last writes to it may be lost';
    expect(rig.answers()).toEqual([`${id}: ERR_SNAPSHOT ${why}`]);
    expect(rig.holds).toBe(0);
    rig.rest();
    expect(rig.answers()).toEqual([]);
  });

  test('a disk that is at work for ever is told after a while; what it does later concerns no other hold', async () => {
    const id = rig.ask('hold');
    await rig.expire();
    const why = 'snapshot: the machine’s disks have not come to rest for 30 s; take it again';
    expect(rig.answers()).toEqual([`${id}: ERR_SNAPSHOT ${why}`]);
    expect(rig.holds).toBe(0);
    const late = rig.quiet.splice(0);
    const next = rig.ask('hold');
    for (const callback of late) callback();
    for (const callback of rig.quiet.splice(1)) callback(); // of the first
    expect(rig.answers()).toEqual([]);
    expect(rig.syncs).toEqual([]);
    rig.rest();
    rig.rest();
    expect(rig.answers()).toEqual([String(next)]);
  });

  test('the guest’s reset meanwhile is told', () => {
    const id = rig.ask('hold');
    rig.control.replaceMachine(rig.machine());
    expect(rig.answers()).toEqual([`${id}: ERR_SNAPSHOT snapshot: the guest reset itself meanwhile; take it again`]);
    expect(rig.holds).toBe(0);
  });

  test('by one at a time: another is refused and does not disturb it', () => {
    const first = rig.ask('hold');
    const second = rig.ask('hold');
    expect(rig.answers()).toEqual([
      `${second}: ERR_SNAPSHOT snapshot: another one of this machine is being taken; wait for that`,
    ]);
    rig.rest();
    rig.rest();
    expect(rig.answers()).toEqual([String(first)]);
    expect(rig.holds).toBe(1);
  });
});
