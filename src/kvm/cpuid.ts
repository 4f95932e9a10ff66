import { kvm_cpuid_entry2 as entry, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid2 } from './generated/abi.js';

/** The four result registers of a CPUID leaf, as unsigned 32-bit numbers. */
export interface CpuidLeaf {
  eax: number;
  ebx: number;
  ecx: number;
  edx: number;
}

/** A struct kvm_cpuid2: CPUID results by function and index (KVM API 4.46 and 4.68). */
export class Cpuid {
  readonly bytes: Uint8Array;
  readonly #view: DataView;

  private constructor(bytes: Uint8Array) {
    this.bytes = bytes;
    this.#view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  }

  static ofCapacity(entries: number): Cpuid {
    const cpuid = new Cpuid(new Uint8Array(kvm_cpuid2.sizeof + entries * entry.sizeof));
    cpuid.#view.setUint32(kvm_cpuid2.nent, entries, true);
    return cpuid;
  }

  /** Takes bytes as a struct kvm_cpuid2; undefined when they are not as long as it says. */
  static of(bytes: Uint8Array): Cpuid | undefined {
    if (bytes.length < kvm_cpuid2.entries) return undefined;
    const cpuid = new Cpuid(bytes);
    return cpuid.used.length === kvm_cpuid2.entries + cpuid.length * entry.sizeof ? cpuid : undefined;
  }

  /** The bytes that its entries take. */
  get used(): Uint8Array {
    return this.bytes.subarray(0, kvm_cpuid2.entries + this.length * entry.sizeof);
  }

  get length(): number {
    return this.#view.getUint32(kvm_cpuid2.nent, true);
  }

  /** The leaf, or undefined where the table has none. */
  get(leaf: number, index = 0): CpuidLeaf | undefined {
    const at = this.#find(leaf, index);
    if (at < 0) return undefined;
    const u32 = (offset: number) => this.#view.getUint32(at + offset, true);
    return { eax: u32(entry.eax), ebx: u32(entry.ebx), ecx: u32(entry.ecx), edx: u32(entry.edx) };
  }

  /** Changes a leaf that is there; nothing happens when it is not: a host that lacks a leaf lacks what it tells. */
  update(leaf: number, index: number, change: (leaf: CpuidLeaf) => Partial<CpuidLeaf>): void {
    const at = this.#find(leaf, index);
    const before = this.get(leaf, index);
    if (!before) return;
    this.#write(at, { ...before, ...change(before) });
  }

  /** Sets one index of a leaf that has several, also one that is not there. @throws RangeError when the table is full. */
  set(leaf: number, index: number, registers: CpuidLeaf): void {
    let at = this.#find(leaf, index);
    if (at < 0) {
      at = kvm_cpuid2.entries + this.length * entry.sizeof;
      this.#view.setUint32(at + entry.function, leaf, true);
      this.#view.setUint32(at + entry.index, index, true);
      this.#view.setUint32(at + entry.flags, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, true);
      this.#view.setUint32(kvm_cpuid2.nent, this.length + 1, true);
    }
    this.#write(at, registers);
  }

  /** Function and index of every entry, in table order. */
  *leaves(): IterableIterator<{ leaf: number; index: number }> {
    for (let i = 0; i < this.length; i++) {
      const at = kvm_cpuid2.entries + i * entry.sizeof;
      yield {
        leaf: this.#view.getUint32(at + entry.function, true),
        index: this.#view.getUint32(at + entry.index, true),
      };
    }
  }

  #write(at: number, registers: CpuidLeaf): void {
    for (const register of ['eax', 'ebx', 'ecx', 'edx'] as const) {
      this.#view.setUint32(at + entry[register], registers[register] >>> 0, true);
    }
  }

  #find(leaf: number, index: number): number {
    for (let i = 0; i < this.length; i++) {
      const at = kvm_cpuid2.entries + i * entry.sizeof;
      if (this.#view.getUint32(at + entry.function, true) !== leaf) continue;
      if (this.#view.getUint32(at + entry.index, true) === index) return at;
    }
    return -1;
  }
}
