import { text } from 'node:stream/consumers';
import { Machine } from '#dist/machine/machine.js';
import { compileReference } from './compile.js';
import { outputOf, QEMU } from './contestants.js';
import { Image } from './image.js';
import type { Bench, BenchOptions, Measurement } from './result.js';
import { Sink } from './sink.js';
import { Tap } from './tap.js';
import {
  type Around,
  benchGuest,
  compare,
  qemuCommand,
  tsvisorCommands,
  type Vmm,
  type Vmms,
  type Workload,
} from './virtio-guest.js';

const KiB = 1024;

const counted = (unit: string, size: number) => ({ unit, weight: 1, size });
const megabytes = (size: number) => ({ unit: 'MB/s', weight: size / 1e6, size });

const BLOCK: readonly Workload[] = [
  {
    ...{ name: 'blk 4 KiB random read, depth 1', bench: 'blk-random-read', depth: 1 },
    ...counted('IOPS', 4 * KiB),
  },
  {
    ...{ name: 'blk 4 KiB random read, depth 32', bench: 'blk-random-read', depth: 32 },
    ...counted('IOPS', 4 * KiB),
  },
  { name: 'blk 128 KiB sequential read, depth 4', bench: 'blk-read', depth: 4, ...megabytes(128 * KiB) },
  { name: 'blk 128 KiB sequential write, depth 4', bench: 'blk-write', depth: 4, ...megabytes(128 * KiB) },
  {
    ...{ name: 'blk 4 KiB random write and flush', bench: 'blk-write-flush', depth: 1 },
    ...counted('ops/s', 4 * KiB),
  },
];

/** The least and the most of Ethernet, without the frame's checksum. */
const FRAMES = [60, 1514];
const NET_OUT = FRAMES.map((size) => ({
  ...{ name: `net ${size}-byte frames out`, bench: 'net-send', depth: 0 },
  ...counted('frames/s', size),
}));
const NET_IN = FRAMES.map((size) => ({
  ...{ name: `net ${size}-byte frames in`, bench: 'net-receive', depth: 0 },
  ...counted('frames/s', size),
}));

/** One at a time is what Linux' driver does. */
const CONSOLE = [1, 16].map((depth) => ({
  ...{ name: `console 4 KiB writes, depth ${depth}`, bench: 'console-write', depth },
  ...megabytes(4 * KiB),
}));

/** QEMU then handles a notification on the vCPU's thread, as tsvisor does, and not on another. */
const WITHOUT_IOEVENTFD = ['-global', 'virtio-mmio.ioeventfd=off'];

/** tsvisor's virtio devices beside those of QEMU's microvm, driven by the same guest. */
export const virtio: Bench = {
  name: 'virtio',
  describe: 'virtio block, network and console devices beside QEMU’s, with a guest that only drives them',
  async run(options) {
    const ticksPerSecond = Number(await outputOf(compileReference('tsc.c'), []));
    const hasQemu = await outputOf(QEMU, ['--version']).catch((error) => options.note(`no peer: ${error.message}`));
    const each: Each = async (workloads, { tsvisor, qemu }, around) => {
      const vmms = { tsvisor, qemu: hasQemu ? qemu : {} };
      const measurements: Measurement[] = [];
      for (const workload of workloads) {
        measurements.push(await compare(workload, vmms, ticksPerSecond, options, around?.(workload)));
      }
      return measurements;
    };
    return [...(await block(each)), ...(await net(each, options.note)), ...(await console(each))];
  },
};

type Each = (workloads: readonly Workload[], vmms: Vmms, around?: (of: Workload) => Around) => Promise<Measurement[]>;

async function block(each: Each): Promise<Measurement[]> {
  using image = new Image();
  const drive = `id=d,file=${image.path},format=raw,if=none,cache=writeback`;
  const qemu = (aio: string, ...others: string[]) =>
    qemuCommand(['-drive', `${drive},aio=${aio}`, '-device', 'virtio-blk-device,drive=d', ...others]);
  const thread = ['-object', 'iothread,id=t', '-global', 'virtio-blk-device.iothread=t'];
  return await each(BLOCK, {
    tsvisor: tsvisorCommands(['--drive', `file=${image.path}`]),
    qemu: {
      'aio=threads': qemu('threads'),
      'aio=threads, iothread': qemu('threads', ...thread),
      'aio=io_uring': qemu('io_uring'),
      'aio=io_uring, iothread': qemu('io_uring', ...thread),
      'aio=io_uring, ioeventfd=off': qemu('io_uring', ...WITHOUT_IOEVENTFD),
    },
  });
}

async function net(each: Each, note: BenchOptions['note']): Promise<Measurement[]> {
  using tap = await Tap.open().catch((error) => {
    note(`no network devices, for want of a tap (root makes one): ${error instanceof Error ? error.message : error}`);
    return undefined;
  });
  if (!tap) return [];
  const device = ['-netdev', `tap,id=n,ifname=${tap.name},script=no,downscript=no,vhost=off`];
  device.push('-device', 'virtio-net-device,netdev=n');
  const vmms = {
    tsvisor: tsvisorCommands(['--net', `tap=${tap.name}`], tap.prefix),
    qemu: {
      'ioeventfd=on': qemuCommand(device, tap.prefix),
      'ioeventfd=off': qemuCommand([...device, ...WITHOUT_IOEVENTFD], tap.prefix),
    },
  };
  const flooded = ({ size }: Workload): Around => {
    return (run) => tap.whileFlooded(size, run);
  };
  const arrived = () => onlyArrived(() => tap.received(), 1);
  return [...(await each(NET_OUT, vmms, arrived)), ...(await each(NET_IN, vmms, flooded))];
}

/**
 * What a VMM takes from the guest and drops does not count: QEMU's console does that when its socket is full.
 * @param received how much has arrived so far; an operation counts `each`
 */
function onlyArrived(received: () => Promise<number>, each: number): Around {
  return async (run) => {
    const before = await received();
    const { rates, total } = await run();
    const part = Math.min(1, ((await received()) - before) / (total * each));
    return { total, rates: rates.map((rate) => rate * part) };
  };
}

/** Here tsvisor is the library: its command line would pass the bytes on once more. */
async function console(each: Each): Promise<Measurement[]> {
  using sink = await Sink.open();
  const device = ['-chardev', `socket,id=c,path=${sink.name},abstract=on,tight=off`];
  device.push('-device', 'virtio-serial-device,max_ports=1', '-device', 'virtconsole,chardev=c');
  const tsvisor =
    (vcpuThreads: boolean): Vmm =>
    async (words) => {
      const consolePorts = [{ name: 'sink', console: true }];
      const { memory, path } = benchGuest;
      await using machine = await Machine.create({ kernel: path(), memory, append: words, consolePorts, vcpuThreads });
      const streams = [text(machine.serial), sink.read(machine.port('sink'))] as const;
      await machine.start();
      await machine.wait();
      const [output] = await Promise.all(streams);
      return output;
    };
  const arrived = ({ size }: Workload) => onlyArrived(() => sink.received(), size);
  const vmms = {
    tsvisor: { inline: tsvisor(false), 'vcpu-threads': tsvisor(true) },
    qemu: { 'ioeventfd=on': qemuCommand(device), 'ioeventfd=off': qemuCommand([...device, ...WITHOUT_IOEVENTFD]) },
  };
  return await each(CONSOLE, vmms, arrived);
}
