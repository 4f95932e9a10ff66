import { constants } from 'node:os';
import { setTimeout as after, setImmediate as soon } from 'node:timers/promises';
import { errnoName, TsvisorError } from '../errors.js';
import { addon, READY, type RunHost } from '../kvm/addon.js';
import { EPOLLIN } from '../kvm/generated/abi.js';
import { type Deferred, deferred } from './deferred.js';
import { Tokens } from './fd-events.js';
import type { VcpuRunner } from './vcpu-runner.js';

const { EAGAIN } = constants.errno;

/** Events between two looks at promises. */
const SLICE = 256;
/** Milliseconds for which promises are looked at again and again after an event, and then how often. */
const ATTENTIVE = 0.2;
const INTERVAL = 1;

/** A machine, as its loop sees it. */
export interface LoopMember {
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
  readonly tokens = new Tokens();
  /** Whether several machines may be on it: then none has its vCPU inline. */
  readonly shared: boolean;
  readonly #vcpus: (VcpuRunner | undefined)[] = [];
  /** Machines that wait to be due. */
  readonly #members = new Map<LoopMember, Deferred<void>>();
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
    const due = deferred<void>();
    this.#members.set(member, due);
    this.leave();
    if (!this.#runs) void this.#run();
    await due.promise;
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

  /** Makes of a machine's handler one that is its own also when it throws. */
  guard(member: LoopMember, handler: () => void): () => void {
    return () => {
      try {
        handler();
      } catch (error) {
        member.fail(error as Error);
      }
      if (member.due) this.#due(member);
    };
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
    while (this.#members.size + this.#away > 0) {
      while (this.#away === 0 && this.#members.size > 0) this.turn(true);
      await this.#takeTurns();
    }
    this.#runs = false;
  }

  /** Handles what comes next. @param wait whether to wait for something. @returns whether there was something. */
  turn(wait: boolean): boolean {
    const event = this.host.next(wait);
    if (event >= READY) {
      this.tokens.dispatch(event & 0xffff);
      return true;
    }
    if (event === -EAGAIN) return false;
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

  #due(member: LoopMember): void {
    const due = this.#members.get(member);
    if (!due) return;
    this.#members.delete(member);
    this.#away++;
    member.rest();
    due.resolve();
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
