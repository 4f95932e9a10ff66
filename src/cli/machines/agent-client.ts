import { connect } from 'node:net';
import type { Duplex } from 'node:stream';
import { Agent } from '../../agent/agent.js';
import { AGENT_PORT } from '../../agent/protocol.js';
import { VsockError } from '../../errors.js';
import { Progress } from '../progress.js';
import { ControlClient } from './control-client.js';
import { LineReader } from './line-reader.js';

/** The longest answer is `OK 4294967294\n`. */
const MAX_ANSWER = 32;
/** How long a guest that is still booting has for its agent to say hello, in milliseconds. */
const READY_MS = 120_000;

/**
 * The agent in the guest of a machine that runs; waits for it while the guest boots.
 * @throws TsvisorError ERR_MACHINE_NOT_FOUND, ERR_AGENT, ERR_AGENT_TIMEOUT; the signal's reason.
 */
export async function agentOf(name: string, signal: AbortSignal): Promise<Agent> {
  using client = await ControlClient.connect(name);
  using _progress = new Progress(`waiting for the agent of ${name}`);
  await client.request('ready', { timeout: READY_MS }, { timeout: READY_MS + 5000, signal });
  const { vsock } = await client.request('status', {}, { signal });
  return new Agent((abort) => connectHybrid(vsock, AGENT_PORT, abort));
}

/**
 * Connects to a port of a guest by the Unix socket of its hybrid vsock.
 * @throws VsockError; the signal's reason.
 */
export async function connectHybrid(path: string, port: number, signal?: AbortSignal): Promise<Duplex> {
  signal?.throwIfAborted();
  const socket = connect({ path, allowHalfOpen: true });
  let failure: Error | undefined;
  const onError = (error: Error) => {
    failure = error;
  };
  socket.on('error', onError);
  const onAbort = () => socket.destroy();
  signal?.addEventListener('abort', onAbort);
  try {
    const lines = new LineReader(socket, MAX_ANSWER);
    socket.write(`CONNECT ${port}\n`);
    const answer = await lines.next();
    signal?.throwIfAborted();
    if (answer === undefined || !/^OK \d+$/.test(answer)) {
      const why = failure ? `: ${failure.message}` : ': nobody listens there';
      throw new VsockError(`port ${port} of the guest cannot be reached by ${path}${why}`, { cause: failure });
    }
    const rest = lines.rest();
    if (rest.length > 0) socket.unshift(rest);
    socket.off('error', onError);
    return socket;
  } catch (error) {
    socket.destroy();
    throw error;
  } finally {
    signal?.removeEventListener('abort', onAbort);
  }
}
