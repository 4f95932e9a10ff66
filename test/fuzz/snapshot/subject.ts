import { linkSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { MessageChannel } from 'node:worker_threads';
import { printable } from '#dist/agent/guest-error.js';
import { TsvisorError } from '#dist/errors.js';
import { Machine } from '#dist/index.js';
import { addon } from '#dist/kvm/addon.js';
import { ConsoleTail } from '#dist/machine/console-tail.js';
import type { MachineEnd } from '#dist/machine/end.js';
import { Timer } from '#dist/machine/fd-events.js';
import { HostServices } from '#dist/machine/host-services.js';
import { RunLoop } from '#dist/machine/run-loop.js';
import { UserDevices } from '#dist/machine/user-devices/user-devices.js';
import { VirtualMachine } from '#dist/machine/virtual-machine.js';
import { OpenSnapshot } from '#dist/snapshot/open.js';
import { restoredConfig } from '#dist/snapshot/restore.js';
import { countingMachine, countsOn } from '../../support/snapshot/counting-guest.js';
import { type Json, stateIn } from '../../support/snapshot/folder.js';
import { Violation } from '../machine.js';

/** Microseconds that a restored guest runs. */
const RUN = 3000;
/** Milliseconds after which a case hangs. */
const TIME_LIMIT = 60_000;

/** A differential snapshot that is real, and a folder for those that are made of it. */
export class SnapshotSubject implements Disposable {
  readonly state: Json;
  readonly #folder: string;
  readonly #crafted: string;

  private constructor(folder: string, crafted: string) {
    this.#folder = folder;
    this.#crafted = crafted;
    this.state = stateIn(join(folder, 'real'));
  }

  static async create(): Promise<SnapshotSubject> {
    const folder = mkdtempSync(join(tmpdir(), 'tsvisor-fuzz-'));
    const image = join(folder, 'image');
    writeFileSync(image, Buffer.alloc(2 ** 20));
    await using machine = await countingMachine({
      drives: [{ file: image }],
      networks: [{ type: 'frames' }],
      consolePorts: [{ name: 'hvc', console: true }, { name: 'port' }],
      vsock: true,
      rng: true,
    });
    await machine.start();
    await countsOn(machine);
    await machine.snapshot(join(folder, 'base'), { track: true });
    await countsOn(machine);
    await machine.snapshot(join(folder, 'real'), { differential: true });
    const crafted = join(folder, 'crafted');
    mkdirSync(crafted);
    for (const name of ['memory', 'disk-0.raw']) linkSync(join(folder, 'real', name), join(crafted, name));
    return new SnapshotSubject(folder, crafted);
  }

  /**
   * Restores a state as Machine.restore() does, but on this thread, and lets it run for a moment.
   * @returns how that ended. @throws Violation
   */
  async run(bytes: Buffer): Promise<string> {
    writeFileSync(join(this.#crafted, 'state'), bytes, { mode: 0o600 });
    const began = performance.now();
    const outcome = await this.#outcome(() => this.#restoreHere());
    if (performance.now() - began > TIME_LIMIT) throw new Violation(`it took ${performance.now() - began} ms`);
    return outcome;
  }

  /** As run(), by Machine.restore(). */
  runMachine(bytes: Buffer): Promise<string> {
    writeFileSync(join(this.#crafted, 'state'), bytes, { mode: 0o600 });
    return this.#outcome(async () => {
      await using machine = await Machine.restore(this.#crafted);
      await machine.resume();
      await new Promise((resolve) => setTimeout(resolve, RUN / 1000));
      const { reason } = await machine.stop();
      return reason;
    });
  }

  [Symbol.dispose](): void {
    rmSync(this.#folder, { recursive: true, force: true });
  }

  async #outcome(restore: () => Promise<string>): Promise<string> {
    try {
      return await restore();
    } catch (error) {
      if (error instanceof Violation) throw error;
      if (!(error instanceof TsvisorError) || error.code === 'ERR_INTERNAL' || error.code === 'ERR_MACHINE_CRASHED') {
        throw new Violation(error instanceof Error ? (error.stack ?? error.message) : String(error));
      }
      if (error.message !== printable(error.message))
        throw new Violation(`not one line: ${JSON.stringify(error.message)}`);
      return error.code;
    }
  }

  async #restoreHere(): Promise<string> {
    await using snapshot = await OpenSnapshot.open(this.#crafted);
    const { config, scratch } = await restoredConfig(snapshot.state, this.#crafted, {});
    const sockets: number[] = [];
    const socket = () => {
      const pair = addon.socketpair() as [number, number];
      sockets.push(...pair);
      return pair[0];
    };
    const problems: string[] = [];
    const data = {
      config,
      port: new MessageChannel().port1,
      doorbell: -1,
      firstRequest: 0,
      serial: socket(),
      consolePorts: config.consolePorts.map(socket),
      networks: config.networks.map(socket),
      vsock: config.vsock && socket(),
      consoleTail: new ConsoleTail().buffer,
      origin: undefined,
      logs: true,
    };
    try {
      using loop = new RunLoop(false);
      using host = new HostServices(loop, data, (message) => {
        if (message.type === 'log' && message.message.includes('internal error')) problems.push(message.message);
      });
      using devices = await UserDevices.load(config, host);
      const origin = { layers: snapshot.layers, machine: snapshot.state.machine, track: true };
      using machine = await VirtualMachine.restore(config, host, devices, origin);
      const timer = new Timer(host.events, () => host.finish({ reason: 'stopped', code: null, message: 'time is up' }));
      timer.arm(RUN);
      host.setRunning(true);
      loop.admit(host);
      while (!host.due) loop.turn(true);
      const { reason } = host.end as MachineEnd;
      timer.close();
      host.setRunning(false);
      host.clearEnd();
      if (machine.settle()) machine.save(host);
      if (problems.length > 0) throw new Violation(problems.join('\n'));
      return reason;
    } finally {
      for (const fd of sockets) addon.close(fd);
      if (scratch !== undefined) rmSync(scratch, { recursive: true });
    }
  }
}
