import { ALL_FLAGS, type RandomCase, type Spec } from './case.js';
import { type Result, WINDOW } from './executor.js';

const RF = 0x1_0000n;
const UNDEFINED_OPCODE = 6;
const GENERAL_PROTECTION = 13;
const USER = 4;

/** How two runs are allowed to differ. */
export interface Tolerance {
  /** Flags that are compared. */
  readonly flags: bigint;
  /** Of the XSAVE area, bytes that are not compared: [from, to). */
  readonly ignore?: readonly (readonly [number, number])[];
  /** Which byte of the page is reported is the CPU's choice: true for large operands. */
  readonly cr2Page?: boolean;
  /** The second run was in kernel mode: its page faults report a supervisor access. */
  readonly kernel: boolean;
  /**
   * The host's KVM answers #GP of user mode with #UD when its emulator does not know the instruction: the #GP that ought
   * to be there is then checked against the manual by tests of their own.
   */
  readonly faultsAsUndefined: boolean;
  /** Bits of EDX:EAX that only the native run may have. */
  readonly hostBits: bigint;
}

export function toleranceFor(spec: Spec, kernel: boolean, faultsAsUndefined: boolean): Tolerance {
  const hostBits = spec.hostBits ?? 0n;
  return { flags: ~ALL_FLAGS | (spec.flags ?? ALL_FLAGS), kernel, faultsAsUndefined, hostBits };
}

const NAMES = 'rax rcx rdx rbx rsp rbp rsi rdi r8 r9 r10 r11 r12 r13 r14 r15'.split(' ');

function firstDifference(a: Uint8Array, b: Uint8Array, ignore: Tolerance['ignore'] = []): number {
  if (Buffer.compare(a, b) === 0) return -1;
  return a.findIndex((byte, i) => byte !== b[i] && !ignore.some(([from, to]) => i >= from && i < to));
}

/** What is different, or an empty list. */
export function differences(native: Result, other: Result, tolerance: Tolerance): string[] {
  const found: string[] = [];
  const say = (what: string, a: unknown, b: unknown) => {
    const show = (v: unknown) => (typeof v === 'bigint' ? `0x${v.toString(16)}` : String(v));
    if (a !== b) found.push(`${what}: native ${show(a)}, completed ${show(b)}`);
  };
  const [a, b] = [native.outcome, other.outcome];
  say('end', a.kind, b.kind);
  let flags = tolerance.flags;
  const cr2Mask = tolerance.cr2Page ? ~0xfffn : ~0n;
  if (a.kind === 'fault' && b.kind === 'fault') {
    const replaced =
      tolerance.faultsAsUndefined &&
      a.vector === UNDEFINED_OPCODE &&
      b.vector === GENERAL_PROTECTION &&
      b.errorCode === 0;
    if (replaced) flags &= ~RF;
    else {
      say('vector', a.vector, b.vector);
      say('error code', tolerance.kernel && a.vector === 14 ? (a.errorCode ?? 0) & ~USER : a.errorCode, b.errorCode);
      if (a.vector === 14) say('CR2', a.cr2 & cr2Mask, b.cr2 & cr2Mask);
    }
    say('RIP', a.regs.rip, b.regs.rip);
  }
  if (a.kind !== b.kind) return found;
  const hostBits = a.kind === 'done' ? tolerance.hostBits : 0n;
  const host = [hostBits & 0xffff_ffffn, 0n, hostBits >> 32n];
  NAMES.forEach((name, number) => {
    say(name, a.regs.gpr(number) & ~(host[number] ?? 0n), b.regs.gpr(number));
  });
  say('RFLAGS', a.regs.rflags & flags, b.regs.rflags & flags);
  const at = firstDifference(native.memory, other.memory);
  if (at >= 0) {
    found.push(`memory differs from 0x${(WINDOW.start + at).toString(16)}: ${native.memory[at]}, ${other.memory[at]}`);
  }
  // XSTATE_BV is a hint: the CPU may keep a component in use although it holds initial values.
  const state = firstDifference(native.xsave, other.xsave, [[512, 520], ...(tolerance.ignore ?? [])]);
  if (state >= 0) found.push(`XSAVE area differs from byte ${state}: ${native.xsave[state]}, ${other.xsave[state]}`);
  return found;
}

/** A case for a failure message. */
export function describeCase(test: RandomCase, seed: number): string {
  const hex = Buffer.from(test.code).toString('hex');
  const registers = test.gprs.map((value, i) => `${NAMES[i]}=${value.toString(16)}`).join(' ');
  return `code ${hex}, operand on ${test.place}${test.misaligned ? ', misaligned' : ''}; ${registers} rflags=${test.rflags.toString(16)}; TSVISOR_SEED=${seed}`;
}
