import { resolve } from 'node:path';
import { AgentError, TsvisorError } from '../../errors.js';
import type { MachineConfig } from '../../machine/config.js';
import type { Machine } from '../../machine/machine.js';
import { ESCAPE_EXIT } from '../exit-codes.js';
import type { Session } from '../session.js';
import { CONSOLE_PORT } from '../streams.js';
import { ConsoleHub } from './console-hub.js';
import type { MachineStatus } from './control-protocol.js';
import { ControlServer } from './control-server.js';
import type { MachineFolder } from './machine-folder.js';
import { RotatingLog } from './rotating-log.js';

export type NamedConfig = MachineConfig & { readonly memory: number; readonly cpus: number; readonly agent: boolean };

/** What makes a machine of this process one that other processes find by its name. */
export class NamedMachine implements AsyncDisposable {
  readonly #folder: MachineFolder;
  readonly #machine: Machine;
  readonly #session: Session;
  readonly #config: NamedConfig;
  readonly #log: RotatingLog;
  readonly #hub: ConsoleHub | undefined;
  readonly #detached: boolean;
  #server: ControlServer | undefined;

  private constructor(
    folder: MachineFolder,
    machine: Machine,
    session: Session,
    config: NamedConfig,
    detached: boolean,
  ) {
    this.#detached = detached;
    this.#folder = folder;
    this.#machine = machine;
    this.#session = session;
    this.#config = config;
    this.#log = new RotatingLog(folder.paths.consoleLog);
    const { terminal } = session;
    this.#hub = terminal && new ConsoleHub(terminal, this.#log);
  }

  /** @param session has not been run yet. @throws TsvisorError ERR_OUTPUT */
  static async serve(
    folder: MachineFolder,
    machine: Machine,
    session: Session,
    config: NamedConfig,
    detached: boolean,
  ): Promise<NamedMachine> {
    const named = new NamedMachine(folder, machine, session, config, detached);
    await named.#listen();
    return named;
  }

  async #listen(): Promise<void> {
    const session = this.#session;
    this.#server = await ControlServer.listen(this.#folder.paths.control, {
      status: async () => this.status(),
      wait: () => session.ended,
      ready: async ({ timeout }) => {
        if (!this.#config.agent) {
          const { name } = this.#folder.paths;
          throw new AgentError(`machine ${name} was started without an agent; start it with --agent`);
        }
        await this.#machine.ready({ timeout });
        return {};
      },
      stop: ({ timeout, force }) => {
        if (this.#config.agent && !force) return session.powerOff(ESCAPE_EXIT, timeout);
        session.stop(ESCAPE_EXIT);
        return session.ended;
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
    const { kernel, memory, cpus, agent, vsock } = this.#config;
    const { name } = this.#folder.paths;
    return {
      name,
      pid: process.pid,
      state: this.#machine.state,
      uptime: this.#session.uptime,
      memory,
      cpus,
      kernel: kernel === undefined ? 'default' : resolve(kernel),
      agent,
      console: this.#hub !== undefined,
      vsock: resolve((typeof vsock === 'object' && vsock.socket) || this.#folder.vsock),
      detached: this.#detached,
    };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#server?.[Symbol.asyncDispose]();
    this.#log[Symbol.dispose]();
  }
}
