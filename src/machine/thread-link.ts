import { Socket, type SocketConstructorOpts } from 'node:net';
import type { Duplex } from 'node:stream';
import { MessageChannel, type MessagePort, receiveMessageOnPort } from 'node:worker_threads';
import { atExit } from '../at-exit.js';
import { errnoName, errorFromData, MachineError, TsvisorError } from '../errors.js';
import { addon } from '../kvm/addon.js';
import { type Deferred, deferred } from './deferred.js';
import type { MachineEnd, MachineStats } from './end.js';
import type {
  ControlAnswer,
  ControlRequest,
  DevicePlace,
  DeviceRequest,
  MachineMessage,
  MachineThreadData,
  ThreadOrder,
} from './messages.js';
import type { SharedThread } from './shared-thread.js';
import { giveBack, type MachineThread, takeThread } from './warm-threads.js';

const DOORBELL = new Uint8Array(new BigUint64Array([1n]).buffer);

/** Bytes of a stream that wait for the program. */
const READ_AHEAD = 64 * 1024;

/** Of a request. Those of machines that have a thread one after the other differ. */
let nextId = 1;

type Request = Omit<ControlRequest, 'id'>;

/** What a thread says unasked. */
type Notice = Exclude<MachineMessage, { type: 'ready' | 'failed' | 'reply' | 'refusal' | 'ended' | 'gone' }>;

/**
 * The main thread's side of a machine thread: the Worker, its doorbell, the sockets whose other ends it has, and requests
 * with their answers. It owns all these descriptors.
 */
export class ThreadLink {
  /** Settled when the machine is built: where the user's devices are. */
  readonly ready: Promise<readonly DevicePlace[]>;
  /** Settled when the machine has ended or its thread has failed. */
  readonly ended: Promise<MachineEnd>;
  readonly #doorbell: number;
  readonly #descriptors: number[];
  /** Of pairs, until they are streams. */
  readonly #ends = new Set<number>();
  readonly #streams: Duplex[] = [];
  readonly #ready = deferred<readonly DevicePlace[]>();
  readonly #ended = deferred<MachineEnd>();
  readonly #pending = new Map<number, Deferred<ControlAnswer>>();
  #port: MessagePort | undefined;
  /** Its thread, where that is its own. */
  #thread: MachineThread | undefined;
  #shared: SharedThread | undefined;
  /** Its thread has done with it. */
  #gone: Promise<void> = Promise.resolve();
  #sayGone = () => {};
  #built = false;
  /** Its thread may not end by itself then. */
  #hasUserCode = false;
  /** eventfd of a page source that lets go of who waits for it. */
  #letGo: number | undefined;
  #final: { end: MachineEnd; stats: MachineStats } | undefined;
  #failure: Error | undefined;

  constructor() {
    this.ready = this.#ready.promise;
    this.ended = this.#ended.promise;
    this.#doorbell = addon.eventfd(0);
    if (this.#doorbell < 0) throw new TsvisorError('ERR_INTERNAL', `eventfd: ${errnoName(-this.#doorbell)}`);
    this.#descriptors = [this.#doorbell];
  }

  get final(): { end: MachineEnd; stats: MachineStats } | undefined {
    return this.#final;
  }

  /** Whether the machine is over, one way or the other. */
  get over(): boolean {
    return this.#final !== undefined || this.#failure !== undefined;
  }

  /** A socketpair: the main thread's end, which is for stream(), and the machine thread's. For before start(). */
  openPair(): readonly [here: number, there: number] {
    const pair = addon.socketpair();
    if (typeof pair === 'number') {
      this.#closeDescriptors();
      for (const fd of this.#ends) addon.close(fd);
      throw new TsvisorError('ERR_INTERNAL', `socketpair: ${errnoName(-pair)}`);
    }
    this.#ends.add(pair[0]);
    this.#descriptors.push(pair[1]);
    return pair;
  }

  /** The main thread's end of a pair as a stream: slow to make, so rather after start(). */
  stream(here: number): Duplex {
    this.#ends.delete(here);
    addon.release(here); // the Socket closes it
    const stream = new Socket({
      fd: here,
      readable: true,
      writable: true,
      readableHighWaterMark: READ_AHEAD,
    } as SocketConstructorOpts);
    // The machine's end of the pair disappears with its thread, whatever was still to be written.
    stream.on('error', () => {});
    this.#streams.push(stream);
    return stream;
  }

  /** Closes descriptors once the thread has exited. */
  own(descriptors: readonly number[]): void {
    this.#descriptors.push(...descriptors);
  }

  /**
   * Starts the thread, or gives the machine to one that there is; it builds the machine.
   * @param onNotice gets what it says unasked.
   */
  start(
    data: Omit<MachineThreadData, 'doorbell' | 'firstRequest' | 'port'>,
    shared: SharedThread | undefined,
    onNotice: (notice: Notice) => void,
  ): void {
    const order = { ...data, doorbell: this.#doorbell, firstRequest: nextId };
    const { config, origin } = data;
    this.#letGo = origin?.pages?.stop;
    const onMessage = (message: MachineMessage) => this.#receive(message, onNotice);
    if (shared) {
      const { port1: here, port2: there } = new MessageChannel();
      this.#shared = shared;
      this.#listen(here, onMessage, () => {
        here.close();
        shared.release(this);
      });
      shared.take(this, { ...order, port: there });
      return;
    }
    const ofItsOwn = origin?.pages !== undefined || origin?.layers[0]?.exclusive === true;
    const thread = takeThread(ofItsOwn ? 0 : config.memory);
    const { worker, port } = thread;
    this.#thread = thread;
    this.#hasUserCode = config.devices.length > 0;
    worker.postMessage(order satisfies ThreadOrder);
    this.#listen(port, onMessage, () => port.off('message', onMessage));
    worker.on('error', (error) => this.#fail(crashed(error)));
    worker.on('exit', (code) => {
      // Nothing says that its last messages came before this.
      for (let m = receiveMessageOnPort(port); m; m = receiveMessageOnPort(port)) onMessage(m.message);
      this.lost(new Error(`it exited with code ${code}`));
    });
  }

  /** @param leave what is to be done when the thread has done with the machine */
  #listen(port: MessagePort, onMessage: (message: MachineMessage) => void, leave: () => void): void {
    this.#port = port;
    port.on('message', onMessage);
    port.unref(); // its thread keeps the process
    // process.exit() waits for every Worker, and one inside KVM_RUN only leaves it when its doorbell rings.
    const forget = atExit(() => this.#send({ command: 'stop' }));
    this.#gone = new Promise((resolve) => {
      this.#sayGone = () => {
        forget();
        leave();
        this.#closeDescriptors();
        resolve();
      };
    });
  }

  /** The thread has died, or ended. */
  lost(why: Error): void {
    this.#fail(crashed(why));
    this.#sayGone();
  }

  /** @throws TsvisorError ERR_MACHINE_STATE when the machine is over. */
  request(request: Request): Promise<ControlAnswer> {
    if (this.#failure) return Promise.reject(this.#failure);
    if (this.#final) {
      const why = `the machine has ended (${this.#final.end.message}): it cannot ${request.command}`;
      return Promise.reject(new TsvisorError('ERR_MACHINE_STATE', why));
    }
    const pending = deferred<ControlAnswer>();
    this.#pending.set(this.#send(request), pending);
    return pending.promise;
  }

  /** Says something that has no answer. No effect when the machine is over. @throws DataCloneError */
  tell(request: DeviceRequest): void {
    if (!this.over) this.#post(request);
  }

  /** Whether the machine is being built: its thread does not hear requests yet. */
  get building(): boolean {
    return !this.#built && !this.over;
  }

  /** Ends the machine, gives its thread back or ends it if that is its own, and releases everything. */
  async close(): Promise<void> {
    if (!this.over) this.request({ command: 'stop' }).catch(() => {});
    // Its disks are closed then. A thread that is still building does not listen; one that has just built wakes up.
    if (!this.building || this.#shared) await this.ended.catch(() => {});
    for (const stream of this.#streams) stream.destroy(); // what is unread keeps its end there
    if (!this.#final || this.#hasUserCode) await this.#thread?.worker.terminate();
    await this.#gone;
    this.#closeDescriptors();
    await Promise.all(this.#streams.map(destroyed));
  }

  #send(request: Request): number {
    const id = nextId++;
    this.#post({ id, ...request });
    // A thread that waits for a page does not hear.
    if (request.command === 'stop' && this.#letGo !== undefined) addon.write(this.#letGo, DOORBELL, 0, DOORBELL.length);
    return id;
  }

  #post(request: ControlRequest | DeviceRequest): void {
    this.#port?.postMessage(request);
    addon.write(this.#doorbell, DOORBELL, 0, DOORBELL.length);
  }

  #receive(message: MachineMessage, onNotice: (notice: Notice) => void): void {
    switch (message.type) {
      case 'ready':
        this.#built = true;
        this.#ready.resolve(message.devices);
        break;
      case 'failed': {
        const error = errorFromData(message.error);
        // A defect, once the machine ran, is told as what it means to the user.
        this.#fail(this.#built && error.code === 'ERR_INTERNAL' ? crashed(error) : error);
        break;
      }
      case 'reply':
        this.#pending.get(message.id)?.resolve(message.answer);
        this.#pending.delete(message.id);
        break;
      case 'refusal':
        this.#pending.get(message.id)?.reject(errorFromData(message.error));
        this.#pending.delete(message.id);
        break;
      case 'ended':
        if (this.over) break;
        this.#final = { end: message.end, stats: message.stats };
        this.#settle(new TsvisorError('ERR_MACHINE_STATE', `the machine has ended (${message.end.message})`));
        this.#ended.resolve(message.end);
        break;
      case 'gone':
        if (message.reusable && this.#thread) {
          this.#sayGone();
          giveBack(this.#thread);
          this.#thread = undefined;
        } else if (this.#shared) this.#sayGone(); // a thread of its own ends now
        break;
      default:
        onNotice(message);
    }
  }

  #fail(error: Error): void {
    if (this.over) return;
    this.#failure = error;
    this.#ready.reject(error);
    this.#ended.reject(error);
    this.#settle(error);
  }

  #settle(error: Error): void {
    for (const pending of this.#pending.values()) pending.reject(error);
    this.#pending.clear();
  }

  #closeDescriptors(): void {
    for (const fd of this.#descriptors.splice(0)) addon.close(fd);
  }
}

function crashed(cause: Error): MachineError {
  return new MachineError('ERR_MACHINE_CRASHED', `the machine thread died: ${cause.message}`, { cause });
}

async function destroyed(stream: Duplex): Promise<void> {
  if (stream.destroyed) return;
  const closed = new Promise((resolve) => stream.once('close', resolve));
  stream.destroy();
  await closed;
}
