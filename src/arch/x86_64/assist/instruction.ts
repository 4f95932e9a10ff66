import type { SegmentName } from '../../../kvm/registers.js';
import { Unsupported, undefinedOpcode } from './fault.js';
import type { Entry, OpcodeTable } from './opcode.js';

/** The mandatory prefix that selects an instruction (SDM 2A 2.1.2); F2 and F3 win over 66. */
export const prefix = { NONE: 0, P66: 1, PF3: 2, PF2: 3 } as const;

const SEGMENTS: Record<number, SegmentName> = { 38: 'es', 46: 'cs', 54: 'ss', 62: 'ds', 100: 'fs', 101: 'gs' };
const RSP = 4;
const RBP = 5;

/** Where the bytes of an instruction come from. */
export interface CodeSource {
  /** The byte at this distance from RIP. @throws GuestFault when it cannot be fetched. */
  byte(offset: number): number;
}

/**
 * One decoded instruction (SDM 2A chapter 2). The object is decoded into again and again: a completion allocates none.
 * Register numbers include their REX or VEX extension.
 */
export class Instruction {
  /** In bytes. */
  length = 0;
  /** One of `prefix`. */
  mandatory = 0;
  /** 0 one-byte opcodes, 1 after 0F, 2 after 0F 38, 3 after 0F 3A. */
  map = 0;
  opcode = 0;
  lock = false;
  rexW = false;
  /** Whether a REX prefix makes byte registers 4 to 7 SPL to DIL instead of AH to BH. */
  rex = false;
  /** 8 where REX.B extends a register in the opcode, else 0. */
  rexB = 0;
  /** Operand size in bytes: 2, 4 or 8. */
  operandSize = 4;
  /** Address size in bytes: 2, 4 or 8. */
  addressSize = 8;
  vex = false;
  /** VEX.vvvv: the extra source register. */
  vvvv = 0;
  vexL = 0;

  modrm = 0;
  reg = 0;
  /** The register in ModRM.rm when `memory` is false. */
  rm = 0;
  /** Whether ModRM names memory, described by the fields after it. */
  memory = false;
  segment: SegmentName = 'ds';
  /** Register number, or -1. */
  base = -1;
  index = -1;
  scale = 0;
  displacement = 0;
  ripRelative = false;
  /** The immediate byte, where the instruction has one. */
  immediate = 0;

  #rex = 0;
  #override: SegmentName | undefined;
  #operand66 = false;
  #in64 = false;

  /**
   * Decodes what the table knows.
   * @param mode code size in bits. @returns undefined for an opcode that is not in the table.
   */
  decode(code: CodeSource, mode: number, table: OpcodeTable): Entry | undefined {
    this.#in64 = mode === 64;
    this.memory = false;
    let at = this.#prefixes(code, mode);
    at = this.#opcode(code, at, mode);
    const candidates = table.find(this.vex, this.map, this.mandatory, this.opcode);
    const first = candidates?.[0];
    if (!first) return undefined;
    if (first.modrm) at = this.#modrm(code, at);
    if (first.immediate) this.immediate = code.byte(at++);
    this.length = at;
    const entry = candidates.find((e) => e.matches(this));
    if (entry && this.lock && !(entry.lockable && this.memory)) throw undefinedOpcode();
    return entry;
  }

  #prefixes(code: CodeSource, mode: number): number {
    let at = 0;
    let operand66 = false;
    let address67 = false;
    let repeat = 0;
    this.lock = false;
    this.#rex = 0;
    this.#override = undefined;
    for (; ; at++) {
      const byte = code.byte(at);
      if (byte === 0x66) operand66 = true;
      else if (byte === 0x67) address67 = true;
      else if (byte === 0xf0) this.lock = true;
      else if (byte === 0xf2 || byte === 0xf3) repeat = byte;
      else if (SEGMENTS[byte]) this.#segmentOverride(byte, mode);
      else if (mode === 64 && byte >> 4 === 4) {
        this.#rex = byte;
        continue; // counts only right before the opcode
      } else break;
      this.#rex = 0;
    }
    this.mandatory = repeat === 0xf3 ? prefix.PF3 : repeat === 0xf2 ? prefix.PF2 : operand66 ? prefix.P66 : prefix.NONE;
    this.rex = this.#rex !== 0;
    this.rexB = (this.#rex & 1) << 3;
    this.rexW = (this.#rex & 8) !== 0;
    this.#operand66 = operand66;
    const wide = mode === 16 ? operand66 : !operand66;
    this.operandSize = this.rexW ? 8 : wide ? 4 : 2;
    if (mode === 64) this.addressSize = address67 ? 4 : 8;
    else this.addressSize = (mode === 32) === address67 ? 2 : 4;
    return at;
  }

  /** ES, CS, SS and DS overrides mean nothing in 64-bit mode (SDM 2A 2.2.1.2), not even to an FS or GS one before. */
  #segmentOverride(byte: number, mode: number): void {
    if (mode === 64 && byte < 100) return;
    this.#override = SEGMENTS[byte];
  }

  #opcode(code: CodeSource, start: number, mode: number): number {
    let at = start;
    const byte = code.byte(at++);
    this.vex = false;
    this.vvvv = 0;
    this.vexL = 0;
    this.map = 0;
    this.opcode = byte;
    if (byte === 0x0f) {
      const second = code.byte(at++);
      this.map = second === 0x38 ? 2 : second === 0x3a ? 3 : 1;
      this.opcode = this.map === 1 ? second : code.byte(at++);
    } else if ((byte === 0xc4 || byte === 0xc5) && (mode === 64 || code.byte(at) >> 6 === 3)) {
      at = this.#vex(code, at, byte === 0xc4, mode);
    }
    return at;
  }

  /** SDM 2A 2.3.5. */
  #vex(code: CodeSource, start: number, three: boolean, mode: number): number {
    let at = start;
    const inverted = code.byte(at++) ^ 0xff;
    let last = inverted ^ 0xff;
    if (this.lock || this.#rex || this.mandatory || this.#operand66) throw undefinedOpcode();
    this.#rex = 0x40 | ((inverted >> 5) & 4); // R
    this.map = 1;
    if (three) {
      this.#rex |= (inverted >> 5) & 3; // X and B
      this.map = last & 31;
      last = code.byte(at++);
      if (last & 0x80) this.#rex |= 8;
    }
    if (mode !== 64) this.#rex = 0;
    this.rexW = (this.#rex & 8) !== 0;
    this.operandSize = this.rexW ? 8 : 4;
    this.vvvv = (~last >> 3) & (mode === 64 ? 15 : 7);
    this.vexL = (last >> 2) & 1;
    this.mandatory = [prefix.NONE, prefix.P66, prefix.PF3, prefix.PF2][last & 3] as number;
    this.vex = true;
    this.opcode = code.byte(at++);
    return at;
  }

  #modrm(code: CodeSource, start: number): number {
    let at = start;
    const modrm = code.byte(at++);
    const mod = modrm >> 6;
    this.modrm = modrm;
    this.reg = ((modrm >> 3) & 7) | ((this.#rex & 4) << 1);
    this.memory = mod !== 3;
    if (mod === 3) {
      this.rm = (modrm & 7) | ((this.#rex & 1) << 3);
      return at;
    }
    if (this.addressSize === 2) throw new Unsupported('16-bit addressing');
    this.base = (modrm & 7) | ((this.#rex & 1) << 3);
    this.index = -1;
    this.scale = 0;
    this.ripRelative = false;
    let wide = mod === 2;
    if ((modrm & 7) === RSP) {
      const sib = code.byte(at++);
      this.scale = sib >> 6;
      this.index = ((sib >> 3) & 7) | ((this.#rex & 2) << 2);
      if (this.index === RSP) this.index = -1;
      this.base = (sib & 7) | ((this.#rex & 1) << 3);
      if (mod === 0 && (sib & 7) === RBP) {
        this.base = -1;
        wide = true;
      }
    } else if (mod === 0 && (modrm & 7) === RBP) {
      this.base = -1;
      this.ripRelative = this.#in64;
      wide = true;
    }
    this.segment = this.#override ?? (this.base === RSP || this.base === RBP ? 'ss' : 'ds');
    this.displacement = 0;
    if (wide) {
      this.displacement =
        code.byte(at) | (code.byte(at + 1) << 8) | (code.byte(at + 2) << 16) | (code.byte(at + 3) << 24);
      at += 4;
    } else if (mod === 1) this.displacement = (code.byte(at++) << 24) >> 24;
    return at;
  }
}
