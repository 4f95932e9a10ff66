import { once } from 'node:events';
import { type AddressInfo, connect, createServer } from 'node:net';
import { describe, expect, test } from 'vitest';
import { Machine, type MachineConfig } from '#dist/index.js';
import { cli } from '../support/cli.js';
import { defaultGuest } from '../support/default-guest.js';
import { describeKvm } from '../support/kvm.js';
import { expectNoMoreThan, resources } from '../support/process-resources.js';

Machine.keepWarm(0); // a thread ends with its machine: what is left is a leak

const forward = (hostPort: number) => ({ protocol: 'tcp', hostAddress: '127.0.0.1', hostPort, guestPort: 80 }) as const;

/** Whether somebody listens. */
async function connects(port: number): Promise<boolean> {
  const socket = connect(port, '127.0.0.1');
  try {
    await once(socket, 'connect');
    return true;
  } catch {
    return false;
  } finally {
    socket.destroy();
  }
}

describeKvm('a machine’s networks', () => {
  const config = (networks: MachineConfig['networks']): MachineConfig => ({
    ...defaultGuest(),
    networks: networks ?? [],
  });

  test('host forwards are open from the beginning, at the ports that were found, and closed with the machine', async () => {
    const machine = await Machine.create(
      config([
        { type: 'user', hostForwards: [forward(0), forward(0)] },
        { type: 'user', hostForwards: [forward(0)] },
      ]),
    );
    const ports = machine.hostForwards.map(({ hostPort }) => hostPort);
    expect(new Set(ports).size).toBe(3);
    expect(machine.hostForwards[0]).toEqual(forward(ports[0] as number));
    for (const port of ports) expect(await connects(port)).toBe(true);
    await machine.stop();
    await machine.close();
    for (const port of ports) expect(await connects(port)).toBe(false);
  });

  test('the command line says which host ports were chosen', async () => {
    const nets = ['--net', 'user,hostfwd=tcp::0-:80,hostfwd=udp::0-10.0.2.16:53', '--net', 'user'];
    const { code, stderr } = await cli(['run', ...nets, '--timeout', '0.1']);
    expect(stderr).toMatch(
      /^tsvisor: host forward tcp:127\.0\.0\.1:[1-9]\d*-:80\ntsvisor: host forward udp:127\.0\.0\.1:[1-9]\d*-10\.0\.2\.16:53\n$/,
    );
    expect(code).toBe(124);
  });

  describe('that cannot be had reject create(), and nothing stays open:', () => {
    test.each<[string, (port: number) => MachineConfig['networks'], RegExp]>([
      [
        'a port in use, after one that was free',
        (port) => [
          { type: 'user', hostForwards: [forward(0)] },
          { type: 'user', hostForwards: [forward(0), forward(port)] },
        ],
        /^host forward 'tcp:127\.0\.0\.1:\d+-:80': port \d+ of 127\.0\.0\.1 is in use; /,
      ],
      [
        'an interface that is no tap, after a host forward',
        () => [
          { type: 'user', hostForwards: [forward(0)] },
          { type: 'tap', name: 'lo' },
        ],
        /^tap lo: /,
      ],
    ])('%s', async (_, networks, message) => {
      const server = createServer().listen(0, '127.0.0.1');
      await once(server, 'listening');
      const guest = config(networks((server.address() as AddressInfo).port));
      await Machine.create(guest).catch(() => {}); // what is loaded once stays
      const before = resources();
      const error = await Machine.create(guest).then(
        () => new Error('it was made'),
        (reason: Error) => reason,
      );
      expect(error).toMatchObject({ code: 'ERR_NETWORK' });
      expect(error.message).toMatch(message);
      await expectNoMoreThan(before);
      server.close();
    });
  });

  test('a forward that is wrong is told by the name of its field', async () => {
    const networks = [{ type: 'frames' }, { type: 'user', hostForwards: [forward(0), forward(65536)] }] as const;
    await expect(Machine.create(config(networks))).rejects.toMatchObject({
      code: 'ERR_USAGE',
      message: 'networks[1].hostForwards[1]: host port 65536 is not between 0 and 65535',
    });
  });
});
