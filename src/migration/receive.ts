import type { TLSSocket } from 'node:tls';
import { MigrationError, TsvisorError } from '../errors.js';
import { type Deferred, deferred } from '../machine/deferred.js';
import type { MemoryLayer } from '../machine/guest-ram.js';
import type { DriveOverride } from '../snapshot/disks.js';
import { type CheckedState, decodeState } from '../snapshot/format.js';
import { formatAddress, parseAddress } from './address.js';
import { ConnectionLost, FrameChannel, Refusal, unversioned, violation } from './channel.js';

export { ownFolders } from './drives.js';

import { checkDrives, drivesHere } from './drives.js';
import { FrameType, versioned } from './frames.js';
import { checkMilliseconds, DEFAULT_TIMEOUT, type MigrationCommon, type MigrationProgress } from './options.js';
import { ownIdentity } from './process-identity.js';
import { ReceivedMemory } from './received-memory.js';
import { keyBytes, SecureListener } from './secure.js';
import { stages } from './stages.js';

/** Rounds of pre-copy that a source may take. */
const MAX_ROUNDS = 1000;
/** Milliseconds for which it is told what became of a machine, to a source that may not have heard. */
const LINGER = 120_000;

/** What a target is told. */
export interface ReceiveOptions extends MigrationCommon {
  /** Told once the target can be connected to: where it listens, with the real port. */
  readonly onListening?: (address: string) => void;
}

/** A machine that is being made, as far as this goes. */
export interface ReceivedMachine {
  resume(): Promise<void>;
  close(): Promise<void>;
}

export interface Reception<M> extends ReceiveOptions {
  readonly signal: AbortSignal | undefined;
  /** Files in place of those that the source names. */
  readonly drives: readonly (DriveOverride | undefined)[];
  /** Rejects if there can be no machine of that configuration with those drives here; makes ready for one. */
  readonly prepare: (state: CheckedState, drives: readonly DriveOverride[]) => Promise<void>;
  /** Makes the machine. */
  readonly build: (state: CheckedState, drives: readonly DriveOverride[], memory: MemoryLayer) => Promise<M>;
}

/**
 * Waits for a migration and takes the machine. @returns it, running, unless it was paused at the source.
 * @throws MigrationError, UsageError, the signal's reason; nothing is left of the machine here then
 */
export async function receiveMachine<M extends ReceivedMachine>(address: string, reception: Reception<M>): Promise<M> {
  const { signal, onListening, timeout = DEFAULT_TIMEOUT } = reception;
  const where = parseAddress(address);
  const psk = keyBytes(reception.key);
  checkMilliseconds('timeout', timeout);
  signal?.throwIfAborted();
  const receiver = new Receiver(reception, timeout);
  const listener = await SecureListener.open(where, psk, timeout, receiver);
  const abort = () => receiver.fail(signal?.reason);
  signal?.addEventListener('abort', abort, { once: true });
  if (signal?.aborted) abort();
  try {
    onListening?.(formatAddress(listener.address));
    return await receiver.result;
  } catch (error) {
    if (signal?.aborted || (error instanceof TsvisorError && error.code === 'ERR_USAGE')) throw error;
    const { message } = error as Error;
    const why = error instanceof Refusal ? `the source gave up: ${message}` : message;
    throw new MigrationError(`migration: ${why}`, { cause: error });
  } finally {
    signal?.removeEventListener('abort', abort);
    listener.unref();
    void receiver.answered.then(() => listener.close());
  }
}

/** Who comes to a target. One of them brings the machine; it may come back to ask what became of it. */
class Receiver<M extends ReceivedMachine> {
  readonly result: Promise<M>;
  /** Resolves when nobody will ask any more. */
  readonly answered: Promise<void>;
  readonly #reception: Reception<M>;
  readonly #timeout: number;
  readonly #result: Deferred<M> = deferred();
  readonly #answered: Deferred<void> = deferred();
  /** `mine`: the source has said so. What is `over` will never run. */
  #state: 'waiting' | 'receiving' | 'mine' | 'over' = 'waiting';
  #channel: FrameChannel | undefined;
  #id = '';

  constructor(reception: Reception<M>, timeout: number) {
    this.#reception = reception;
    this.#timeout = timeout;
    this.result = this.#result.promise;
    this.answered = this.#answered.promise;
  }

  connected(socket: TLSSocket): void {
    const channel = new FrameChannel(socket, this.#timeout);
    this.#greet(channel).catch((error) => channel.refuse((error as Error).message));
  }

  wrongKey(error: MigrationError): void {
    if (this.#state === 'waiting') this.fail(error);
  }

  /** Ends it, unless the machine runs here. */
  fail(error: Error): void {
    if (this.#state === 'mine') return;
    this.#state = 'over';
    this.#channel?.destroy(error);
    if (!this.#channel) this.#settle(error);
  }

  async #greet(channel: FrameChannel): Promise<void> {
    const { type, payload } = await channel.next(FrameType.hello, FrameType.ask);
    if (type === FrameType.ask) return this.#answer(channel, unversioned(payload).toString('latin1'));
    if (this.#state !== 'waiting') throw new MigrationError('another migration is under way there');
    this.#state = 'receiving';
    this.#channel = channel;
    try {
      this.#result.resolve(await this.#receive(channel, payload));
    } catch (error) {
      this.#state = 'over';
      this.#settle(error as Error);
      throw error;
    }
  }

  #settle(error: Error): void {
    this.#result.reject(error);
    if (this.#id === '') this.#answered.resolve();
    else setTimeout(() => this.#answered.resolve(), LINGER).unref();
  }

  /** The source has lost its connection: what became of the machine is decided now, if it was not. */
  async #answer(channel: FrameChannel, id: string): Promise<void> {
    if (id !== this.#id) throw new MigrationError('there is no such migration');
    this.fail(new ConnectionLost('the connection was lost'));
    try {
      await this.result;
    } catch {
      throw new MigrationError('the target gave up');
    }
    await channel.send(FrameType.running);
    channel.end();
  }

  async #receive(channel: FrameChannel, hello: Buffer): Promise<M> {
    const state = decodeState(unversioned(hello), 'the source’s description');
    const drives = drivesHere(state.disks, this.#reception.drives);
    await this.#reception.prepare(state, drives);
    using memory = new ReceivedMemory(state.memory.size);
    await channel.send(FrameType.accept, versioned(Buffer.from(JSON.stringify(ownIdentity()))));
    await stages.reached('target: accepted');
    const { saved, paused } = await this.#takeAll(channel, state, memory);
    const machine = await this.#reception.build({ ...state, machine: saved.machine }, drives, memory.finish());
    try {
      await this.#takeOver(channel, machine, state.id, paused);
      return machine;
    } catch (error) {
      await machine.close();
      throw error;
    }
  }

  /** Takes memory while the machine runs at the source, then its state. */
  async #takeAll(
    channel: FrameChannel,
    described: CheckedState,
    memory: ReceivedMemory,
  ): Promise<{ saved: CheckedState; paused: boolean }> {
    let bytes = 0;
    for (let round = 1; ; ) {
      const { type, payload } = await channel.next(FrameType.pages, FrameType.round, FrameType.state);
      if (type === FrameType.pages) {
        memory.take(payload);
        bytes += payload.length;
        this.#report('pre-copy', round, bytes);
      } else if (type === FrameType.round) {
        memory.round();
        await stages.reached('target: round taken');
        await channel.send(FrameType.round);
        if (++round > MAX_ROUNDS) throw violation(`more than ${MAX_ROUNDS} rounds`);
      } else {
        this.#report('stop-and-copy', round, bytes);
        const saved = decodeState(payload.subarray(1), 'the source’s state');
        if (saved.id !== described.id) throw violation('the state of another machine');
        checkDrives(described.disks, saved.disks, this.#reception.drives);
        await stages.reached('target: state taken');
        return { saved, paused: payload[0] === 1 };
      }
    }
  }

  /** From the moment that it hears so, the machine is this process's; a source that loses its way here asks by `id`. */
  async #takeOver(channel: FrameChannel, machine: M, id: string, paused: boolean): Promise<void> {
    this.#id = id;
    await channel.send(FrameType.ready);
    this.#report('confirm', 0, 0);
    await stages.reached('target: ready sent');
    await channel.next(FrameType.commit);
    if (this.#state === 'over') throw new ConnectionLost('the connection was lost');
    this.#state = 'mine';
    await stages.reached('target: commit heard');
    if (!paused) await machine.resume();
    await stages.reached('target: running');
    channel
      .send(FrameType.running)
      .then(() => channel.next(FrameType.done))
      .then(
        () => this.#answered.resolve(),
        () => setTimeout(() => this.#answered.resolve(), LINGER).unref(),
      )
      .finally(() => channel.destroy());
  }

  #report(phase: MigrationProgress['phase'], round: number, bytesSent: number): void {
    this.#reception.onProgress?.({ phase, round, bytesSent, bytesRemaining: 0 });
  }
}
