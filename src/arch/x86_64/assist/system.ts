import { addon } from '../../../kvm/addon.js';
import type { GuestCpu } from './cpu.js';
import { generalProtection, Unsupported, undefinedOpcode } from './fault.js';
import { PKRU } from './guest-cpuid.js';
import { type Instruction, prefix } from './instruction.js';
import type { Definition } from './opcode.js';
import { access } from './page-walk.js';
import { cr4, rflags } from './register-bits.js';
import { SSE } from './xstate.js';

const IA32_TSC = 0x10;
const IA32_TSC_AUX = 0xc000_0103;
/** CPUID.(7,0):EBX */
const FEATURE_SMAP = 1 << 20;

/** STAC and CLAC (SDM 2B, 2A). */
function setAc(value: bigint): (cpu: GuestCpu) => void {
  return (cpu) => {
    if (cpu.cpl !== 0 || !(cpu.state.cpuid.features7 & FEATURE_SMAP)) throw undefinedOpcode();
    cpu.setFlags(rflags.AC, value);
  };
}

/** RDTSCP (SDM 2B). */
function rdtscp(cpu: GuestCpu): void {
  if (cpu.cr4 & cr4.TSD && cpu.cpl !== 0) throw generalProtection();
  const tsc = cpu.vcpu.getMsr(IA32_TSC) ?? 0n;
  cpu.setGpr(1, 4, cpu.vcpu.getMsr(IA32_TSC_AUX) ?? 0n);
  cpu.setGpr(0, 4, tsc);
  cpu.setGpr(2, 4, tsc >> 32n);
}

/** RDPID (SDM 2B). */
function rdpid(cpu: GuestCpu, insn: Instruction): void {
  cpu.setGpr(insn.rm, cpu.mode === 64 ? 8 : 4, BigInt.asUintN(32, cpu.vcpu.getMsr(IA32_TSC_AUX) ?? 0n));
}

/**
 * INVPCID (SDM 2A). Whatever the type, everything is flushed: more than was asked, which is always allowed. KVM flushes
 * when control registers change, so CR4 is set to something else and back.
 */
function invpcid(cpu: GuestCpu, insn: Instruction): void {
  cpu.requireCpl0();
  const size = cpu.mode === 64 ? 8 : 4;
  const type = cpu.gpr(insn.reg, size);
  const bytes = new Uint8Array(16);
  cpu.readMemory(insn, bytes);
  const view = new DataView(bytes.buffer);
  const pcid = view.getBigUint64(0, true);
  const address = view.getBigUint64(8, true);
  if (type > 3n) throw generalProtection();
  if (pcid >> 12n) throw generalProtection();
  if (type <= 1n && pcid !== 0n && !(cpu.cr4 & cr4.PCIDE)) throw generalProtection();
  if (type === 0n && BigInt.asUintN(64, BigInt.asIntN(cpu.cr4 & cr4.LA57 ? 57 : 48, address)) !== address) {
    throw generalProtection();
  }
  cpu.flushTlb();
}

/** LDMXCSR (SDM 2A). */
function ldmxcsr(cpu: GuestCpu, insn: Instruction): void {
  cpu.requireSse();
  const value = Number(cpu.readMemoryNumber(insn, 4));
  const { state } = cpu;
  state.load();
  if (value & ~state.mxcsrMask) throw generalProtection();
  state.mxcsr = value;
  state.xstateBv |= SSE;
  state.store();
}

/** STMXCSR (SDM 2B). */
function stmxcsr(cpu: GuestCpu, insn: Instruction): void {
  cpu.requireSse();
  cpu.state.load();
  cpu.writeMemoryNumber(insn, 4, BigInt(cpu.state.mxcsr));
}

/** Where PKRU is in the extended state. @throws GuestFault #UD without CR4.PKE. */
function pkruOffset(cpu: GuestCpu): number {
  const found = cpu.state.cpuid.components.find((component) => component.number === PKRU);
  if (!(cpu.cr4 & cr4.PKE) || !found) throw undefinedOpcode();
  if (cpu.regs.gpr(1) & 0xffff_ffffn) throw generalProtection();
  return found.offset;
}

/** RDPKRU (SDM 2B). */
function rdpkru(cpu: GuestCpu): void {
  const at = pkruOffset(cpu);
  cpu.state.load();
  cpu.setGpr(0, 4, BigInt(cpu.state.view.getUint32(at, true)));
  cpu.setGpr(2, 4, 0n);
}

/** WRPKRU (SDM 2D). */
function wrpkru(cpu: GuestCpu): void {
  const at = pkruOffset(cpu);
  if (cpu.regs.gpr(2) & 0xffff_ffffn) throw generalProtection();
  cpu.state.load();
  cpu.state.view.setUint32(at, Number(cpu.regs.gpr(0) & 0xffff_ffffn), true);
  cpu.state.xstateBv |= 1n << BigInt(PKRU);
  cpu.state.store();
}

/** CLWB (SDM 2A): host caches are not the guest's to write back; only the address is checked. */
function clwb(cpu: GuestCpu, insn: Instruction): void {
  cpu.readMemoryNumber(insn, 1);
}

/** RDSSP (SDM 2B) is a no-operation while shadow stacks are off, and KVM offers an interpreted guest none. */
const nothing = () => {};

/** CMPXCHG8B's 16-byte form, CMPXCHG16B (SDM 2A). */
function cmpxchg16b(cpu: GuestCpu, insn: Instruction): void {
  const linear = cpu.linearAddress(insn, 16, true);
  if (linear & 15n) throw generalProtection();
  cpu.open(linear, 16, access.WRITE); // it always writes, so a read-only page faults either way
  const { regs } = cpu;
  const words = BigUint64Array.of(regs.gpr(0), regs.gpr(2), regs.gpr(3), regs.gpr(1));
  const equal = addon.compareExchange16(cpu.memory.slice(16), words);
  if (!equal) {
    regs.setGpr(0, words[0] as bigint);
    regs.setGpr(2, words[1] as bigint);
  }
  cpu.setFlags(rflags.ZF, equal ? rflags.ZF : 0n);
}

const { NONE, P66, PF3 } = prefix;
const system = (exactly: number) => ({ map: 1, opcode: 0x01, prefixes: [NONE], modrm: { exactly } }) as const;

export const systemInstructions: readonly Definition[] = [
  { kind: 'clac', ...system(0xca), run: setAc(0n) },
  { kind: 'stac', ...system(0xcb), run: setAc(rflags.AC) },
  { kind: 'rdpkru', ...system(0xee), run: rdpkru },
  { kind: 'wrpkru', ...system(0xef), run: wrpkru },
  { kind: 'rdtscp', map: 1, opcode: 0x01, modrm: { exactly: 0xf9 }, run: rdtscp },
  { kind: 'rdpid', map: 1, opcode: 0xc7, prefixes: [PF3], modrm: { reg: 7, form: 'register' }, run: rdpid },
  { kind: 'invpcid', map: 2, opcode: 0x82, prefixes: [P66], modrm: { form: 'memory' }, run: invpcid },
  { kind: 'ldmxcsr', map: 1, opcode: 0xae, prefixes: [NONE], modrm: { reg: 2, form: 'memory' }, run: ldmxcsr },
  { kind: 'stmxcsr', map: 1, opcode: 0xae, prefixes: [NONE], modrm: { reg: 3, form: 'memory' }, run: stmxcsr },
  { kind: 'clwb', map: 1, opcode: 0xae, prefixes: [P66], modrm: { reg: 6, form: 'memory' }, run: clwb },
  { kind: 'rdssp', map: 1, opcode: 0x1e, prefixes: [PF3], modrm: { reg: 1, form: 'register' }, run: nothing },
  {
    kind: 'cmpxchg16b',
    map: 1,
    opcode: 0xc7,
    prefixes: [NONE, P66, PF3, prefix.PF2],
    modrm: { reg: 1, form: 'memory' },
    lockable: true,
    run: (cpu, insn) => {
      if (!insn.rexW) throw new Unsupported();
      cmpxchg16b(cpu, insn);
    },
  },
];
