import { once } from 'node:events';
import type { Duplex } from 'node:stream';
import { setTimeout as delay } from 'node:timers/promises';
import { describe, expect, it } from 'vitest';
import type { GuestIdentity } from '#dist/agent/agent.js';
import { FrameType, FrameWriter, PayloadReader, SEED_SIZE } from '#dist/agent/protocol.js';
import { VsockListener } from '#dist/backends/vsock/listener.js';
import type { VsockStream } from '#dist/backends/vsock/stream.js';
import { MachineError, VsockError } from '#dist/errors.js';
import { deferred } from '#dist/machine/deferred.js';
import { MachineAgent } from '#dist/machine/machine-agent.js';
import { duplexPair } from '../../support/duplex-pair.js';
import { frame, hello } from '../../support/fake-agent.js';

const refused = new VsockError('vsock: port 1007 of the guest: connection refused');

/** @param answer to a connection to the agent. */
function setUp(identity?: GuestIdentity, answer: () => Promise<Duplex> = () => Promise.reject(refused)) {
  const listener = new VsockListener(1007, () => {});
  const driver = deferred<void>();
  const vsock = {
    connect: () => answer() as Promise<VsockStream>,
    listen: () => listener,
    driverUp: () => driver.promise,
  };
  const agent = new MachineAgent(vsock, () => {}, identity);
  /** A connection of the guest's. @returns the guest's end, and the host's. */
  const connectBoth = (port = 1000): [Duplex, Duplex] => {
    const [here, there] = duplexPair();
    listener.add(Object.assign(here, { localPort: 1007, remotePort: port }) as unknown as VsockStream);
    return [there, here];
  };
  const connect = (port?: number): Duplex => connectBoth(port)[0];
  return { agent, connect, connectBoth, driver };
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

it('is still awaited when the guest resets the connection of its greeting', async () => {
  const { agent, connect, connectBoth } = setUp();
  const ready = agent.ready({ timeout: 10_000 });
  const [, host] = connectBoth();
  await delay(20);
  host.destroy(new VsockError('vsock: port 1006 of the guest and 1007 of the host: the guest reset the connection'));
  await delay(20);
  connect().write(hello());
  await ready;
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

describe('of a guest that was restored', () => {
  const late = { code: 'ERR_AGENT_TIMEOUT' };
  const identity = { hostname: 'clone-1', macs: new Map([[1, '52:54:00:ab:cd:ef']]) };

  /** An agent that takes one connection after the other. @param answers to their requests; undefined: none */
  function guest(...answers: (Uint8Array | undefined)[]) {
    const requests: Buffer[] = [];
    const connect = async () => {
      const [here, there] = duplexPair();
      // The request tells the time: it comes once the agent has said hello.
      void once(there, 'data').then(async () => {
        const next = once(there, 'data');
        there.write(hello());
        const [request] = await next;
        requests.push(request as Buffer);
        const answer = answers[requests.length - 1];
        if (answer) there.write(answer);
      });
      return here;
    };
    return { requests, connect };
  }

  it('is ready when it has taken its identity, without a greeting', async () => {
    const { requests, connect: answer } = guest(frame(FrameType.ok), frame(FrameType.ok));
    const { agent, connect, driver } = setUp(identity, answer);
    const before = Math.floor(Date.now() / 1000);
    driver.resolve();
    await agent.resumed();
    await agent.ready({ timeout: 1000 });
    expect(requests).toHaveLength(1);
    const [request] = requests as [Buffer];
    expect([request.readUInt32LE(0), request.readUInt32LE(4)]).toEqual([request.length - 8, FrameType.renew]);
    const payload = new PayloadReader(request.subarray(8));
    expect(payload.u32()).toBe(3);
    const seed = Array.from({ length: SEED_SIZE / 8 }, () => payload.u64());
    expect(new Set(seed).size).toBe(SEED_SIZE / 8);
    expect(Math.abs(Number(payload.u64()) - before)).toBeLessThan(60);
    expect(payload.u32()).toBeLessThan(1e9);
    expect(payload.string()).toBe('clone-1');
    expect([payload.u32(), payload.u32()]).toEqual([1, 1]);
    expect(request.subarray(-6).toString('hex')).toBe('525400abcdef');
    // Neither what it says later nor another resume() has it take another.
    connect().write(hello());
    await agent.resumed();
    await delay(20);
    await agent.ready({ timeout: 1000 });
    expect(requests).toHaveLength(1);
  });

  it('is not ready before, whatever it says', async () => {
    const { connect: answer } = guest(undefined);
    const { agent, connect, driver } = setUp(identity, answer);
    void agent.resumed();
    await expect(agent.ready({ timeout: 20 })).rejects.toMatchObject(late);
    driver.resolve();
    connect().write(hello());
    await expect(agent.ready({ timeout: 50 })).rejects.toMatchObject(late);
  });

  it('whose agent is not there yet takes it once that says it is', async () => {
    const { requests, connect: answer } = guest(frame(FrameType.ok));
    let there = false;
    const { agent, connect, driver } = setUp(identity, () => (there ? answer() : Promise.reject(refused)));
    driver.resolve();
    await agent.resumed();
    await expect(agent.ready({ timeout: 20 })).rejects.toMatchObject(late);
    there = true;
    connect().write(hello());
    await agent.ready({ timeout: 1000 });
    expect(requests).toHaveLength(1);
  });

  it('whose connection is lost on the way is asked again when it says it is there', async () => {
    const { requests, connect: answer } = guest(undefined, frame(FrameType.ok));
    const streams: Duplex[] = [];
    const { agent, connect, driver } = setUp(identity, async () => {
      const stream = await answer();
      streams.push(stream);
      return stream;
    });
    driver.resolve();
    const resumed = agent.resumed();
    await delay(20);
    connect().write(hello()); // while the first is under way
    await delay(20);
    streams[0]?.destroy(new VsockError('vsock: the guest was reset'));
    await resumed;
    await agent.ready({ timeout: 1000 });
    expect(requests).toHaveLength(2);
  });

  it('that refuses it is never ready, until it takes it', async () => {
    const error = (errno: number) => new FrameWriter(FrameType.error).u32(errno).string('x', '').frame();
    const { connect: answer } = guest(error(71), error(1), frame(FrameType.ok));
    const { agent, connect, driver } = setUp(identity, answer);
    driver.resolve();
    await agent.resumed();
    for (const why of [/older tsvisor/, /EPERM/]) {
      await expect(agent.ready()).rejects.toMatchObject({ code: 'ERR_AGENT', message: expect.stringMatching(why) });
      connect().write(hello());
      await delay(20);
    }
    await agent.ready({ timeout: 1000 });
  });
});
