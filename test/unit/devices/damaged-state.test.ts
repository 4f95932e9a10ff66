import { describe, test } from 'vitest';
import { BootTimer } from '#dist/devices/boot-timer.js';
import { CmosRtc } from '#dist/devices/cmos-rtc.js';
import { I8042 } from '#dist/devices/i8042.js';
import { SleepControl } from '#dist/devices/sleep-control.js';
import { expectDamageIsRefused } from '../../support/damaged-state.js';
import { SerialRig } from './serial-rig.js';

describe('a state of which a field is missing or wrong is refused by that field', () => {
  test.each([
    ['16550A', () => new SerialRig().uart],
    ['i8042', () => new I8042(() => {})],
    ['CMOS clock', () => new CmosRtc({ clock: Date, memoryBelow4GiB: 1 << 20 })],
    ['sleep control', () => new SleepControl(() => {})],
    ['boot timer', () => new BootTimer(() => {})],
  ])('%s', (_, make) => {
    expectDamageIsRefused(make().save(), make);
  });
});
