import { renewGenerationId } from '../arch/x86_64/acpi/tables.js';
import { setEntryState } from '../arch/x86_64/entry-state.js';
import { restoreVcpu, saveVcpu, type VcpuState } from '../arch/x86_64/vcpu-state.js';
import { GuestIo } from '../backends/guest-io.js';
import { Bus, type DeviceState } from '../bus/bus.js';
import { BootTimer } from '../devices/boot-timer.js';
import { CmosRtc } from '../devices/cmos-rtc.js';
import { DebugExit } from '../devices/debug-exit.js';
import { I8042 } from '../devices/i8042.js';
import { Serial16550 } from '../devices/serial-16550.js';
import { SleepControl } from '../devices/sleep-control.js';
import { KvmError, SnapshotError } from '../errors.js';
import * as abi from '../kvm/generated/abi.js';
import type { VcpuFd } from '../kvm/vcpu.js';
import type { VmFd } from '../kvm/vm.js';
import { bytesToState, StateReader } from '../state-reader.js';
import type { ResolvedConfig } from './config.js';
import { CONSOLE_TAIL_SIZE } from './console-tail.js';
import { virtioDeviceCount } from './device-config.js';
import { now } from './end.js';
import { Timer } from './fd-events.js';
import { FirstPitAccess } from './first-pit-access.js';
import type { GuestRam, RamContents } from './guest-ram.js';
import { Hardware } from './hardware.js';
import type { HostServices } from './host-services.js';
import { gsi, layout, ports } from './layout.js';
import { loadGuest } from './load-guest.js';
import type { MachineOrigin } from './messages.js';
import { PageFaults } from './page-faults.js';
import type { UserDevices } from './user-devices/user-devices.js';
import { VcpuRunner } from './vcpu-runner.js';
import { addVirtioDevices } from './virtio-devices.js';

/** PIC master and slave, IOAPIC. */
const IRQCHIPS = 3;
const IRQCHIP_BYTES = abi.kvm_irqchip.sizeof;

type DeviceStates = Readonly<Record<string, DeviceState>>;

/** A machine without its memory. Structures of the KVM API are in base64, numbers of 64 bits in hexadecimal. */
export interface SavedState {
  /** What the guest said last, for messages. */
  readonly console: string;
  /** kvmclock, in nanoseconds. */
  readonly clock: string;
  readonly vcpus: readonly VcpuState[];
  readonly irqchips: readonly { readonly registers: string }[];
  /** Empty where the guest has not touched it. */
  readonly pit: string;
  /** Of each bus, by name. */
  readonly devices: { readonly ports: DeviceStates; readonly mmio: DeviceStates };
}

/** Gives a new machine's KVM objects their saved state. @throws SnapshotError */
function restoreKvm({ kvm, vm, vcpus }: Hardware, state: StateReader): void {
  const chips = state.list('irqchips', IRQCHIPS).map((chip) => chip.bytes('registers', IRQCHIP_BYTES));
  if (chips.length !== IRQCHIPS) state.refuse('irqchips', `are not ${IRQCHIPS}`);
  const pit = state.bytes('pit', 0, abi.kvm_pit_state2.sizeof);
  if (pit.length > 0 && pit.length < abi.kvm_pit_state2.sizeof) state.refuse('pit', 'is not whole');
  const clock = state.bigint('clock');
  const saved = state.list('vcpus', vcpus.length);
  if (saved.length !== vcpus.length) state.refuse('vcpus', `are not ${vcpus.length}, as its configuration says`);
  try {
    vm.setIrqchips(chips);
    if (pit.length > 0) {
      vm.createPit2();
      vm.setPit(pit);
    }
    vm.setClock(clock);
  } catch (cause) {
    if (!(cause instanceof KvmError)) throw cause;
    throw new SnapshotError(`snapshot: KVM of this host refuses it: ${cause.message}; it is damaged`, { cause });
  }
  const indices = kvm.msrIndices();
  vcpus.forEach((vcpu, id) => {
    restoreVcpu(vcpu, saved[id] as StateReader, indices);
  });
}

/** One power-on of a machine: its KVM objects, memory and devices, from a kernel loaded to the guest's end. */
export class VirtualMachine implements Disposable {
  readonly ports = new Bus('port');
  readonly mmio = new Bus('MMIO');

  readonly #hardware: Hardware;
  readonly #runners: VcpuRunner[] = [];
  #io: GuestIo | undefined;

  private constructor(hardware: Hardware) {
    this.#hardware = hardware;
  }

  /** Builds a machine and loads its kernel. @throws TsvisorError of every kind that a configuration can cause. */
  static build(config: ResolvedConfig, host: HostServices, devices: UserDevices): Promise<VirtualMachine> {
    return VirtualMachine.#make(config, host, devices, {}, async (hardware) => {
      const { vcpus } = hardware;
      hardware.identifyVcpus();
      host.statistics.phase('vmCreated');
      // The others wait for its INIT and SIPI.
      const bootProcessor = vcpus[0] as (typeof vcpus)[0];
      setEntryState(bootProcessor, await loadGuest(hardware, config, devices));
      host.statistics.phase('kernelLoaded');
    });
  }

  /**
   * Builds a machine that goes on where another was saved. @param origin whose state, what save() gave, may be anybody's
   * input. @throws SnapshotError, and as build().
   */
  static async restore(
    config: ResolvedConfig,
    host: HostServices,
    devices: UserDevices,
    { layers, pages, machine: saved, track, moved }: MachineOrigin,
  ): Promise<VirtualMachine> {
    const state = new StateReader(saved, '');
    const attach: RamContents['attach'] = pages && ((regions) => new PageFaults(regions, pages, host));
    const machine = await VirtualMachine.#make(config, host, devices, { layers, attach }, async (hardware) => {
      host.statistics.phase('vmCreated');
      restoreKvm(hardware, state);
    });
    try {
      machine.ram.trackDirtyPages(track); // devices write to the guest's memory as they go on
      for (const byte of state.bytes('console', 0, CONSOLE_TAIL_SIZE)) host.consoleTail.put(byte);
      const saved = state.object('devices');
      restoreDevices(machine.ports, saved.object('ports'));
      restoreDevices(machine.mmio, saved.object('mmio'));
      if (config.acpi !== 'off' && !moved) machine.#tellOfRestore();
      machine.ram.check();
      return machine;
    } catch (error) {
      machine[Symbol.dispose]();
      throw error;
    }
  }

  /** By the VM generation ID: a guest that knows of it seeds its random numbers anew. */
  #tellOfRestore(): void {
    const { vm, ram } = this.#hardware;
    renewGenerationId(ram.memory);
    vm.setIrqLine(gsi.vmGenerationId, true);
    vm.setIrqLine(gsi.vmGenerationId, false);
  }

  /** @param load makes it ready to run, before its devices are there. */
  static async #make(
    config: ResolvedConfig,
    host: HostServices,
    devices: UserDevices,
    contents: RamContents,
    load: (hardware: Hardware) => Promise<void>,
  ): Promise<VirtualMachine> {
    const hardware = await Hardware.create(config.memory, config.cpus, contents);
    try {
      await load(hardware);
      const { vm, processors, ram, own } = hardware;
      const { memory } = ram;
      const machine = new VirtualMachine(hardware);
      machine.#addDevices(vm, config, host);
      own(devices.powerOn(memory, vm, machine.mmio));
      if (virtioDeviceCount(config) + devices.virtio.length > 0) {
        const io = own(new GuestIo(ram.regions, memory, host.events));
        host.rings?.powerOn(ram.regions);
        own({ [Symbol.dispose]: () => host.rings?.powerOff() });
        addVirtioDevices(machine.mmio, vm, { config, memory, io, host, own, devices: devices.virtio });
        machine.#io = io;
      }
      for (const processor of processors) machine.#runners.push(own(new VcpuRunner(processor, host, machine)));
      return machine;
    } catch (error) {
      hardware[Symbol.dispose]();
      throw error;
    }
  }

  get vcpus(): readonly VcpuFd[] {
    return this.#hardware.vcpus;
  }

  get ram(): GuestRam {
    return this.#hardware.ram;
  }

  /** Calls back, now or later on this thread, when no device works on a request; with its vCPUs stopped. */
  whenQuiet(callback: () => void): void {
    if (this.#io) this.#io.whenIdle(callback);
    else callback();
  }

  /**
   * Brings the vCPUs, which do not run, to where their state is all in KVM. @returns whether the guest goes on after it:
   * what a vCPU's last exit began may also be the guest's end.
   */
  settle(): boolean {
    return this.#runners.every((runner) => runner.settle());
  }

  /** Everything but the memory, as JSON. The vCPUs are stopped, their last exits settled, and the machine is quiet. */
  save(host: HostServices): SavedState {
    const { kvm, vm, vcpus } = this.#hardware;
    // What a vCPU writes of its clock comes into memory by KVM_KVMCLOCK_CTRL: memory is saved after this.
    for (const vcpu of vcpus) vcpu.notePause();
    const indices = kvm.msrIndices();
    return {
      console: bytesToState(host.consoleTail.bytes()),
      clock: vm.getClock().toString(16),
      vcpus: vcpus.map((vcpu) => saveVcpu(vcpu, indices)),
      irqchips: vm.getIrqchips().map((registers) => ({ registers: bytesToState(registers) })),
      pit: vm.hasPit ? bytesToState(vm.getPit()) : '',
      devices: { ports: saveDevices(this.ports), mmio: saveDevices(this.mmio) },
    };
  }

  [Symbol.dispose](): void {
    this.#hardware[Symbol.dispose]();
  }

  /** Adding a device is a line here. */
  #addDevices(vm: VmFd, config: ResolvedConfig, host: HostServices): void {
    const add = ({ base, length }: { base: number; length: number }, device: Parameters<Bus['add']>[2]) =>
      this.ports.add(base, length, device);
    const pit = new FirstPitAccess(vm);
    add(ports.pit, pit);
    add(
      ports.i8042,
      new I8042(() => host.finish({ reason: 'guest-reset', code: null, message: 'the guest reset itself' }), pit.portB),
    );
    const low = Math.min(config.memory, layout.mmioHoleStart);
    add(ports.cmos, new CmosRtc({ clock: Date, memoryBelow4GiB: low, memoryAbove4GiB: config.memory - low }));
    add(
      ports.debugExit,
      new DebugExit((code) =>
        host.finish({ reason: 'guest-exit', code, message: `the guest exited with code ${code}` }),
      ),
    );
    add(
      ports.bootTimer,
      new BootTimer((name) => {
        host.statistics.milestone(name);
        host.log('debug', `milestone ${name}`);
      }),
    );
    add(
      ports.sleepControl,
      new SleepControl(() => host.finish({ reason: 'guest-shutdown', code: 0, message: 'the guest powered off' })),
    );
    if (host.serial) add(ports.serial, this.#serial(vm, host, host.serial));
  }

  #serial(vm: VmFd, host: HostServices, stream: NonNullable<HostServices['serial']>): Serial16550 {
    const timer = new Timer(host.events, () => serial.timerExpired());
    this.#hardware.own({ [Symbol.dispose]: () => timer.close() });
    let first = true;
    const serial: Serial16550 = new Serial16550({
      interrupt: { set: (level) => vm.setIrqLine(gsi.serial, level) },
      output: {
        write: (byte) => {
          if (first) {
            host.statistics.phase('firstSerialByte');
            first = false;
          }
          const taken = stream.write(byte);
          if (taken) host.consoleTail.put(byte);
          return taken;
        },
      },
      input: stream,
      timer,
      now: () => now() * 1e3,
    });
    stream.onWritable = () => serial.outputReady();
    stream.onReadable = () => serial.inputReady();
    return serial;
  }
}

function saveDevices({ ranges }: Bus): DeviceStates {
  return Object.fromEntries(ranges.flatMap(({ device }) => (device.save ? [[device.name, device.save()]] : [])));
}

function restoreDevices({ ranges }: Bus, saved: StateReader): void {
  for (const { device } of ranges) device.restore?.(saved.object(device.name));
}
