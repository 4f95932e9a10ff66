import type { Bus } from '../../bus/bus.js';
import type { MmioDevice } from '../../device/mmio-device.js';
import type { VirtioDevice } from '../../device/virtio-device.js';
import { DeviceError } from '../../errors.js';
import type { VmFd } from '../../kvm/vm.js';
import { GuestMemory, GuestMemoryRangeError } from '../../memory/guest-memory.js';
import type { ResolvedConfig } from '../config.js';
import { type ResolvedDevice, virtioDeviceCount } from '../device-config.js';
import { gsi, layout, MAX_VIRTIO_DEVICES, virtioSlot } from '../layout.js';
import type { DevicePlace, DeviceRequest } from '../messages.js';
import { UserMmio } from './mmio.js';
import { describe, type UserDeviceServices } from './user-device.js';
import { UserVirtio } from './virtio.js';

const PAGE = 4096;

/** In a bundle, what stands for import() of anything outside; see src/bundle.cts. */
declare const importModule: ((url: string) => Promise<unknown>) | undefined;

/** Devices that the user of a machine wrote, on the machine thread. They outlive a reset of the guest. */
export class UserDevices implements Disposable {
  /** In the order of their slots, which come after those of the machine's own devices. */
  readonly virtio: readonly UserVirtio[];
  readonly mmio: readonly UserMmio[];
  /** In the order of the configuration. */
  readonly #all: readonly (UserVirtio | UserMmio)[];

  private constructor(all: readonly (UserVirtio | UserMmio)[]) {
    this.#all = all;
    this.virtio = all.filter((device) => device instanceof UserVirtio);
    this.mmio = all.filter((device) => device instanceof UserMmio);
  }

  /** Imports the modules, makes the devices and gives each its place. @throws DeviceError that names the device. */
  static async load(config: ResolvedConfig, services: UserDeviceServices): Promise<UserDevices> {
    const all: (UserVirtio | UserMmio)[] = [];
    for (const [index, device] of config.devices.entries()) all.push(await load(index, device, services));
    const devices = new UserDevices(all);
    devices.#place(virtioDeviceCount(config));
    return devices;
  }

  get places(): DevicePlace[] {
    return this.#all.map(({ place }) => place);
  }

  /** Puts the MMIO devices on the bus and powers all on. @returns what powers them off, before `memory` goes. */
  powerOn(memory: GuestMemory, vm: VmFd, mmio: Bus): Disposable {
    for (const device of this.mmio) mmio.add(device.place.base, device.place.length, device);
    for (const device of this.#all) {
      const { gsi } = device.place;
      device.powerOn({ memory, setInterrupt: (level) => gsi !== undefined && vm.setIrqLine(gsi, level) });
    }
    return {
      [Symbol.dispose]: () => {
        for (const device of this.#all) device.powerOff();
      },
    };
  }

  /** Something for a device from the program. */
  receive(request: DeviceRequest): void {
    const device = this.#all[request.device];
    if ('taken' in request) device?.taken(request.taken);
    else device?.receive(request.value);
  }

  [Symbol.dispose](): void {
    for (const device of this.#all) device[Symbol.dispose]();
  }

  /** @param slots that the machine's own virtio devices have. @throws DeviceError */
  #place(slots: number): void {
    const wired = this.mmio.filter(({ trigger }) => trigger !== 'none');
    if (slots + this.virtio.length + wired.length > MAX_VIRTIO_DEVICES) {
      const wanted = `${slots} virtio devices of its own and ${this.virtio.length + wired.length} of yours`;
      throw new DeviceError(`devices: a machine has ${MAX_VIRTIO_DEVICES} interrupts: too few for ${wanted}`);
    }
    this.virtio.forEach((device, index) => {
      device.place = virtioSlot(slots + index);
    });
    const pins = [...gsi.virtio];
    let base: number = layout.userMmioBase;
    for (const device of this.mmio) {
      const { name, size, trigger } = device;
      const alignment = Math.max(PAGE, 2 ** Math.ceil(Math.log2(size)));
      base = Math.ceil(base / alignment) * alignment;
      if (base + alignment > layout.userMmioEnd) {
        throw new DeviceError(`device '${name}': there is no address space left for ${size} bytes`);
      }
      device.place = { base, length: size, gsi: trigger === 'none' ? undefined : pins.pop() };
      base += alignment;
    }
  }
}

async function load(index: number, config: ResolvedDevice, services: UserDeviceServices) {
  const { name, module, exportName, options } = config;
  const { VirtioDevice, MmioDevice } = await publicClasses();
  const broken = (what: string, cause?: unknown) => new DeviceError(`device '${name}' (${module}): ${what}`, { cause });
  let namespace: Record<string, unknown>;
  try {
    namespace = (await importOutside(module)) as Record<string, unknown>;
  } catch (error) {
    throw broken(`it cannot be loaded: ${describe(error)}`, error);
  }
  const Class = namespace[exportName];
  const isVirtio = isSubclass(Class, VirtioDevice);
  if (!isVirtio && !isSubclass(Class, MmioDevice)) {
    const what = Class === undefined ? `there is no export '${exportName}'` : `its export '${exportName}' is no class`;
    throw broken(`${what} that extends VirtioDevice or MmioDevice of this tsvisor/device`);
  }
  const host = isVirtio ? new UserVirtio(index, name, services) : new UserMmio(index, name, services);
  let problem: string | undefined;
  try {
    const device = new (Class as new (init: object) => VirtioDevice & MmioDevice)({ name, options, host });
    problem = (isVirtio ? UserVirtio : UserMmio).problem(device);
    if (!problem) host.adopt(device);
  } catch (error) {
    throw broken(`its constructor threw ${describe(error)}`, error);
  }
  if (problem) throw broken(problem);
  return host;
}

/**
 * The classes that a user's module gets from tsvisor/device. Those of a bundle are others, which no module can import: what
 * a device is given, and what that throws, are made instances of the public ones too.
 */
async function publicClasses(): Promise<typeof import('../../device/index.js')> {
  if (typeof importModule === 'undefined') return await import('../../device/index.js');
  const url = new URL('../device/index.js', import.meta.url).href; // from the bundle
  const classes = (await importModule(url)) as typeof import('../../device/index.js');
  Object.setPrototypeOf(GuestMemory.prototype, classes.GuestMemory.prototype);
  Object.setPrototypeOf(GuestMemoryRangeError.prototype, classes.GuestMemoryRangeError.prototype);
  return classes;
}

function importOutside(url: string): Promise<unknown> {
  return typeof importModule === 'undefined' ? import(url) : importModule(url);
}

function isSubclass(value: unknown, base: typeof VirtioDevice | typeof MmioDevice): boolean {
  return typeof value === 'function' && value.prototype instanceof base;
}
