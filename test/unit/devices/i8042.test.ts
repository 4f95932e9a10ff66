import { describe, expect, test, vi } from 'vitest';
import { I8042 } from '#dist/devices/i8042.js';
import { StateReader } from '#dist/state-reader.js';
import { random } from './serial-rig.js';

const [DATA, STATUS, COMMAND] = [0, 4, 4];
const [OBF, IBF] = [0x01, 0x02];

function controller() {
  const onReset = vi.fn();
  const device = new I8042(onReset);
  return { device, onReset };
}

/** Writes a command and reads its answer as a driver does: when the output buffer is full. */
function ask(device: I8042, command: number, parameter?: number): number {
  device.writeByte(COMMAND, command);
  if (parameter !== undefined) device.writeByte(DATA, parameter);
  expect(device.readByte(STATUS) & OBF).toBe(OBF);
  return device.readByte(DATA);
}

describe('I8042', () => {
  test("Linux's i8042_flush finds no controller after 16 reads, and again after a reload or a kexec", () => {
    const { device } = controller();
    for (let probe = 0; probe < 10; probe++) {
      let count = 0;
      let accesses = 0;
      let found = true;
      while (device.readByte(STATUS) & OBF) {
        accesses++;
        if (count++ >= 16) {
          found = false;
          break;
        }
        device.readByte(DATA);
        accesses++;
      }
      expect([found, accesses]).toEqual([false, 33]);
    }
  });

  test('Linux reboots through it: the input buffer is never full, 0xfe resets', () => {
    const { device, onReset } = controller();
    expect(device.readByte(STATUS) & IBF).toBe(0);
    device.writeByte(COMMAND, 0xfe);
    expect(onReset).toHaveBeenCalledTimes(1);
    device.reset();
    expect(device.save()).toEqual(new I8042(() => {}).save());
  });

  test.each(Array.from({ length: 16 }, (_, i) => 0xf0 + i))(
    'command %i pulses reset if its bit 0 is clear',
    (command) => {
      const { device, onReset } = controller();
      device.writeByte(COMMAND, command);
      expect(onReset).toHaveBeenCalledTimes(command & 1 ? 0 : 1);
    },
  );

  test('the output port resets when its bit 0 falls, and only by its own command', () => {
    const { device, onReset } = controller();
    device.writeByte(COMMAND, 0xd1);
    device.writeByte(DATA, 0xdf); // A20 on, as Linux writes it
    device.writeByte(DATA, 0x00); // to the keyboard
    device.writeByte(COMMAND, 0x60);
    device.writeByte(DATA, 0x00); // configuration
    device.writeByte(COMMAND, 0xd1);
    device.writeByte(COMMAND, 0xaa); // a command between drops the first
    device.writeByte(DATA, 0x00);
    expect(onReset).not.toHaveBeenCalled();
    expect(ask(device, 0xd0)).toBe(0xdf);
    device.writeByte(COMMAND, 0xd1);
    device.writeByte(DATA, 0xde);
    expect(onReset).toHaveBeenCalledTimes(1);
  });

  test.each([
    ['self-test passes', 0xaa, 0x55],
    ['keyboard port test passes', 0xab, 0x00],
    ['auxiliary port test fails', 0xa9, 0x01],
    ['input port: not locked', 0xc0, 0x80],
  ])('%s', (_, command, answer) => {
    expect(ask(controller().device, command)).toBe(answer);
  });

  test('the configuration byte is kept, and follows the enable commands', () => {
    const { device } = controller();
    ask(device, 0x60, 0x47);
    expect(ask(device, 0x20)).toBe(0x47);
    for (const [command, config] of [
      [0xad, 0x57],
      [0xa7, 0x77],
      [0xae, 0x67],
      [0xa8, 0x47],
    ] as const) {
      device.writeByte(COMMAND, command);
      expect(ask(device, 0x20)).toBe(config);
    }
  });

  test('the auxiliary loop answers without the mouse bit, so that Linux finds no mouse port at once', () => {
    const { device } = controller();
    device.writeByte(COMMAND, 0xd3);
    device.writeByte(DATA, 0x5a);
    expect(device.readByte(STATUS) & (OBF | 0x20)).toBe(OBF);
    expect(device.readByte(DATA)).toBe(0x5a);
    expect(ask(device, 0xd2, 0x33)).toBe(0x33);
  });

  test('a keyboard that is not there answers "resend"', () => {
    const { device } = controller();
    device.writeByte(DATA, 0xf2);
    expect(device.readByte(DATA)).toBe(0xfe);
  });

  test('a guest that reads until the buffer is empty gets to an end, and then finds a working controller', () => {
    const { device } = controller();
    let reads = 0;
    while (device.readByte(STATUS) & OBF) {
      expect(device.readByte(DATA)).toBe(0xff);
      expect(reads++).toBeLessThan(2000);
    }
    device.writeByte(COMMAND, 0xaa);
    expect(device.readByte(STATUS)).toBe(0x1d); // not locked, last was command, self-test passed, output full
    expect(device.readByte(DATA)).toBe(0x55);
    expect(device.readByte(STATUS) & OBF).toBe(OBF); // after a command it looks as at first
    device.writeByte(DATA, 0);
    expect(device.readByte(STATUS) & 0x08).toBe(0);
  });

  test('ports between data and status are not decoded', () => {
    const { device, onReset } = controller();
    const before = device.save();
    for (const offset of [1, 2, 3, 5, 100]) {
      device.writeByte(offset, 0xfe);
      expect(device.readByte(offset)).toBe(0xff);
    }
    expect(device.save()).toEqual(before);
    expect(onReset).not.toHaveBeenCalled();
  });

  test('random accesses of any width never throw, and IBF stays clear; state survives', () => {
    const next = random(7);
    const { device } = controller();
    const data = new Uint8Array(8);
    for (let i = 0; i < 100_000; i++) {
      const window = data.subarray(0, 1 << (next() & 3));
      const offset = next() % 6;
      if (next() & 1) device.read(offset, window);
      else device.write(offset, window.fill(next()));
      if (device.readByte(STATUS) & ~0x1d) throw new Error(`status after ${i}`);
      if (i % 1000 === 0) {
        const state = JSON.parse(JSON.stringify(device.save()));
        const other = new I8042(() => {});
        other.restore(new StateReader(state, 'i8042'));
        expect(other.save()).toEqual(state);
      }
    }
  });
});
