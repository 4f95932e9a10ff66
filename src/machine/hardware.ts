import { detectKvmFlavour, type KvmFlavour } from '../arch/x86_64/assist/detect.js';
import type { NestedAssist } from '../arch/x86_64/assist/nested-assist.js';
import { shapeCpuid } from '../arch/x86_64/cpuid.js';
import { Kvm } from '../kvm/kvm.js';
import type { VcpuFd } from '../kvm/vcpu.js';
import type { VmFd } from '../kvm/vm.js';
import { ExitData } from './exit-data.js';
import { GuestRam, type RamContents } from './guest-ram.js';
import { layout } from './layout.js';

/** What depends on the host. */
interface Code {
  readonly flavour: KvmFlavour;
  /** Only where KVM interprets the guest's kernel: it is the largest part of the machine thread's code. */
  readonly Assist: typeof NestedAssist | undefined;
}

/** A vCPU with what tells of its exits and what completes them. */
export interface Processor {
  readonly vcpu: VcpuFd;
  readonly exits: ExitData;
  /** Only where KVM interprets the guest's kernel. */
  readonly assist: NestedAssist | undefined;
}

/** KVM has some MiB for each GiB of a machine's memory: more is not made ahead. */
const MAX_PREPARED = 2 ** 30;
/** Guest physical addresses of large pages that hold what is written at boot, and kernels that are small. */
const FIRST_TOUCHED = [0, 2 ** 21];

/** The KVM objects and memory of one power-on, and what else is released with them. */
export class Hardware implements Disposable {
  /** What prepare() made. */
  static #prepared: Hardware | undefined;
  readonly flavour: KvmFlavour;
  readonly #Assist: typeof NestedAssist | undefined;
  readonly kvm: Kvm;
  readonly vm: VmFd;
  readonly ram: GuestRam;
  /** By number; the boot processor is the first. */
  readonly processors: Processor[] = [];
  /** How many vCPUs those that there are know of. */
  #identified = 0;
  /** What is made is released in reverse. */
  readonly #resources: Disposable[] = [];
  /** Releases a resource with the machine. */
  readonly own = <T extends Disposable>(resource: T): T => {
    this.#resources.push(resource);
    return resource;
  };

  private constructor({ flavour, Assist }: Code, memory: number, cpus: number, contents: RamContents) {
    this.flavour = flavour;
    this.#Assist = Assist;
    try {
      this.kvm = this.own(Kvm.open());
      this.vm = this.own(this.kvm.createVm());
      const { vm } = this;
      Assist?.prepare(vm);
      vm.setTssAddr(layout.tss);
      vm.setIdentityMapAddr(layout.identityMap);
      // Before the interrupt controllers: KVM puts off freeing what they replace, and a memory slot waits for that, some 10 ms.
      this.ram = this.own(new GuestRam(vm, memory, contents));
      vm.createIrqchip();
      this.#addVcpus(cpus);
    } catch (error) {
      this[Symbol.dispose]();
      throw error;
    }
  }

  /** @param memory bytes of RAM. @throws TsvisorError ERR_KVM…, MemoryError, SnapshotError */
  static async create(memory: number, cpus: number, contents: RamContents): Promise<Hardware> {
    const code = await loadCode();
    const prepared = Hardware.#prepared;
    Hardware.#prepared = undefined;
    if (!prepared) return new Hardware(code, memory, cpus, contents);
    try {
      if (prepared.ram.memory.size === memory && prepared.ram.fill(contents)) {
        prepared.#addVcpus(cpus);
        return prepared;
      }
      const hardware = new Hardware(code, memory, cpus, contents);
      prepared[Symbol.dispose]();
      return hardware;
    } catch (error) {
      prepared[Symbol.dispose]();
      throw error;
    }
  }

  /** Does ahead what a thread's first machine needs. @param memory that it is expected to have; 0: that is not known. */
  static async prepare(memory: number): Promise<void> {
    const code = await loadCode();
    if (memory === 0 || memory > MAX_PREPARED) return;
    try {
      if (Hardware.#prepared) return;
      const hardware = new Hardware(code, memory, 1, {});
      Hardware.#prepared = hardware;
      hardware.identifyVcpus();
      const { memory: ram } = hardware.ram;
      for (const gpa of FIRST_TOUCHED) if (ram.contains(gpa, 1)) ram.writeU8(gpa, 0);
    } catch {
      // create() tells why
    }
  }

  get vcpus(): readonly VcpuFd[] {
    return this.processors.map(({ vcpu }) => vcpu);
  }

  /** Sets what each vCPU of a machine that boots reports of itself. */
  identifyVcpus(): void {
    const { length } = this.processors;
    if (this.#identified === length) return;
    this.processors.forEach(({ vcpu }, id) => {
      const cpuid = this.kvm.supportedCpuid();
      shapeCpuid(cpuid, id, length, this.flavour);
      vcpu.setCpuid(cpuid);
    });
    this.#identified = length;
  }

  /** @param count that there are to be. */
  #addVcpus(count: number): void {
    const Assist = this.#Assist;
    while (this.processors.length < count) {
      const vcpu = this.own(this.vm.createVcpu(this.processors.length));
      const assist = Assist && new Assist(vcpu, this.ram.memory);
      this.processors.push({ vcpu, exits: new ExitData(vcpu.run.buffer), assist });
    }
  }

  [Symbol.dispose](): void {
    for (const resource of this.#resources.reverse()) resource[Symbol.dispose]();
    this.#resources.length = 0;
  }
}

let code: Promise<Code> | undefined;

function loadCode(): Promise<Code> {
  code ??= load();
  return code;
}

async function load(): Promise<Code> {
  const flavour = detectKvmFlavour();
  const Assist =
    flavour === 'interpreted' ? (await import('../arch/x86_64/assist/nested-assist.js')).NestedAssist : undefined;
  return { flavour, Assist };
}
