import type { GuestCpu } from './cpu.js';
import { injectException, injectInterrupt } from './events.js';
import { GuestFault, generalProtection, Unsupported, undefinedOpcode, vector } from './fault.js';
import type { Instruction } from './instruction.js';
import type { Definition } from './opcode.js';
import { cr0 } from './register-bits.js';

const FSW_ES = 0x80;
/** In an error code: it names a gate of the IDT (SDM 3A 6.13). */
const IDT = 2;

const GATE_BYTES = 16;

/** The gate of a software interrupt must exist and be open to this privilege level (SDM 3A 6.12.1.2). */
function requireGate(cpu: GuestCpu, number: number): void {
  if (cpu.mode !== 64) throw new Unsupported('software interrupt outside 64-bit mode');
  const errorCode = number * 8 + IDT;
  const { base, limit } = cpu.sregs.table('idt');
  if ((number + 1) * GATE_BYTES - 1 > limit) throw generalProtection(errorCode);
  const gate = new Uint8Array(GATE_BYTES);
  cpu.readImplicit(base + BigInt(number * GATE_BYTES), gate);
  const attributes = gate[5] as number;
  const type = attributes & 0x1f;
  if (type !== 14 && type !== 15) throw generalProtection(errorCode);
  if (((attributes >> 5) & 3) < cpu.cpl) throw generalProtection(errorCode);
  if (!(attributes & 0x80)) throw new GuestFault(vector.NP, errorCode);
}

/** INT n and INT3 (SDM 2A): the privilege check that only software interrupts get, then delivery as a trap. */
function software(cpu: GuestCpu, number: number): void {
  requireGate(cpu, number);
  cpu.afterRetire(() => injectInterrupt(cpu.vcpu, number));
}

/** INT1 (SDM 2A, INT n): a trap that no gate's DPL can refuse. */
const int1 = (cpu: GuestCpu) => cpu.afterRetire(() => injectException(cpu.vcpu, vector.DB));

/** FWAIT (SDM 2D): reports a pending x87 error. */
function fwait(cpu: GuestCpu): void {
  if (cpu.cr0 & cr0.MP && cpu.cr0 & cr0.TS) throw new GuestFault(vector.NM);
  cpu.state.load();
  if (cpu.state.statusWord & FSW_ES && cpu.cr0 & cr0.NE) throw new GuestFault(vector.MF);
}

const undefinedInstruction = () => {
  throw undefinedOpcode();
};

export const interrupts: readonly Definition[] = [
  { kind: 'int3', map: 0, opcode: 0xcc, run: (cpu) => software(cpu, vector.BP) },
  {
    kind: 'int',
    map: 0,
    opcode: 0xcd,
    immediate: true,
    run: (cpu, insn: Instruction) => software(cpu, insn.immediate),
  },
  { kind: 'int1', map: 0, opcode: 0xf1, run: int1 },
  { kind: 'fwait', map: 0, opcode: 0x9b, run: fwait },
  { kind: 'ud2', map: 1, opcode: 0x0b, run: undefinedInstruction },
  { kind: 'ud1', map: 1, opcode: 0xb9, modrm: {}, run: undefinedInstruction },
  { kind: 'ud0', map: 1, opcode: 0xff, modrm: {}, run: undefinedInstruction },
];
