import { createHash, randomBytes } from 'node:crypto';
import { createSocket } from 'node:dgram';
import { setServers } from 'node:dns';
import { once } from 'node:events';
import { createServer as createHttpServer } from 'node:http';
import { connect, createServer, type Socket } from 'node:net';
import { buffer, text } from 'node:stream/consumers';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { Machine, type NetworkConfig } from '#dist/index.js';
import { Console } from '../support/console.js';
import { defaultGuest } from '../support/default-guest.js';
import { describeKvm } from '../support/kvm.js';
import { enterNetworkNamespace, ip } from '../support/network-namespace.js';

const BOOT = 600_000;
const TRANSFER = 300_000;
const BULK = randomBytes(1 << 20);
const MD5 = createHash('md5').update(BULK).digest('hex');
/** What the host serves in this file; all of it ends with the process. */
const PORTS = { http: 8000, sink: 8001, guest: 80 };

/** What DHCP's client does with what it got. */
const DHCP_SCRIPT =
  '#!/bin/sh\n[ $1 = bound ] && ifconfig $interface $ip netmask $subnet && route add default gw $router && ' +
  'echo nameserver $dns >/etc/resolv.conf\n';

const md5 = (bytes: Uint8Array) => createHash('md5').update(bytes).digest('hex');

/** A DNS server that knows one name. */
async function serveDns(): Promise<number> {
  const socket = createSocket('udp4').bind(0, '127.0.0.1');
  await once(socket, 'listening');
  socket.on('message', (query, from) => {
    const end = query.indexOf(0, 12) + 5;
    const isAddress = query.readUInt16BE(end - 4) === 1 && query.subarray(12, end).includes('known');
    const head = Buffer.from([query[0] ?? 0, query[1] ?? 0, 0x81, 0x80, 0, 1, 0, isAddress ? 1 : 0, 0, 0, 0, 0]);
    const answer = Buffer.from([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 7]);
    socket.send(Buffer.concat([head, query.subarray(12, end), ...(isAddress ? [answer] : [])]), from.port);
  });
  return socket.address().port;
}

const MAC = '52:54:00:aa:bb:cc';
const USER: NetworkConfig = {
  type: 'user',
  mac: MAC,
  hostForwards: [{ protocol: 'tcp', hostAddress: '127.0.0.1', hostPort: 0, guestPort: PORTS.guest }],
};

describeKvm('Linux on a network', () => {
  /** MD5 of what each connection to the sink brought. */
  const sunk: string[] = [];
  let machine: Machine;
  let shell: Console;

  beforeAll(async () => {
    enterNetworkNamespace();
    const http = createHttpServer((_, response) => void response.end(BULK)).listen(PORTS.http, '0.0.0.0');
    const sink = createServer((socket) => void buffer(socket).then((bytes) => sunk.push(md5(bytes))));
    sink.listen(PORTS.sink, '0.0.0.0');
    await Promise.all([once(http, 'listening'), once(sink, 'listening')]);
    setServers([`127.0.0.1:${await serveDns()}`]);
    machine = await Machine.create({ ...defaultGuest(), networks: [USER, { type: 'tap', name: 'tap0' }] });
    ip('addr add 10.9.0.1/24 dev tap0');
    shell = new Console(machine.serial);
    await machine.start();
    await shell.prompt(BOOT / 1e3);
  }, BOOT);
  afterAll(() => machine?.close());

  describe.each([
    { what: 'of user mode', host: '10.0.2.2' },
    { what: 'by a tap', host: '10.9.0.1' },
  ])('$what', ({ what, host }) => {
    const isUser = what === 'of user mode';

    test('gets its address', async () => {
      if (isUser) {
        expect(await shell.run('cat /sys/class/net/eth0/address')).toContain(MAC);
        expect(await shell.run('cat /sys/class/net/eth0/carrier')).toMatch(/^1\r?$/m);
        const given = await shell.run('ifconfig eth0; route -n; cat /etc/resolv.conf');
        expect(given).toContain('inet addr:10.0.2.15');
        expect(given).toMatch(/^0\.0\.0\.0 +10\.0\.2\.2 /m);
        expect(given).toContain('nameserver 10.0.2.3');
        await shell.run('ifconfig eth0 0.0.0.0 down; rm /etc/resolv.conf'); // what init did; DHCP does it as well
        await shell.run(`printf '${DHCP_SCRIPT.replaceAll('\n', '\\n')}' >/tmp/dhcp; chmod +x /tmp/dhcp`);
        await shell.run('ifconfig eth0 up; udhcpc -i eth0 -t 30 -n -q -s /tmp/dhcp');
        expect(await shell.run('ifconfig eth0')).toContain('inet addr:10.0.2.15');
      } else {
        await shell.run('ifconfig eth1 10.9.0.2');
      }
    });

    test('pings the host', async () => {
      expect(await shell.run(`ping -c 3 ${host}`)).toContain('3 packets transmitted, 3 packets received');
    });

    if (isUser) {
      test('asks for names', async () => {
        expect(await shell.run('nslookup known.example')).toMatch(/Address[^\n]*192\.0\.2\.7/);
      });
    }

    test('fetches 1 MiB by HTTP', { timeout: TRANSFER }, async () => {
      const out = await shell.run(
        `wget -q -O /tmp/bulk http://${host}:${PORTS.http}/; md5sum /tmp/bulk`,
        TRANSFER / 1e3,
      );
      expect(out).toContain(MD5);
    });

    test('sends it back', { timeout: TRANSFER }, async () => {
      await shell.run(`nc ${host} ${PORTS.sink} -e cat /tmp/bulk`, TRANSFER / 1e3);
      await expect.poll(() => sunk, { timeout: TRANSFER }).toEqual([MD5]);
      sunk.length = 0;
    });

    test('is connected to, and gets 1 MiB', { timeout: TRANSFER }, async () => {
      await shell.run(`nc -l -p ${PORTS.guest} -e md5sum & sleep 1`);
      const port = machine.hostForwards[0]?.hostPort;
      const socket: Socket = isUser ? connect(port as number, '127.0.0.1') : connect(PORTS.guest, '10.9.0.2');
      socket.end(BULK);
      expect(await text(socket)).toContain(MD5);
    });
  });

  test('nothing is left in the namespace', async () => {
    await machine.close();
    expect(ip('-br link').trim().split('\n')).toHaveLength(1);
  });
});
