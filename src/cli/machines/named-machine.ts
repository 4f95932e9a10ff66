import { resolve } from 'node:path';
import { AgentError, TsvisorError } from '../../errors.js';
import type { Machine } from '../../machine/machine.js';
import { ESCAPE_EXIT } from '../exit-codes.js';
import type { Session } from '../session.js';
import { CONSOLE_PORT } from '../streams.js';
import { ConsoleHub } from './console-hub.js';
import type { MachineStatus } from './control-protocol.js';
import { ControlServer } from './control-server.js';
import { cannotUse, type MachineFolder } from './machine-folder.js';
import { RotatingLog } from './rotating-log.js';

/** Where a machine comes from. */
export interface MachineSource {
  /** Path of its kernel, or `default`. */
  readonly kernel: string;
  /** Path of the snapshot that it goes on from. */
  readonly snapshot?: string;
}

/** What makes a machine of this process one that other processes find by its name. */
export class NamedMachine implements AsyncDisposable {
  readonly #folder: MachineFolder;
  readonly #machine: Machine;
  readonly #session: Session;
  readonly #source: MachineSource;
  readonly #log: RotatingLog;
  readonly #hub: ConsoleHub | undefined;
  readonly #detached: boolean;
  #server: ControlServer | undefined;
  #ending: Promise<unknown> | undefined;

  private constructor(
    folder: MachineFolder,
    machine: Machine,
    session: Session,
    source: MachineSource,
    detached: boolean,
  ) {
    this.#detached = detached;
    this.#folder = folder;
    this.#machine = machine;
    this.#session = session;
    this.#source = source;
    this.#log = new RotatingLog(folder.paths.consoleLog);
    const { terminal } = session;
    this.#hub = terminal && new ConsoleHub(terminal, this.#log);
  }

  /** @param session has not been run yet. @throws TsvisorError ERR_OUTPUT */
  static async serve(
    folder: MachineFolder,
    machine: Machine,
    session: Session,
    source: MachineSource,
    detached: boolean,
  ): Promise<NamedMachine> {
    try {
      const named = new NamedMachine(folder, machine, session, source, detached);
      await named.#listen();
      return named;
    } catch (error) {
      throw cannotUse(folder.paths.folder, error);
    }
  }

  async #listen(): Promise<void> {
    const session = this.#session;
    this.#server = await ControlServer.listen(this.#folder.paths.control, {
      status: async () => this.status(),
      wait: () => session.ended,
      ready: async ({ timeout }) => {
        if (!this.#machine.config.agent) {
          const { name } = this.#folder.paths;
          throw new AgentError(`machine ${name} was started without an agent; start it with --agent`);
        }
        await this.#machine.ready({ timeout });
        return {};
      },
      stop: ({ timeout, force }) => {
        if (this.#machine.config.agent && !force) return session.powerOff(ESCAPE_EXIT, timeout);
        session.stop(ESCAPE_EXIT);
        return session.ended;
      },
      snapshot: ({ folder, ...options }, { signal }) => {
        const save = () => this.#machine.snapshot(folder, { ...options, signal });
        return options.stop ? this.#ends(session.endBy(ESCAPE_EXIT, save)) : save();
      },
      migrate: ({ address, key, maxDowntime }, call) => {
        const options = { key: Buffer.from(key, 'base64'), maxDowntime, ...call };
        return this.#ends(this.#machine.migrate(address, options));
      },
      console: () => {
        const hub = this.#hub;
        if (!hub) {
          const why = `machine ${this.#folder.paths.name} has no console to join: --serial and --console lead elsewhere`;
          throw new TsvisorError('ERR_MACHINE_STATE', why);
        }
        return (client, typed) => hub.join(client, typed);
      },
      resize: async (size) => {
        if (session.terminalIsConsolePort) await this.#machine.resizeConsole(CONSOLE_PORT, size);
        return {};
      },
    });
  }

  status(): MachineStatus {
    const { memory, cpus, agent, vsock } = this.#machine.config;
    const { name } = this.#folder.paths;
    return {
      name,
      pid: process.pid,
      state: this.#machine.state,
      uptime: this.#session.uptime,
      memory,
      cpus,
      ...this.#source,
      agent,
      console: this.#hub !== undefined,
      vsock: resolve(vsock?.socket ?? this.#folder.vsock),
      detached: this.#detached,
    };
  }

  /** What ends the machine: its client is answered before the connection goes. */
  #ends<T>(ending: Promise<T>): Promise<T> {
    this.#ending = ending;
    return ending;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#ending?.catch(() => {});
    await new Promise(setImmediate);
    await this.#server?.[Symbol.asyncDispose]();
    this.#log[Symbol.dispose]();
  }
}
