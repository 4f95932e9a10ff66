import { formatHostForward, type HostForward, parseHostForward } from '../backends/user-network/host-forward.js';
import { UsageError } from '../errors.js';
import type { NetworkConfig } from '../machine/device-config.js';

const EXAMPLE = 'write tap=NAME, user or none; for example --net user,hostfwd=tcp:127.0.0.1:8080-:80';

/** The networks that the `--net` options ask for, one each. @throws UsageError */
export function parseNetworks(options: readonly string[]): NetworkConfig[] {
  if (options.length === 1 && options[0] === 'none') return [];
  if (options.includes('none')) {
    throw new UsageError('--net none: does not go with another --net; leave one of them out');
  }
  return options.map(parseNetwork);
}

/** A line for each host forward whose port was left to the host. @param actual of the machine that has these networks. */
export function chosenForwards(networks: readonly NetworkConfig[], actual: readonly HostForward[]): string[] {
  const asked = networks.flatMap((network) => (network.type === 'user' ? (network.hostForwards ?? []) : []));
  return actual.filter((_, i) => asked[i]?.hostPort === 0).map((it) => `host forward ${formatHostForward(it)}`);
}

function parseNetwork(option: string): NetworkConfig {
  const wrong = (what: string) => new UsageError(`--net ${option}: ${what}; ${EXAMPLE}`);
  const [kind = '', ...settings] = option.split(',');
  const type = kind.startsWith('tap=') ? 'tap' : kind;
  if (kind === 'tap' || kind === 'tap=') throw wrong('the name of the tap is missing');
  if (type !== 'tap' && type !== 'user') throw wrong(`'${kind}' is no kind of network`);

  let mac: string | undefined;
  const hostForwards: HostForward[] = [];
  for (const setting of settings) {
    const [key = '', ...rest] = setting.split('=');
    const value = rest.join('=');
    if (key !== 'mac' && !(key === 'hostfwd' && type === 'user')) throw wrong(`'${key}' is no setting of ${type}`);
    if (value === '') throw wrong(`'${key}' needs a value`);
    if (key === 'mac' && mac !== undefined) throw wrong("'mac' is given twice");
    if (key === 'mac') mac = value;
    else hostForwards.push(parseForward(option, value));
  }
  const common = mac === undefined ? {} : { mac };
  return type === 'tap' ? { type, name: kind.slice(4), ...common } : { type, hostForwards, ...common };
}

function parseForward(option: string, text: string): HostForward {
  try {
    return parseHostForward(text);
  } catch (error) {
    if (!(error instanceof UsageError)) throw error;
    throw new UsageError(`--net ${option}: ${error.message}`);
  }
}
