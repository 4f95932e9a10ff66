// Compiled by `tsc -p test/tsconfig.json`, never run: what programs may and may not write against the published types.
import type { Duplex, Readable } from 'node:stream';
import {
  type DriveConfig,
  type EndReason,
  type ErrorCode,
  type ExecResult,
  type FileEntry,
  type Flow,
  GuestError,
  type GuestProcess,
  KvmError,
  Machine,
  type MachineConfig,
  type MachineEnd,
  type MachineMetrics,
  type MachineState,
  type NetworkConfig,
  type PageSource,
  type ProcessExit,
  TsvisorError,
  type UsageError,
  type VsockError,
  type VsockListener,
  type VsockStream,
} from 'tsvisor';
import { type Chain, MmioDevice, VirtioDevice } from 'tsvisor/device';
import { machineTest } from 'tsvisor/vitest';
import { expectTypeOf } from 'vitest';

/** The configuration. */
export function configurations(): MachineConfig[] {
  expectTypeOf<MachineConfig['memory']>().toEqualTypeOf<number | undefined>();
  expectTypeOf<MachineConfig['onReset']>().toEqualTypeOf<'restart' | 'end' | undefined>();
  expectTypeOf<MachineConfig['drives']>().toEqualTypeOf<readonly DriveConfig[] | undefined>();
  expectTypeOf<DriveConfig['file']>().toEqualTypeOf<string>();

  return [
    {}, // the default guest
    { kernel: 'vmlinux', initrd: 'initramfs.cpio', append: 'quiet', memory: 2 ** 26, cpus: 4 },
    { vcpuThreads: true },
    { drives: [{ file: 'disk.img' }, { file: 'base.img', overlay: 'mine.overlay', cache: 'unsafe', onError: 'end' }] },
    { rng: true },
    { rng: { bytesPerSecond: 1 } },
    { vsock: true },
    { vsock: { cid: 3, socket: '/tmp/socket' } },
    { devices: [{ module: new URL('file:///dice.js'), export: 'Dice', name: 'dice', options: { sides: 6 } }] },
    // @ts-expect-error memory is in bytes
    { memory: '64M' },
    // @ts-expect-error no such field
    { ram: 2 ** 26 },
    // @ts-expect-error neither restart nor end
    { onReset: 'halt' },
    // @ts-expect-error a drive needs a file
    { drives: [{ readOnly: true }] },
    // @ts-expect-error exactOptionalPropertyTypes: leave it out instead
    { kernel: undefined },
  ];
}

/** A network is one of three kinds, and each has its own fields. */
export function networks(network: NetworkConfig): NetworkConfig[] {
  if (network.type === 'tap') expectTypeOf(network.name).toEqualTypeOf<string>();
  // @ts-expect-error only a tap has a name
  if (network.type === 'user') network.name;
  // @ts-expect-error nothing of the kind is told before the type is known
  network.hostForwards;

  return [
    { type: 'tap', name: 'tap0', mac: '52:54:00:12:34:56' },
    {
      type: 'user',
      allow: async (flow) => {
        expectTypeOf(flow).toEqualTypeOf<Flow>();
        return flow.port === 443;
      },
    },
    { type: 'frames' },
    // @ts-expect-error a tap needs a name
    { type: 'tap' },
    // @ts-expect-error only the user-mode network asks
    { type: 'tap', name: 'tap0', allow: () => true },
    // @ts-expect-error no such kind
    { type: 'bridge', name: 'br0' },
  ];
}

/** A machine's life. */
export async function life(): Promise<void> {
  await using machine = await Machine.create({}, { signal: AbortSignal.timeout(60_000), onLog: (level) => level });
  // @ts-expect-error create() makes machines
  new Machine({});
  expectTypeOf(machine.serial).toEqualTypeOf<Duplex>();
  expectTypeOf(machine.port('agent')).toEqualTypeOf<Duplex>();
  expectTypeOf(machine.state).toEqualTypeOf<MachineState>();
  expectTypeOf(machine.consoleTail()).toEqualTypeOf<string>();
  // @ts-expect-error only the machine changes it
  machine.state = 'running';

  machine.on('state', (state) => expectTypeOf(state).toEqualTypeOf<MachineState>());
  machine.once('end', (end) => expectTypeOf(end).toEqualTypeOf<MachineEnd>());
  machine.on('driveError', ({ drive }) => expectTypeOf(drive).toEqualTypeOf<number>());
  // @ts-expect-error no such event
  machine.on('ended', () => {});

  expectTypeOf(machine.start).returns.resolves.toBeVoid();
  expectTypeOf(await machine.metrics()).toEqualTypeOf<MachineMetrics>();
  const { reason, code } = await machine.wait();
  expectTypeOf(reason).toEqualTypeOf<EndReason>();
  expectTypeOf(code).toEqualTypeOf<number | null>();
  switch (reason) {
    case 'guest-exit':
    case 'stopped':
      break;
    // @ts-expect-error no such reason
    case 'crashed':
      break;
  }
}

/** Commands and files in the guest. */
export async function guest(machine: Machine): Promise<void> {
  const result = await machine.exec('ls', { args: ['-l'], env: { LANG: 'C' }, cwd: '/', timeout: 1000, stdin: 'text' });
  expectTypeOf(result).toEqualTypeOf<ExecResult>();
  expectTypeOf(result.stdout).toEqualTypeOf<string>();
  expectTypeOf(result.code).toEqualTypeOf<number | null>();
  expectTypeOf(result.signal).toEqualTypeOf<NodeJS.Signals | null>();
  // @ts-expect-error a command is one string, with its arguments in the options
  await machine.exec(['ls', '-l']);
  // @ts-expect-error no such option
  await machine.exec('ls', { shell: true });
  await using child = await machine.spawn('cat', { signal: AbortSignal.timeout(1000) });
  expectTypeOf(child).toEqualTypeOf<GuestProcess>();
  child.stdin.end('text');
  expectTypeOf(child.stdout).toExtend<Readable>();
  expectTypeOf(await child.exited).toEqualTypeOf<ProcessExit>();
  expectTypeOf(await machine.fs.readFile('/etc/hostname')).toEqualTypeOf<Buffer>();
  expectTypeOf(await machine.fs.readFile('/etc/hostname', { encoding: 'utf8' })).toEqualTypeOf<string>();
  expectTypeOf(await machine.fs.list('/')).toEqualTypeOf<FileEntry[]>();
}

/** What comes one after the other is iterated. */
export async function streams(machine: Machine): Promise<void> {
  for await (const chunk of machine.serial) expectTypeOf(chunk).toBeAny(); // as of every stream of Node
  const stream = await machine.vsock.connect(1024, { timeout: 1000 });
  expectTypeOf(stream).toEqualTypeOf<VsockStream>();
  expectTypeOf(stream).toExtend<Duplex>();
  await using listener = machine.vsock.listen(1025);
  expectTypeOf(listener).toEqualTypeOf<VsockListener>();
  for await (const stream of listener) expectTypeOf(stream.remotePort).toEqualTypeOf<number>();
  for await (const value of machine.device('dice')) expectTypeOf(value).toBeUnknown();
}

/** Failures are told apart by class or code. */
export function failures(error: unknown): string {
  if (error instanceof KvmError) expectTypeOf(error.errno).toEqualTypeOf<number>();
  if (error instanceof GuestError) expectTypeOf(error.errno).toEqualTypeOf<string>();
  if (!(error instanceof TsvisorError)) throw error;
  expectTypeOf(error).toExtend<Error>();
  expectTypeOf(error.code).toEqualTypeOf<ErrorCode>();
  expectTypeOf(error.console).toEqualTypeOf<string | undefined>();
  expectTypeOf<UsageError | VsockError>().toExtend<TsvisorError>();
  // @ts-expect-error no such code
  if (error.code === 'ERR_NOTHING') return '';
  switch (error.code) {
    case 'ERR_KVM_MISSING':
      expectTypeOf(error.code).toEqualTypeOf<'ERR_KVM_MISSING'>();
      return 'no KVM';
    default:
      expectTypeOf(error.code).toEqualTypeOf<Exclude<ErrorCode, 'ERR_KVM_MISSING'>>();
      return error.message;
  }
}

/** Devices of one's own. */
export class Dice extends MmioDevice<{ readonly sides: number }> {
  override read(offset: number, size: 1 | 2 | 4): number {
    expectTypeOf(this.options).toEqualTypeOf<{ readonly sides: number }>();
    return offset + size;
  }

  override save(): { readonly rolled: number } {
    return { rolled: 1 };
  }

  override restore(state: unknown): void {
    expectTypeOf(state).toBeUnknown();
  }
}

export class Echo extends VirtioDevice {
  override readonly type = 42;
  override readonly queueSizes = [64];

  override handleQueue(index: number): void {
    const chain = this.queues[index]?.pop();
    if (chain) expectTypeOf(chain).toEqualTypeOf<Chain>();
    expectTypeOf(this.options).toBeUnknown();
  }
}

// @ts-expect-error read() is missing
export class Nothing extends MmioDevice {}

/** The test kit. */
export function kit(): void {
  const test = machineTest({ memory: 2 ** 26 }, { timeout: 1000, ready: async (machine) => void machine.state });
  test('a test', async ({ machine, expect, task }) => {
    expectTypeOf(machine).toEqualTypeOf<Machine>();
    expect(task.name).toBe('a test');
  });
  // @ts-expect-error what belongs to the kit is not a fixture
  test('another', ({ machines }) => machines);
  // @ts-expect-error memory is in bytes
  machineTest({ memory: '64M' });
}

/** A page source, and its use. */
export class Pages implements PageSource {
  async read(offset: number, into: Uint8Array): Promise<number> {
    return offset + into.length;
  }
}
export const paged = () =>
  Machine.restore('snapshot', { pages: { module: './pages.js', options: {} }, prefetch: true });
// @ts-expect-error it has to say how many bytes it gave
export const silent: PageSource = { read: async () => {} };
