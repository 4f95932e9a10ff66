import type { GuestCpu } from './cpu.js';
import type { Instruction } from './instruction.js';

/** What is needed of the ModRM byte: nothing more than its presence, or a group's number and form. */
export interface ModRm {
  /** ModRM.reg as an opcode extension, 0 to 7. */
  readonly reg?: number;
  readonly form?: 'memory' | 'register';
  /** The exact byte, as in 0F 01 D0. */
  readonly exactly?: number;
}

/** An instruction that the assist completes: how it is recognised, and what it does. */
export interface Definition {
  /** Its name in statistics. */
  readonly kind: string;
  readonly vex?: boolean;
  /** 0 one-byte opcodes, 1 after 0F, 2 after 0F 38, 3 after 0F 3A. */
  readonly map: 0 | 1 | 2 | 3;
  /** The mandatory prefixes (of `prefix`) with which it is this instruction. All four where left out. */
  readonly prefixes?: readonly number[];
  readonly opcode: number;
  readonly modrm?: ModRm;
  /** Whether an immediate byte follows. */
  readonly immediate?: boolean;
  /** Whether LOCK may stand before its memory form. */
  readonly lockable?: boolean;
  /**
   * Does it. What can fault comes before what changes: a GuestFault leaves registers and memory as they were.
   * RIP is still at the instruction and is advanced after it.
   */
  readonly run: (cpu: GuestCpu, insn: Instruction) => void;
}

/** A definition, ready to be looked up. */
export class Entry {
  readonly kind: string;
  readonly modrm: boolean;
  readonly immediate: boolean;
  readonly lockable: boolean;
  readonly run: Definition['run'];
  readonly #modrm: ModRm;

  constructor(definition: Definition) {
    this.kind = definition.kind;
    this.modrm = definition.modrm !== undefined;
    this.immediate = definition.immediate ?? false;
    this.lockable = definition.lockable ?? false;
    this.run = definition.run;
    this.#modrm = definition.modrm ?? {};
  }

  matches(insn: Instruction): boolean {
    const { reg, form, exactly } = this.#modrm;
    if (exactly !== undefined && exactly !== insn.modrm) return false;
    if (reg !== undefined && reg !== (insn.reg & 7)) return false;
    return form === undefined || (form === 'memory') === insn.memory;
  }
}

const key = (vex: boolean, map: number, mandatory: number, opcode: number) =>
  (vex ? 0x10000 : 0) | (map << 10) | (mandatory << 8) | opcode;

/** Definitions by opcode. Those that share an opcode all have a ModRM byte, or none has, and the same immediate. */
export class OpcodeTable {
  readonly #entries = new Map<number, Entry[]>();

  constructor(definitions: readonly Definition[]) {
    for (const definition of definitions) {
      const entry = new Entry(definition);
      for (const mandatory of definition.prefixes ?? [0, 1, 2, 3]) {
        const at = key(definition.vex ?? false, definition.map, mandatory, definition.opcode);
        const there = this.#entries.get(at);
        if (there) there.push(entry);
        else this.#entries.set(at, [entry]);
      }
    }
  }

  find(vex: boolean, map: number, mandatory: number, opcode: number): readonly Entry[] | undefined {
    return this.#entries.get(key(vex, map, mandatory, opcode));
  }
}
