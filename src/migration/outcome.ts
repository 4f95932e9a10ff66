import { setTimeout as sleep } from 'node:timers/promises';
import type { Address } from './address.js';
import { FrameChannel, Refusal } from './channel.js';
import { FrameType, versioned } from './frames.js';
import { isAlive, type ProcessIdentity } from './process-identity.js';
import { connectSecurely, isRefusal } from './secure.js';

/** Milliseconds for which a target is asked that cannot be reached. It answers for twice as long: see LINGER. */
const ASK_FOR = 60_000;
const ASK_PAUSE = 200;

export interface Question {
  readonly address: Address;
  readonly psk: Buffer;
  readonly timeout: number;
  /** The target's process. */
  readonly target: ProcessIdentity;
  /** Of the migration. */
  readonly id: string;
}

/**
 * Whether a target that was told to run a machine runs it; when it has not heard of that yet, it never will. Asked anew,
 * since the connection was lost.
 * @returns undefined when it cannot be found out.
 */
export async function outcome(question: Question): Promise<boolean | undefined> {
  const { target, timeout } = question;
  const end = performance.now() + Math.max(ASK_FOR, timeout);
  do {
    // A process of this host that is gone runs nothing. It is looked for before the answer of others is believed.
    const alive = isAlive(target);
    if (alive === false) return false;
    try {
      return await ask(question);
    } catch (error) {
      if (error instanceof Refusal) return false;
      // Nobody listens at another host: the target's process is gone, since it listens for as long as it may be asked.
      if (alive === undefined && isRefusal((error as Error).cause)) return false;
    }
    await sleep(ASK_PAUSE);
  } while (performance.now() < end);
  return undefined;
}

async function ask({ address, psk, timeout, id }: Question): Promise<boolean> {
  const channel = new FrameChannel(await connectSecurely(address, psk, timeout), timeout);
  try {
    await channel.send(FrameType.ask, versioned(Buffer.from(id)));
    await channel.next(FrameType.running);
    return true;
  } finally {
    channel.destroy();
  }
}
