import { Machine } from '../machine/machine.js';
import { wholeAddress } from './address.js';
import { hostMachine } from './host-machine.js';
import { readKey } from './key-file.js';
import { migrationProgress } from './migration-progress.js';
import { Progress } from './progress.js';
import type { ReceiveArguments } from './receive.js';
import { madeMachine, parseRestored } from './restore-machine.js';

/** `tsvisor receive`. */
export async function receiveMachine(args: ReceiveArguments): Promise<void> {
  const address = wholeAddress(args.address);
  const key = readKey(args.key);
  const restored = parseRestored(args);
  await hostMachine(args, {
    make: async (named, options, announce) => {
      using progress = new Progress(`waiting for a machine at ${args.address}`);
      const machine = await Machine.receive(address, {
        ...restored,
        ...options,
        key,
        vsockSocket: named?.vsock,
        onListening: announce,
        onProgress: (at) => progress.update(`receiving a machine: ${migrationProgress(at)}`),
      });
      progress[Symbol.dispose]();
      const greeting = 'the machine goes on here';
      try {
        return madeMachine(machine, args, { greeting });
      } catch (error) {
        // It runs nowhere else: better with other streams than not at all.
        process.stderr.write(`tsvisor: ${(error as Error).message}\n`);
        return madeMachine(machine, { ...args, serial: undefined, console: undefined, port: [] }, { greeting });
      }
    },
  });
}
