import { createSocket } from 'node:dgram';
import { once } from 'node:events';
import { describe, expect, test } from 'vitest';
import { type Flow, UserNetwork } from '#dist/backends/user-network/user-network.js';
import { resources } from '../../support/process-resources.js';
import { Guest } from './guest.js';
import { DNS, GATEWAY } from './packets.js';
import { distinct, eventually, HostServer } from './support.js';

describe('allow', () => {
  test('sees each TCP connection and UDP flow once, as the guest names it', async () => {
    const flows: Flow[] = [];
    await using host = await HostServer.open();
    await using guest = await Guest.open({
      allow: (flow) => {
        flows.push(flow);
        return true;
      },
    });
    const socket = createSocket('udp4').bind(0, '127.0.0.1');
    await once(socket, 'listening');
    const { port } = socket.address();
    for (const text of ['one', 'two']) {
      const received = once(socket, 'message');
      guest.sendUdp(GATEWAY, port, 5000, text);
      expect(String((await received)[0])).toBe(text);
    }
    socket.close();
    expect((await guest.tcp.connect(host.port)).state).toBe('open');
    expect((await guest.tcp.connect(host.port)).state).toBe('open');
    const tcp = { protocol: 'tcp', address: GATEWAY, port: host.port };
    expect(flows).toEqual([{ protocol: 'udp', address: GATEWAY, port }, tcp, tcp]);
  });

  test.each<[string, () => boolean | Promise<boolean>]>([
    ['false', () => false],
    ['a promise of false', () => Promise.resolve(false)],
    ['a rejection', () => Promise.reject(new Error('no'))],
    [
      'a throw',
      () => {
        throw new Error('no');
      },
    ],
  ])('%s refuses: no connection is made, no datagram sent', async (_name, allow) => {
    await using host = await HostServer.open(() => expect.unreachable());
    await using guest = await Guest.open({ allow, resolvers: [] });
    expect((await guest.tcp.connect(host.port)).state).toBe('reset');
    const socket = createSocket('udp4').bind(0, '127.0.0.1');
    await once(socket, 'listening');
    socket.on('message', () => expect.unreachable());
    guest.sendUdp(GATEWAY, socket.address().port, 5000, 'x');
    guest.sendUdp(DNS, 53, 5001, Buffer.from('000001000001000000000000000001000100', 'hex'));
    expect(((await guest.nextUdp(5001)).payload[3] as number) & 15).toBe(5);
    await guest.settle();
    expect(guest.network.counters).toMatchObject({ refused: 3, tcpOpened: 0, udpToHost: 0, tcpNow: 0 });
    socket.close();
  });

  test('a decision may take its time', async () => {
    const decisions: ((allowed: boolean) => void)[] = [];
    await using host = await HostServer.open();
    await using guest = await Guest.open({ allow: () => new Promise((resolve) => decisions.push(resolve)) });
    const connections = [guest.tcp.start(host.port), guest.tcp.start(host.port)];
    await eventually(() => decisions.length === 2);
    decisions[1]?.(false);
    await connections[1]?.until((c) => c.state === 'reset');
    expect(connections[0]?.state).toBe('opening');
    decisions[0]?.(true);
    await connections[0]?.until((c) => c.state === 'open');
  });
});

describe('close', () => {
  test('leaves nothing behind, whatever was going on', async () => {
    const before = { active: active(), descriptors: resources().descriptors };
    for (let round = 0; round < 3; round++) {
      const host = await HostServer.open();
      const udp = createSocket('udp4').bind(0, '127.0.0.1');
      await once(udp, 'listening');
      const network = await UserNetwork.open({
        hostForwards: [
          { protocol: 'tcp', hostAddress: '127.0.0.1', hostPort: 0, guestPort: 80 },
          { protocol: 'udp', hostAddress: '127.0.0.1', hostPort: 0, guestPort: 53 },
        ],
        resolvers: [`127.0.0.1:${udp.address().port}`],
        allow: ({ port }) => port !== 1 || new Promise(() => {}),
      });
      const guest = await Guest.attach(network);
      const connection = await guest.tcp.connect(host.port);
      connection.pause();
      (await host.next()).write(distinct(1_000_000));
      connection.write(distinct(1_000_000));
      guest.tcp.start(1); // waits for a decision
      guest.tcp.start(9, {}, '192.0.2.1'); // is being connected
      const ended = await guest.tcp.connect(host.port);
      (await host.next()).resume().end();
      ended.end();
      await ended.until((c) => c.ended && c.finAcked); // in TIME_WAIT
      const question = once(udp, 'message');
      guest.sendUdp(DNS, 53, 5000, Buffer.from('000001000001000000000000000001000100', 'hex'));
      guest.sendUdp(GATEWAY, udp.address().port, 5001, 'x');
      await question;
      const dns = await guest.tcp.connect(53, {}, DNS);
      dns.write(Buffer.from([0, 17, ...Buffer.from('000001000001000000000000000001000100', 'hex')]));
      await guest.settle();
      const state = network.counters;
      expect(state.tcpNow).toBeGreaterThanOrEqual(3);
      await network.close();
      await network.close(); // again is no harm
      expect(state).toMatchObject({ tcpNow: 0, tcpBufferedNow: 0, udpMappingsNow: 0 });
      guest.tcp.dispose();
      guest.socket.destroy();
      udp.close();
      await host[Symbol.asyncDispose]();
    }
    await eventually(() => resources().descriptors <= before.descriptors);
    await eventually(() => active().length <= before.active.length);
  });

  test('a stream attached afterwards is closed', async () => {
    const network = await UserNetwork.open();
    await network.close();
    const guest = await Guest.attach(network);
    await once(guest.socket, 'close');
  });
});

/** Handles that keep the process alive, without those of the test runner. */
function active(): string[] {
  return process
    .getActiveResourcesInfo()
    .filter((name) => /TCP|UDP|Pipe|GetAddrInfo/.test(name))
    .sort();
}
