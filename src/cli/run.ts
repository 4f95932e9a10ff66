import { createWriteStream } from 'node:fs';
import type { Writable } from 'node:stream';
import { finished } from 'node:stream/promises';
import type { Argv } from 'yargs';
import { TsvisorError, UsageError } from '../errors.js';
import type { MachineConfig } from '../machine/config.js';
import { deferred } from '../machine/deferred.js';
import { type MachineEnd, type MachineStats, now } from '../machine/end.js';
import { Machine } from '../machine/machine.js';
import { initramfsPath, kernelPath } from './default-guest.js';
import { parseDrive } from './drive-option.js';
import { CLOSED_STDOUT_EXIT, END_EXIT, ERROR_EXIT, ESCAPE_EXIT, SIGNAL_EXIT, TIMEOUT_EXIT } from './exit-codes.js';
import { createLog, LOG_LEVELS } from './log.js';
import { parseNetworks } from './net-option.js';
import { OutputFile } from './output-file.js';
import { parseSize } from './size.js';
import { EscapeFilter, rawTerminal } from './terminal.js';

export const command = 'run';
export const describe = 'Boot a Linux guest, with this terminal as its console';

export function builder(yargs: Argv) {
  return yargs
    .option('kernel', {
      type: 'string',
      requiresArg: true,
      describe: 'vmlinux, bzImage or PVH ELF [default: built-in]',
    })
    .option('initrd', { type: 'string', requiresArg: true, describe: 'initial RAM disk [default: built-in]' })
    .option('append', { type: 'string', requiresArg: true, describe: 'more kernel command line' })
    .option('memory', { alias: 'm', type: 'string', default: '64M', describe: 'guest RAM; a bare number is MiB' })
    .option('cpus', { type: 'number', default: 1, describe: 'number of vCPUs (1)' })
    .option('serial', { type: 'string', default: 'stdio', describe: 'ttyS0: stdio, none or file:PATH' })
    .option('drive', {
      type: 'string',
      array: true,
      requiresArg: true,
      describe:
        'a disk: FILE or file=FILE[,readonly][,cache=writeback|none|unsafe][,overlay=FILE][,id=NAME]; repeatable',
    })
    .option('net', {
      type: 'string',
      array: true,
      nargs: 1,
      requiresArg: true,
      default: [] as string[],
      defaultDescription: 'none',
      describe: 'tap=NAME, user[,hostfwd=tcp:127.0.0.1:8080-:80] or none, each with [,mac=..]; repeatable',
    })
    .option('rng', { type: 'boolean', default: false, describe: 'an entropy device, /dev/hwrng in the guest' })
    .option('acpi', {
      choices: ['auto', 'on', 'off'] as const,
      default: 'auto' as const,
      describe: 'how the guest finds its devices: ACPI alone, without, or both',
    })
    .option('no-reboot', {
      type: 'boolean',
      default: false,
      describe: 'a guest reset ends the machine, not restarts it',
    })
    .option('stats', { type: 'string', requiresArg: true, describe: 'write timings and counters as JSON to this file' })
    .option('timeout', { type: 'number', requiresArg: true, describe: 'end the machine after this many seconds' })
    .option('log-level', { choices: LOG_LEVELS, default: 'silent' as const, describe: 'structured log on stderr' })
    .example('$0 run', 'boot the default guest to a shell; poweroff ends it')
    .example('$0 run --kernel vmlinux --initrd rootfs.cpio', 'boot your own; the console stays ttyS0')
    .example('$0 run --drive disk.img --drive file=data.img,readonly', 'with disks: /dev/vda, /dev/vdb')
    .example('$0 run -m 256M --append "debug loglevel=7"', 'more memory, a chattier kernel')
    .example("printf 'uname -a\\npoweroff\\n' | $0 run", 'a script on the guest’s shell')
    .epilogue(
      'Keys: Ctrl-A x ends the machine, Ctrl-A Ctrl-A sends Ctrl-A, Ctrl-A h helps.\n' +
        'Exit codes: 0 powered off, 1-255 the guest’s own (debug-exit port), 64 usage, 66 bad image, 69 no KVM, ' +
        '71 memory, 73 output file, 77 no permission, 80 guest reset, 81 triple fault, 82 KVM failure, ' +
        '83 unknown instruction, 124 timeout, 130 SIGINT, 141 stdout closed, 143 SIGTERM.',
    );
}

type RunArguments = Awaited<ReturnType<typeof builder>['argv']>;

export async function handler(args: RunArguments): Promise<void> {
  const serial = parseSerial(args.serial);
  const timeout = parseTimeout(args.timeout);
  const memory = parseSize('memory', args.memory);
  const stats = args.stats === undefined ? undefined : new OutputFile('stats', args.stats);
  try {
    const options = await createLog(args.logLevel);
    const config: MachineConfig = {
      kernel: args.kernel ?? (await kernelPath()),
      ...(await initrdOf(args)),
      append: args.append ?? '',
      memory,
      cpus: args.cpus,
      onReset: args.noReboot ? 'end' : 'restart',
      serial: serial.kind !== 'none',
      ...terminalOf(serial),
      networks: parseNetworks(args.net),
      drives: (args.drive ?? []).map(parseDrive),
      rng: args.rng,
      acpi: args.acpi,
    };
    await using machine = await Machine.create(config, options);
    const session = new Session(machine, serial, timeout);
    const { code, end } = await session.run();
    if (code !== 0 && end.reason !== 'guest-exit' && end.reason !== 'stopped') {
      process.stderr.write(`tsvisor: ${end.message}\n`);
    }
    const { stats: numbers } = await machine.query();
    stats?.commit(`${JSON.stringify(report(numbers, end, code), null, 2)}\n`);
    process.exitCode = code;
  } finally {
    stats?.discard();
  }
}

type Serial = { kind: 'stdio' } | { kind: 'none' } | { kind: 'file'; path: string };

function parseSerial(text: string): Serial {
  if (text === 'stdio' || text === 'none') return { kind: text };
  if (text.startsWith('file:') && text.length > 5) return { kind: 'file', path: text.slice(5) };
  throw new UsageError(`--serial: '${text}' is not stdio, none or file:PATH`);
}

function parseTimeout(seconds: number | undefined): number | undefined {
  if (seconds === undefined || (seconds > 0 && seconds <= 2_000_000)) return seconds;
  throw new UsageError(`--timeout: ${seconds} is not a number of seconds above 0`);
}

/** The user's initrd; the default one only for the default kernel, unless that is told of a root file system. */
async function initrdOf({ kernel, initrd, append }: RunArguments): Promise<{ initrd?: string }> {
  if (initrd !== undefined) return { initrd };
  const hasRoot = /(^|\s)root=/.test(append ?? '');
  return kernel === undefined && !hasRoot ? { initrd: await initramfsPath() } : {};
}

function terminalOf(serial: Serial): Pick<MachineConfig, 'terminal'> {
  const { stdin, stdout, env } = process;
  if (serial.kind !== 'stdio' || !stdin.isTTY || !stdout.isTTY) return {};
  return { terminal: { type: env.TERM ?? 'vt102', rows: stdout.rows, columns: stdout.columns } };
}

/** The JSON of --stats; times in ms since this process started. */
function report(stats: MachineStats, end: MachineEnd, code: number): object {
  const start = now() - process.uptime() * 1e3;
  const since = (times: Readonly<Record<string, number | undefined>>) =>
    Object.fromEntries(Object.entries(times).map(([name, at]) => [name, Number(((at ?? 0) - start).toFixed(3))]));
  return {
    phases: since(stats.phases),
    milestones: since(stats.milestones),
    exits: stats.exits,
    assists: stats.assists,
    peakRssBytes: process.resourceUsage().maxRSS * 1024,
    end: { reason: end.reason, code, message: end.message },
  };
}

/** How long a machine thread may take to obey a stop before the process gives up on it, in milliseconds. */
const STOP_GRACE = 5000;

const CTRL_D = '\x04';

/** One machine on this terminal, until it ends or a signal, the escape key, a closed stdout or the clock ends it. */
class Session {
  readonly #machine: Machine;
  readonly #serial: Serial;
  readonly #timeout: number | undefined;
  readonly #stopped = deferred<void>();
  /** The exit code of what stopped the machine from outside. */
  #stopCode: number | undefined;
  #failure: Error | undefined;
  #endOfInput: NodeJS.Timeout | undefined;
  #restoreTerminal = () => {};

  constructor(machine: Machine, serial: Serial, timeout: number | undefined) {
    this.#machine = machine;
    this.#serial = serial;
    this.#timeout = timeout;
  }

  async run(): Promise<{ code: number; end: MachineEnd }> {
    const removeSignals = this.#handleSignals();
    const timer = this.#timeout && setTimeout(() => this.#stop(TIMEOUT_EXIT), this.#timeout * 1e3);
    try {
      const output = this.#attachOutput();
      if (this.#serial.kind === 'stdio') this.#attachStdin();
      await this.#machine.start();
      const end = await this.#machine.wait();
      // What the guest said last is still on its way, unless nobody waits for it any more.
      await Promise.race([output, this.#stopped.promise]);
      if (this.#failure) throw this.#failure;
      return { code: this.#exitCode(end), end };
    } finally {
      if (timer) clearTimeout(timer);
      clearInterval(this.#endOfInput);
      removeSignals();
      this.#restoreTerminal();
      process.stdin.destroy();
    }
  }

  #exitCode(end: MachineEnd): number {
    if (end.reason === 'stopped') return this.#stopCode ?? ERROR_EXIT.ERR_INTERNAL;
    return end.reason === 'guest-exit' ? (end.code ?? 0) : END_EXIT[end.reason];
  }

  #stop(code: number): void {
    if (this.#stopCode !== undefined) return;
    this.#stopCode = code;
    void this.#machine.stop().then(() => this.#stopped.resolve(), this.#stopped.reject);
    setTimeout(() => {
      this.#restoreTerminal();
      process.kill(process.pid, 'SIGKILL'); // process.exit() would wait for the thread that does not answer
    }, STOP_GRACE).unref();
  }

  #handleSignals(): () => void {
    const handlers = Object.entries(SIGNAL_EXIT).map(([signal, code]) => {
      const onSignal = () => this.#stop(code);
      process.on(signal, onSignal);
      return () => process.removeListener(signal, onSignal);
    });
    return () => {
      for (const remove of handlers) remove();
    };
  }

  /** @returns when everything the guest printed is written. */
  #attachOutput(): Promise<void> {
    const { serial } = this.#machine;
    if (this.#serial.kind === 'none') {
      serial.resume();
      return Promise.resolve();
    }
    const target: Writable = this.#serial.kind === 'file' ? createWriteStream(this.#serial.path) : process.stdout;
    const toFile = target !== process.stdout;
    target.on('error', (error: NodeJS.ErrnoException) => {
      if (toFile) this.#failure ??= new TsvisorError('ERR_OUTPUT', `--serial: cannot write: ${error.message}`);
      this.#stop(toFile ? ERROR_EXIT.ERR_OUTPUT : CLOSED_STDOUT_EXIT);
    });
    serial.pipe(target, { end: toFile });
    return finished(toFile ? target : serial, { writable: toFile }).catch(() => {});
  }

  #attachStdin(): void {
    const { stdin } = process;
    const { serial } = this.#machine;
    if (stdin.isTTY) {
      const filter = new EscapeFilter(
        () => this.#stop(ESCAPE_EXIT),
        (text) => process.stderr.write(text),
      );
      this.#restoreTerminal = rawTerminal();
      stdin.pipe(filter).pipe(serial, { end: false });
      return;
    }
    let any = false;
    stdin.on('data', () => {
      any = true;
    });
    // The end of a script is Ctrl-D to the guest's terminal, typed again every second while the guest takes it, since one
    // that comes before anybody reads is lost. No input at all (</dev/null, a daemon) is not an end.
    stdin.on('end', () => {
      if (any) this.#endOfInput = setInterval(() => serial.writableLength === 0 && serial.write(CTRL_D), 1000);
    });
    stdin.on('error', () => {}); // a stdin that cannot be read is one that says nothing
    stdin.pipe(serial, { end: false });
  }
}
