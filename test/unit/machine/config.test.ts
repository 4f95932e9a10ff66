import { describe, expect, test } from 'vitest';
import { checkConfig, type MachineConfig, resolveConfig } from '#dist/machine/config.js';

/** As a program in JavaScript can write it. */
const check = (config: unknown) => {
  checkConfig(config as MachineConfig);
  resolveConfig({ kernel: 'vmlinux', ...(config as MachineConfig) });
};

describe('a wrong configuration is refused by the name of its field', () => {
  for (const [config, message] of [
    [null, 'config: must be an object'],
    [[], 'config: must be an object'],
    [{ memoy: 1 }, 'memoy: there is no such field; there are kernel, '],
    [{ serial: 5 }, 'serial: 5 is neither true nor false'],
    ...[0, 255, -1, 1.5, '1', Number.NaN].map(
      (cpus) => [{ cpus }, `cpus: ${cpus} is not a number of vCPUs; a machine has 1 to 254`] as const,
    ),
    [{ drives: 'disk.img' }, 'drives: must be an array'],
    [{ drives: ['disk.img'] }, 'drives[0]: must be an object'],
    [{ drives: [{ file: 'disk.img', readonly: true }] }, 'drives[0].readonly: there is no such field'],
    [{ drives: [{ file: 'disk.img', readOnly: 'no' }] }, 'drives[0].readOnly: no is neither true nor false'],
    [{ networks: {} }, 'networks: must be an array'],
    [{ networks: [null] }, 'networks[0]: must be an object'],
    [{ networks: [{ type: 'user', allow: 5 }] }, 'networks[0].allow: must be a function'],
    [{ networks: [{ type: 'user', hostForwards: [{ host: 1 }] }] }, 'networks[0].hostForwards[0].host: there is no'],
    [{ terminal: 'vt102' }, 'terminal: must be an object'],
    [{ terminal: { type: 'vt102 init=/bin/sh', rows: 24, columns: 80 } }, 'terminal.type: must be a word'],
    [
      { terminal: { type: 'vt102', rows: '24 x', columns: 80 } },
      'terminal.rows: 24 x is not a whole number from 0 to 65535',
    ],
    [{ consolePorts: ['a'] }, 'consolePorts[0]: must be an object'],
    [{ vsock: 1 }, 'vsock: must be an object'],
    [{ rng: 'yes' }, 'rng: must be an object'],
    [{ devices: {} }, 'devices: must be an array'],
    [{ devices: [{ module: 'https://a.test/b.js' }] }, "devices[0].module: 'https://a.test/b.js' is neither a path"],
  ] as const) {
    test(JSON.stringify(config), () => {
      expect(() => check(config)).toThrowError(expect.objectContaining({ code: 'ERR_USAGE' }));
      expect(() => check(config)).toThrowError(message);
    });
  }
});
