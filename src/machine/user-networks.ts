import type { Duplex } from 'node:stream';
import type { HostForward } from '../backends/user-network/host-forward.js';
import type { UserNetwork } from '../backends/user-network/user-network.js';
import type { NetworkConfig } from './device-config.js';

/** The user-mode networks of a machine. They run on the main thread, each behind a stream to its device. */
export class UserNetworks {
  /** All host forwards, with their real ports. */
  readonly hostForwards: HostForward[] = [];
  /** In the order of the configuration; undefined for a tap. */
  readonly #networks: (UserNetwork | undefined)[] = [];
  #closed: Promise<unknown> | undefined;

  /** Opens what `networks` asks for. @throws UsageError, NetworkError: then nothing stays open. */
  static async open(networks: readonly NetworkConfig[]): Promise<UserNetworks> {
    const opened = new UserNetworks();
    try {
      for (const [index, network] of networks.entries()) await opened.#open(network, index);
    } catch (error) {
      await opened.close();
      throw error;
    }
    return opened;
  }

  /** Connects the device of that index. */
  attach(index: number, stream: Duplex): void {
    this.#networks[index]?.attach(stream);
  }

  /** Ends the networks, their connections and host forwards. */
  async close(): Promise<void> {
    this.#closed ??= Promise.all(this.#networks.map((network) => network?.close()));
    await this.#closed;
  }

  async #open(config: NetworkConfig, index: number): Promise<void> {
    if (config.type !== 'user') {
      this.#networks.push(undefined);
      return;
    }
    // Loaded only where there is one: it is much code.
    const { UserNetwork } = await import('../backends/user-network/user-network.js');
    const { checkHostForward } = await import('../backends/user-network/host-forward.js');
    const { hostForwards = [], allow } = config;
    for (const [at, it] of hostForwards.entries()) checkHostForward(it, `networks[${index}].hostForwards[${at}]`);
    const network = await UserNetwork.open({ hostForwards, ...(allow && { allow }) });
    this.#networks.push(network);
    this.hostForwards.push(...network.hostForwards);
  }
}
