import { execFileSync, spawnSync } from 'node:child_process';
import { createSocket } from 'node:dgram';
import { once } from 'node:events';
import { readdirSync, readlinkSync } from 'node:fs';
import { type AddressInfo, createServer, type Socket } from 'node:net';
import { afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { Tap } from '#dist/backends/tap/tap.js';
import { NetworkError } from '#dist/errors.js';
import { addon } from '#dist/kvm/addon.js';
import { feature } from '#dist/virtio/device.js';
import * as abi from '#dist/virtio/generated/virtio.js';
import { cliPath } from '../../support/cli.js';
import { enterNetworkNamespace, ip } from '../../support/network-namespace.js';
import { arpReply, GUEST_IP, HOST_IP, pseudoSum, sum, TCP, TRANSPORT, tcp, UDP, u16, u32, udp } from './packets.js';
import { frame, header, join, MAC, NetRig, parseHeader } from './rig.js';

const NEEDS_CSUM = abi.VIRTIO_NET_HDR_F_NEEDS_CSUM;
/** Of the host's kernel: no IPv6 of its own on the interfaces that tests make. */
const QUIET = '/proc/sys/net/ipv6/conf/default/disable_ipv6';

let rig: NetRig;
const taps: Tap[] = [];
beforeAll(() => {
  enterNetworkNamespace();
  execFileSync('sh', ['-c', `[ ! -e ${QUIET} ] || echo 1 >${QUIET}`]);
});
beforeEach(() => {
  rig = new NetRig();
});
afterEach(() => {
  for (const tap of taps.splice(0)) tap[Symbol.dispose]();
  rig[Symbol.dispose]();
});

function open(name: string): Tap {
  const tap = new Tap(name, rig.events);
  taps.push(tap);
  return tap;
}

const interfaces = () =>
  ip('-br link')
    .split('\n')
    .map((line) => line.split(/[\s@]/)[0]);

/** A guest at 10.9.0.2 on a tap whose host is 10.9.0.1; it answers ARP. */
class Guest {
  readonly tap: Tap;
  readonly net;
  readonly driver;
  readonly hostMac: Uint8Array;
  /** IPv4 frames with their headers. */
  readonly received: Uint8Array[] = [];

  constructor(name: string, features = ~0n) {
    this.tap = open(name);
    ip(`addr add 10.9.0.1/24 dev ${name}`);
    const mac = /link\/ether (\S+)/.exec(ip(`link show ${name}`))?.[1] as string;
    this.hostMac = new Uint8Array(Buffer.from(mac.replaceAll(':', ''), 'hex'));
    const { net, driver } = rig.driver(this.tap, { features });
    this.net = net;
    this.driver = driver;
    for (let i = 0; i < 60; i++) this.rx.add([16_384]);
    this.rx.notify();
  }

  get rx() {
    return this.driver.queues[0] as (typeof this.driver.queues)[0];
  }

  send(frame: Uint8Array, fields = {}): void {
    this.driver.queues[1]?.request([header(fields), frame]);
  }

  /** Waits for an IPv4 frame of a protocol. */
  async receive(protocol: number): Promise<Uint8Array> {
    let found: Uint8Array | undefined;
    await rig.until(() => {
      for (const { data, written } of this.rx.completions()) {
        this.rx.send([16_384]);
        const bytes = data.subarray(0, written);
        const type = u16(bytes, 12 + 12);
        if (type === 0x0806) this.send(arpReply(this.hostMac));
        else if (type === 0x0800) this.received.push(bytes.slice());
      }
      const index = this.received.findIndex((bytes) => bytes[12 + 14 + 9] === protocol);
      if (index >= 0) [found] = this.received.splice(index, 1);
      return index >= 0;
    });
    return found as Uint8Array;
  }
}

describe('a tap', () => {
  test('that does not exist is made, up, and gone with its owner', () => {
    const tap = open('made0');
    expect(ip('link show made0')).toMatch(/<[^>]*\bUP\b/);
    expect(tap.mtu).toBe(1500);
    taps.pop()?.[Symbol.dispose]();
    expect(interfaces()).not.toContain('made0');
  });

  test('that is persistent is used as it is, and stays', () => {
    ip('tuntap add dev kept0 mode tap');
    ip('link set kept0 mtu 9000');
    expect(open('kept0').mtu).toBe(9000);
    expect(ip('link show kept0')).not.toMatch(/<[^>]*\bUP\b/);
    taps.pop()?.[Symbol.dispose]();
    expect(interfaces()).toContain('kept0');
    open('kept0');
    ip('link del kept0');
  });

  test('that is deleted takes the link down', async () => {
    const guest = new Guest('gone0');
    ip('link del gone0');
    await rig.until(() => guest.driver.readConfig(abi.virtio_net_config.status, 2)[0] === 0);
    guest.send(frame(60));
    expect(guest.net.counters.sentRefused).toBe(1);
    expect(guest.tap.up).toBe(false);
    // It is not waited for any more: its error would be reported for ever.
    let calls = 0;
    guest.tap.onReadable = () => void calls++;
    guest.driver.initialize();
    for (let i = 0; i < 20; i++) rig.pump();
    expect(calls).toBe(0);
  });

  test('that is down refuses what is sent, and takes it when it is up', () => {
    const guest = new Guest('down0');
    ip('link set down0 down');
    guest.send(frame(60));
    ip('link set down0 up');
    guest.send(frame(60));
    expect(guest.net.counters).toMatchObject({ sentRefused: 1, sentFrames: 1 });
  });
});

describe('frames', () => {
  test('a datagram each way, checksums left to the offload', async () => {
    const guest = new Guest('tap0');
    const socket = createSocket('udp4').bind(5000, '10.9.0.1');
    await once(socket, 'listening');
    const heard = once(socket, 'message');
    const payload = frame(700);
    guest.send(udp(guest.hostMac, [4000, 5000], payload), { flags: NEEDS_CSUM, csumStart: TRANSPORT, csumOffset: 6 });
    const [message, from] = await heard;
    expect(new Uint8Array(message)).toEqual(payload);
    expect(from).toMatchObject({ address: '10.9.0.2', port: 4000 });

    socket.send(payload, 4000, '10.9.0.2');
    const bytes = await guest.receive(UDP);
    expect(parseHeader(bytes)).toMatchObject({ flags: NEEDS_CSUM, csumStart: TRANSPORT, csumOffset: 6, numBuffers: 1 });
    expect(u16(bytes, 12 + TRANSPORT + 6)).toBe(pseudoSum(HOST_IP, GUEST_IP, UDP, 708));
    expect(bytes.subarray(12 + TRANSPORT + 8)).toEqual(payload);
    socket.close();
  });

  test('checksums are complete for a guest that does not take partial ones, also after another that did', async () => {
    const guest = new Guest('tap0');
    const features = ~(feature(abi.VIRTIO_NET_F_GUEST_CSUM) | offloadsOfTcp());
    guest.driver.initialize({ features });
    for (let i = 0; i < 60; i++) guest.rx.add([16_384]);
    guest.rx.notify();
    const socket = createSocket('udp4').bind(5000, '10.9.0.1');
    await once(socket, 'listening');
    socket.send(frame(701), 4000, '10.9.0.2');
    const bytes = await guest.receive(UDP);
    expect(parseHeader(bytes)).toMatchObject({ flags: 0, numBuffers: 1 });
    expect(sum(bytes.subarray(12 + TRANSPORT), pseudoSum(HOST_IP, GUEST_IP, UDP, 709))).toBe(0xffff);
    socket.close();
  });

  test.each([true, false])('TCP segments longer than the link, left to the offload: %s', async (offload) => {
    const guest = new Guest('tap0', offload ? ~0n : ~offloadsOfTcp());
    const server = createServer().listen(5001, '10.9.0.1');
    await once(server, 'listening');
    const port = (server.address() as AddressInfo).port;
    const ports = [offload ? 4001 : 4002, port] as const;
    const partial = { flags: NEEDS_CSUM, csumStart: TRANSPORT, csumOffset: 16 };
    const accepted = once(server, 'connection');
    guest.send(tcp(guest.hostMac, { ports, sequence: 1000, acknowledged: 0, flags: 2 }), partial);
    const synAck = await guest.receive(TCP);
    let acknowledged = u32(synAck, 12 + TRANSPORT + 4) + 1;
    guest.send(tcp(guest.hostMac, { ports, sequence: 1001, acknowledged, flags: 16 }), partial);
    const [socket] = (await accepted) as [Socket];

    // To the host: one frame of 8000 bytes, or as many as the link takes.
    const data = frame(8000);
    const size = offload ? data.length : 536;
    for (let at = 0; at < data.length; at += size) {
      const part = data.subarray(at, at + size);
      const segment = tcp(guest.hostMac, { ports, sequence: 1001 + at, acknowledged, flags: 24, data: part });
      guest.send(segment, offload ? { ...partial, gsoType: 1, gsoSize: 536, hdrLen: 54 } : partial);
    }
    const heard: Uint8Array[] = [];
    socket.on('data', (chunk) => heard.push(chunk));
    await rig.until(() => heard.reduce((length, chunk) => length + chunk.length, 0) === data.length);
    expect(join(...heard)).toEqual(data);

    // From the host: the first window of ten segments of 536 bytes.
    socket.write(data);
    const received: Uint8Array[] = [];
    let longest = 0;
    const start = acknowledged;
    while (acknowledged - start < data.length) {
      const bytes = await guest.receive(TCP);
      const payload = bytes.subarray(12 + TRANSPORT + 20);
      if (payload.length === 0) continue;
      expect(u32(bytes, 12 + TRANSPORT + 4)).toBe(acknowledged);
      longest = Math.max(longest, payload.length);
      if (payload.length > 536)
        expect(parseHeader(bytes)).toMatchObject({ gsoType: 1, gsoSize: 536, flags: NEEDS_CSUM });
      else expect(parseHeader(bytes).gsoType).toBe(0);
      received.push(payload);
      acknowledged += payload.length;
      guest.send(tcp(guest.hostMac, { ports, sequence: 1001 + data.length, acknowledged, flags: 16 }), partial);
    }
    expect(join(...received)).toEqual(data);
    if (offload) expect(longest).toBeGreaterThan(536);
    else expect(longest).toBe(536);
    socket.destroy();
    server.close();
  });

  test('a tap that is full stops the guest’s queue, and what is in it goes out later', async () => {
    // A bridge to a slow link keeps the frames, and the send buffer's limit is soon reached.
    ip('link add slow0 type veth peer name slow1');
    ip('link add br0 type bridge');
    const tap = open('tap0');
    for (const port of ['slow0', 'tap0']) ip(`link set ${port} master br0`);
    for (const port of ['br0', 'slow0', 'slow1']) ip(`link set ${port} up`);
    execFileSync('tc', 'qdisc add dev slow0 root tbf rate 4mbit burst 4kb limit 10mb'.split(' '));
    const TUNSETSNDBUF = 0x4004_54d4;
    expect(addon.ioctl(descriptorOfTun(), TUNSETSNDBUF, new Int32Array([20_000]).buffer)).toBe(0);
    const { net, driver } = rig.driver(tap);
    const tx = driver.queues[1] as (typeof driver.queues)[0];
    const unicast = join(Uint8Array.of(2, 0, 0, 0, 0, 9), MAC, frame(1400)); // a copy for everybody would not count as ours
    const fill = () => {
      for (let i = 0; i < 60; i++) tx.add([join(header(), unicast)]);
      tx.notify();
    };
    await rig.until(() => /state forwarding/.test(ip('-d link show tap0')));
    fill();
    expect(tx.usedIndex).toBeLessThan(60);
    await rig.until(() => tx.usedIndex === 60);
    fill();
    expect(tx.usedIndex).toBeLessThan(120);
    await rig.until(() => tx.usedIndex === 120);
    expect(net.counters).toMatchObject({ sentFrames: 120, sentRefused: 0 });
    ip('link del br0');
    ip('link del slow0');
  });
});

describe('errors', () => {
  const message = (action: () => unknown): string => {
    try {
      action();
    } catch (error) {
      expect(error).toBeInstanceOf(NetworkError);
      return (error as Error).message;
    }
    throw new Error('there was no error');
  };

  test('a tap that somebody has', () => {
    open('tap0');
    expect(message(() => open('tap0'))).toBe('tap tap0: another program uses it; give each machine its own');
  });

  test('an interface that is no tap, or one of another kind', () => {
    expect(message(() => open('lo'))).toMatch(
      /^tap lo: the network interface of that name is not a tap for one queue; /,
    );
    ip('tuntap add dev tun0 mode tun');
    expect(message(() => open('tun0'))).toMatch(/is not a tap for one queue/);
    ip('link del tun0');
  });

  test('a name that cannot be', () => {
    expect(message(() => open('a/b'))).toBe('tap a/b: that cannot be the name of a network interface');
  });

  test('leave nothing open', () => {
    const before = readdirSync('/proc/self/fd').length;
    message(() => open('lo'));
    expect(readdirSync('/proc/self/fd').length).toBe(before);
  });

  /** `tsvisor run --net tap=NAME` without the privilege to make networks, after some preparation. */
  function unprivileged(name: string, prepare = ':') {
    const run = 'exec setpriv --bounding-set=-net_admin,-dac_override --inh-caps=-all "$0" "$@"';
    const command = ['sh', '-c', `${prepare} && ${run}`];
    const tsvisor = [process.execPath, cliPath, 'run', '--kernel', '/dev/null', '--net', `tap=${name}`];
    const [program = '', ...args] = ['unshare', '-m', ...command, ...tsvisor];
    return spawnSync(program, args, { encoding: 'utf8' });
  }

  test('not allowed to make a tap: the remedy is one that works', () => {
    const { stderr, status } = unprivileged('mine0');
    const remedy = 'sudo ip tuntap add dev mine0 mode tap user $USER';
    expect(stderr).toBe(
      `tsvisor: tap mine0: there is none, and this user may not make it; make it with: ${remedy}, or run with CAP_NET_ADMIN\n`,
    );
    expect(status).toBe(74);
    ip(`tuntap add dev mine0 mode tap user ${process.getuid?.()}`);
    expect(unprivileged('mine0').stderr).not.toMatch(/mine0/); // it is the kernel that is wrong now
    ip('link del mine0');
  });

  test('a tap of another user', () => {
    ip('tuntap add dev theirs0 mode tap user 12345');
    const { stderr, status } = unprivileged('theirs0');
    expect(stderr).toMatch(/^tsvisor: tap theirs0: it belongs to another user; [^\n]*\n$/);
    expect(status).toBe(74);
    ip('link del theirs0');
  });

  test('no /dev/net/tun, or not for this user', () => {
    const none = unprivileged('tap0', 'mount -t tmpfs none /dev/net');
    expect(none.stderr).toBe(
      'tsvisor: tap tap0: this host has no /dev/net/tun; load the kernel module with: sudo modprobe tun\n',
    );
    const closed = unprivileged('tap0', 'mount -t tmpfs none /dev/net && touch /dev/net/tun && chmod 0 /dev/net/tun');
    expect(closed.stderr).toBe(
      'tsvisor: tap tap0: this user may not open /dev/net/tun; allow it with: sudo chmod 0666 /dev/net/tun, or use --net user\n',
    );
    expect([none.status, closed.status]).toEqual([74, 74]);
  });
});

function offloadsOfTcp(): bigint {
  const bits = [abi.VIRTIO_NET_F_GUEST_TSO4, abi.VIRTIO_NET_F_GUEST_TSO6, abi.VIRTIO_NET_F_GUEST_ECN];
  return bits.reduce((set, bit) => set | feature(bit), 0n);
}

function descriptorOfTun(): number {
  const fds = readdirSync('/proc/self/fd').filter((fd) => {
    try {
      return readlinkSync(`/proc/self/fd/${fd}`) === '/dev/net/tun';
    } catch {
      return false; // that of the folder itself
    }
  });
  expect(fds).toHaveLength(1);
  return Number(fds[0]);
}
