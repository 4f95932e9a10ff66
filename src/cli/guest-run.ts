import { setTimeout as delay } from 'node:timers/promises';
import { TsvisorError } from '../errors.js';
import type { MachineEnd } from '../machine/end.js';
import type { Machine } from '../machine/machine.js';
import { ESCAPE_EXIT } from './exit-codes.js';
import { runCommand } from './guest-command.js';
import { Progress } from './progress.js';
import type { Session } from './session.js';

/** How long a guest has to power off after its command, in milliseconds. */
const POWER_OFF_MS = 10_000;
/** A command's connection is lost a little before the machine is known to have ended, in milliseconds. */
const END_MS = 2000;

/** What there is besides the command. */
export interface ForCommand {
  /** What the guest does until it can be asked, as a person is told. */
  readonly progress: string;
  /** Whether the guest powers off after it. Otherwise its power is cut at once: nothing of it is to stay. */
  readonly powersOff: boolean;
}

/**
 * `tsvisor run -- COMMAND`: lets the guest run, runs the command as if it were one of this host, and ends the machine.
 * @param session headless, not run yet
 */
export async function runGuestCommand(
  machine: Machine,
  session: Session,
  [command = '', ...args]: readonly string[],
  { progress, powersOff }: ForCommand,
): Promise<{ code: number; end: MachineEnd }> {
  let onStart = () => {};
  const started = new Promise<void>((resolve) => {
    onStart = resolve;
  });
  const running = session.run(onStart);
  running.catch(() => {}); // awaited below
  try {
    await Promise.race([started, running]);
    await answers(machine, progress);
    session.leaveSignals();
    const code = await runCommand((...call) => machine.spawn(...call), command, {
      args,
      stdin: true,
      keys: { x: { does: 'end the machine', run: () => session.stop(ESCAPE_EXIT) } },
    });
    if (powersOff) await session.powerOff(code, POWER_OFF_MS);
    else session.stop(code);
    return { code, end: (await running).end };
  } catch (error) {
    const result = await Promise.race([running, delay(END_MS, undefined, { ref: false })]);
    // The command itself, the clock or a key ended the machine: that is no failure.
    if (result && ['guest-shutdown', 'guest-exit', 'stopped'].includes(result.end.reason)) return result;
    session.stop(ESCAPE_EXIT);
    await running.catch(() => {});
    const isMachine = !(error instanceof TsvisorError && (error.code === 'ERR_EXEC' || error.code === 'ERR_TIMEOUT'));
    const said = isMachine ? machine.consoleTail() : '';
    if (said) process.stderr.write(`${said}\n`);
    throw error;
  }
}

async function answers(machine: Machine, progress: string): Promise<void> {
  using _progress = new Progress(progress);
  await machine.ready();
}
