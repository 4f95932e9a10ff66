import { createSocket, type Socket } from 'node:dgram';
import { once } from 'node:events';
import { type AddressInfo, createServer, type Server } from 'node:net';
import { expect, test } from 'vitest';
import { Guest } from './guest.js';
import { DNS } from './packets.js';

function name(text: string): Buffer {
  const labels = text.split('.').filter(Boolean);
  return Buffer.concat([...labels.map((l) => Buffer.from([l.length, ...Buffer.from(l, 'latin1')])), Buffer.from([0])]);
}

function query(text: string, type = 1, id = 0x1234): Buffer {
  const head = Buffer.from([id >> 8, id & 255, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
  return Buffer.concat([head, name(text), Buffer.from([type >> 8, type & 255, 0, 1])]);
}

/** The resolver's answer: the query with the response bit and some bytes that only it can know. */
function answerTo(message: Uint8Array, extra = 'answer'): Buffer {
  const answer = Buffer.concat([message, Buffer.from(extra)]);
  answer[2] = (answer[2] as number) | 0x80;
  return answer;
}

/** A resolver of the host, UDP and TCP, on one port. */
class Resolver implements AsyncDisposable {
  readonly queries: Buffer[] = [];
  readonly udp: Socket;
  readonly tcp: Server;

  static async open(answer: (message: Buffer) => Buffer[] = (m) => [answerTo(m)]): Promise<Resolver> {
    const resolver = new Resolver(answer);
    resolver.tcp.listen(0, '127.0.0.1');
    await once(resolver.tcp, 'listening');
    resolver.udp.bind((resolver.tcp.address() as AddressInfo).port, '127.0.0.1');
    await once(resolver.udp, 'listening');
    return resolver;
  }

  private constructor(answer: (message: Buffer) => Buffer[]) {
    this.udp = createSocket('udp4');
    this.udp.on('message', (message, from) => {
      this.queries.push(message);
      for (const one of answer(message)) this.udp.send(one, from.port, from.address);
    });
    this.tcp = createServer((socket) => {
      socket.on('error', () => {});
      socket.once('data', (chunk) => {
        const message = chunk.subarray(2);
        this.queries.push(message);
        for (const one of answer(message)) {
          // In two pieces, since a stream owes nobody whole messages.
          const bytes = Buffer.concat([Buffer.from([one.length >> 8, one.length & 255]), one]);
          socket.write(bytes.subarray(0, 1));
          setImmediate(() => socket.write(bytes.subarray(1)));
        }
      });
    });
  }

  get text(): string {
    return `127.0.0.1:${(this.tcp.address() as AddressInfo).port}`;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.udp.close();
    this.tcp.close();
  }
}

async function ask(guest: Guest, message: Uint8Array, port = 3000): Promise<Buffer> {
  guest.sendUdp(DNS, 53, port, message);
  const { source, sourcePort, payload } = await guest.nextUdp(port);
  expect([source, sourcePort]).toEqual([DNS, 53]);
  return payload;
}

const code = (answer: Buffer) => (answer[3] as number) & 15;

test('a query goes to the resolver as it is, and its answer comes back as it is', async () => {
  await using resolver = await Resolver.open((m) => [answerTo(m, 'x'.repeat(3000))]);
  await using guest = await Guest.open({ resolvers: [resolver.text] });
  const message = Buffer.concat([query('Example.ORG', 65), Buffer.from([0, 0, 41, 16, 0, 0, 0, 0, 0, 0, 0])]);
  expect(await ask(guest, message)).toEqual(answerTo(message, 'x'.repeat(3000)));
  expect(resolver.queries).toEqual([message]);
  expect(guest.faults).toEqual([]);
});

test('an answer with another ID, or that is none, is not taken', async () => {
  await using resolver = await Resolver.open((m) => {
    const other = answerTo(m, 'forged');
    other[0] = (other[0] as number) ^ 1;
    return [other, m, Buffer.alloc(3), answerTo(m)];
  });
  await using guest = await Guest.open({ resolvers: [resolver.text] });
  expect(await ask(guest, query('example.org'))).toEqual(answerTo(query('example.org')));
});

test('a resolver that is silent or not there makes way for the next', async () => {
  await using silent = await Resolver.open(() => []);
  await using resolver = await Resolver.open();
  const resolvers = [silent.text, '127.0.0.1:1', resolver.text];
  await using guest = await Guest.open({ resolvers, tuning: { dnsTimeout: 50 } });
  expect(await ask(guest, query('example.org'))).toEqual(answerTo(query('example.org')));
  expect(silent.queries).toHaveLength(1);
});

test('queries over TCP, several in one connection', async () => {
  await using resolver = await Resolver.open((m) => [answerTo(m, 'y'.repeat(20_000))]);
  await using guest = await Guest.open({ resolvers: [resolver.text], tuning: { timeWait: 10 } });
  const connection = await guest.tcp.connect(53, {}, DNS);
  const queries = ['a.example', 'b.example', 'c.example'].map((text, i) => query(text, 1, i));
  const framed = Buffer.concat(queries.map((q) => Buffer.concat([Buffer.from([0, q.length]), q])));
  connection.write(framed.subarray(0, 1));
  connection.write(framed.subarray(1, 40));
  connection.write(framed.subarray(40));
  connection.end();
  await connection.until((c) => c.ended);
  const expected = queries.map((q) => {
    const answer = answerTo(q, 'y'.repeat(20_000));
    return Buffer.concat([Buffer.from([answer.length >> 8, answer.length & 255]), answer]);
  });
  expect(connection.data.equals(Buffer.concat(expected))).toBe(true);
  expect(guest.faults).toEqual([]);
});

test('garbage over TCP ends the connection', async () => {
  await using guest = await Guest.open({ resolvers: [] });
  const connection = await guest.tcp.connect(53, {}, DNS);
  connection.write(Buffer.alloc(100, 0xff));
  await connection.until((c) => c.state === 'reset');
  expect(guest.network.counters.tcpNow).toBe(0);
});

test('without a resolver the system’s own knowledge answers', async () => {
  await using guest = await Guest.open({ resolvers: [] });
  const a = await ask(guest, query('LocalHost'));
  expect(code(a)).toBe(0);
  expect(a.readUInt16BE(6)).toBeGreaterThanOrEqual(1);
  expect(a.subarray(0, 2)).toEqual(Buffer.from([0x12, 0x34]));
  const record = a.subarray(query('localhost').length);
  expect(record.subarray(0, 6)).toEqual(Buffer.from([0xc0, 12, 0, 1, 0, 1]));
  expect(record.subarray(10, 16)).toEqual(Buffer.from([0, 4, 127, 0, 0, 1]));
  const aaaa = await ask(guest, query('localhost', 28));
  expect(code(aaaa)).toBe(0); // with or without an address: the name exists
  const ptr = await ask(guest, query('1.0.0.127.in-addr.arpa', 12));
  expect(code(ptr)).toBe(0);
  expect(ptr.readUInt16BE(6)).toBe(1);
  expect(code(await ask(guest, query('localhost', 15)))).toBe(2); // MX: not to be had
  expect(guest.network.counters.dnsFailed).toBe(1);
});

test('queries that are wrong', async () => {
  await using guest = await Guest.open({ resolvers: [] });
  const two = query('example.org');
  two[5] = 2;
  expect(code(await ask(guest, two))).toBe(1);
  const pointer = query('example.org');
  pointer[12] = 0xc0;
  expect(code(await ask(guest, pointer))).toBe(1);
  expect(code(await ask(guest, query('example.org').subarray(0, 20)))).toBe(1);
  expect(code(await ask(guest, query(`${'a'.repeat(63)}.`.repeat(5))))).toBe(1);
  guest.sendUdp(DNS, 53, 3000, answerTo(query('example.org')));
  guest.sendUdp(DNS, 53, 3000, Buffer.alloc(11));
  await guest.settle();
  expect(guest.network.counters.dropped.malformed).toBe(2);
  expect(guest.taken((frame) => frame.type === 0x0800)).toEqual([]);
});

test('allow sees the name and refuses', async () => {
  const seen: unknown[] = [];
  await using resolver = await Resolver.open();
  await using guest = await Guest.open({
    resolvers: [resolver.text],
    allow: (flow) => {
      seen.push(flow);
      return flow.name !== 'secret.example';
    },
  });
  expect(code(await ask(guest, query('Secret.Example')))).toBe(5);
  expect(await ask(guest, query('open.example'))).toEqual(answerTo(query('open.example')));
  expect(seen[0]).toEqual({ protocol: 'dns', address: DNS, port: 53, name: 'secret.example' });
  await ask(guest, query('\x00a\\.'));
  expect(seen[2]).toMatchObject({ name: '\\000a\\092' });
  expect(resolver.queries).toHaveLength(2);
  expect(guest.network.counters.refused).toBe(1);
});

test('questions under way are limited', async () => {
  await using silent = await Resolver.open(() => []);
  await using guest = await Guest.open({ resolvers: [silent.text], tuning: { dnsQueries: 5 } });
  for (let i = 0; i < 20; i++) guest.sendUdp(DNS, 53, 3000, query('example.org', 1, i));
  await guest.settle();
  expect(guest.network.counters.dropped.limit).toBe(15);
});

test('a resolver that is not one is a usage error', async () => {
  await expect(Guest.open({ resolvers: ['dns.example'] })).rejects.toMatchObject({ code: 'ERR_USAGE' });
  await expect(Guest.open({ resolvers: ['127.0.0.1:0'] })).rejects.toMatchObject({ code: 'ERR_USAGE' });
  await expect(Guest.open({ hostName: 'no spaces' })).rejects.toMatchObject({ code: 'ERR_USAGE' });
  for (const resolver of ['::1', '[::1]:5353', '127.0.0.1']) {
    await using _guest = await Guest.open({ resolvers: [resolver] });
  }
});
