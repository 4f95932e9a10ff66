import { describe, expect, test } from 'vitest';
import { StateReader } from '#dist/state-reader.js';
import { random, SerialRig } from './serial-rig.js';

const [DATA, IER, IIR, FCR, LCR, MCR, LSR, MSR, SCR] = [0, 1, 2, 2, 3, 4, 5, 6, 7];
const [RTS, OUT2, LOOP] = [0x02, 0x08, 0x10];
const [RDI, THRI, RLSI, MSI] = [0x01, 0x02, 0x04, 0x08];

/** A UART with FIFOs on, RTS and OUT2 up, and these interrupts enabled. */
function opened(ier = RDI, fcr = 0x81): SerialRig {
  const rig = new SerialRig();
  rig.write(MCR, 0x0b);
  rig.write(FCR, fcr);
  rig.write(IER, ier);
  return rig;
}

const bytes = (count: number, from = 0) => Array.from({ length: count }, (_, i) => (from + i) & 0xff);

describe('16550A registers (datasheet tables I and II)', () => {
  test('values after a master reset', () => {
    const rig = new SerialRig();
    const expectReset = () => {
      expect([IER, IIR, LCR, MCR, LSR, MSR, SCR].map((r) => rig.read(r))).toEqual([0, 0x01, 0, 0, 0x60, 0xb0, 0]);
      expect(rig.level).toBe(false);
    };
    expectReset();
    rig.write(LCR, 0x83);
    rig.write(DATA, 1);
    rig.write(LCR, 0x03);
    for (const [register, value] of [
      [FCR, 0xc1],
      [MCR, 0x0f],
      [SCR, 7],
      [IER, 0x0f],
    ] as const)
      rig.write(register, value);
    expect(rig.level).toBe(true);
    rig.uart.reset();
    expectReset();
  });

  test.each([
    [IER, 0x0f],
    [LCR, 0xff],
    [MCR, 0x1f],
    [SCR, 0xff],
  ])('register %d keeps the bits %d', (register, mask) => {
    const rig = new SerialRig();
    for (const value of [0xff, 0x00, 0xaa, 0x55, 0x80, 0x01]) {
      rig.write(register, value);
      expect(rig.read(register)).toBe(value & mask);
    }
  });

  test('DLAB shows the divisor latch instead of RBR, THR and IER', () => {
    const rig = new SerialRig();
    rig.write(IER, THRI);
    rig.write(LCR, 0x80);
    rig.write(DATA, 0x34);
    rig.write(IER, 0x12);
    expect([rig.read(DATA), rig.read(IER)]).toEqual([0x34, 0x12]);
    rig.write(LCR, 0x00);
    expect([rig.read(DATA), rig.read(IER)]).toEqual([0, THRI]);
    expect(rig.sent).toEqual([]);
    rig.write(LCR, 0x80);
    expect([rig.read(DATA), rig.read(IER)]).toEqual([0x34, 0x12]);
  });

  test('LSR and MSR are for reading only', () => {
    const rig = new SerialRig();
    rig.write(LSR, 0xff);
    rig.write(MSR, 0xff);
    expect([rig.read(LSR), rig.read(MSR)]).toEqual([0x60, 0xb0]);
  });

  test('wide accesses are byte accesses at consecutive registers', () => {
    const rig = new SerialRig();
    rig.uart.write(LCR, Uint8Array.of(0x03, 0x0b));
    expect([rig.read(LCR), rig.read(MCR)]).toEqual([0x03, 0x0b]);
    const data = new Uint8Array(4).fill(0xff);
    rig.uart.read(LCR, data);
    expect(Array.from(data)).toEqual([0x03, 0x0b, 0x60, 0xb0]);
    rig.uart.read(SCR, data); // past the last register: all ones
    expect(Array.from(data)).toEqual([0, 0xff, 0xff, 0xff]);
    rig.uart.write(SCR, Uint8Array.of(1, 2, 3, 4));
    expect(rig.read(SCR)).toBe(1);
    rig.uart.write(1000, Uint8Array.of(1));
  });
});

describe('16550A FIFO control (datasheet 8.4)', () => {
  test('IIR shows enabled FIFOs', () => {
    const rig = new SerialRig();
    expect(rig.read(IIR)).toBe(0x01);
    rig.write(FCR, 0x01);
    expect(rig.read(IIR)).toBe(0xc1);
    rig.write(FCR, 0x00);
    expect(rig.read(IIR)).toBe(0x01);
  });

  test('bits are not taken without FCR0', () => {
    const rig = new SerialRig();
    rig.write(FCR, 0xc6);
    rig.write(FCR, 0x01);
    rig.write(MCR, 0x0b);
    rig.write(IER, RDI);
    rig.type([1]);
    expect(rig.read(IIR)).toBe(0xc4); // trigger level 1, not 14
  });

  test.each([
    [0x01, 1],
    [0x41, 4],
    [0x81, 8],
    [0xc1, 14],
  ])('FCR %i: data available from the trigger level on, character timeout below', (fcr, trigger) => {
    for (let count = 1; count <= 16; count++) {
      const rig = opened(RDI, fcr);
      rig.type(bytes(count));
      for (let left = count; left > 0; left--) {
        expect(rig.read(IIR)).toBe(left >= trigger ? 0xc4 : 0xcc);
        expect(rig.level).toBe(true);
        expect(rig.read(DATA)).toBe(count - left);
      }
      expect(rig.read(IIR)).toBe(0xc1);
      expect(rig.edges).toEqual([true, false]);
    }
  });

  test('without FIFO one byte is held, and there is no character timeout', () => {
    const rig = opened(RDI, 0);
    rig.type([1, 2]);
    expect(rig.read(IIR)).toBe(0x04);
    expect(rig.read(DATA)).toBe(1);
    expect(rig.read(LSR) & 1).toBe(0);
    rig.advance(100_000);
    expect(rig.read(DATA)).toBe(2);
  });

  test('clearing the receiver empties it; what the host had sent comes again later', () => {
    for (const clear of [0x83, 0x00]) {
      const rig = opened();
      rig.type(bytes(20));
      expect([rig.read(DATA), rig.read(DATA)]).toEqual([0, 1]);
      rig.write(FCR, clear);
      expect([rig.read(LSR) & 1, rig.level]).toEqual([0, false]);
      rig.write(FCR, 0x81);
      expect(rig.read(LSR) & 1).toBe(0);
      const rest: number[] = [];
      for (let i = 0; i < 40; i++) {
        rig.advance(1000);
        while (rig.read(LSR) & 1) rest.push(rig.read(DATA));
      }
      expect(rest).toEqual(bytes(18, 2));
    }
  });

  test('clearing the receiver in loopback discards', () => {
    const rig = opened();
    rig.write(MCR, 0x1b);
    for (const byte of bytes(5)) rig.write(DATA, byte);
    rig.write(FCR, 0x83);
    rig.write(MCR, 0x0b);
    rig.advance(100_000);
    expect(rig.read(LSR)).toBe(0x60);
  });

  test('clearing the transmitter drops what the host has not taken and raises THRE', () => {
    const rig = opened(THRI);
    rig.room = 0;
    rig.write(DATA, 1);
    rig.write(DATA, 2);
    expect([rig.read(LSR), rig.read(IIR), rig.level]).toEqual([0, 0xc1, false]);
    rig.write(FCR, 0x85);
    expect([rig.read(LSR), rig.level]).toEqual([0x60, true]);
    rig.makeRoom(10);
    expect(rig.sent).toEqual([]);
    expect(rig.uart.overruns).toBe(0);
  });
});

describe('16550A interrupts (datasheet table IV)', () => {
  test('priorities: line status, received data, transmitter, modem status', () => {
    const rig = opened(0);
    rig.write(MCR, LOOP | OUT2 | RTS); // modem lines change
    for (const byte of bytes(17)) rig.write(DATA, byte); // the 17th overruns
    rig.write(IER, 0x0f);
    expect(rig.level).toBe(true);
    expect(rig.read(IIR)).toBe(0xc6);
    expect(rig.read(LSR)).toBe(0x63);
    expect(rig.read(LSR)).toBe(0x61);
    for (let left = 16; left > 0; left--) {
      expect(rig.read(IIR)).toBe(left >= 8 ? 0xc4 : 0xcc);
      rig.read(DATA);
    }
    expect(rig.read(IIR)).toBe(0xc2);
    expect(rig.read(IIR)).toBe(0xc0);
    expect(rig.read(IIR)).toBe(0xc0); // reading IIR clears only THRE
    expect(rig.level).toBe(true);
    expect(rig.read(MSR) & 0x0f).not.toBe(0);
    expect(rig.read(IIR)).toBe(0xc1);
    expect(rig.level).toBe(false);
    expect(rig.edges).toEqual([true, false]);
  });

  test('each source is masked by its IER bit', () => {
    const rig = opened(0);
    rig.write(MCR, LOOP | OUT2);
    for (const byte of bytes(17)) rig.write(DATA, byte);
    for (const [ier, id] of [
      [RLSI, 0xc6],
      [RDI, 0xc4],
      [THRI, 0xc2],
      [MSI, 0xc0],
      [0, 0xc1],
    ] as const) {
      rig.write(IER, ier);
      expect(rig.read(IIR)).toBe(id);
    }
  });

  test('THRE: enabling raises it, IIR clears it as the source, and enabling again raises it again', () => {
    const rig = opened(0);
    rig.write(IER, THRI);
    expect(rig.level).toBe(true);
    expect([rig.read(IIR), rig.read(IIR)]).toEqual([0xc2, 0xc1]);
    expect(rig.level).toBe(false);
    rig.write(IER, THRI | RDI); // no 0 to 1 transition
    expect(rig.level).toBe(false);
    rig.write(IER, 0);
    rig.write(IER, THRI);
    expect(rig.read(IIR)).toBe(0xc2);
  });

  test('THRE: an IIR read that reports another source leaves it pending', () => {
    const rig = opened(RDI);
    rig.type([1]);
    rig.write(IER, RDI | THRI);
    expect(rig.read(IIR)).toBe(0xcc);
    rig.read(DATA);
    expect([rig.read(IIR), rig.read(IIR)]).toEqual([0xc2, 0xc1]);
  });

  test('THRE: sending raises it again once the host has taken the byte', () => {
    const rig = opened(THRI);
    rig.read(IIR);
    expect(rig.level).toBe(false);
    rig.write(DATA, 65);
    expect([rig.sent, rig.level]).toEqual([[65], true]);
    rig.read(IIR);
    rig.room = 0;
    rig.write(DATA, 66);
    expect([rig.read(LSR), rig.read(IIR), rig.level]).toEqual([0, 0xc1, false]);
    rig.makeRoom(1);
    expect([rig.sent, rig.read(LSR), rig.level, rig.read(IIR)]).toEqual([[65, 66], 0x60, true, 0xc2]);
  });

  test('THRE: enabling does not raise it while the transmitter holds a byte', () => {
    const rig = opened(0);
    rig.room = 0;
    rig.write(DATA, 1);
    rig.write(IER, THRI);
    expect([rig.level, rig.read(IIR)]).toEqual([false, 0xc1]);
    rig.makeRoom(1);
    expect([rig.level, rig.read(IIR)]).toEqual([true, 0xc2]);
  });

  test('THRE: a write to THR takes back a pending one', () => {
    const rig = opened(THRI);
    rig.room = 0;
    expect(rig.level).toBe(true);
    rig.write(DATA, 1);
    expect([rig.level, rig.read(IIR)]).toEqual([false, 0xc1]);
  });

  test('OUT2 gates the line but not IIR', () => {
    const rig = opened(THRI);
    rig.write(MCR, RTS);
    expect(rig.level).toBe(false);
    rig.write(MCR, RTS | OUT2);
    expect(rig.level).toBe(true);
    rig.write(MCR, RTS);
    expect([rig.level, rig.read(IIR)]).toEqual([false, 0xc2]);
  });
});

describe('16550A modem registers and loopback (datasheet 8.7 and 8.9)', () => {
  test.each([
    ['RTS', 0x02, 0x10],
    ['DTR', 0x01, 0x20],
    ['OUT1', 0x04, 0x40],
    ['OUT2', 0x08, 0x80],
  ])('loopback connects %s to its MSR bit', (_, mcr, msr) => {
    const rig = new SerialRig();
    rig.write(MCR, LOOP | mcr);
    expect(rig.read(MSR) & 0xf0).toBe(msr);
    rig.write(MCR, mcr);
    expect(rig.read(MSR) & 0xf0).toBe(0xb0);
  });

  test('deltas show changes since the last read; TERI only the trailing edge of RI', () => {
    const rig = new SerialRig();
    rig.write(MCR, LOOP | 0x0b); // CTS, DSR, DCD stay up, RI stays down
    expect(rig.read(MSR)).toBe(0xb0);
    rig.write(MCR, LOOP | 0x0f); // RI comes
    expect(rig.read(MSR)).toBe(0xf0);
    rig.write(MCR, LOOP | 0x0b); // RI goes
    expect(rig.read(MSR)).toBe(0xb4);
    expect(rig.read(MSR)).toBe(0xb0);
    rig.write(MCR, LOOP);
    rig.write(MCR, LOOP | 0x0b); // down and up again is still a change
    expect(rig.read(MSR)).toBe(0xbb);
  });

  test('the modem status interrupt is cleared by reading MSR', () => {
    const rig = opened(MSI);
    rig.write(MCR, LOOP | OUT2);
    expect([rig.level, rig.read(IIR)]).toEqual([true, 0xc0]);
    rig.read(MSR);
    expect([rig.level, rig.read(IIR)]).toEqual([false, 0xc1]);
  });

  test('loopback: the receiver gets what is transmitted, the host neither gets nor gives', () => {
    const rig = opened(RDI);
    rig.write(MCR, LOOP | OUT2 | RTS);
    rig.type([99]);
    for (const byte of [1, 2, 3]) rig.write(DATA, byte);
    expect(rig.read(LSR)).toBe(0x61);
    expect([rig.read(DATA), rig.read(DATA), rig.read(DATA)]).toEqual([1, 2, 3]);
    rig.advance(100_000);
    expect([rig.read(LSR), rig.sent]).toEqual([0x60, []]);
    rig.write(MCR, OUT2 | RTS);
    expect(rig.read(DATA)).toBe(99);
  });

  test('overrun: the FIFO keeps its 16 bytes, a lone RBR is overwritten', () => {
    for (const [fcr, left] of [
      [0x01, bytes(16)],
      [0, [16]],
    ] as const) {
      const rig = new SerialRig();
      rig.write(FCR, fcr);
      rig.write(MCR, LOOP);
      for (const byte of bytes(17)) rig.write(DATA, byte);
      expect(rig.read(LSR)).toBe(0x63);
      const got: number[] = [];
      while (rig.read(LSR) & 1) got.push(rig.read(DATA));
      expect(got).toEqual(left);
    }
  });

  test('bytes of the host that are unread when loopback begins come after it', () => {
    const rig = opened(RDI);
    rig.type([7, 8]);
    rig.write(MCR, LOOP | OUT2 | RTS);
    expect(rig.read(LSR) & 1).toBe(0);
    rig.write(MCR, OUT2 | RTS);
    rig.advance(50_000);
    expect([rig.read(DATA), rig.read(DATA)]).toEqual([7, 8]);
  });
});

describe('16550A output', () => {
  test('a full host clears THRE and TEMT; 16 bytes wait, further ones are dropped and counted', () => {
    const rig = opened(0);
    rig.room = 3;
    for (const byte of bytes(22)) rig.write(DATA, byte);
    expect([rig.read(LSR), rig.uart.overruns]).toEqual([0, 3]);
    rig.makeRoom(10);
    expect([rig.sent, rig.read(LSR)]).toEqual([bytes(13), 0]);
    rig.makeRoom(10);
    expect([rig.sent, rig.read(LSR)]).toEqual([bytes(19), 0x60]);
    rig.uart.outputReady();
    expect(rig.sent).toEqual(bytes(19));
  });

  test('a sink that calls back while it takes a byte gets none twice', () => {
    const rig = opened(0);
    rig.room = 0;
    for (const byte of bytes(5)) rig.write(DATA, byte);
    rig.onWrite = () => rig.uart.outputReady();
    rig.makeRoom(100);
    expect(rig.sent).toEqual(bytes(5));
  });

  test('without FIFO one byte waits', () => {
    const rig = opened(0, 0);
    rig.room = 0;
    for (const byte of [1, 2, 3]) rig.write(DATA, byte);
    expect([rig.read(LSR), rig.uart.overruns]).toEqual([0, 2]);
    rig.makeRoom(10);
    expect(rig.sent).toEqual([1]);
  });
});

describe('16550A input', () => {
  test('waits for receive interrupts, so that nothing is lost before a driver is there', () => {
    const rig = new SerialRig();
    rig.write(FCR, 0x01);
    rig.type(bytes(3));
    for (let i = 0; i < 10; i++) rig.read(LSR);
    expect([rig.reads, rig.read(DATA)]).toEqual([0, 0]);
    rig.write(IER, RDI);
    expect([rig.read(DATA), rig.read(DATA), rig.read(DATA)]).toEqual([0, 1, 2]);
  });

  test('or for a guest that polls LSR without sending', () => {
    const rig = new SerialRig();
    rig.type([42]);
    for (let i = 0; i < 100; i++) {
      expect(rig.read(LSR)).toBe(0x60); // a polling printk
      rig.write(DATA, i);
    }
    let polls = 0;
    while ((rig.read(LSR) & 1) === 0) expect(polls++).toBeLessThan(50);
    expect(rig.read(DATA)).toBe(42);
  });

  test('stops while RTS is down after it has been up, and goes on when it rises', () => {
    const rig = new SerialRig();
    rig.write(FCR, 0x01);
    rig.write(IER, RDI);
    rig.type([1]);
    expect(rig.read(DATA)).toBe(1); // RTS was never up
    rig.write(MCR, RTS | OUT2);
    rig.write(MCR, OUT2);
    rig.advance(100_000);
    rig.type([2]);
    rig.advance(100_000);
    expect(rig.read(LSR) & 1).toBe(0);
    rig.write(MCR, RTS | OUT2);
    expect([rig.level, rig.read(DATA)]).toEqual([true, 2]);
  });

  test('RTS in loopback does not reach the line: a guest that only tested it gets input', () => {
    const rig = new SerialRig();
    rig.write(MCR, LOOP | RTS | OUT2);
    rig.write(MCR, OUT2);
    rig.write(IER, RDI);
    rig.type([5]);
    expect(rig.read(DATA)).toBe(5);
  });

  test('rests after a drained FIFO for restFactor times what draining took', () => {
    const rig = new SerialRig(3);
    rig.write(FCR, 0x81);
    rig.write(IER, RDI);
    rig.type(bytes(40));
    rig.advance(1000);
    for (const byte of bytes(16)) expect(rig.read(DATA)).toBe(byte);
    rig.advance(2999);
    expect([rig.read(LSR) & 1, rig.expiry]).toEqual([0, rig.time + 1]);
    rig.advance(1);
    expect(rig.read(LSR) & 1).toBe(1);
  });

  test('the rest is neither shorter than 50 µs nor longer than 20 ms', () => {
    for (const [taken, rest] of [
      [0, 50],
      [1_000_000, 20_000],
    ] as const) {
      const rig = opened();
      rig.type(bytes(32));
      rig.advance(taken);
      for (let i = 0; i < 16; i++) rig.read(DATA);
      rig.advance(rest - 1);
      expect(rig.read(LSR) & 1).toBe(0);
      rig.advance(1);
      expect(rig.read(LSR) & 1).toBe(1);
    }
  });

  test('arms no timer when the source is empty, nor twice', () => {
    const rig = opened();
    rig.type([1]);
    rig.read(DATA);
    expect(rig.timersArmed).toBe(0);
    rig.type([2]);
    rig.type([3]);
    expect(rig.timersArmed).toBe(1);
    rig.advance(1000);
    expect([rig.read(DATA), rig.read(DATA)]).toEqual([2, 3]);
  });

  test('an early or a spurious timer does no harm', () => {
    const rig = opened();
    rig.uart.timerExpired();
    rig.type(bytes(32));
    rig.advance(500);
    for (let i = 0; i < 16; i++) rig.read(DATA);
    rig.uart.timerExpired();
    expect(rig.read(LSR) & 1).toBe(0);
    rig.advance(1000);
    expect(rig.read(DATA)).toBe(16);
  });

  test('a clock that jumps back does not stop input', () => {
    const rig = opened();
    rig.time = 1e9;
    rig.type(bytes(32));
    for (let i = 0; i < 16; i++) rig.read(DATA);
    rig.time = 0;
    rig.expiry = undefined;
    rig.uart.timerExpired();
    expect(rig.read(DATA)).toBe(16);
  });
});

describe('16550A state', () => {
  test('save and restore carry everything, as plain data', () => {
    const rig = opened(0x0f);
    rig.write(LCR, 0x83);
    rig.write(DATA, 0x01);
    rig.write(IER, 0x02);
    rig.write(LCR, 0x03);
    rig.write(SCR, 0x5a);
    rig.type(bytes(20));
    rig.read(DATA);
    rig.room = 0;
    for (const byte of bytes(5, 100)) rig.write(DATA, byte);
    const state = JSON.parse(JSON.stringify(rig.uart.save()));
    expect(state).toEqual(rig.uart.save());

    const other = new SerialRig();
    other.room = 0;
    other.uart.restore(new StateReader(state, 'serial'));
    expect(other.uart.save()).toEqual(state);
    expect(other.edges).toEqual([true]);
    for (const register of [IER, LCR, MCR, IIR, LSR, MSR, SCR]) expect(other.read(register)).toBe(rig.read(register));
    other.makeRoom(100);
    expect(other.sent).toEqual(bytes(5, 100));
    other.type(bytes(4, 16));
    const got: number[] = [];
    for (let i = 0; i < 20; i++) {
      while (other.read(LSR) & 1) got.push(other.read(DATA));
      other.advance(20_000);
    }
    expect(got).toEqual(bytes(19, 1));
  });

  test('a restored one goes on by itself: it sends what the host had not taken and takes what there is', () => {
    const rig = opened(0x01);
    rig.write(IER, RDI | THRI);
    rig.room = 0;
    for (const byte of bytes(5, 100)) rig.write(DATA, byte);
    const state = rig.uart.save();
    const other = new SerialRig();
    other.pending.push(7, 8);
    other.uart.restore(new StateReader(state, 'serial'));
    expect(other.sent).toEqual(bytes(5, 100));
    expect(other.uart.save()).toMatchObject({ rx: [7, 8], tx: [], threPending: true });
    expect(other.level).toBe(true);
    // An empty source is asked again only when it says that it has something.
    const idle = new SerialRig();
    idle.uart.restore(new StateReader(state, 'serial'));
    idle.type([9]);
    expect(idle.uart.save().rx).toEqual([9]);
  });

  test('unread input that was on the line survives', () => {
    const rig = opened(0, 0);
    rig.write(IER, RDI);
    rig.type(bytes(10));
    const state = rig.uart.save();
    expect([state.rx, state.line]).toEqual([[0], bytes(9, 1)]);
    const other = new SerialRig();
    other.uart.restore(new StateReader(state, 'serial'));
    const got: number[] = [];
    for (let i = 0; i < 20; i++) {
      while (other.read(LSR) & 1) got.push(other.read(DATA));
      other.advance(1000);
    }
    expect(got).toEqual(bytes(10));
  });

  test.each([
    ['ier', -1],
    ['mcr', 9999],
    ['divisor', 1e9],
    ['rx', bytes(17)],
    ['tx', bytes(17)],
    ['line', bytes(17)],
    ['line', [256]],
    ['rtsSeen', 1],
    ['modemDeltas', undefined],
  ])('a state whose %s is %j is refused', (name, value) => {
    const rig = new SerialRig();
    const state = new StateReader({ ...rig.uart.save(), [name]: value }, 'serial');
    expect(() => rig.uart.restore(state)).toThrow(`serial.${name}`);
  });
});

describe('16550A under a hostile guest', () => {
  test.each([1, 2, 3, 4])('100,000 random accesses keep the invariants (seed %d)', (seed) => {
    const next = random(seed * 0x9e37_79b9);
    const rig = new SerialRig();
    const buffer = new Uint8Array(8);
    let fed = 0;
    for (let i = 0; i < 100_000; i++) {
      const roll = next();
      const register = roll & 7;
      switch ((roll >> 8) % 12) {
        case 0:
          rig.room = next() % 40;
          rig.uart.outputReady();
          break;
        case 1:
          if (rig.pending.length < 100) rig.type(bytes(next() % 50, fed++));
          break;
        case 2:
          rig.advance(next() % 30_000);
          break;
        case 3:
          rig.uart.read(next() % 20, buffer.subarray(0, 1 << (next() & 3)));
          break;
        case 4:
          buffer.fill(next());
          rig.uart.write(next() % 20, buffer.subarray(0, 1 << (next() & 3)));
          break;
        case 5: {
          if (roll % 50) break;
          const { rx, line, tx, threPending, ...rest } = rig.uart.save();
          const saved = JSON.parse(JSON.stringify({ rx, line, tx, threPending, ...rest }));
          rig.uart.restore(new StateReader(saved, 'serial'));
          const after = rig.uart.save();
          expect(after).toMatchObject(rest);
          // It goes on at once.
          expect([...after.rx, ...after.line].slice(0, rx.length + line.length)).toEqual([...rx, ...line]);
          expect(tx.slice(tx.length - after.tx.length)).toEqual(after.tx);
          break;
        }
        case 6:
        case 7:
        case 8:
          rig.write(register, next() & 0xff);
          break;
        default:
          rig.read(register);
      }
      const state = rig.uart.save();
      const capacity = state.fcr & 1 ? 16 : 1;
      if (state.rx.length > capacity || state.tx.length > capacity) throw new Error(`FIFO too long after ${i}`);
      if (!state.rxLooped && state.rx.length + state.line.length > 16) throw new Error(`line too long after ${i}`);
      if (state.ier > 0x0f || state.mcr > 0x1f || state.modemDeltas > 0x0f) throw new Error(`stray bits after ${i}`);
      if (state.threPending && (state.tx.length > 0 || !(state.ier & THRI))) throw new Error(`THRE pending after ${i}`);
      const lsr = rig.read(LSR);
      if (lsr & 0x9c || (lsr & 1) !== Number(rig.uart.save().rx.length > 0)) throw new Error(`LSR ${lsr} after ${i}`);
      if (((lsr & 0x60) === 0x60) !== (state.tx.length === 0)) throw new Error(`THRE ${lsr} after ${i}`);
      const level = rig.level;
      const iir = rig.read(IIR);
      if (level !== ((iir & 1) === 0 && (state.mcr & OUT2) !== 0))
        throw new Error(`line ${level}, IIR ${iir} after ${i}`);
    }
    expect(rig.sent.length).toBeGreaterThan(200);
  });

  test('whatever a guest does to FIFO, RTS, IER and loopback, what it reads of the host is whole and in order', () => {
    const next = random(99);
    const rig = opened();
    const got: number[] = [];
    let fed = 0;
    for (let i = 0; i < 50_000; i++) {
      switch (next() % 8) {
        case 0: {
          const count = next() % 20;
          rig.type(bytes(count, fed));
          fed += count;
          break;
        }
        case 1:
          rig.write(FCR, [0x83, 0x81, 0x00, 0x07][next() & 3] as number);
          break;
        case 2:
          rig.write(MCR, [RTS | OUT2, OUT2, LOOP | RTS, RTS][next() & 3] as number);
          break;
        case 3:
          rig.write(IER, next() & 0x0f);
          break;
        default:
          rig.advance(next() % 2000);
          if (rig.read(LSR) & 1) got.push(rig.read(DATA));
      }
    }
    expect(got.length).toBeGreaterThan(1000);
    expect(got).toEqual(bytes(got.length));
  });
});
