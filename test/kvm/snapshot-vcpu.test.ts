import { afterEach, describe, expect, test } from 'vitest';
import type { VcpuState } from '#dist/arch/x86_64/vcpu-state.js';
import * as abi from '#dist/kvm/generated/abi.js';
import { Regs } from '#dist/kvm/registers.js';
import { XSAVE_BUFFER } from '#dist/kvm/vcpu.js';
import type { SavedState } from '#dist/machine/virtual-machine.js';
import { placeSregs, registers } from '../support/bare-guest.js';
import { bare, writeTables } from '../support/bare-guest-layout.js';
import { guestProgram } from '../support/guest-program.js';
import { describeKvm } from '../support/kvm.js';
import { closeLayers, OUT_PORT, Rig, type Saved, timeless } from '../support/snapshot/rig.js';
import { temporaryFolder } from '../support/temporary-folder.js';
import { Random } from './assist/random.js';

const folder = temporaryFolder();
const MEMORY = 4 * 2 ** 20;
const CASES = Number(process.env.TSVISOR_CASES ?? 100);
const random = new Random();
const TSC = 0x10;
const hint = `seed ${random.seed}`;

const rigs: Rig[] = [];
async function rig(kernel: string, saved?: Saved): Promise<Rig> {
  const made = await Rig.create(kernel, MEMORY, saved);
  rigs.push(made);
  return made;
}
afterEach(() => {
  for (const one of rigs.splice(0)) one[Symbol.dispose]();
});

/** The same machine by way of a snapshot; the old one is no more. */
async function reborn(
  old: Rig,
  kernel: string,
  change: (state: SavedState) => SavedState = (state) => state,
): Promise<Rig> {
  const saved = old.save(folder);
  rigs.splice(rigs.indexOf(old), 1);
  old[Symbol.dispose]();
  const made = await rig(kernel, { ...saved, state: change(saved.state) });
  closeLayers(saved);
  return made;
}

/** A guest that halts with interrupts on; every interrupt writes 1 to OUT_PORT and halts it for good. */
const HALTED = guestProgram(`
    lea rax, [handler]
    mov rdi, 0x200000
    mov ecx, 256
    mov bx, cs
  gate:
    mov rdx, rax
    mov [rdi], dx
    mov [rdi + 2], bx
    mov byte ptr [rdi + 5], 0x8e
    shr rdx, 16
    mov [rdi + 6], dx
    add rdi, 16
    dec ecx
    jnz gate
    lidt [table]
    mov al, 0xff          # no interrupt of the PIC
    out 0x21, al
    out 0xa1, al
    mov al, 0x34          # PIT channel 0: mode 2, 65536
    out 0x43, al
    xor al, al
    out 0x40, al
    out 0x40, al
    mov rsp, 0x210000
    sti
  again:
    hlt
    jmp again
  handler:
    mov dx, ${OUT_PORT}
    mov eax, 1
    out dx, eax
    cli
    hlt
  table:
    .word 0xfff
    .quad 0x200000`);

/** Counts, with a checksum in memory, and writes it to OUT_PORT every 16 steps. */
const COUNTING = guestProgram(`
    xor r8d, r8d
    xor r9d, r9d
    mov dx, ${OUT_PORT}
  again:
    inc r8d
    imul r9d, r9d, 31
    add r9d, r8d
    add [0x200000], r9d
    test r8d, 15
    jnz again
    mov eax, [0x200000]
    out dx, eax
    jmp again`);

function* counted(): Generator<number> {
  let [sum, total] = [0, 0];
  for (let step = 1; ; step++) {
    sum = (Math.imul(sum, 31) + step) >>> 0;
    total = (total + sum) >>> 0;
    if (step % 16 === 0) yield total;
  }
}

describeKvm('a vCPU that is saved and restored', () => {
  describe('has the state that it had', () => {
    const u64 = () => random.u64();
    const canonical = () => random.u64() & 0x7fff_ffff_ffffn;

    function disturb({ vcpu }: Rig): void {
      const regs = new Regs(BigUint64Array.from({ length: abi.kvm_regs.sizeof / 8 }, u64));
      regs.rip = canonical();
      regs.rflags = 2n | (u64() & 0xcd5n);
      const sregs = vcpu.getSregs();
      sregs.cr2 = u64();
      for (const name of ['fs', 'gs'] as const) sregs.setSegment(name, { ...sregs.segment(name), base: canonical() });
      const xsave = new Uint8Array(XSAVE_BUFFER);
      const area = new DataView(xsave.buffer);
      vcpu.setXcr0(7n);
      for (let at = 0; at < 24; at += 4) area.setUint32(at, 0x37f, true);
      area.setUint32(4, 0, true);
      area.setUint32(24, 0x1f80, true); // MXCSR
      for (let at = 160; at < 416; at++) xsave[at] = random.below(256); // XMM
      for (let at = 576; at < 832; at++) xsave[at] = random.below(256); // the upper halves of YMM
      area.setBigUint64(512, 7n, true); // XSTATE_BV
      const debug = new DataView(new ArrayBuffer(abi.kvm_debugregs.sizeof));
      for (let n = 0; n < 4; n++) debug.setBigUint64(8 * n, canonical(), true);
      debug.setBigUint64(abi.kvm_debugregs.dr6, 0xffff_0ff0n | BigInt(random.below(16)), true);
      debug.setBigUint64(abi.kvm_debugregs.dr7, 0x400n | BigInt(random.below(256)), true);
      const lapic = vcpu.getLapic();
      const apic = new DataView(lapic.buffer);
      apic.setUint32(0xf0, 0x1ff, true);
      apic.setUint32(0x80, 0x20 + random.below(4) * 16, true); // task priority
      apic.setUint32(0x350, 0x1_0000 | random.below(256), true); // LINT0, masked
      apic.setUint32(0x200 + 16 * (2 + random.below(6)), random.u32(), true); // interrupts that wait
      apic.setUint32(0x100 + 16 * (2 + random.below(6)), random.u32(), true); // and that are served
      vcpu.setSregs(sregs);
      vcpu.setRegs(regs);
      vcpu.setXsave(xsave);
      vcpu.setDebugRegs(debug);
      vcpu.setLapic(lapic);
      // STAR, LSTAR, CSTAR, FMASK, KERNEL_GS_BASE, SYSENTER_CS, _ESP, _EIP, TSC_AUX, PAT
      const msrs = [0xc000_0081, 0xc000_0082, 0xc000_0083, 0xc000_0084, 0xc000_0102, 0x174, 0x175, 0x176];
      vcpu.setMsrs([
        ...msrs.map((index) => [index, canonical()] as const),
        [0xc000_0103, 5n],
        [0x277, 0x0007_0106_0606_0600n],
      ]);
    }

    test('registers, FPU, AVX, debug registers, local APIC, MSRs', async () => {
      for (let n = 0; n < 5; n++) {
        const before = await rig(HALTED);
        disturb(before);
        const saved = before.save(folder);
        const after = await rig(HALTED, saved);
        closeLayers(saved);
        expect(timeless(after.state()), hint).toEqual(timeless(saved.state));
        const ymm = Buffer.from(saved.state.vcpus[0]?.xsave as string, 'base64').subarray(576, 832);
        expect(ymm.some((byte) => byte !== 0)).toBe(true);
        expect(saved.state.vcpus[0]?.xcr0).toBe('7');
      }
    });

    const { sizeof, exception_injected, exception_nr, exception_has_error_code, exception_error_code } =
      abi.kvm_vcpu_events;
    const { interrupt_injected, interrupt_nr, interrupt_shadow, nmi_pending, nmi_masked, flags } = abi.kvm_vcpu_events;
    for (const [what, fields] of [
      [
        'an exception with an error code',
        { [exception_injected]: 1, [exception_nr]: 13, [exception_has_error_code]: 1 },
      ],
      ['an exception without', { [exception_injected]: 1, [exception_nr]: 6 }],
      ['an interrupt', { [interrupt_injected]: 1, [interrupt_nr]: 0x50 }],
      ['an interrupt that waits for the next instruction', { [interrupt_shadow]: 1, [flags]: 4 }],
      ['an NMI', { [nmi_pending]: 1, [flags]: 1 }],
      ['an NMI that is served', { [nmi_masked]: 1 }],
    ] as const) {
      test(`${what} on its way`, async () => {
        const before = await rig(HALTED);
        const events = new DataView(new ArrayBuffer(sizeof));
        for (const [at, value] of Object.entries(fields)) events.setUint8(Number(at), value);
        if (fields[exception_has_error_code as never]) events.setUint32(exception_error_code, 0x1234, true);
        before.vcpu.setEvents(events);
        const saved = before.save(folder);
        const found = Buffer.from(saved.state.vcpus[0]?.events as string, 'base64');
        for (const [at, value] of Object.entries(fields))
          if (Number(at) !== flags) expect(found[Number(at)]).toBe(value);
        const after = await rig(HALTED, saved);
        closeLayers(saved);
        expect(timeless(after.state())).toEqual(timeless(saved.state));
      });
    }

    test('halted, and so it stays', async () => {
      const before = await rig(HALTED);
      before.run(1e6, () => before.vcpu.getMpState() === 3);
      const saved = before.save(folder);
      expect(saved.state.vcpus[0]?.mpState).toBe(3);
      const after = await rig(HALTED, saved);
      closeLayers(saved);
      after.run(20_000);
      expect(timeless(after.state())).toEqual(timeless(saved.state));
    });
  });

  test('counts on as if nothing had been, whenever it is saved', { timeout: 600_000 }, async () => {
    const expected = counted();
    let guest = await rig(COUNTING);
    let seen = 0;
    for (let n = 0; n < CASES; n++) {
      guest.run(100 + random.below(3000));
      for (const value of guest.out.splice(0)) expect(value, `${hint}, ${++seen}`).toBe(expected.next().value);
      guest = await reborn(guest, COUNTING);
    }
    guest.run(1e6, () => guest.out.length > 3);
    for (const value of guest.out) expect(value, hint).toBe(expected.next().value);
    expect(seen).toBeGreaterThan(CASES / 4);
  });

  test('computes on in user mode with AVX, whenever it is saved', { timeout: 600_000 }, async () => {
    // again: vpaddq ymm0, ymm0, ymm1; vpxor ymm1, ymm1, ymm2; dec rcx; jnz again; vextracti128 xmm3, ymm0, 1;
    // vmovd eax, xmm3; mov [rdi + r8 * 4], eax; inc r8d; and r8d, 0x3fff; mov ecx, 100000; jmp again
    const loop = 'c5fdd4c1c5f5efca48ffc975f3';
    const code = Buffer.from(`${loop}c4e37d39c301c5f97ed84289048741ffc04181e0ff3f0000b9a0860100ebd4`, 'hex');
    let guest = await rig(HALTED);
    const { vcpu } = guest;
    const { ram } = guest.machine;
    writeTables(ram.memory);
    ram.memory.write(bare.code, code);
    const regs = registers({ 1: 100_000n, 7: BigInt(bare.data) });
    const sregs = vcpu.getSregs();
    placeSregs(sregs, 3, { cr0: 0x8005_0033n, cr4: 0x0004_0620n });
    vcpu.setSregs(sregs);
    vcpu.setXcr0(7n);
    const xsave = new Uint8Array(XSAVE_BUFFER);
    const area = new DataView(xsave.buffer);
    area.setUint32(24, 0x1f80, true);
    area.setBigUint64(512, 7n, true);
    const [one, two] = [random.u32() | 1, random.u32() | 1];
    area.setUint32(576 + 16, one, true); // YMM1, third quadword, low half
    area.setUint32(576 + 32, two, true); // YMM2
    vcpu.setXsave(xsave);
    vcpu.setRegs(regs);
    // The third quadword of YMM1, the upper half's first, is in turn one and one ^ two.
    let sum = 0;
    const next = () => {
      sum = (sum + Math.imul(50_000, (one + (one ^ two)) | 0)) >>> 0;
      return sum;
    };
    let seen = 0;
    for (let n = 0; n < CASES; n++) {
      guest.run(100 + random.below(3000));
      const end = Number(guest.vcpu.getRegs().gpr(8));
      for (; (seen & 0x3fff) !== end; seen++) {
        const value = guest.machine.ram.memory.readU32(bare.data + 4 * (seen & 0x3fff));
        expect(value, `${hint}, ${seen}`).toBe(next());
      }
      guest = await reborn(guest, HALTED);
    }
    expect(seen).toBeGreaterThan(CASES);
  });

  describe('is interrupted by what was to come', () => {
    const fires = async (prepare: (guest: Rig) => void, change?: (state: SavedState) => SavedState) => {
      const before = await rig(HALTED);
      before.run(1e6, () => before.vcpu.getMpState() === 3);
      prepare(before);
      expect(before.out).toEqual([]);
      const after = await reborn(before, HALTED, change);
      after.run(5e6, () => after.out.length > 0);
      expect(after.out).toEqual([1]);
    };
    const withApic = (guest: Rig, fields: Record<number, number>) => {
      const lapic = guest.vcpu.getLapic();
      const view = new DataView(lapic.buffer);
      view.setUint32(0xf0, 0x1ff, true); // enabled
      for (const [at, value] of Object.entries(fields)) view.setUint32(Number(at), value, true);
      guest.vcpu.setLapic(lapic);
    };

    test('the local APIC’s timer', () =>
      fires((guest) => withApic(guest, { 800: 0x40, 992: 0xb, 896: 3e8, 912: 3e8 })));

    test('the TSC deadline', () =>
      fires((guest) => {
        const { vcpu } = guest;
        withApic(guest, { 800: 0x4_0040 });
        vcpu.setMsr(0x6e0, (vcpu.getMsr(TSC) as bigint) + 600_000_000n);
      }));

    test('the TSC deadline, on a host whose TSC began anew', () =>
      fires(
        (guest) => withApic(guest, { 800: 0x4_0040 }),
        (state) => {
          const [vcpu] = state.vcpus;
          const far = 1n << 50n;
          const values = new Map([[TSC, far], [0x6e0, far + 600_000_000n]]); // biome-ignore format: pairs
          const msrs = vcpu?.msrs.map((msr) => ({ ...msr, value: values.get(msr.index)?.toString(16) ?? msr.value }));
          return { ...state, vcpus: [{ ...vcpu, msrs } as VcpuState] };
        },
      ));

    test('an interrupt that waits in the local APIC', () => fires((guest) => withApic(guest, { 544: 1 << 5 })));

    test('the PIT, by the IOAPIC', () =>
      fires(
        (guest) => withApic(guest, {}),
        (state) => {
          const irqchips = state.irqchips.map(({ registers }, chip) => {
            const bytes = Buffer.from(registers, 'base64');
            if (chip === 2) bytes.writeBigUInt64LE(0x41n, 32); // pin 0: edge, not masked, vector 0x41
            return { registers: bytes.toString('base64') };
          });
          return { ...state, irqchips };
        },
      ));
  });

  test('has a TSC that goes on where it was: what was set, or the host’s where KVM leaves it as it is', async () => {
    const before = await rig(HALTED);
    before.vcpu.setMsr(TSC, 1n << 50n);
    const then = before.vcpu.getMsr(TSC) as bigint;
    const after = await reborn(before, HALTED);
    const now = after.vcpu.getMsr(TSC) as bigint;
    expect(now).toBeGreaterThan(then);
    expect(now).toBeLessThan(then + (1n << 44n)); // hours
  });

  test('has a clock that goes on where it was', async () => {
    const THEN = 10n ** 15n;
    const SYSTEM_TIME_NEW = 0x4b56_4d01;
    const before = await rig(HALTED);
    before.vcpu.setMsr(SYSTEM_TIME_NEW, 0x30_0001n);
    const after = await reborn(before, HALTED, (state) => ({ ...state, clock: THEN.toString(16) }));
    after.run(5000);
    const shown = after.machine.ram.memory.readU64(0x30_0010); // struct pvclock_vcpu_time_info: system_time
    const saved = BigInt(`0x${after.state().clock}`);
    for (const time of [shown, saved]) {
      expect(time).toBeGreaterThanOrEqual(THEN);
      expect(time).toBeLessThan(THEN + 10n ** 12n);
    }
  });
});
