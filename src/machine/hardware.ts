import { detectKvmFlavour, type KvmFlavour } from '../arch/x86_64/assist/detect.js';
import type { NestedAssist } from '../arch/x86_64/assist/nested-assist.js';
import { Kvm } from '../kvm/kvm.js';
import type { VcpuFd } from '../kvm/vcpu.js';
import type { VmFd } from '../kvm/vm.js';
import { GuestRam, type RamContents } from './guest-ram.js';
import { layout } from './layout.js';

/**
 * A machine's KVM objects before it has memory. The interrupt controllers come after memory: KVM puts off freeing what they
 * replace, and a memory slot waits for that, some 10 ms.
 */
class BareMachine implements Disposable {
  readonly kvm: Kvm;
  readonly vm: VmFd;
  readonly #resources: Disposable[] = [];

  /** @throws TsvisorError ERR_KVM… */
  constructor({ Assist }: Code) {
    const own = <T extends Disposable>(resource: T): T => {
      this.#resources.push(resource);
      return resource;
    };
    try {
      this.kvm = own(Kvm.open());
      this.vm = own(this.kvm.createVm());
      const { vm } = this;
      Assist?.prepare(vm);
      vm.setTssAddr(layout.tss);
      vm.setIdentityMapAddr(layout.identityMap);
    } catch (error) {
      this[Symbol.dispose]();
      throw error;
    }
  }

  [Symbol.dispose](): void {
    for (const resource of this.#resources.reverse()) resource[Symbol.dispose]();
    this.#resources.length = 0;
  }
}

/** What depends on the host. */
interface Code {
  readonly flavour: KvmFlavour;
  /** Only where KVM interprets the guest's kernel: it is the largest part of the machine thread's code. */
  readonly Assist: typeof NestedAssist | undefined;
}

/** The KVM objects and memory of one power-on, and what else is released with them. */
export class Hardware implements Disposable {
  /** What prepare() made. */
  static #prepared: BareMachine | undefined;
  readonly flavour: KvmFlavour;
  readonly Assist: typeof NestedAssist | undefined;
  readonly kvm: Kvm;
  readonly vm: VmFd;
  readonly ram: GuestRam;
  /** By number; the boot processor is the first. */
  readonly vcpus: readonly VcpuFd[];
  /** What is made is released in reverse. */
  readonly #resources: Disposable[] = [];
  /** Releases a resource with the machine. */
  readonly own = <T extends Disposable>(resource: T): T => {
    this.#resources.push(resource);
    return resource;
  };

  private constructor(
    { flavour, Assist }: Code,
    bare: BareMachine,
    memory: number,
    cpus: number,
    contents: RamContents,
  ) {
    const { kvm, vm } = this.own(bare);
    this.flavour = flavour;
    this.Assist = Assist;
    this.kvm = kvm;
    this.vm = vm;
    const vcpus: VcpuFd[] = [];
    this.vcpus = vcpus;
    try {
      this.ram = this.own(new GuestRam(vm, memory, contents));
      vm.createIrqchip();
      vm.createPit2();
      while (vcpus.length < cpus) vcpus.push(this.own(vm.createVcpu(vcpus.length)));
    } catch (error) {
      this[Symbol.dispose]();
      throw error;
    }
  }

  /** @param memory bytes of RAM. @throws TsvisorError ERR_KVM…, MemoryError, SnapshotError */
  static async create(memory: number, cpus: number, contents: RamContents): Promise<Hardware> {
    const code = await loadCode();
    const bare = Hardware.#prepared ?? new BareMachine(code);
    Hardware.#prepared = undefined;
    return new Hardware(code, bare, memory, cpus, contents);
  }

  /** Does ahead what a thread's first machine needs whatever it is. */
  static async prepare(): Promise<void> {
    const code = await loadCode();
    try {
      Hardware.#prepared ??= new BareMachine(code);
    } catch {
      // create() tells why
    }
  }

  [Symbol.dispose](): void {
    for (const resource of this.#resources.reverse()) resource[Symbol.dispose]();
    this.#resources.length = 0;
  }
}

async function loadCode(): Promise<Code> {
  const flavour = detectKvmFlavour();
  const Assist =
    flavour === 'interpreted' ? (await import('../arch/x86_64/assist/nested-assist.js')).NestedAssist : undefined;
  return { flavour, Assist };
}
