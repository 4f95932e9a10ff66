import { Agent } from '../agent/agent.js';
import { readGreeting } from '../agent/connection.js';
import { AGENT_PORT } from '../agent/protocol.js';
import type { VsockListener } from '../backends/vsock/listener.js';
import type { Vsock } from '../backends/vsock/vsock.js';
import { AgentError, UsageError } from '../errors.js';
import { type Deferred, deferred } from './deferred.js';

/** Milliseconds from a question to an agent that must be there by then: a boot on a busy host that interprets guests. */
const DEFAULT_READY_TIMEOUT = 120_000;
/** Ports below need privilege in the guest: its other programs cannot pass for the agent. */
const PRIVILEGED_PORTS = 1024;

/** How long to wait for a guest. */
export interface ReadyOptions {
  /** Milliseconds, 1 to 2^31 - 1; default two minutes. */
  readonly timeout?: number;
  /** Gives up when it aborts, with its reason. */
  readonly signal?: AbortSignal | undefined;
}

/** The agent of a machine's guest: it says itself when it is there, and is asked by connections to it. */
export class MachineAgent {
  readonly agent: Agent;
  readonly #listener: VsockListener;
  /** Settled while the agent is there. */
  #there: Deferred<void> = deferred();
  #over = false;

  /** @param check throws where it is no use to wait. */
  constructor(vsock: Vsock, check: () => void) {
    this.#listener = vsock.listen(AGENT_PORT);
    const ready = (signal?: AbortSignal) => {
      check();
      return this.ready({ signal });
    };
    this.agent = new Agent((signal) => vsock.connect(AGENT_PORT, signal && { signal }), { ready });
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

  /** The machine has ended. */
  close(error: Error): void {
    this.#over = true;
    this.#there.reject(error);
    this.#there = deferred();
    this.#there.reject(error);
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
      const { closed } = await readGreeting(stream);
      if (this.#over) return;
      const there = deferred<void>(); // a new one: that of before may have been rejected
      there.resolve();
      this.#there.resolve();
      this.#there = there;
      await closed;
      if (this.#there === there) this.#there = deferred(); // it says so when it is there again
    } catch (error) {
      this.#there.reject(error as Error); // of another version, say: it is no use to wait
    }
  }
}
