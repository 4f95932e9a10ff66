import { describe, expect, test } from 'vitest';
import { MmioDevice } from '#dist/device/index.js';
import { UserMmio } from '#dist/machine/user-devices/mmio.js';
import { StateReader } from '#dist/state-reader.js';
import { expectDamageIsRefused } from '../../support/damaged-state.js';
import { RecordingServices } from '../../support/devices/services.js';
import { mockMemory } from '../../support/virtio/mock-driver.js';

/** Notes every access. */
class Recorder extends MmioDevice {
  override size = 0x20;
  readonly accesses: string[] = [];
  value: unknown = 0x1234_5678;

  read(offset: number, size: number): number {
    this.accesses.push(`read ${offset}/${size}`);
    if (this.value instanceof Error) throw this.value;
    return this.value as number;
  }

  override write(offset: number, value: number, size: number): void {
    this.accesses.push(`write ${offset}/${size} ${value.toString(16)}`);
    if (value === 0xdead) throw new Error('written dead');
  }
}

function rig(trigger: MmioDevice['trigger'] = 'level') {
  const services = new RecordingServices();
  const host = new UserMmio(0, 'recorder', services);
  const device = new Recorder({ name: 'recorder', options: undefined, host });
  Object.assign(device, { trigger });
  host.adopt(device);
  const levels: boolean[] = [];
  const power = { memory: mockMemory().memory, setInterrupt: (level: boolean) => levels.push(level) };
  host.powerOn(power);
  const read = (offset: number, length: number) => {
    const data = new Uint8Array(length).fill(0xff);
    host.read(offset, data);
    return Buffer.from(data).toString('hex');
  };
  const write = (offset: number, hex: string) => host.write(offset, Buffer.from(hex, 'hex'));
  return { services, host, device, levels, power, read, write };
}

describe('a user’s MMIO device', () => {
  test('is read in accesses of 1, 2 and 4 bytes, whatever the guest does', () => {
    const { device, read } = rig();
    expect([read(3, 1), read(2, 2), read(0, 4), read(8, 8), read(1, 7)]).toEqual([
      '78',
      '7856',
      '78563412',
      '7856341278563412',
      '78563412785678',
    ]);
    expect(device.accesses).toEqual([
      'read 3/1',
      'read 2/2',
      'read 0/4',
      'read 8/4',
      'read 12/4',
      'read 1/4',
      'read 5/2',
      'read 7/1',
    ]);
  });

  test('what it returns is cut to the access; what is no number reads as 0', () => {
    const { device, read } = rig();
    for (const [value, expected] of [
      [2 ** 32 + 5, '05000000'],
      [-1, 'ffffffff'],
      [1.9, '01000000'],
      [7n, '07000000'],
      [undefined, '00000000'],
    ] as const) {
      device.value = value;
      expect(read(0, 4)).toBe(expected);
    }
  });

  test('is written likewise', () => {
    const { device, write } = rig();
    for (const hex of ['ff', 'ffff', 'ffffffff', '0102030405060788', '010203']) write(4, hex);
    expect(device.accesses).toEqual([
      'write 4/1 ff',
      'write 4/2 ffff',
      'write 4/4 ffffffff',
      'write 4/4 4030201',
      'write 8/4 88070605',
      'write 4/2 201',
      'write 6/1 3',
    ]);
  });

  test('its interrupt changes level only when it does; a pulse is both edges', () => {
    const { device, levels } = rig();
    for (const level of [false, true, true, false]) device.interrupt.set(level);
    device.interrupt.pulse();
    expect(levels).toEqual([true, false, true, false]);
  });

  test('one that throws reads as all ones, is not written, and lets its interrupt go, until the guest is reset', () => {
    const { device, host, levels, power, read, services, write } = rig();
    device.interrupt.set(true);
    write(0, 'adde0000');
    expect(levels).toEqual([true, false]);
    expect(services.reports).toMatchObject([{ type: 'device-failed', why: /^Error: written dead/ }]);
    expect(services.lines).toMatchObject([/^device recorder: Error: written dead.*until the guest is reset$/]);
    device.accesses.length = 0;
    expect([read(0, 4), read(0, 8)]).toEqual(['ffffffff', 'ffffffffffffffff']);
    write(0, '01');
    expect([device.accesses, services.reports.length]).toEqual([[], 1]);
    host.powerOff();
    device.interrupt.set(true); // to nobody
    host.powerOn(power);
    expect(read(0, 4)).toBe('78563412');
    device.interrupt.set(true);
    expect(levels).toEqual([true, false, true]);
  });

  test('one that throws in the middle of an access reads as ones from there on', () => {
    const { device, read } = rig();
    device.value = new Error('no');
    expect(read(0, 8)).toBe('ffffffffffffffff');
    expect(device.accesses).toEqual(['read 0/4']);
  });

  test('one whose method is asynchronous is told so: it would never go on', () => {
    const { device, read, services } = rig();
    device.value = Promise.resolve(5);
    expect(read(0, 4)).toBe('ffffffff');
    expect(services.reports).toMatchObject([{ why: expect.stringMatching(/^TypeError: a method returned a promise/) }]);
  });

  for (const [fields, message] of [
    [{ size: 3 }, /^size: 3/],
    [{ size: 2 ** 24 + 1 }, /^size/],
    [{ size: '16' }, /^size/],
    [{ trigger: 'rising' }, /^trigger: rising/],
    [{ read: undefined }, /^read: it has no/],
  ] as const) {
    test(`cannot have ${JSON.stringify(fields)}`, () => {
      expect(UserMmio.problem(Object.assign(rig().device, fields))).toMatch(message);
    });
  }
});

describe('a user’s MMIO device that is saved and restored', () => {
  const save = (host: UserMmio) => JSON.parse(JSON.stringify(host.save()));

  test('has its state and its line again; without a state it begins as after power-on', () => {
    const { device, host } = rig();
    device.save = () => ({ value: 7 });
    device.interrupt.set(true);
    const other = rig();
    other.device.restore = (state) => {
      other.device.value = (state as { value: number }).value;
    };
    other.host.restore(new StateReader(save(host), 'state'));
    expect([other.read(0, 4), other.levels]).toEqual(['07000000', [true]]);
    other.device.interrupt.set(false);
    expect(other.levels).toEqual([true, false]);
    const third = rig();
    third.host.restore(new StateReader(save(other.host), 'state'));
    expect([third.read(0, 4), third.levels]).toEqual(['78563412', []]);
  });

  test('an edge that was given is not given again', () => {
    const { device, host } = rig('edge');
    device.interrupt.set(true);
    const other = rig('edge');
    other.host.restore(new StateReader(save(host), 'state'));
    expect(other.levels).toEqual([]);
    other.device.interrupt.set(true);
    expect(other.levels).toEqual([]);
    other.device.interrupt.set(false);
    other.device.interrupt.set(true);
    expect(other.levels).toEqual([false, true]);
  });

  test('one that was stopped stays so until the guest is reset', () => {
    const { host, write } = rig();
    write(0, 'adde0000');
    const other = rig();
    other.host.restore(new StateReader(save(host), 'state'));
    expect(other.read(0, 4)).toBe('ffffffff');
    expect(other.device.accesses).toEqual([]);
    other.host.powerOff();
    other.host.powerOn(other.power);
    expect(other.read(0, 4)).toBe('78563412');
  });

  test('a state that cannot be is refused by its field', () => {
    expectDamageIsRefused(rig().host.save(), () => rig().host);
  });
});
