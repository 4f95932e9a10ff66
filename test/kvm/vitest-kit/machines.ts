import { machineTest } from 'tsvisor/vitest';
import { guestProgram } from '../../support/guest-program.js';

/** Prints a line on ttyS0 and sleeps for good. */
const text = [...'a line of the guest\n'].map((c) => `mov al, ${c.charCodeAt(0)}\nout dx, al`).join('\n');

/** Tests of a guest that takes no time to boot and has no agent. */
export const test = machineTest(
  { kernel: guestProgram(`mov dx, SERIAL\n${text}\nagain: pause\njmp again`), memory: 2 ** 23 },
  {
    async ready(machine) {
      for await (const chunk of machine.serial.iterator({ destroyOnReturn: false }))
        if (`${chunk}`.includes('\n')) return;
    },
    timeout: 30_000,
  },
);
