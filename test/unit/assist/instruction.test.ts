import { describe, expect, it } from 'vitest';
import { GuestFault, Unsupported } from '#dist/arch/x86_64/assist/fault.js';
import { Instruction, prefix } from '#dist/arch/x86_64/assist/instruction.js';
import { type Definition, OpcodeTable } from '#dist/arch/x86_64/assist/opcode.js';

// SDM 2A chapter 2.

const run = () => {};
const { NONE, P66, PF2, PF3 } = prefix;
const definitions: Definition[] = [
  { kind: 'plain', map: 0, opcode: 0x9b, run },
  { kind: 'byte', map: 0, opcode: 0xcd, immediate: true, run },
  { kind: 'none', map: 1, opcode: 0xae, prefixes: [NONE], modrm: { reg: 4, form: 'memory' }, run },
  { kind: 'locked', map: 1, opcode: 0xc7, prefixes: [NONE], modrm: { reg: 1, form: 'memory' }, lockable: true, run },
  { kind: 'p66', map: 2, opcode: 0xf6, prefixes: [P66], modrm: {}, run },
  { kind: 'pf3', map: 2, opcode: 0xf6, prefixes: [PF3], modrm: {}, run },
  { kind: 'pf2', map: 2, opcode: 0xf6, prefixes: [PF2], modrm: {}, run },
  { kind: 'vex', vex: true, map: 2, opcode: 0xf2, prefixes: [NONE], modrm: {}, run },
  { kind: 'imm', map: 3, opcode: 0x0f, prefixes: [P66], modrm: {}, immediate: true, run },
];
const table = new OpcodeTable(definitions);

function decode(hex: string, mode = 64): { kind: string | undefined; insn: Instruction } {
  const bytes = Buffer.from(hex.replaceAll(' ', ''), 'hex');
  const insn = new Instruction();
  const entry = insn.decode({ byte: (at) => bytes[at] ?? 0xcc }, mode, table);
  return { kind: entry?.kind, insn };
}

describe('Instruction', () => {
  it('tells mandatory prefixes apart; F2 and F3 win over 66', () => {
    expect(decode('66 0f38f6 c3').kind).toBe('p66');
    expect(decode('f3 0f38f6 c3').kind).toBe('pf3');
    expect(decode('66 f2 0f38f6 c3')).toMatchObject({ kind: 'pf2', insn: { operandSize: 2 } });
    expect(decode('0f38f6 c3').kind).toBeUndefined();
  });

  it('knows groups by ModRM.reg and form', () => {
    expect(decode('0fae 27')).toMatchObject({ kind: 'none', insn: { length: 3, memory: true, base: 7 } });
    expect(decode('0fae 2f').kind).toBeUndefined();
    expect(decode('0fae e7').kind).toBeUndefined();
    expect(decode('66 0fae 27').kind).toBeUndefined();
  });

  it('extends registers by REX, which counts only right before the opcode', () => {
    expect(decode('66 4d 0f38f6 c3').insn).toMatchObject({ reg: 8, rm: 11, rexW: true, operandSize: 8 });
    expect(decode('4d 66 0f38f6 c3').insn).toMatchObject({ reg: 0, rm: 3, rexW: false, operandSize: 2 });
  });

  it('decodes every addressing form', () => {
    const of = (tail: string) => decode(`66 ${tail}`).insn;
    expect(of('0f38f6 40 80')).toMatchObject({ base: 0, index: -1, displacement: -128, length: 6 });
    expect(of('0f38f6 84 88 00010000')).toMatchObject({ base: 0, index: 1, scale: 2, displacement: 0x100, length: 10 });
    expect(of('0f38f6 05 fcffffff')).toMatchObject({ base: -1, ripRelative: true, displacement: -4 });
    expect(of('0f38f6 04 25 78563412')).toMatchObject({
      base: -1,
      index: -1,
      ripRelative: false,
      displacement: 0x12345678,
    });
    expect(of('43 0f38f6 44 25 00')).toMatchObject({ base: 13, index: 12, displacement: 0 });
    expect(of('42 0f38f6 04 25 00000000')).toMatchObject({ base: -1, index: 12 });
    expect(of('41 0f38f6 04 24')).toMatchObject({ base: 12, index: -1 });
  });

  it('takes RSP and RBP for stack accesses, R12 and R13 not', () => {
    const segment = (hex: string) => decode(hex).insn.segment;
    expect([segment('66 0f38f6 04 24'), segment('66 0f38f6 45 00')]).toEqual(['ss', 'ss']);
    expect([segment('66 41 0f38f6 04 24'), segment('66 41 0f38f6 45 00')]).toEqual(['ds', 'ds']);
    expect([segment('64 66 0f38f6 04 24'), segment('3e 66 0f38f6 04 24')]).toEqual(['fs', 'ss']);
    expect(segment('64 2e 66 0f38f6 00')).toBe('fs');
  });

  it('decodes VEX, and refuses the prefixes that may not stand before it', () => {
    expect(decode('c4 c2 e0 f2 c0')).toMatchObject({
      kind: 'vex',
      insn: { reg: 0, rm: 8, vvvv: 3, rexW: true, length: 5 },
    });
    for (const before of ['66', 'f2', 'f3', 'f0', '48']) {
      expect(() => decode(`${before} c4 c2 e0 f2 c0`), before).toThrow(GuestFault);
    }
  });

  it('allows LOCK only where the definition does', () => {
    expect(decode('f0 48 0fc7 0f').kind).toBe('locked');
    expect(() => decode('f0 0fae 27')).toThrow(GuestFault);
    expect(() => decode('f0 9b')).toThrow(GuestFault);
  });

  it('counts immediates into the length', () => {
    expect(decode('cd 80').insn).toMatchObject({ immediate: 0x80, length: 2 });
    expect(decode('66 0f3a0f 05 00000000 07').insn).toMatchObject({ immediate: 7, length: 10 });
  });

  it('follows the code size', () => {
    expect(decode('0fae 27', 32).insn).toMatchObject({ addressSize: 4, operandSize: 4 });
    expect(decode('0fae 25 78563412', 32).insn).toMatchObject({ ripRelative: false, displacement: 0x12345678 });
    expect(decode('67 0fae 27').insn.addressSize).toBe(4);
    expect(() => decode('67 0fae 27', 32)).toThrow(Unsupported);
    expect(decode('48', 32).kind).toBeUndefined();
  });
});
