import { Agent, type GuestIdentity } from '../agent/agent.js';
import { readGreeting } from '../agent/connection.js';
import { AGENT_PORT } from '../agent/protocol.js';
import type { VsockListener } from '../backends/vsock/listener.js';
import type { VsockHost } from '../backends/vsock/vsock-host.js';
import { AgentError, UsageError, VsockError } from '../errors.js';
import { type Deferred, deferred } from './deferred.js';

/** Milliseconds from a question to an agent that must be there by then: a boot on a busy host that interprets guests. */
const DEFAULT_READY_TIMEOUT = 120_000;
/** Who waits for ready() has a limit of his own. */
const NO_LIMIT = 2 ** 31 - 1;
/** Ports below need privilege in the guest: its other programs cannot pass for the agent. */
const PRIVILEGED_PORTS = 1024;

/** How long to wait for a guest. */
export interface ReadyOptions {
  /** Milliseconds, 1 to 2^31 - 1; default two minutes. */
  readonly timeout?: number;
  /** Gives up when it aborts, with its reason. */
  readonly signal?: AbortSignal | undefined;
}

type AgentVsock = Pick<VsockHost, 'connect' | 'listen' | 'driverUp'>;

/** The agent of a machine's guest: it says itself when it is there, and is asked by connections to it. */
export class MachineAgent {
  readonly agent: Agent;
  readonly #listener: VsockListener;
  /** Settled while the agent is there. */
  #there: Deferred<void> = deferred();
  #over = false;
  readonly #vsock: AgentVsock;
  /** For renew(): nobody waits for anything there. */
  readonly #fresh: Agent;
  /** What the guest is to be given before anything is asked of it. */
  #identity: GuestIdentity | undefined;
  #renewing: Promise<void> | undefined;

  /**
   * @param check throws where it is no use to wait.
   * @param identity of a guest that goes on from a snapshot: it is there when it has taken that.
   */
  constructor(vsock: AgentVsock, check: () => void, identity?: GuestIdentity) {
    this.#vsock = vsock;
    this.#identity = identity;
    this.#listener = vsock.listen(AGENT_PORT);
    const ready = (signal?: AbortSignal) => {
      check();
      return this.ready({ signal });
    };
    const connect = (signal?: AbortSignal) => vsock.connect(AGENT_PORT, signal && { signal });
    this.agent = new Agent(connect, { ready });
    this.#fresh = new Agent(connect, { answerTimeout: NO_LIMIT });
    void this.#accept();
  }

  /** Resolves when the agent is there. @throws AgentError ERR_AGENT_TIMEOUT, ERR_AGENT; the signal's reason. */
  async ready({ timeout = DEFAULT_READY_TIMEOUT, signal }: ReadyOptions = {}): Promise<void> {
    if (!(timeout >= 1 && timeout < 2 ** 31)) throw new UsageError(`timeout: ${timeout} is not 1 to 2^31 - 1 ms`);
    signal?.throwIfAborted();
    const over = deferred<never>();
    const late = () => {
      over.reject(new AgentError(`the guest's agent is not there after ${timeout} ms`, 'ERR_AGENT_TIMEOUT'));
    };
    const timer = setTimeout(late, timeout);
    const onAbort = () => over.reject(signal?.reason);
    signal?.addEventListener('abort', onAbort, { once: true });
    try {
      await Promise.race([this.#there.promise, over.promise]);
    } finally {
      clearTimeout(timer);
      signal?.removeEventListener('abort', onAbort);
    }
  }

  /** The guest runs. One of a snapshot has its agent running already: it is not waited for until it says so. */
  async resumed(): Promise<void> {
    if (!this.#identity) return;
    try {
      await this.#vsock.driverUp();
      await this.#renew();
      this.#settle();
    } catch (error) {
      if (!isLost(error)) this.#settle(error as Error); // otherwise it will say when it is there
    }
  }

  /** The machine has ended. */
  close(error: Error): void {
    this.#settle(error);
    this.#over = true;
    void this.#listener.close();
  }

  async #accept(): Promise<void> {
    for await (const stream of this.#listener) {
      if (stream.remotePort < PRIVILEGED_PORTS) void this.#greeted(stream);
      else stream.destroy();
    }
  }

  async #greeted(stream: Parameters<typeof readGreeting>[0]): Promise<void> {
    try {
      const { closed } = await readGreeting(stream, NO_LIMIT);
      await this.#renewing?.catch(() => {});
      await this.#renew();
      const there = this.#settle();
      await closed;
      if (this.#over) return;
      if (this.#there === there) this.#there = deferred(); // it says so when it is there again
    } catch (error) {
      // A guest that was restored resets its connections, those too that it has made since: its agent says so again.
      if (!isLost(error)) this.#settle(error as Error); // of another version, say: it is no use to wait
    }
  }

  /** Tells those who wait and those who come later. */
  #settle(error?: Error): Deferred<void> {
    if (this.#over) return this.#there;
    const there = deferred<void>(); // a new one: that of before may have been settled
    for (const one of [this.#there, there]) {
      if (error) one.reject(error);
      else one.resolve();
    }
    this.#there = there;
    return there;
  }

  /** Gives the guest its identity, once. */
  #renew(): Promise<void> {
    if (!this.#identity) return Promise.resolve();
    this.#renewing ??= this.#fresh
      .renew(this.#identity)
      .then(() => {
        this.#identity = undefined;
      })
      .finally(() => {
        this.#renewing = undefined;
      });
    return this.#renewing;
  }
}

/** Whether it is a connection's end, and not what was said on it. */
function isLost(error: unknown): boolean {
  return error instanceof VsockError || (error as Error).cause instanceof VsockError;
}
