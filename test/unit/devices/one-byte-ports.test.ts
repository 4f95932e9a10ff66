import { describe, expect, test, vi } from 'vitest';
import { BootTimer } from '#dist/devices/boot-timer.js';
import { DebugExit } from '#dist/devices/debug-exit.js';
import { SleepControl } from '#dist/devices/sleep-control.js';
import { StateReader } from '#dist/state-reader.js';

describe('DebugExit', () => {
  test.each([0, 1, 42, 255])('a byte ends the machine with its value: %d', (code) => {
    const onExit = vi.fn();
    new DebugExit(onExit).write(0, Uint8Array.of(code));
    expect(onExit.mock.calls).toEqual([[code]]);
  });

  test('a wider write counts once, by its low byte; reads are all ones; other offsets do nothing', () => {
    const onExit = vi.fn();
    const device = new DebugExit(onExit);
    device.write(0, Uint8Array.of(3, 1, 2, 4));
    device.write(1, Uint8Array.of(9));
    const data = new Uint8Array(4);
    device.read(0, data);
    expect(Array.from(data)).toEqual([255, 255, 255, 255]);
    expect(onExit.mock.calls).toEqual([[3]]);
  });
});

describe('SleepControl', () => {
  test('powers off for SLP_EN with SLP_TYP 5 and nothing else', () => {
    for (let value = 0; value < 256; value++) {
      const onPowerOff = vi.fn();
      new SleepControl(onPowerOff).writeByte(0, value);
      expect(onPowerOff).toHaveBeenCalledTimes(value & 0x20 && ((value >> 2) & 7) === 5 ? 1 : 0);
    }
  });

  test('Linux writes SLP_TYP first and SLP_EN with it after; SLP_EN reads as zero', () => {
    const onPowerOff = vi.fn();
    const device = new SleepControl(onPowerOff);
    device.writeByte(0, 5 << 2);
    expect([device.readByte(0), onPowerOff.mock.calls.length]).toEqual([5 << 2, 0]);
    device.writeByte(0, (5 << 2) | 0x20);
    expect([device.readByte(0), onPowerOff.mock.calls.length]).toEqual([5 << 2, 1]);
    device.writeByte(1, 0x34);
    expect([device.readByte(1), onPowerOff.mock.calls.length]).toEqual([0xff, 1]);
  });

  test('state', () => {
    const device = new SleepControl(() => {});
    device.writeByte(0, 3 << 2);
    const other = new SleepControl(() => {});
    other.restore(new StateReader(JSON.parse(JSON.stringify(device.save())), 'sleep'));
    expect(other.readByte(0)).toBe(3 << 2);
    other.reset();
    expect(other.readByte(0)).toBe(0);
  });
});

describe('BootTimer', () => {
  test('names the first stamp of each milestone only', () => {
    const names: string[] = [];
    const device = new BootTimer((name) => names.push(name));
    for (const value of [1, 1, 2, 0, 7, 255, 2, 1, 7]) device.write(0, Uint8Array.of(value));
    device.writeByte(1, 9);
    expect(device.readByte()).toBe(0xff);
    expect(names).toEqual(['init', 'shell', 'milestone-0', 'milestone-7', 'milestone-255']);
  });

  test('a restored machine does not stamp again, a reset one does', () => {
    const names: string[] = [];
    const device = new BootTimer((name) => names.push(name));
    device.writeByte(0, 1);
    const state = JSON.parse(JSON.stringify(device.save()));
    expect(state).toEqual({ seen: [1] });
    device.reset();
    device.writeByte(0, 1);
    device.restore(new StateReader(state, 'timer'));
    device.writeByte(0, 1);
    expect(names).toEqual(['init', 'init']);
  });
});
