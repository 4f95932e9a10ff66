import { detectKvmFlavour, type KvmFlavour } from '../arch/x86_64/assist/detect.js';
import type { NestedAssist } from '../arch/x86_64/assist/nested-assist.js';
import { Kvm } from '../kvm/kvm.js';
import type { VcpuFd } from '../kvm/vcpu.js';
import type { VmFd } from '../kvm/vm.js';
import { GuestRam, type RamContents } from './guest-ram.js';
import { layout } from './layout.js';

/** The KVM objects and memory of one power-on, and what else is released with them. */
export class Hardware implements Disposable {
  readonly flavour: KvmFlavour;
  /** Only where KVM interprets the guest's kernel. */
  readonly Assist: typeof NestedAssist | undefined;
  readonly kvm: Kvm;
  readonly vm: VmFd;
  readonly ram: GuestRam;
  readonly vcpu: VcpuFd;
  /** What is made is released in reverse. */
  readonly #resources: Disposable[] = [];
  /** Releases a resource with the machine. */
  readonly own = <T extends Disposable>(resource: T): T => {
    this.#resources.push(resource);
    return resource;
  };

  private constructor(
    flavour: KvmFlavour,
    Assist: typeof NestedAssist | undefined,
    memory: number,
    contents: RamContents,
  ) {
    const { own } = this;
    this.flavour = flavour;
    this.Assist = Assist;
    try {
      this.kvm = own(Kvm.open());
      this.vm = own(this.kvm.createVm());
      const { vm } = this;
      Assist?.prepare(vm);
      this.ram = own(new GuestRam(vm, memory, contents));
      vm.setTssAddr(layout.tss);
      vm.setIdentityMapAddr(layout.identityMap);
      vm.createIrqchip();
      vm.createPit2();
      this.vcpu = own(vm.createVcpu(0));
    } catch (error) {
      this[Symbol.dispose]();
      throw error;
    }
  }

  /** @param memory bytes of RAM. @throws TsvisorError ERR_KVM…, MemoryError, SnapshotError */
  static async create(memory: number, contents: RamContents): Promise<Hardware> {
    const { flavour, Assist } = await Hardware.loadCode();
    return new Hardware(flavour, Assist, memory, contents);
  }

  /** Loads what only some hosts need: it is the largest part of the machine thread's code. */
  static async loadCode(): Promise<{ flavour: KvmFlavour; Assist: typeof NestedAssist | undefined }> {
    const flavour = detectKvmFlavour();
    const Assist =
      flavour === 'interpreted' ? (await import('../arch/x86_64/assist/nested-assist.js')).NestedAssist : undefined;
    return { flavour, Assist };
  }

  [Symbol.dispose](): void {
    for (const resource of this.#resources.reverse()) resource[Symbol.dispose]();
    this.#resources.length = 0;
  }
}
