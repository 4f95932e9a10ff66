import { closeSync, ftruncateSync, openSync } from 'node:fs';
import { join } from 'node:path';
import { MessageChannel } from 'node:worker_threads';
import type { VcpuFd } from '#dist/kvm/vcpu.js';
import { resolveConfig } from '#dist/machine/config.js';
import { ConsoleTail } from '#dist/machine/console-tail.js';
import { dirtyExtents } from '#dist/machine/dirty-extents.js';
import { Timer } from '#dist/machine/fd-events.js';
import type { MemoryLayer } from '#dist/machine/guest-ram.js';
import { HostServices } from '#dist/machine/host-services.js';
import { RunLoop } from '#dist/machine/run-loop.js';
import { UserDevices } from '#dist/machine/user-devices/user-devices.js';
import { type SavedState, VirtualMachine } from '#dist/machine/virtual-machine.js';
import type { Json } from './folder.js';

/** A port whose writes of 4 bytes are noted. */
export const OUT_PORT = 0x500;

/** A machine that was saved. */
export interface Saved {
  readonly state: SavedState;
  readonly layers: readonly MemoryLayer[];
}

/** A machine on the test's own thread: it runs for as long as the test says, and all of its vCPU can be set and asked. */
export class Rig implements Disposable {
  readonly machine: VirtualMachine;
  /** What the guest wrote to OUT_PORT and nobody took yet. */
  readonly out: number[] = [];
  readonly #loop: RunLoop;
  readonly #host: HostServices;
  readonly #devices: UserDevices;
  readonly #timer: Timer;

  private constructor(loop: RunLoop, host: HostServices, devices: UserDevices, machine: VirtualMachine) {
    this.#loop = loop;
    this.#host = host;
    this.#devices = devices;
    this.machine = machine;
    const write = (_: number, data: Uint8Array) => {
      this.out.push(new DataView(data.buffer, data.byteOffset).getUint32(0, true));
    };
    machine.ports.add(OUT_PORT, 4, { name: 'out', read: () => {}, write });
    this.#timer = new Timer(host.events, () => host.finish({ reason: 'stopped', code: null, message: '' }));
  }

  /** Powers a guest program on, or a machine that was saved; without ACPI, and so without a new VM generation ID. */
  static async create(kernel: string, memory: number, saved?: Saved): Promise<Rig> {
    const config = resolveConfig({ kernel, memory, serial: false, acpi: 'off' });
    const { buffer: consoleTail } = new ConsoleTail();
    const { port1: port } = new MessageChannel();
    const data = {
      config,
      port,
      doorbell: -1,
      firstRequest: 0,
      serial: -1,
      consolePorts: [],
      networks: [],
      vsock: undefined,
      logs: false,
    };
    const loop = new RunLoop(false);
    const host = new HostServices(loop, { ...data, consoleTail, origin: undefined }, () => {});
    const devices = await UserDevices.load(config, host);
    const origin = saved && { layers: saved.layers, machine: JSON.parse(JSON.stringify(saved.state)), track: false };
    const machine = origin
      ? await VirtualMachine.restore(config, host, devices, origin)
      : await VirtualMachine.build(config, host, devices);
    return new Rig(loop, host, devices, machine);
  }

  /** Runs the guest for so many microseconds, or until `done`; then its vCPU is settled. */
  run(microseconds: number, done: () => boolean = () => false): void {
    const until = performance.now() + microseconds / 1000;
    const slice = Math.min(microseconds, 2000);
    do {
      this.#timer.arm(slice);
      this.#host.setRunning(true);
      this.#loop.admit(this.#host);
      while (!this.#host.due) this.#loop.turn(true);
      const { reason, message } = this.#host.end ?? {};
      if (reason !== 'stopped') throw new Error(`${reason}: ${message}`);
      this.#host.clearEnd();
    } while (!done() && performance.now() < until);
    this.#host.setRunning(false);
    if (!this.machine.settle()) throw new Error('the guest ended');
  }

  get vcpu(): VcpuFd {
    return this.machine.vcpus[0] as VcpuFd;
  }

  /** What save() gives of all but the memory. */
  state(): SavedState {
    return this.machine.save(this.#host);
  }

  /** All that is in its memory. */
  get memory(): Buffer {
    return Buffer.concat(this.machine.ram.regions.map(([, { buffer }]) => Buffer.from(buffer)));
  }

  /** Saves it with all of its memory. @param folder for a file. */
  save(folder: string): Saved {
    const state = this.state();
    return { state, layers: [{ fd: this.#saveMemory(folder, undefined), extents: undefined }] };
  }

  /** Saves it with what was written since tracking began, or since the last. @param base of that time. */
  saveDifference(folder: string, base: Saved): Saved {
    const state = this.state();
    const { ram } = this.machine;
    const pages = new Uint8Array(ram.pages);
    ram.takeDirtyPages(pages);
    const extents = dirtyExtents(pages);
    return { state, layers: [...base.layers, { fd: this.#saveMemory(folder, pages), extents }] };
  }

  [Symbol.dispose](): void {
    this.#timer.close();
    this.machine[Symbol.dispose]();
    this.#devices[Symbol.dispose]();
    this.#host[Symbol.dispose]();
    this.#loop[Symbol.dispose]();
  }

  #saveMemory(folder: string, pages: Uint8Array | undefined): number {
    const { ram } = this.machine;
    const fd = openSync(join(folder, `memory${memories++}`), 'wx+');
    ftruncateSync(fd, ram.memory.size);
    const written = ram.save(fd, pages);
    if (written < 0) throw new Error(`saving memory: ${written}`);
    return fd;
  }
}
let memories = 0;

/** Closes the files of a saved machine; mappings outlive them. */
export function closeLayers({ layers }: Saved): void {
  for (const { fd } of layers) closeSync(fd);
}

/** What of a state goes on with the time, or with the host's: left out where states are compared. */
export function timeless({ vcpus, pit, clock: _, ...rest }: SavedState): Json {
  const CURRENT_COUNT = 0x390;
  return {
    ...rest,
    vcpus: vcpus.map(({ msrs, lapic, ...vcpu }) => {
      const registers = Buffer.from(lapic, 'base64');
      registers.writeUInt32LE(0, CURRENT_COUNT);
      return { ...vcpu, lapic: registers.toString('base64'), msrs: msrs.filter(({ index }) => !OF_TIME.has(index)) };
    }),
    pit: pitWithoutTime(pit),
  };
}

/** IA32_TSC, and the clocks of KVM and Hyper-V (HV_X64_MSR_TIME_REF_COUNT, …VP_RUNTIME). */
const OF_TIME = new Set([0x10, 0x4000_0020, 0x4000_0010]);

/**
 * Three channels of 24 bytes, each with the time of its last loading in the last 8, and a count at 4 that is of that time
 * and counts only where byte 6 says so; nothing before the guest used it.
 */
export function pitWithoutTime(pit: string): string {
  const bytes = Buffer.from(pit, 'base64');
  if (bytes.length === 0) return '';
  for (let channel = 0; channel < 3; channel++) {
    bytes.writeBigUInt64LE(0n, 24 * channel + 16);
    if (bytes[24 * channel + 6] === 0) bytes.writeUInt16LE(0, 24 * channel + 4);
  }
  return bytes.toString('base64');
}
