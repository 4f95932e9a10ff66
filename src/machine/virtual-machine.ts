import { writeAcpiTables } from '../arch/x86_64/acpi/tables.js';
import { detectKvmFlavour } from '../arch/x86_64/assist/detect.js';
import type { NestedAssist } from '../arch/x86_64/assist/nested-assist.js';
import { shapeCpuid } from '../arch/x86_64/cpuid.js';
import { setEntryState } from '../arch/x86_64/entry-state.js';
import { writeMpTable } from '../arch/x86_64/mptable.js';
import { writeBootGdt, writeBootPageTables } from '../arch/x86_64/page-tables.js';
import { GuestIo } from '../backends/guest-io.js';
import { agentArchive } from '../boot/agent-archive.js';
import { loadKernel } from '../boot/load.js';
import { Bus } from '../bus/bus.js';
import { BootTimer } from '../devices/boot-timer.js';
import { CmosRtc } from '../devices/cmos-rtc.js';
import { DebugExit } from '../devices/debug-exit.js';
import { I8042 } from '../devices/i8042.js';
import { Serial16550 } from '../devices/serial-16550.js';
import { SleepControl } from '../devices/sleep-control.js';
import { Kvm } from '../kvm/kvm.js';
import type { VcpuFd } from '../kvm/vcpu.js';
import type { VmFd } from '../kvm/vm.js';
import { commandLine } from './command-line.js';
import type { ResolvedConfig } from './config.js';
import { virtioDeviceCount } from './device-config.js';
import { now } from './end.js';
import { Timer } from './fd-events.js';
import { GuestRam } from './guest-ram.js';
import type { HostServices } from './host-services.js';
import { gsi, layout, ports, virtioSlot } from './layout.js';
import type { UserDevices } from './user-devices/user-devices.js';
import { addVirtioDevices } from './virtio-devices.js';

/** One power-on of a machine: its KVM objects, memory and devices, from a kernel loaded to the guest's end. */
export class VirtualMachine implements Disposable {
  readonly vcpu: VcpuFd;
  readonly ports = new Bus('port');
  readonly mmio = new Bus('MMIO');
  /** Only where KVM interprets the guest's kernel. */
  readonly assist: NestedAssist | undefined;
  readonly #resources: Disposable[];

  private constructor(vcpu: VcpuFd, assist: NestedAssist | undefined, resources: Disposable[]) {
    this.vcpu = vcpu;
    this.assist = assist;
    this.#resources = resources;
  }

  /** Builds a machine and loads its kernel. @throws TsvisorError of every kind that a configuration can cause. */
  static async build(config: ResolvedConfig, host: HostServices, devices: UserDevices): Promise<VirtualMachine> {
    // What is made is released in reverse, here if building fails and in dispose otherwise.
    const resources: Disposable[] = [];
    const own = <T extends Disposable>(resource: T): T => {
      resources.push(resource);
      return resource;
    };
    try {
      const flavour = detectKvmFlavour();
      const kvm = own(Kvm.open());
      const vm = own(kvm.createVm());
      // Loaded only where it is used: it is the largest part of the machine thread's code.
      const Assist =
        flavour === 'interpreted' ? (await import('../arch/x86_64/assist/nested-assist.js')).NestedAssist : undefined;
      Assist?.prepare(vm);
      const ram = own(new GuestRam(vm, config.memory));
      const { memory } = ram;
      vm.setTssAddr(layout.tss);
      vm.setIdentityMapAddr(layout.identityMap);
      vm.createIrqchip();
      vm.createPit2();
      const vcpu = own(vm.createVcpu(0));
      const cpuid = kvm.supportedCpuid();
      shapeCpuid(cpuid, 0, config.cpus, flavour);
      vcpu.setCpuid(cpuid);
      host.statistics.phase('vmCreated');

      const virtioCount = virtioDeviceCount(config) + devices.virtio.length;
      const virtio = Array.from({ length: virtioCount }, (_, index) => virtioSlot(index));
      const { cpus, serial, acpi } = config;
      const entry = await loadKernel(memory, {
        kernel: config.kernel,
        initrd: config.initrd,
        initrdPrefix: config.agentProgram === undefined ? undefined : agentArchive(config.agentProgram),
        commandLine: commandLine(config, flavour, devices),
        rsdp: acpi === 'off' ? undefined : writeAcpiTables(memory, { cpus, serial, virtio }),
      });
      writeBootPageTables(memory);
      writeBootGdt(memory);
      if (acpi !== 'on') {
        // The PIT, which KVM has at pin 0, and the ISA devices.
        const pins = [0, gsi.serial, gsi.cmos].map((pin) => ({ pin, level: false }));
        const own = devices.mmio.flatMap(({ place: { gsi }, trigger }) =>
          gsi === undefined ? [] : [{ pin: gsi, level: trigger === 'level' }],
        );
        writeMpTable(memory, cpus, [...pins, ...virtio.map(({ gsi }) => ({ pin: gsi, level: true })), ...own]);
      }
      setEntryState(vcpu, entry);
      host.statistics.phase('kernelLoaded');

      const assist = Assist && new Assist(vcpu, memory);
      const machine = new VirtualMachine(vcpu, assist, resources);
      machine.#addDevices(vm, config, host);
      own(devices.powerOn(memory, vm, machine.mmio));
      if (virtioCount > 0) {
        const io = own(new GuestIo(ram.regions, host.events));
        addVirtioDevices(machine.mmio, vm, { config, memory, io, host, own, devices: devices.virtio });
      }
      host.runHost.attachVcpu(vcpu.fd, vcpu.run);
      return machine;
    } catch (error) {
      release(resources);
      throw error;
    }
  }

  [Symbol.dispose](): void {
    release(this.#resources);
  }

  /** Adding a device is a line here. */
  #addDevices(vm: VmFd, config: ResolvedConfig, host: HostServices): void {
    const add = ({ base, length }: { base: number; length: number }, device: Parameters<Bus['add']>[2]) =>
      this.ports.add(base, length, device);
    add(
      ports.i8042,
      new I8042(() => host.finish({ reason: 'guest-reset', code: null, message: 'the guest reset itself' })),
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
    this.#resources.push({ [Symbol.dispose]: () => timer.close() });
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

function release(resources: Disposable[]): void {
  for (const resource of resources.reverse()) resource[Symbol.dispose]();
  resources.length = 0;
}
