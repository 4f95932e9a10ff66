import { describe, expect, test } from 'vitest';
import { commandLine } from '#dist/machine/command-line.js';
import { type MachineConfig, resolveConfig } from '#dist/machine/config.js';

const consoles = (config: Partial<MachineConfig>) =>
  commandLine(resolveConfig({ kernel: 'vmlinux', ...config }), 'hardware').match(/console=\S+/g) ?? [];

const terminal = { name: 'terminal', console: true };
const plain = { name: 'plain' };
const SERIAL = 'console=ttyS0,115200n8r';
const HVC = 'console=hvc0';

describe('the guest’s console', () => {
  for (const [what, config, expected] of [
    ['ttyS0 by default', {}, [SERIAL]],
    ['ttyS0 beside a console port', { consolePorts: [terminal] }, [SERIAL]],
    ['hvc0 without a serial port', { serial: false, consolePorts: [plain, terminal] }, [HVC]],
    ['none where there is none', { serial: false, consolePorts: [plain] }, []],
    [
      'hvc0 by wish, after ttyS0: the last is /dev/console',
      { consolePorts: [terminal], console: 'hvc0' },
      [SERIAL, HVC],
    ],
    ['ttyS0 by wish', { consolePorts: [terminal], console: 'ttyS0' }, [SERIAL]],
  ] as const) {
    test(what, () => expect(consoles(config)).toEqual(expected));
  }

  test('what is appended comes after it', () => {
    expect(consoles({ serial: false, consolePorts: [terminal], append: 'console=tty9' })).toEqual([
      HVC,
      'console=tty9',
    ]);
  });

  for (const [config, message] of [
    [{ console: 'hvc0' }, /console: there is no hvc0, since no console port has console: true/],
    [{ console: 'hvc0', consolePorts: [plain] }, /console: there is no hvc0/],
    [{ console: 'ttyS0', serial: false }, /console: there is no ttyS0, since serial is false/],
    [{ console: 'tty0' as 'ttyS0' }, /console: tty0 is neither ttyS0 nor hvc0/],
    [{ consolePorts: [{ name: '' }] }, /consolePorts\[0\].name: '' is not/],
    [{ consolePorts: [{ name: 'a/b' }] }, /consolePorts\[0\].name: 'a\/b' is not/],
    [{ consolePorts: [{ name: 'x'.repeat(65) }] }, /at most 64/],
    [{ consolePorts: [plain, plain] }, /consolePorts\[1\].name: there is a 'plain' already/],
    [{ consolePorts: Array.from({ length: 17 }, (_, i) => ({ name: `p${i}` })) }, /consolePorts: at most 16/],
  ] as const) {
    test(`refuses ${JSON.stringify(config).slice(0, 60)}`, () => {
      expect(() => resolveConfig({ kernel: 'vmlinux', ...config })).toThrow(message);
    });
  }
});
