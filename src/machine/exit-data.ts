import type { Bus } from '../bus/bus.js';
import { KVM_EXIT_IO_IN, kvm_run } from '../kvm/generated/abi.js';

/** Completes KVM_EXIT_IO and KVM_EXIT_MMIO on kvm_run (KVM API, section 5). Allocates nothing. */
export class ExitData {
  readonly #view: DataView;
  readonly #bytes: Uint8Array;
  /** One scratch buffer for each width of a string access. */
  readonly #scratch = [1, 2, 4].map((size) => new Uint8Array(size));
  /** Views of the port data of a single access, where KVM puts it: at one offset, made when it is first seen. */
  #portOffset = -1;
  #port: Uint8Array[] = [];
  readonly #mmio: Uint8Array[];

  constructor(run: ArrayBuffer) {
    this.#view = new DataView(run);
    this.#bytes = new Uint8Array(run);
    this.#mmio = Array.from({ length: 9 }, (_, length) => new Uint8Array(run, kvm_run.mmio_data, length));
  }

  portAccess(bus: Bus): void {
    const view = this.#view;
    const size = view.getUint8(kvm_run.io_size);
    const port = view.getUint16(kvm_run.io_port, true);
    const isRead = view.getUint8(kvm_run.io_direction) === KVM_EXIT_IO_IN;
    const count = view.getUint32(kvm_run.io_count, true);
    const offset = view.getUint32(kvm_run.io_data_offset, true);
    if (count === 1) {
      if (offset !== this.#portOffset) this.#makePortViews(offset);
      const data = this.#port[size] as Uint8Array;
      if (isRead) bus.read(port, data);
      else bus.write(port, data);
      return;
    }
    // rep ins/outs: `count` accesses of the same port, in order.
    const data = this.#scratch[size >> 1] as Uint8Array;
    for (let at = offset; at < offset + count * size; at += size) {
      if (isRead) {
        bus.read(port, data);
        for (let i = 0; i < size; i++) this.#bytes[at + i] = data[i] as number;
      } else {
        for (let i = 0; i < size; i++) data[i] = this.#bytes[at + i] as number;
        bus.write(port, data);
      }
    }
  }

  mmioAccess(bus: Bus): void {
    const view = this.#view;
    const low = view.getUint32(kvm_run.mmio_phys_addr, true);
    const address = view.getUint32(kvm_run.mmio_phys_addr + 4, true) * 2 ** 32 + low;
    const data = this.#mmio[view.getUint32(kvm_run.mmio_len, true)] as Uint8Array;
    if (view.getUint8(kvm_run.mmio_is_write) === 0) bus.read(address, data);
    else bus.write(address, data);
  }

  #makePortViews(offset: number): void {
    this.#portOffset = offset;
    this.#port = [];
    for (const size of [1, 2, 4]) this.#port[size] = this.#bytes.subarray(offset, offset + size);
  }
}
