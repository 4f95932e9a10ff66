import type { Duplex } from 'node:stream';
import { setTimeout as delay } from 'node:timers/promises';
import { expect, it } from 'vitest';
import { VsockListener } from '#dist/backends/vsock/listener.js';
import type { VsockStream } from '#dist/backends/vsock/stream.js';
import { MachineError } from '#dist/errors.js';
import { MachineAgent } from '#dist/machine/machine-agent.js';
import { duplexPair } from '../../support/duplex-pair.js';
import { hello } from '../../support/fake-agent.js';

function setUp() {
  const listener = new VsockListener(1007, () => {});
  const vsock = { cid: 3, connect: () => Promise.reject(new Error('nobody listens')), listen: () => listener };
  const agent = new MachineAgent(vsock, () => {});
  /** A connection of the guest's. */
  const connect = (port = 1000): Duplex => {
    const [here, there] = duplexPair();
    listener.add(Object.assign(here, { localPort: 1007, remotePort: port }) as unknown as VsockStream);
    return there;
  };
  return { agent, connect };
}

it('is ready from the greeting to the end of its connection', async () => {
  const { agent, connect } = setUp();
  await expect(agent.ready({ timeout: 20 })).rejects.toMatchObject({ code: 'ERR_AGENT_TIMEOUT' });
  const connection = connect();
  connection.write(hello());
  await agent.ready({ timeout: 1000 });
  connection.destroy();
  await delay(20);
  await expect(agent.ready({ timeout: 20 })).rejects.toMatchObject({ code: 'ERR_AGENT_TIMEOUT' });
});

it('is ready after a greeting that was cut off by a reset of the guest, or was of another version', async () => {
  for (const first of [hello().subarray(0, 5), hello(2)]) {
    const { agent, connect } = setUp();
    const cut = connect();
    cut.write(first);
    await delay(20);
    cut.destroy();
    await delay(20);
    await expect(agent.ready({ timeout: 20 })).rejects.toMatchObject({ code: 'ERR_AGENT' });
    connect().write(hello());
    await delay(20);
    await agent.ready({ timeout: 1000 });
  }
});

it('is not there for a program of the guest without privilege, nor when the machine has ended', async () => {
  const { agent, connect } = setUp();
  connect(1024).write(hello());
  await expect(agent.ready({ timeout: 20 })).rejects.toMatchObject({ code: 'ERR_AGENT_TIMEOUT' });
  const late = connect();
  await delay(20);
  const end = new MachineError('ERR_MACHINE_ENDED', 'the machine has ended');
  agent.close(end);
  late.write(hello());
  await delay(20);
  await expect(agent.ready()).rejects.toBe(end);
});
