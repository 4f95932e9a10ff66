import { cr0, type GuestCpu } from './cpu.js';
import { GuestFault, undefinedOpcode, vector } from './fault.js';
import type { Instruction } from './instruction.js';
import type { Definition } from './opcode.js';

const FSW_ES = 0x80;
/** In an error code: it names a gate of the IDT (SDM 3A 6.13). */
const IDT = 2;

/** INT n (SDM 2A): the privilege check that only software interrupts get, then delivery as a trap. */
function software(cpu: GuestCpu, number: number): void {
  cpu.requireGate(number, number * 8 + IDT);
  cpu.afterRetire(() => cpu.injectSoftware(number));
}

/** INT1 (SDM 2A, INT n): a trap that no gate's DPL can refuse. */
const int1 = (cpu: GuestCpu) => cpu.afterRetire(() => cpu.inject(vector.DB));

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
