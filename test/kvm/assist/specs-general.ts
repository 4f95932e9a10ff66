import { bare, selectors } from '../../support/bare-guest-layout.js';
import type { Draft, Spec } from './case.js';
import type { Random } from './random.js';

const [CF, ZF, SF, OF] = [1n, 0x40n, 0x80n, 0x800n];
const STANDARD = [2, 4, 8] as const;
const BMI = [4, 8] as const;
const NONE = 0;
const P66 = 1;
const PF3 = 2;
const PF2 = 3;

const bmi = (kind: string, opcode: number, pp: number, flags: bigint, extension?: number): Spec => {
  return {
    kind,
    opcode: [opcode],
    vex: { map: 2, pp },
    sizes: BMI,
    flags,
    ...(extension === undefined ? {} : { extension }),
  };
};
const FLAGLESS = 0x8d5n;

/** CMPXCHG16B compares equal in half of the cases. */
function arrangeExchange(draft: Draft, random: Random): void {
  if (draft.operand === undefined || random.chance(50)) return;
  const view = new DataView(draft.memory.buffer, draft.memory.byteOffset);
  view.setBigUint64(draft.operand, draft.gprs[0] as bigint, true);
  view.setBigUint64(draft.operand + 8, draft.gprs[2] as bigint, true);
}

/** A selector in the low half of every register and of memory. Null, kernel and user ones: those that every GDT has. */
function arrangeSelector(draft: Draft, random: Random): void {
  const { kernelCs, kernelSs, userCs, userSs } = selectors;
  const one = () => random.pick([0, 3, kernelCs, kernelSs, userCs, userSs, 0xfff0]);
  draft.gprs = draft.gprs.map((value, i) => (i === 4 ? value : (value & ~0xffffn) | BigInt(one())));
}

/** LDMXCSR: half of the values valid. */
function arrangeMxcsr(draft: Draft, random: Random): void {
  if (draft.operand === undefined || random.chance(30)) return;
  new DataView(draft.memory.buffer, draft.memory.byteOffset).setUint32(draft.operand, random.u32() & 0xffbf, true);
}

/** RSP in the memory that is compared. */
function arrangeStack(draft: Draft, random: Random): void {
  draft.gprs[4] = BigInt(bare.data + 0x8000 + random.below(0x1000));
}

function arrangeBadStack(draft: Draft, random: Random): void {
  draft.gprs[4] = BigInt(random.pick([bare.dataEnd, bare.readOnly, bare.supervisor]) + 1 + random.below(0x800));
}

export const generalSpecs: readonly Spec[] = [
  { kind: 'popcnt', prefix: 0xf3, opcode: [0x0f, 0xb8], sizes: STANDARD },
  { kind: 'tzcnt', prefix: 0xf3, opcode: [0x0f, 0xbc], sizes: STANDARD, flags: CF | ZF },
  { kind: 'lzcnt', prefix: 0xf3, opcode: [0x0f, 0xbd], sizes: STANDARD, flags: CF | ZF },
  bmi('andn', 0xf2, NONE, CF | ZF | SF | OF),
  bmi('bextr', 0xf7, NONE, CF | ZF | OF),
  bmi('blsr', 0xf3, NONE, CF | ZF | SF | OF, 1),
  bmi('blsmsk', 0xf3, NONE, CF | ZF | SF | OF, 2),
  bmi('blsi', 0xf3, NONE, CF | ZF | SF | OF, 3),
  bmi('bzhi', 0xf5, NONE, CF | ZF | SF | OF),
  bmi('pdep', 0xf5, PF2, FLAGLESS),
  bmi('pext', 0xf5, PF3, FLAGLESS),
  { ...bmi('mulx', 0xf6, PF2, FLAGLESS), fixed: [2] },
  bmi('shlx', 0xf7, P66, FLAGLESS),
  bmi('shrx', 0xf7, PF2, FLAGLESS),
  bmi('sarx', 0xf7, PF3, FLAGLESS),
  { kind: 'adcx', prefix: 0x66, opcode: [0x0f, 0x38, 0xf6], sizes: BMI },
  { kind: 'adox', prefix: 0xf3, opcode: [0x0f, 0x38, 0xf6], sizes: BMI },
  { kind: 'crc32', prefix: 0xf2, opcode: [0x0f, 0x38, 0xf0], sizes: BMI, width: 1 },
  { kind: 'crc32', prefix: 0xf2, opcode: [0x0f, 0x38, 0xf1], sizes: STANDARD },
  { kind: 'movbe', opcode: [0x0f, 0x38, 0xf0], sizes: STANDARD, form: 'memory' },
  { kind: 'movbe', opcode: [0x0f, 0x38, 0xf1], sizes: STANDARD, form: 'memory', writes: true },
  ...[false, true].map((lock): Spec => {
    return {
      kind: 'cmpxchg16b',
      opcode: [0x0f, 0xc7],
      extension: 1,
      sizes: [8],
      width: 16,
      align: 16,
      form: 'memory',
      writes: true,
      lock,
      fixed: [0, 1, 2, 3],
      arrange: arrangeExchange,
    };
  }),
  { kind: 'stmxcsr', opcode: [0x0f, 0xae], extension: 3, form: 'memory', writes: true },
  { kind: 'ldmxcsr', opcode: [0x0f, 0xae], extension: 2, form: 'memory', arrange: arrangeMxcsr },
  { kind: 'clwb', prefix: 0x66, opcode: [0x0f, 0xae], extension: 6, form: 'memory', width: 1 },
  { kind: 'lar', opcode: [0x0f, 0x02], sizes: STANDARD, form: 'register', userOnly: true, arrange: arrangeSelector },
  { kind: 'lsl', opcode: [0x0f, 0x03], sizes: STANDARD, form: 'register', userOnly: true, arrange: arrangeSelector },
  { kind: 'verr', opcode: [0x0f, 0x00], extension: 4, form: 'register', userOnly: true, arrange: arrangeSelector },
  { kind: 'verw', opcode: [0x0f, 0x00], extension: 5, form: 'register', userOnly: true, arrange: arrangeSelector },
  { kind: 'nop', opcode: [0x90], form: 'none' },
  { kind: 'nop', opcode: [0x0f, 0x1f, 0x00], form: 'none' },
  { kind: 'endbr64', prefix: 0xf3, opcode: [0x0f, 0x1e, 0xfa], form: 'none' },
  { kind: 'cld', opcode: [0xfc], form: 'none' },
  ...Array.from(
    { length: 8 },
    (_, i): Spec => ({ kind: 'push', opcode: [0x50 + i], form: 'none', arrange: arrangeStack }),
  ),
  { kind: 'push', opcode: [0x6a], immediate: true, form: 'none', arrange: arrangeStack },
  // A push that faults: in user mode, where the fault has a stack of its own.
  { kind: 'push', opcode: [0x53], form: 'none', userOnly: true, arrange: arrangeBadStack },
  { kind: 'int3', opcode: [0xcc], form: 'none' },
  { kind: 'fwait', opcode: [0x9b], form: 'none' },
  { kind: 'ud1', opcode: [0x0f, 0xb9], form: 'register' },
  { kind: 'ud2', opcode: [0x0f, 0x0b], form: 'none' },
  { kind: 'fnclex', opcode: [0xdb, 0xe2], form: 'none' },
  { kind: 'fnstsw', opcode: [0xdf, 0xe0], form: 'none' },
  { kind: 'emms', opcode: [0x0f, 0x77], form: 'none' },
  { kind: 'fldcw', opcode: [0xd9], extension: 5, form: 'memory', width: 2 },
  { kind: 'fild', opcode: [0xdb], extension: 0, form: 'memory' },
];

/** RORX has an immediate and a map of its own. */
export const immediateSpecs: readonly Spec[] = [
  { kind: 'rorx', opcode: [0xf0], vex: { map: 3, pp: 3 }, sizes: BMI, immediate: true, flags: FLAGLESS },
];
