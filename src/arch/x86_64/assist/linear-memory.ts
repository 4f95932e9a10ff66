import type { Sregs } from '../../../kvm/registers.js';
import type { GuestMemory } from '../../../memory/guest-memory.js';
import { Unsupported } from './fault.js';
import { access, type Paging, translate } from './page-walk.js';
import { cr0, cr4, EFER_LMA, EFER_NXE, rflags } from './register-bits.js';

const PAGE = 4096;

/** Guest memory by linear address: translated and checked by the guest's own page tables. All of an access, or none. */
export class LinearMemory {
  readonly #memory: GuestMemory;
  readonly #paging: Paging = {
    levels: 4,
    root: 0,
    writeProtect: true,
    noExecute: true,
    smep: false,
    smap: false,
    physicalBits: 52,
  };

  constructor(memory: GuestMemory) {
    this.#memory = memory;
  }

  /** Takes what decides translation from the registers. @throws Unsupported for the paging of 32-bit kernels. */
  configure(sregs: Sregs, flags: bigint, physicalBits: number): void {
    const paging = this.#paging;
    const control = Number(sregs.cr4 & 0xffff_ffffn);
    const control0 = Number(sregs.cr0 & 0xffff_ffffn);
    const { efer } = sregs;
    if (control0 & cr0.PG) {
      if ((efer & EFER_LMA) === 0n) throw new Unsupported('legacy paging');
      paging.levels = control & cr4.LA57 ? 5 : 4;
    } else paging.levels = 0;
    paging.root = Number(sregs.cr3 & 0xf_ffff_ffff_f000n);
    paging.writeProtect = (control0 & cr0.WP) !== 0;
    paging.noExecute = (efer & EFER_NXE) !== 0n;
    paging.smep = (control & cr4.SMEP) !== 0;
    paging.smap = (control & cr4.SMAP) !== 0 && (flags & rflags.AC) === 0n;
    paging.physicalBits = physicalBits;
  }

  /** Physical address of the code byte at a linear address. */
  fetchable(linear: bigint, user: boolean): number {
    return translate(this.#memory, this.#paging, linear, access.FETCH, user);
  }

  // The range that is being accessed: where it starts on its first page, and the physical addresses of its pages.
  #start = 0;
  readonly #frames: number[] = [];

  /**
   * Raises the fault that an access to the whole range would raise. get() and put() then take offsets from its start and
   * cannot fault, until the next open().
   */
  open(linear: bigint, length: number, kind: number, user: boolean): void {
    this.#start = Number(linear & 0xfffn);
    const count = Math.ceil((this.#start + length) / PAGE);
    this.#frames.length = 0;
    for (let i = 0; i < count; i++) {
      // A fault reports the first byte of the access that is on the page.
      const at = i === 0 ? linear : linear - BigInt(this.#start) + BigInt(i * PAGE);
      const physical = translate(this.#memory, this.#paging, at, kind, user);
      if (!this.#memory.contains(physical, 1)) throw new Unsupported('operand is not in RAM');
      this.#frames.push(physical - (physical % PAGE));
    }
  }

  get(offset: number, into: Uint8Array): void {
    this.#transfer(offset, into, false);
  }

  put(offset: number, data: Uint8Array): void {
    this.#transfer(offset, data, true);
  }

  /** A live view of so many bytes from the start of the range, all on its first page, taken to be written now. */
  slice(length: number): Uint8Array {
    return this.#memory.slice((this.#frames[0] as number) + this.#start, length);
  }

  #transfer(offset: number, data: Uint8Array, write: boolean): void {
    for (let done = 0; done < data.length; ) {
      const from = this.#start + offset + done;
      const length = Math.min(PAGE - (from % PAGE), data.length - done);
      const part = length === data.length ? data : data.subarray(done, done + length);
      const at = (this.#frames[Math.floor(from / PAGE)] as number) + (from % PAGE);
      if (write) this.#memory.write(at, part);
      else this.#memory.read(at, part);
      done += length;
    }
  }
}
