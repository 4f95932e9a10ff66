import { describe, expect, test } from 'vitest';
import { type Costs, Linux8250, nestedHost, plainHost } from './linux-8250.js';
import { random, SerialRig } from './serial-rig.js';

const KiB = 1024;
const text = (rig: SerialRig) => Buffer.from(rig.sent).toString();

function randomBytes(count: number): number[] {
  const next = random(0x1234_5678);
  return Array.from({ length: count }, () => next() & 0xff);
}

describe.each<[string, Costs]>([
  ['nested', nestedHost],
  ['plain', plainHost],
])("Linux's 8250 driver on %s KVM", (_, costs) => {
  test('finds a 16550A with a FIFO of 16 bytes, and sends nothing meanwhile', () => {
    const rig = new SerialRig();
    const driver = new Linux8250(rig, costs);
    expect(driver.autoconfig()).toBe('16550A');
    expect(driver.sizeFifo()).toBe(16);
    expect([rig.sent, rig.uart.overruns]).toEqual([[], 0]);
  });

  test('sees no bugs to work around when it opens the port', () => {
    const rig = new SerialRig();
    const driver = new Linux8250(rig, costs);
    driver.autoconfig();
    driver.open();
    expect(driver.bugs).toEqual([]);
  });

  test('input that waits from power-on is lost neither by probing nor by console output, opening or set_termios', () => {
    const rig = new SerialRig();
    const input = randomBytes(500);
    rig.type(input);
    const driver = new Linux8250(rig, costs);
    driver.printk('early\n');
    driver.autoconfig();
    driver.printk('booting, and booting, and booting\n');
    driver.open();
    driver.close();
    driver.open();
    for (let i = 0; i < 20; i++) driver.setTermios();
    driver.run(() => driver.received.length >= 300 && driver.idle);
    driver.close();
    driver.printk('between two opens\n');
    driver.open();
    driver.run(() => driver.received.length === input.length && driver.idle);
    expect(driver.received).toEqual(input);
    expect(text(rig)).toContain('between two opens\n');
  });

  test('a paste of 64 KiB is read and echoed whole', () => {
    const rig = new SerialRig();
    const driver = new Linux8250(rig, costs);
    driver.autoconfig();
    driver.open();
    const input = randomBytes(64 * KiB);
    rig.type(input);
    driver.run(() => rig.sent.length === input.length);
    expect(driver.received).toEqual(input);
    expect(rig.sent).toEqual(input);
    expect([driver.flipOverruns, driver.lineOverruns, rig.uart.overruns]).toEqual([0, 0, 0]);
  });

  test('a paste of 256 KiB, four times the flip buffer, does not fill it', () => {
    const rig = new SerialRig();
    const driver = new Linux8250(rig, costs);
    driver.autoconfig();
    driver.open();
    const input = randomBytes(256 * KiB);
    rig.type(input);
    driver.run(() => driver.received.length === input.length);
    expect(driver.received).toEqual(input);
    expect(driver.flipHighWater).toBeLessThan(32 * KiB);
  });

  test('the interrupt handler is never fed for long', () => {
    const rig = new SerialRig();
    const driver = new Linux8250(rig, costs);
    driver.echo = false;
    driver.open();
    rig.type(randomBytes(8 * KiB));
    driver.run(() => driver.received.length === 8 * KiB);
    const perByte = 2 * costs.access + costs.receive;
    expect(driver.longestInterrupt).toBeLessThan(3 * (costs.interrupt + 16 * perByte + 6 * costs.access));
  });

  test('output to a host that takes little at a time is complete and in order', () => {
    const rig = new SerialRig();
    const driver = new Linux8250(rig, costs);
    driver.open();
    const output = randomBytes(32 * KiB);
    let written = 0;
    let steps = 0;
    driver.run(() => {
      written += driver.write(output.slice(written, written + 100));
      if (steps++ % 50 === 0) rig.makeRoom(7);
      return rig.sent.length === output.length;
    });
    expect(rig.sent).toEqual(output);
    expect(rig.uart.overruns).toBe(0);
  });

  test('with CRTSCTS a reader that stalls throttles the host', () => {
    const highWater = (throttleAt: number) => {
      const rig = new SerialRig();
      const driver = new Linux8250(rig, { ...costs, consume: costs.consume * 50 });
      driver.echo = false;
      driver.throttleAt = throttleAt;
      driver.open();
      const input = randomBytes(4 * KiB);
      rig.type(input);
      driver.run(() => driver.received.length === input.length);
      expect(driver.received).toEqual(input);
      return driver.flipHighWater;
    };
    expect(highWater(128)).toBeLessThan(128 + 3 * 16);
    expect(highWater(Number.POSITIVE_INFINITY)).toBeGreaterThan(1000);
  });
});

test('a blocked host costs a polling printk its time-out, then bytes, and nothing after that', () => {
  const rig = new SerialRig();
  const driver = new Linux8250(rig, plainHost);
  driver.open();
  rig.room = 5;
  driver.printk('0123456789abcdefghijklmnopqrstuvwxyz');
  expect(text(rig)).toBe('01234');
  expect(rig.uart.overruns).toBe(36 - 5 - 16);
  rig.makeRoom(1000);
  driver.printk('\nnext line');
  expect(text(rig)).toBe('0123456789abcdefghijk\nnext line');
});

test('a keystroke is echoed without waiting for a timer', () => {
  const rig = new SerialRig();
  const driver = new Linux8250(rig, plainHost);
  driver.open();
  rig.advance(10_000);
  const armed = rig.timersArmed;
  for (const byte of Buffer.from('hello')) {
    const start = rig.time;
    const before = rig.sent.length;
    rig.type([byte]);
    driver.run(() => rig.sent.length > before);
    expect(rig.time - start).toBeLessThan(100);
    rig.advance(100_000);
  }
  expect(text(rig)).toBe('hello');
  expect(rig.timersArmed).toBe(armed);
});
