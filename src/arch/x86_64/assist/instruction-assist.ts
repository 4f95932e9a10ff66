import type { VcpuFd } from '../../../kvm/vcpu.js';
import { type GuestMemory, GuestMemoryRangeError } from '../../../memory/guest-memory.js';
import { bitInstructions } from './bits.js';
import { GuestCpu } from './cpu.js';
import { descriptorInstructions } from './descriptors.js';
import { disassemble } from './disassemble.js';
import { GuestFault, Unsupported } from './fault.js';
import { Instruction } from './instruction.js';
import { interrupts } from './interrupts.js';
import { type Entry, OpcodeTable } from './opcode.js';
import { simpleInstructions } from './simple.js';
import { sseInstructions } from './sse.js';
import { sseMoves } from './sse-moves.js';
import { systemInstructions } from './system.js';
import { x87Instructions } from './x87.js';
import { xsaveFamily } from './xsave.js';

const table = new OpcodeTable([
  ...interrupts,
  ...xsaveFamily,
  ...systemInstructions,
  ...descriptorInstructions,
  ...bitInstructions,
  ...x87Instructions,
  ...sseMoves,
  ...sseInstructions,
  ...simpleInstructions,
]);

/**
 * Completes the instructions that KVM's emulator leaves (KVM_EXIT_INTERNAL_ERROR with
 * KVM_INTERNAL_ERROR_EMULATION), as the CPU would have executed them. For a host whose KVM interprets guest kernel mode.
 */
export class InstructionAssist {
  readonly #cpu: GuestCpu;
  readonly #instruction = new Instruction();

  /** The vCPU's registers must have been loaded (VcpuFd.loadRegisters) when its methods are called. */
  constructor(vcpu: VcpuFd, memory: GuestMemory) {
    this.#cpu = new GuestCpu(vcpu, memory);
  }

  /**
   * Completes the instruction at RIP on the vCPU's state, or injects the exception it raises. Call at an exit: registers
   * are taken from kvm_run and left there for the next KVM_RUN.
   * @returns its kind for statistics, or undefined if it is none that can be completed: then nothing has changed.
   */
  complete(): string | undefined {
    const cpu = this.#cpu;
    let entry: Entry | undefined;
    try {
      cpu.begin();
      entry = this.#instruction.decode(cpu.code, cpu.mode, table);
      if (!entry) return undefined;
      entry.run(cpu, this.#instruction);
      cpu.retire(this.#instruction.length);
      return entry.kind;
    } catch (error) {
      if (error instanceof GuestFault) {
        cpu.raise(error);
        return entry?.kind ?? 'fault';
      }
      if (error instanceof Unsupported || error instanceof GuestMemoryRangeError) return undefined;
      throw error;
    }
  }

  /**
   * Where the guest is and what stands there, for the error that ends the machine.
   * @returns text is one line: `0xffffffff81000000: c5 ec 58 cb (vaddps ymm1,ymm2,ymm3)`.
   */
  describe(): { rip: bigint; bytes: Uint8Array; text: string } {
    const cpu = this.#cpu;
    const { rip } = cpu.regs;
    let bytes: Uint8Array = new Uint8Array();
    try {
      cpu.begin();
      bytes = cpu.code.available();
    } catch (error) {
      if (!(error instanceof Unsupported)) throw error;
    }
    const at = `0x${rip.toString(16)}`;
    if (bytes.length === 0) return { rip, bytes, text: `${at}: bytes cannot be read` };
    const { text, length } = disassemble(bytes, cpu.mode, rip);
    bytes = bytes.subarray(0, length);
    const hex = Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0')).join(' ');
    return { rip, bytes, text: `${at}: ${hex} (${text})` };
  }
}
