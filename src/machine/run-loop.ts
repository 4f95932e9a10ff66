import { constants } from 'node:os';
import { setTimeout as after, setImmediate as soon } from 'node:timers/promises';
import { errnoName, TsvisorError } from '../errors.js';
import { addon, READY, type RunHost } from '../kvm/addon.js';
import { EPOLLIN } from '../kvm/generated/abi.js';
import { type Deferred, deferred } from './deferred.js';
import { Tokens } from './fd-events.js';
import { PolledRings } from './polled-rings.js';
import type { VcpuRunner } from './vcpu-runner.js';

const { EAGAIN } = constants.errno;

/** Events between two looks at promises. */
const SLICE = 256;
/** Milliseconds for which promises are looked at again and again after an event, and then how often. */
const ATTENTIVE = 0.2;
const INTERVAL = 1;

/** A machine, as its loop sees it. */
export interface LoopMember {
  /** The loop's: there while it waits to be due. */
  waiter: Deferred<void> | undefined;
  /** What it waits for has happened. Looked at after each of its events. */
  readonly due: boolean;
  /** One of its events threw this. */
  fail(error: Error): void;
  /** Its vCPUs leave the guest: it is due. */
  rest(): void;
}

/**
 * The hot loop of a machine thread: waits for whatever comes next to the machines on it, exits of vCPUs and descriptors,
 * and gives it to who handles it. While it blocks, the thread's own event loop does not run; while one of its machines
 * waits for promises (`enter()` to `until()`), the two take turns. Allocates nothing for an event.
 */
export class RunLoop implements Disposable {
  readonly host: RunHost = new addon.RunHost();
  readonly tokens = new Tokens<LoopMember>();
  readonly polled = new PolledRings(this.host);
  /** Whether several machines may be on it: then none has its vCPU inline. */
  readonly shared: boolean;
  readonly #vcpus: (VcpuRunner | undefined)[] = [];
  /** Machines that wait to be due. */
  #waiting = 0;
  /** Tokens of events that came to a machine which waited for promises: it has no devices then, or not yet. */
  #late: number[] = [];
  /** Tokens that come before what the RunHost has. */
  readonly #raised: number[] = [];
  /** Machines that wait for promises. */
  #away = 0;
  #back = () => {};
  #runs = false;

  constructor(shared: boolean) {
    this.shared = shared;
  }

  /** A machine comes, and will wait for promises. */
  enter(): void {
    this.#away++;
  }

  /** It goes. */
  leave(): void {
    if (--this.#away === 0) this.#back();
  }

  /** Resolves when the machine is due: until then its events are handled. */
  async until(member: LoopMember): Promise<void> {
    if (member.due) return;
    const { promise } = this.admit(member);
    this.leave();
    if (!this.#runs) void this.#run();
    await promise;
  }

  /** From now on a machine's events are handled, until it is due; first those that came before. */
  admit(member: LoopMember): Deferred<void> {
    const due = deferred<void>();
    member.waiter = due;
    this.#waiting++;
    for (const token of this.#late.splice(0)) this.#dispatch(token);
    return due;
  }

  /** @returns its index. @throws Error when there is no thread to be had. */
  attachVcpu(runner: VcpuRunner, ownThread: boolean): number {
    const { fd, run } = runner.vcpu;
    const index = this.host.attachVcpu(fd, run, ownThread);
    this.#vcpus[index] = runner;
    return index;
  }

  detachVcpu(index: number): void {
    this.host.detachVcpu(index);
    this.#vcpus[index] = undefined;
  }

  /** Whether nothing of any machine is on it. */
  get empty(): boolean {
    return this.tokens.count === 0 && this.#waiting + this.#away === 0 && !this.#vcpus.some((vcpu) => vcpu);
  }

  /** Has a token dispatched with the next turn. */
  raise(token: number): void {
    this.#raised.push(token);
  }

  /** Calls back whenever an eventfd has been written to. */
  onDoorbell(fd: number, callback: () => void): void {
    const count = new Uint8Array(8);
    const token = this.tokens.allocate(() => {
      addon.read(fd, count, 0, 8);
      this.host.watch(fd, token, EPOLLIN);
      callback();
    });
    this.host.watch(fd, token, EPOLLIN);
  }

  [Symbol.dispose](): void {
    this.host.close();
  }

  async #run(): Promise<void> {
    this.#runs = true;
    while (this.#waiting + this.#away > 0) {
      while (this.#away === 0 && this.#waiting > 0) this.turn(true);
      await this.#takeTurns();
    }
    this.#runs = false;
  }

  /** Handles what comes next. @param wait whether to wait for something. @returns whether there was something. */
  turn(wait: boolean): boolean {
    const raised = this.#raised.pop();
    const event = raised === undefined ? this.host.next(wait) : READY | raised;
    if (event >= READY) {
      this.#dispatch(event & 0xffff);
      return true;
    }
    if (event === -EAGAIN) {
      if (wait) this.polled.rest(this.#moved);
      return false;
    }
    if (event < 0) throw new TsvisorError('ERR_INTERNAL', `waiting for events failed with ${errnoName(-event)}`);
    const runner = this.#vcpus[event >> 8] as VcpuRunner;
    const { host } = runner;
    try {
      runner.exit(event & 0xff);
    } catch (error) {
      host.fail(error as Error);
    }
    if (host.due) this.#due(host);
    return true;
  }

  readonly #moved = (token: number) => this.#dispatch(token);

  #dispatch(token: number): void {
    const member = this.tokens.ownerOf(token);
    if (!member) {
      this.tokens.dispatch(token);
      return;
    }
    if (!member.waiter) {
      this.#late.push(token);
      return;
    }
    try {
      this.tokens.dispatch(token);
    } catch (error) {
      member.fail(error as Error);
    }
    if (member.due) this.#due(member);
  }

  #due(member: LoopMember): void {
    const { waiter } = member;
    if (!waiter) return;
    member.waiter = undefined;
    this.#waiting--;
    this.#away++;
    member.rest();
    waiter.resolve();
  }

  /** Until no machine waits for promises. */
  async #takeTurns(): Promise<void> {
    let last = performance.now();
    while (this.#away > 0) {
      let handled = 0;
      while (handled < SLICE && this.turn(false)) handled++;
      if (handled > 0) last = performance.now();
      if (performance.now() - last < ATTENTIVE) {
        await soon();
      } else {
        const back = new Promise<void>((resolve) => {
          this.#back = resolve;
        });
        await Promise.race([after(INTERVAL), back]);
      }
    }
  }
}
