import { isIP, isIPv4 } from 'node:net';
import type { HostForward } from '../backends/user-network/host-forward.js';
import { UsageError } from '../errors.js';
import type { NetworkConfig } from '../machine/device-config.js';

const EXAMPLE = 'write tap=NAME, user or none; for example --net user,hostfwd=tcp:127.0.0.1:8080-:80';
const FORWARD_EXAMPLE = 'write for example hostfwd=tcp:127.0.0.1:8080-:80';

/** The networks that the `--net` options ask for, one each. @throws UsageError */
export function parseNetworks(options: readonly string[]): NetworkConfig[] {
  if (options.length === 1 && options[0] === 'none') return [];
  if (options.includes('none'))
    throw new UsageError('--net none: does not go with another --net; leave one of them out');
  return options.map(parseNetwork);
}

function parseNetwork(option: string): NetworkConfig {
  const wrong = (what: string, example = EXAMPLE) => new UsageError(`--net ${option}: ${what}; ${example}`);
  const [kind, ...settings] = option.split(',').map((part): [key: string, value: string | undefined] => {
    const equals = part.indexOf('=');
    return equals < 0 ? [part, undefined] : [part.slice(0, equals), part.slice(equals + 1)];
  }) as [[string, string | undefined], ...[string, string | undefined][]];

  let mac: string | undefined;
  const hostForwards: HostForward[] = [];
  for (const [key, value] of settings) {
    if (key !== 'mac' && !(key === 'hostfwd' && kind[0] === 'user'))
      throw wrong(`'${key}' is no setting of ${kind[0]}`);
    if (!value) throw wrong(`'${key}' needs a value`);
    if (key === 'hostfwd') hostForwards.push(parseForward(value, wrong));
    else if (mac === undefined) mac = value;
    else throw wrong(`'mac' is given twice`);
  }
  const common = mac === undefined ? {} : { mac };
  if (kind[0] === 'tap') {
    if (!kind[1]) throw wrong('the name of the tap is missing', 'write for example --net tap=tap0');
    return { type: 'tap', name: kind[1], ...common };
  }
  if (kind[0] === 'user' && kind[1] === undefined) return { type: 'user', hostForwards, ...common };
  throw wrong(`'${kind[0]}' is no kind of network`);
}

/** `PROTOCOL:[HOST]:PORT-[GUEST]:PORT`; without a host address, connections come from this host alone. */
function parseForward(text: string, wrong: (what: string, example: string) => UsageError): HostForward {
  const match = /^(tcp|udp):(\[[^\]]*\]|[^:[\]]*):(\d{1,5})-([^:]*):(\d{1,5})$/.exec(text);
  if (!match) throw wrong(`hostfwd '${text}' is not PROTOCOL:HOST:PORT-GUEST:PORT`, FORWARD_EXAMPLE);
  const [, protocol, host, hostPort, guest, guestPort] = match as unknown as [string, 'tcp' | 'udp', ...string[]];
  const hostAddress = (host as string).replace(/^\[|\]$/g, '') || '127.0.0.1';
  if (isIP(hostAddress) === 0) throw wrong(`'${hostAddress}' is not an IP address of this host`, FORWARD_EXAMPLE);
  if (guest && !isIPv4(guest)) throw wrong(`'${guest}' is not an IPv4 address of the guest`, FORWARD_EXAMPLE);
  if (Number(hostPort) > 65535) throw wrong(`${hostPort} is not a port`, FORWARD_EXAMPLE);
  if (Number(guestPort) > 65535 || Number(guestPort) === 0) throw wrong(`${guestPort} is not a port`, FORWARD_EXAMPLE);
  return {
    protocol,
    hostAddress,
    hostPort: Number(hostPort),
    guestPort: Number(guestPort),
    ...(guest ? { guestAddress: guest } : {}),
  };
}
