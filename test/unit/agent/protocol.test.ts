import { once } from 'node:events';
import { mkdtempSync, readFileSync } from 'node:fs';
import { connect } from 'node:net';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import {
  AGENT_PORT,
  encodeFrame,
  FrameType,
  FrameWriter,
  MAX_DATA,
  MAX_PAYLOAD,
  OUTPUT_WINDOW,
  PROTOCOL_VERSION,
  SEED_SIZE,
  STDIN_WINDOW,
} from '#dist/agent/protocol.js';
import { frame, hello } from '../../support/fake-agent.js';
import { HostAgent } from '../../support/host-agent.js';
import { temporaryFolder } from '../../support/temporary-folder.js';

const folder = temporaryFolder();

const snake = (name: string) => name.replace(/[A-Z]/g, '_$&').toUpperCase();

describe('docs/agent-protocol.md, protocol.h and protocol.ts', () => {
  const text = readFileSync('docs/agent-protocol.md', 'utf8');
  const header = readFileSync('guest-images/agent/protocol.h', 'utf8');
  const ours = Object.fromEntries(Object.entries(FrameType).map(([name, value]) => [snake(name), value]));

  it('have the same frame types', () => {
    const documented = Object.fromEntries(
      [...text.matchAll(/^\| (0x[0-9a-f]+|\d+) \| ([A-Z_]+) \|/gm)].map(([, value, name]) => [name, Number(value)]),
    );
    expect(documented).toEqual(ours);
    const inC: Record<string, number> = {};
    let next = 0;
    const body = /enum frame_type \{([^}]*)\}/.exec(header)?.[1] ?? '';
    for (const [, name, value] of body.matchAll(/([A-Z_]+)(?: = (\w+))?,/g)) {
      next = value === undefined ? next : Number(value);
      inC[name as string] = next++;
    }
    expect(inC).toEqual(ours);
  });

  it('have the same limits', () => {
    for (const number of [AGENT_PORT, MAX_PAYLOAD, MAX_DATA, STDIN_WINDOW, OUTPUT_WINDOW]) {
      expect(text).toMatch(new RegExp(`\\b${number}\\b`));
    }
    expect(text).toContain(`version ${PROTOCOL_VERSION}\n`);
    expect(header).toContain(`PROTOCOL_VERSION = ${PROTOCOL_VERSION}, AGENT_PORT = ${AGENT_PORT}`);
    expect(header).toContain(`MAX_PAYLOAD = ${MAX_PAYLOAD / 1024} * 1024, MAX_DATA = ${MAX_DATA / 1024} * 1024`);
    expect(text).toContain(`${SEED_SIZE} bytes of random seed`);
    expect(header).toContain(`SEED_SIZE = ${SEED_SIZE} `);
    expect(header).toContain(
      `STDIN_WINDOW = ${STDIN_WINDOW / 1024} * 1024, OUTPUT_WINDOW = ${OUTPUT_WINDOW / 1024} * 1024`,
    );
  });
});

/** Only as root: the agent then runs as nobody, so that what it is asked for at random does no harm. */
describe.runIf(process.getuid?.() === 0)('the agent under sanitizers', () => {
  let host: HostAgent;
  beforeAll(async () => {
    host = await HostAgent.start(folder, { fuzzed: true });
  });
  afterAll(() => host[Symbol.asyncDispose]());

  /** Sends bytes and returns what comes until the agent ends the connection. */
  async function exchange(bytes: Uint8Array): Promise<Buffer> {
    const socket = connect(host.path);
    const chunks: Buffer[] = [];
    socket.on('error', () => {});
    socket.on('data', (chunk) => chunks.push(chunk));
    socket.end(bytes);
    await once(socket, 'close');
    return Buffer.concat(chunks);
  }

  /** The errno of the last frame, an ERROR. */
  function lastError(answer: Buffer): number | undefined {
    let errno: number | undefined;
    for (let at = 0; at < answer.length; at += 8 + answer.readUInt32LE(at)) {
      errno = answer.readUInt32LE(at + 4) === FrameType.error ? answer.readUInt32LE(at + 8) : undefined;
    }
    return errno;
  }

  const EPROTO = 71;
  const path = (type: number, ...numbers: number[]) => {
    const writer = new FrameWriter(type);
    for (const number of numbers) writer.u32(number);
    return writer.string('/dev/null', 'path').frame();
  };

  /** RENEW with two MACs, and how many it says there are. */
  const renewal = ({ flags = 3, count = 2 }) =>
    new FrameWriter(FrameType.renew)
      .u32(flags)
      .bytes(Buffer.alloc(SEED_SIZE))
      .u64(1n)
      .u32(0)
      .string('name', '')
      .u32(count)
      .bytes(Buffer.alloc(2 * 10))
      .frame();

  it.each<[string, Uint8Array[]]>([
    ['no hello', [frame(FrameType.ping)]],
    ['a huge frame', [Buffer.from([0, 0, 0, 0x80, 1, 0, 0, 0])]],
    ['a hello without an end', [encodeFrame(FrameType.hello, Buffer.from([1, 0]))]],
    ['an unknown request', [hello(), frame(0x99)]],
    ['a path without an end', [hello(), encodeFrame(FrameType.read, Buffer.from('/dev/null'))]],
    ['an empty path', [hello(), encodeFrame(FrameType.read, Buffer.alloc(1))]],
    ['a path and more', [hello(), encodeFrame(FrameType.read, Buffer.from('/dev/null\0x'))]],
    ['no arguments', [hello(), encodeFrame(FrameType.exec, Buffer.alloc(22))]],
    ['a file in place of data', [hello(), path(FrameType.write, 0, 0), frame(FrameType.leave)]],
    ['a leave before the root', [hello(), encodeFrame(FrameType.unpack, Buffer.from('x\0')), frame(FrameType.leave)]],
    ['an impossible action', [hello(), frame(FrameType.shutdown, 2)]],
    ['a renewal with unknown flags', [hello(), renewal({ flags: 4 })]],
    ['a renewal with too few MACs', [hello(), renewal({ count: 3 })]],
    ['a renewal with more MACs than can be', [hello(), renewal({ count: 2 ** 32 - 1 })]],
    ['a renewal with more', [hello(), renewal({ count: 1 })]],
    ['a cut renewal', [hello(), frame(FrameType.renew, 3, 0, 0)]],
  ])('answers %s with EPROTO', async (_name, bytes) => {
    expect(lastError(await exchange(Buffer.concat(bytes)))).toBe(EPROTO);
  });

  it('refuses another version, what is the machine’s, and names that lead elsewhere', async () => {
    expect(lastError(await exchange(Buffer.concat([hello(9), frame(FrameType.ping)])))).toBe(93);
    expect(lastError(await exchange(Buffer.concat([hello(), frame(FrameType.shutdown, 0)])))).toBe(1);
    expect(lastError(await exchange(Buffer.concat([hello(), frame(FrameType.setTime, 1, 0, 0)])))).toBe(1);
    for (const flags of [0, 1, 2, 3])
      expect(lastError(await exchange(Buffer.concat([hello(), renewal({ flags })])))).toBe(1);
    const entry = (mode: number, name: string) =>
      new FrameWriter(FrameType.entry)
        .u32(mode)
        .u32(0)
        .u32(0)
        .u32(0)
        .u64(0n)
        .u64(0n)
        .string(name, '')
        .string('', '')
        .frame();
    const target = new FrameWriter(FrameType.unpack).string(`${mkdtempSync('/tmp/tsvisor-fuzz-')}/x`, '').frame();
    for (const name of ['..', '.', '', 'a/b', '/etc/x']) {
      const bytes = [hello(), target, entry(0o040755, ''), entry(0o100644, name)];
      expect([EPROTO, 13]).toContain(lastError(await exchange(Buffer.concat(bytes))));
    }
  });

  it('survives random frames and cut ones', async () => {
    const seed = Number(process.env.TSVISOR_SEED ?? Date.now() % 1_000_000);
    let state = seed;
    const random = (below: number) => {
      state = (Math.imul(state, 1103515245) + 12345) >>> 0;
      return (state >>> 8) % below;
    };
    const types = Object.values(FrameType);
    const exec = new FrameWriter(FrameType.exec)
      .u32(0)
      .u32(1)
      .u32(1)
      .string('/', '')
      .string('', '')
      .u32(1)
      .string('true', '')
      .u32(0)
      .frame();
    const requests = [exec, path(FrameType.read), path(FrameType.list), path(FrameType.stat, 0), path(FrameType.pack)];
    const bytes = (size: number) => Buffer.from(Array.from({ length: size }, () => (random(2) ? random(256) : 0)));
    for (let i = 0; i < 400; i++) {
      const parts: Uint8Array[] = [hello()];
      const request = Buffer.from(requests[random(requests.length)] as Buffer);
      if (random(2)) request[8 + random(request.length - 8)] = random(256);
      parts.push(random(3) ? request : encodeFrame(types[random(types.length)] ?? 0, bytes(random(64))));
      for (let n = random(5); n > 0; n--) parts.push(encodeFrame(types[random(types.length)] ?? 0, bytes(random(64))));
      const all = Buffer.concat(parts);
      await exchange(random(3) ? all : all.subarray(0, random(all.length)));
      expect(host.stderr, `TSVISOR_SEED=${seed}, case ${i}`).not.toMatch(/Sanitizer|runtime error/);
    }
    await host.agent().ping();
    expect((await host.agent().exec('echo still here')).stdout).toBe('still here\n');
  });
});
