import { ByteStream } from '../backends/byte-stream.js';
import { addon, type RunHost } from '../kvm/addon.js';
import type { MachineEnd } from './end.js';
import { FdEvents } from './fd-events.js';
import type { MachineMessage } from './messages.js';
import { Statistics } from './statistics.js';

/** What outlives a guest's reset on a machine thread: the wait primitive, the console's stream, the counters. */
export class HostServices implements Disposable {
  readonly runHost: RunHost = new addon.RunHost();
  readonly events = new FdEvents(this.runHost);
  readonly statistics = new Statistics();
  readonly serial: ByteStream | undefined;
  readonly #post: (message: MachineMessage) => void;
  #end: MachineEnd | undefined;

  readonly #logs: boolean;

  constructor(serialFd: number | undefined, logs: boolean, post: (message: MachineMessage) => void) {
    this.#logs = logs;
    this.serial = serialFd === undefined ? undefined : new ByteStream(serialFd, this.events);
    this.#post = post;
  }

  /** Why this run of the guest is over; undefined while it is not. The run loop looks after every dispatch. */
  get end(): MachineEnd | undefined {
    return this.#end;
  }

  /** The first reason counts. */
  finish(end: MachineEnd): void {
    this.#end ??= end;
  }

  /** The guest starts anew. */
  clearEnd(): void {
    this.#end = undefined;
  }

  log(level: 'debug' | 'info' | 'warn', message: string): void {
    if (this.#logs) this.#post({ type: 'log', level, message });
  }

  [Symbol.dispose](): void {
    this.serial?.close();
    this.runHost.close();
  }
}
