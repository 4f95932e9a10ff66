import type { Disk } from '../backends/disk/disk.js';
import type { GuestIo } from '../backends/guest-io.js';
import type { Bus } from '../bus/bus.js';
import type { OneShotTimer } from '../devices/host.js';
import type { VmFd } from '../kvm/vm.js';
import type { GuestMemory } from '../memory/guest-memory.js';
import { Blk } from '../virtio/blk/blk.js';
import { VirtioConsole } from '../virtio/console/console.js';
import type { VirtioModel } from '../virtio/device.js';
import type { NetBackend } from '../virtio/net/backend.js';
import { Net } from '../virtio/net/net.js';
import { Rng } from '../virtio/rng/rng.js';
import { VirtioMmio } from '../virtio/transport/mmio.js';
import { VirtioVsock } from '../virtio/vsock/vsock.js';
import type { ResolvedConfig } from './config.js';
import { now } from './end.js';
import { Timer } from './fd-events.js';
import type { HostServices } from './host-services.js';
import { virtioSlot } from './layout.js';

/** What virtio devices are built from. */
export interface VirtioParts {
  readonly config: ResolvedConfig;
  readonly memory: GuestMemory;
  readonly io: GuestIo;
  readonly host: HostServices;
  /** The user's. */
  readonly devices: readonly VirtioModel[];
  /** Releases a resource with the machine. */
  readonly own: <T extends Disposable>(resource: T) => T;
}

/** Puts every virtio device on the bus, in the order of their slots. */
export function addVirtioDevices(mmio: Bus, vm: VmFd, parts: VirtioParts): void {
  const { memory, host } = parts;
  host.statistics.devices.clear();
  makeDevices(parts).forEach((device, index) => {
    const { base, length, gsi } = virtioSlot(index);
    const transport = new VirtioMmio(device, {
      memory,
      interrupt: { set: (level) => vm.setIrqLine(gsi, level) },
      polling: host.rings?.ofDevice(base),
      broken: (what) => host.guestWarning(what),
    });
    mmio.add(base, length, transport);
    host.statistics.devices.set(device.name, transport);
  });
}

/** Adding a device is a line here. As many as virtioDeviceCount(), then the user's. */
function makeDevices({ config, memory, io, host, own, devices }: VirtioParts): VirtioModel[] {
  const timer = (onExpired: () => void): OneShotTimer => {
    const timer = new Timer(host.events, onExpired);
    own({ [Symbol.dispose]: () => timer.close() });
    return timer;
  };
  const warn = (message: string) => void host.guestWarning(message);
  const networks = config.networks.map(({ mac }, index) => {
    const backend = host.networks[index] as NetBackend;
    return new Net({ name: `net${index}`, mac: Buffer.from(mac.replaceAll(':', ''), 'hex'), backend, io, timer });
  });
  const drives = config.drives.map(({ id, onError }, index) => {
    const disk = host.drives[index] as Disk;
    disk.attach(io, memory);
    const blk = new Blk({
      name: `blk${index}`,
      disk,
      id,
      holdVcpus: () => host.holdVcpus(),
      failed: (message) => host.driveFailed(index, message, onError),
    });
    io.onBatch(() => blk.publish());
    return blk;
  });
  const { cid } = config.vsock ?? {};
  return [
    ...drives,
    ...networks,
    ...(host.consolePorts.length > 0 ? [new VirtioConsole({ ports: host.consolePorts, io })] : []),
    ...(config.rng ? [new Rng({ ...config.rng, now, timer })] : []),
    ...(cid !== undefined && host.vsock ? [new VirtioVsock({ cid, channel: host.vsock, io, warn })] : []),
    ...devices,
  ];
}
