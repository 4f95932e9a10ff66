/**
 * A process of the bench 'density' with many machines. Its parent sends it a DensityOrder, then `exits` as often as it
 * likes; it answers the first when all machines run, each with how many of their exits came to user space so far.
 */
import { Machine, SharedThread } from '#dist/index.js';

export interface DensityOrder {
  readonly machines: number;
  /** A guest that ends nothing: the path of its ELF, or of a snapshot with an agent. */
  readonly guest: { readonly kernel: string } | { readonly snapshot: string };
  /** Whether all of them are on one machine thread. */
  readonly shared: boolean;
}

/** Machines that are made at a time: as many as there are cores to make them. */
const AT_ONCE = 2;

const machines: Machine[] = [];

async function make(guest: DensityOrder['guest'], options: { readonly thread?: SharedThread }): Promise<void> {
  if ('snapshot' in guest) {
    const machine = await Machine.restore(guest.snapshot, options);
    machines.push(machine);
    await machine.resume();
    await machine.ready();
  } else {
    const machine = await Machine.create(guest, options);
    machines.push(machine);
    await machine.start();
    while (Object.keys((await machine.metrics()).milestones).length === 0) {
      await new Promise((resolve) => setTimeout(resolve, 5));
    }
  }
}

async function exits(): Promise<number> {
  const metrics = await Promise.all(machines.map((machine) => machine.metrics()));
  return metrics.flatMap((one) => Object.values(one.exits)).reduce((total, count) => total + count, 0);
}

process.on('message', async (message: DensityOrder | 'exits') => {
  try {
    if (message !== 'exits') {
      let left = message.machines;
      const options = message.shared ? { thread: new SharedThread() } : {};
      const makeSome = async () => {
        while (left-- > 0) await make(message.guest, options);
      };
      await Promise.all(Array.from({ length: AT_ONCE }, makeSome));
    }
    process.send?.(await exits());
  } catch (error) {
    process.send?.(String(error));
  }
});
process.on('disconnect', () => process.exit());
process.send?.(0);
