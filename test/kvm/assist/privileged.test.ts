import { afterAll, describe, expect, it } from 'vitest';
import { BareGuest } from '../../support/bare-guest.js';
import { bare, pte, setGate, setPage } from '../../support/bare-guest-layout.js';
import { type Case, Executor, type Result, WINDOW } from './executor.js';

// What only kernel mode may do is not there to be compared with user mode: these follow the manual, section by section.

const executor = new Executor();
afterAll(() => executor.close());

const state = executor.guest.xsave();
const AREA = BigInt(bare.data + 0x1000);
const [UD, NP, GP] = [6, 11, 13];
const CR4_SMAP = 0x20_0000n;
const CR4_OSXSAVE = 0x4_0000n;
const CR0_TS = 8n;
const AC = 0x4_0000n;

/** A case with the given bytes, registers by number, and anything else. */
function given(code: readonly number[], gprs: Record<number, bigint> = {}, rest: Partial<Case> = {}): Case {
  const all = Array.from({ length: 16 }, (_, i) => gprs[i] ?? 0n);
  all[4] = BigInt(bare.kernelStackTop);
  return {
    code: Uint8Array.from(code),
    gprs: all,
    rflags: 2n,
    memory: new Uint8Array(WINDOW.length),
    xsave: state,
    ...rest,
  };
}

function fault(result: Result): [vector: number, errorCode: number | undefined] | string {
  const { outcome } = result;
  return outcome.kind === 'fault' ? [outcome.vector, outcome.errorCode] : outcome.kind;
}

const completed = (test: Case, cpl: 0 | 3 = 0) => executor.completed(test, cpl);

describe('STAC and CLAC (SDM 2B STAC, 2A CLAC)', () => {
  it('set and clear AC and nothing else', () => {
    const stac = completed(given([0x0f, 0x01, 0xcb], {}, { rflags: 0x8d7n }));
    expect([stac.kind, stac.outcome.kind, stac.outcome.regs.rflags]).toEqual(['stac', 'done', 0x8d7n | AC]);
    const clac = completed(given([0x0f, 0x01, 0xca], {}, { rflags: 0x8d7n | AC }));
    expect([clac.kind, clac.outcome.kind, clac.outcome.regs.rflags]).toEqual(['clac', 'done', 0x8d7n]);
  });

  it('are undefined outside kernel mode', () => {
    expect(fault(completed(given([0x0f, 0x01, 0xcb]), 3))).toEqual([UD, undefined]);
  });
});

describe('supervisor access to user pages (SDM 3A 4.6.1)', () => {
  const popcnt = [0xf3, 0x0f, 0xb8, 0x07]; // popcnt eax, [rdi]
  const address = { 7: BigInt(bare.data) };

  it('faults under SMAP unless AC is set', () => {
    const cr4 = BareGuest.CR4 | CR4_SMAP;
    // The code page is a user page too, which SMAP does not mind: it is about data.
    expect(fault(completed(given(popcnt, address, { cr4 })))).toEqual([14, 1]);
    expect(completed(given(popcnt, address, { cr4, rflags: AC | 2n })).outcome.kind).toBe('done');
  });
});

describe('INVPCID (SDM 2A)', () => {
  const invpcid = [0x66, 0x0f, 0x38, 0x82, 0x07]; // invpcid rax, [rdi]
  const descriptor = (pcid: bigint, address = 0n) => {
    const memory = new Uint8Array(WINDOW.length);
    new DataView(memory.buffer).setBigUint64(0, pcid, true);
    new DataView(memory.buffer).setBigUint64(8, address, true);
    return memory;
  };
  const run = (type: bigint, memory: Uint8Array, cr4 = BareGuest.CR4, cpl: 0 | 3 = 0) =>
    completed(given(invpcid, { 0: type, 7: BigInt(bare.data) }, { memory, cr4 }), cpl);

  it('completes every type', () => {
    for (const type of [0n, 1n, 2n, 3n]) expect(run(type, descriptor(0n)).outcome.kind).toBe('done');
  });

  it('refuses a bad type, reserved bits, a PCID without CR4.PCIDE, a non-canonical address, user mode', () => {
    expect(fault(run(4n, descriptor(0n)))).toEqual([GP, 0]);
    expect(fault(run(2n, descriptor(1n << 12n)))).toEqual([GP, 0]);
    expect(fault(run(1n, descriptor(5n)))).toEqual([GP, 0]);
    expect(fault(run(0n, descriptor(0n, 1n << 47n)))).toEqual([GP, 0]);
    expect(fault(run(2n, descriptor(0n), BareGuest.CR4, 3))).toEqual([GP, 0]);
  });

  it('makes a changed page table entry count', () => {
    const { guest } = executor;
    const load = given([0x8b, 0x06], { 6: BigInt(bare.data + 0x5000) }); // mov eax, [rsi]
    try {
      executor.kernel(load);
      setPage(guest.memory, bare.data + 0x5000, 0);
      completed(given(invpcid, { 0: 2n, 7: BigInt(bare.data) }));
      expect(fault(executor.kernel(load))).toEqual([14, 0]);
    } finally {
      setPage(guest.memory, bare.data + 0x5000, pte.P | pte.W | pte.U);
      completed(given(invpcid, { 0: 2n, 7: BigInt(bare.data) }));
    }
    expect(executor.kernel(load).outcome.kind).toBe('done');
  });
});

describe('XGETBV and XSETBV (SDM 2D)', () => {
  const xsetbv = (low: bigint, rest: Partial<Case> = {}, number = 0n) =>
    given([0x0f, 0x01, 0xd1], { 0: low, 1: number }, rest);

  it('XSETBV changes what XGETBV reads', () => {
    try {
      expect(completed(xsetbv(3n)).outcome.kind).toBe('done');
      expect(executor.guest.vcpu.getXcr0()).toBe(3n);
      expect(completed(given([0x0f, 0x01, 0xd0], { 2: 5n })).outcome.regs.gpr(0)).toBe(3n);
    } finally {
      executor.guest.vcpu.setXcr0(executor.xcr0);
    }
  });

  it('XSETBV refuses what no XCR0 may be, other registers, and user mode', () => {
    for (const value of [0n, 2n, 5n, 0xffff_ffffn]) expect(fault(completed(xsetbv(value)))).toEqual([GP, 0]);
    expect(fault(completed(xsetbv(3n, {}, 1n)))).toEqual([GP, 0]);
    expect(fault(completed(xsetbv(3n), 3))).toEqual([GP, 0]);
  });

  it('neither is defined without CR4.OSXSAVE', () => {
    const cr4 = BareGuest.CR4 & ~CR4_OSXSAVE;
    expect(fault(completed(xsetbv(3n, { cr4 })))).toEqual([UD, undefined]);
    expect(fault(completed(given([0x0f, 0x01, 0xd0], {}, { cr4 })))).toEqual([UD, undefined]);
  });
});

describe('XSAVES and XRSTORS (SDM 1 13.11 and 13.12)', () => {
  const xsaves64 = [0x48, 0x0f, 0xc7, 0x2f]; // [rdi]
  const xrstors64 = [0x48, 0x0f, 0xc7, 0x1f];
  const everything = { 0: 0xffff_ffffn, 2: 0xffff_ffffn, 7: AREA };

  it('save in the compacted format only what is in use, and restore it', () => {
    const before = state.slice();
    const view = new DataView(before.buffer);
    before.fill(0x5a, 160, 416);
    before.fill(0xa5, 576, 576 + 256);
    view.setUint32(24, 0x1fa0, true);
    view.setBigUint64(512, 7n, true);
    const saved = completed(given(xsaves64, everything, { xsave: before }));
    expect([saved.kind, saved.outcome.kind]).toEqual(['xsaves', 'done']);
    const area = saved.memory.subarray(0x1000);
    const header = new DataView(area.buffer, area.byteOffset + 512);
    expect(header.getBigUint64(0, true) & ~1n).toBe(6n);
    expect(header.getBigUint64(8, true)).toBe((1n << 63n) | executor.xcr0);
    expect(area.subarray(160, 416)).toEqual(before.subarray(160, 416));
    expect(area.subarray(576, 832)).toEqual(before.subarray(576, 832));
    const restored = completed(given(xrstors64, everything, { memory: saved.memory }));
    expect(restored.kind).toBe('xrstors');
    expect(restored.xsave.subarray(24, 28)).toEqual(before.subarray(24, 28));
    expect(restored.xsave.subarray(160, 416)).toEqual(before.subarray(160, 416));
    expect(restored.xsave.subarray(576, 832)).toEqual(before.subarray(576, 832));
  });

  it('XRSTORS initializes what the area leaves out', () => {
    const memory = new Uint8Array(WINDOW.length);
    new DataView(memory.buffer).setBigUint64(0x1000 + 520, (1n << 63n) | executor.xcr0, true);
    const before = state.slice().fill(0x11, 160, 416).fill(0x22, 576, 832);
    new DataView(before.buffer).setBigUint64(512, 7n, true);
    const restored = completed(given(xrstors64, everything, { memory, xsave: before }));
    expect(restored.xsave.subarray(160, 416).every((byte) => byte === 0)).toBe(true);
    expect(restored.xsave.subarray(576, 832).every((byte) => byte === 0)).toBe(true);
    expect(new DataView(restored.xsave.buffer).getUint32(24, true)).toBe(0x1f80);
    expect(new DataView(restored.xsave.buffer).getUint16(0, true)).toBe(0x37f);
  });

  it('XRSTORS leaves alone what is not asked for', () => {
    const memory = new Uint8Array(WINDOW.length);
    new DataView(memory.buffer).setBigUint64(0x1000 + 520, (1n << 63n) | executor.xcr0, true);
    const before = state.slice().fill(0x11, 160, 416).fill(0x22, 576, 832);
    new DataView(before.buffer).setBigUint64(512, 7n, true);
    const restored = completed(given(xrstors64, { ...everything, 0: 2n }, { memory, xsave: before }));
    expect(restored.xsave.subarray(160, 416).every((byte) => byte === 0)).toBe(true);
    expect(restored.xsave.subarray(576, 832).every((byte) => byte === 0x22)).toBe(true);
  });

  const broken: [what: string, at: number, value: bigint][] = [
    ['the standard format', 520, 0n],
    ['a component that XCR0 lacks', 520, (1n << 63n) | (1n << 40n)],
    ['XSTATE_BV beyond XCOMP_BV', 512, 0x80n],
    ['reserved header bytes', 528, 1n],
    ['the last reserved header byte', 568, 1n << 56n],
  ];
  for (const [what, at, value] of broken) {
    it(`XRSTORS refuses ${what}`, () => {
      const memory = new Uint8Array(WINDOW.length);
      const view = new DataView(memory.buffer);
      view.setBigUint64(0x1000 + 520, (1n << 63n) | 7n, true);
      view.setBigUint64(0x1000 + at, value, true);
      expect(fault(completed(given(xrstors64, everything, { memory })))).toEqual([GP, 0]);
    });
  }

  const conditions: [what: string, Partial<Case>, Record<number, bigint>, 0 | 3, [number, number | undefined]][] = [
    ['user mode', {}, everything, 3, [GP, 0]],
    ['misalignment', {}, { ...everything, 7: AREA + 32n }, 0, [GP, 0]],
    ['CR0.TS', { cr0: BareGuest.CR0 | CR0_TS }, everything, 0, [7, undefined]],
    ['no CR4.OSXSAVE', { cr4: BareGuest.CR4 & ~CR4_OSXSAVE }, everything, 0, [UD, undefined]],
  ];
  for (const [what, rest, gprs, cpl, expected] of conditions) {
    it(`both fault: ${what}`, () => {
      for (const code of [xsaves64, xrstors64]) {
        expect(fault(completed(given(code, gprs, rest), cpl)), code.join()).toEqual(expected);
      }
    });
  }

  it('LOCK is undefined', () => {
    expect(fault(completed(given([0xf0, ...xsaves64], everything)))).toEqual([UD, undefined]);
  });
});

describe('the x87 pointers without REX.W (SDM 1 13.5.1)', () => {
  it('are saved and restored as 32 bits', () => {
    const before = state.slice();
    const view = new DataView(before.buffer);
    view.setBigUint64(8, 0x1234_5678_9abcn, true);
    view.setBigUint64(16, 0x4321_8765_cba9n, true);
    view.setBigUint64(512, 3n, true);
    const saved = completed(given([0x0f, 0xae, 0x27], { 0: 3n, 7: AREA }, { xsave: before })); // xsave [rdi]
    const area = new DataView(saved.memory.buffer, 0x1000);
    expect([area.getBigUint64(8, true), area.getBigUint64(16, true)]).toEqual([0x5678_9abcn, 0x8765_cba9n]);
    const wide = completed(given([0x48, 0x0f, 0xae, 0x27], { 0: 3n, 7: AREA }, { xsave: before }));
    expect(new DataView(wide.memory.buffer, 0x1000).getBigUint64(8, true)).toBe(0x1234_5678_9abcn);
  });
});

describe('RDTSCP and RDPID (SDM 2B)', () => {
  it('read the time-stamp counter and IA32_TSC_AUX', () => {
    executor.guest.vcpu.setMsr(0xc000_0103, 0x1234_5678n);
    const { regs } = completed(given([0x0f, 0x01, 0xf9])).outcome;
    const tsc = (regs.gpr(2) << 32n) | regs.gpr(0);
    expect(regs.gpr(1)).toBe(0x1234_5678n);
    const now = executor.guest.vcpu.getMsr(0x10) as bigint;
    expect(tsc > 0n && tsc <= now && now - tsc < 100_000_000_000n).toBe(true);
    expect(completed(given([0xf3, 0x0f, 0xc7, 0xf8], { 0: ~0n & 0xffff_ffff_ffff_ffffn })).outcome.regs.gpr(0)).toBe(
      0x1234_5678n,
    );
  });
});

describe('RDPKRU and WRPKRU (SDM 2B, 2D)', () => {
  it('are undefined without CR4.PKE', () => {
    for (const last of [0xee, 0xef]) expect(fault(completed(given([0x0f, 0x01, last])))).toEqual([UD, undefined]);
  });
});

describe('LAR, LSL, VERR and VERW of kernel segments (SDM 2A, 2B, 2D)', () => {
  const ZF = 0x40n;
  it('answer for a visible descriptor', () => {
    const lar = completed(given([0x0f, 0x02, 0xc3], { 3: 0x10n })).outcome.regs; // lar eax, ebx
    expect([lar.gpr(0), lar.rflags & ZF]).toEqual([0x00af9b00n, ZF]);
    const lsl = completed(given([0x0f, 0x03, 0xc3], { 3: 0x40n })).outcome.regs; // the TSS
    expect([lsl.gpr(0), lsl.rflags & ZF]).toEqual([0x67n, ZF]);
    expect(completed(given([0x0f, 0x00, 0xe3], { 3: 0x10n })).outcome.regs.rflags & ZF).toBe(ZF); // verr bx
    expect(completed(given([0x0f, 0x00, 0xeb], { 3: 0x10n })).outcome.regs.rflags & ZF).toBe(0n); // verw bx: code
    expect(completed(given([0x0f, 0x00, 0xeb], { 3: 0x18n })).outcome.regs.rflags & ZF).toBe(ZF);
  });
});

describe('software interrupts (SDM 2A INT n, 3A 6.12.1)', () => {
  const interrupt = (number: number) => completed(given([0xcd, number], {}, { rflags: 0x202n }));

  it('INT n and INT3 deliver as traps, whatever the vector', () => {
    for (const number of [0x80, 0x20, 0xff, 3, 1]) {
      const { outcome, kind } = interrupt(number);
      expect(kind).toBe('int');
      expect(fault({ outcome } as Result)).toEqual([number, undefined]);
      expect(outcome.regs.rip).toBe(BigInt(bare.code + 2));
      expect(outcome.regs.rflags).toBe(0x202n);
    }
    const int3 = completed(given([0xcc]));
    expect([int3.kind, fault(int3), int3.outcome.regs.rip]).toEqual(['int3', [3, undefined], BigInt(bare.code + 1)]);
  });

  it('push no error code', () => {
    const { outcome } = completed(given([0xcd, 14], { 0: 1n }));
    // The frame has none, so what the harness takes for one is RIP.
    expect(outcome.kind === 'fault' && [outcome.vector, outcome.errorCode]).toEqual([14, bare.code + 2]);
  });

  it('check the gate', () => {
    const { memory } = executor.guest;
    try {
      setGate(memory, 0x80, { present: false });
      expect(fault(interrupt(0x80))).toEqual([NP, 0x80 * 8 + 2]);
      setGate(memory, 0x80, { dpl: 0 });
      expect(fault(completed(given([0xcd, 0x80]), 3))).toEqual([GP, 0x80 * 8 + 2]);
      expect(fault(interrupt(0x80))).toEqual([0x80, undefined]);
      setGate(memory, 0x80, { type: 5 });
      expect(fault(interrupt(0x80))).toEqual([GP, 0x80 * 8 + 2]);
    } finally {
      setGate(memory, 0x80, {});
    }
  });
});

describe('RFLAGS.TF and RF (SDM 3A 17.3.1)', () => {
  it('a completed instruction clears RF and is followed by its single-step trap', () => {
    const popcnt = given([0xf3, 0x0f, 0xb8, 0xc3], { 3: 7n }, { rflags: 0x1_0102n });
    const { outcome } = completed(popcnt);
    expect(fault({ outcome } as Result)).toEqual([1, undefined]);
    expect(outcome.regs.rip).toBe(BigInt(bare.code + 4));
    expect(outcome.regs.gpr(0)).toBe(3n);
    expect(outcome.regs.rflags & 0x1_0000n).toBe(0n);
    expect(executor.guest.vcpu.getDebugRegs().getBigUint64(32, true) & 0x4000n).toBe(0x4000n);
  });

  it('a fault is pushed with RF set', () => {
    const { outcome } = completed(given([0xf3, 0x0f, 0xb8, 0x07], { 7: BigInt(bare.dataEnd) }));
    expect(outcome.regs.rflags & 0x1_0000n).toBe(0x1_0000n);
  });
});

describe('instructions at a page boundary', () => {
  it('fault where the second page is not executable', () => {
    const at = bare.noExecute - 2;
    const memory = new Uint8Array(WINDOW.length);
    memory.set([0xf3, 0x0f], at - WINDOW.start);
    const result = executor.completedAt(given([], {}, { memory }), 0, BigInt(at));
    expect(fault(result)).toEqual([14, 0x11]);
    expect(result.outcome.kind === 'fault' && result.outcome.cr2).toBe(BigInt(bare.noExecute));
  });
});

describe('what is not known', () => {
  it('changes nothing and is described on one line', () => {
    const { guest, assist } = executor;
    const test = given([0xc5, 0xec, 0x58, 0xcb], { 0: 5n });
    executor.place(test, 0);
    const before = guest.vcpu.syncedRegs.words.slice();
    expect(assist.complete()).toBeUndefined();
    expect(guest.vcpu.syncedRegs.words).toEqual(before);
    const { rip, bytes, text } = assist.describe();
    expect(rip).toBe(BigInt(bare.code));
    expect(Buffer.from(bytes).toString('hex')).toBe('c5ec58cb');
    expect(text).toBe('0x10000: c5 ec 58 cb (vaddps ymm1,ymm2,ymm3)');
  });
});
