import { EventEmitter } from 'node:events';
import { expect, test } from 'vitest';
import type { DeviceHandle } from '#dist/index.js';
import { Reader, Writer } from '../../examples/object-fs/messages.js';
import { serveObject } from '../../examples/object-fs/server.js';
import { Random } from '../../kvm/assist/random.js';

type Tree = Parameters<typeof serveObject>[1];
const RLERROR = 7;
const [ENOENT, ENOMEM, EACCES, EEXIST, EMFILE, ENOSPC] = [2, 12, 13, 17, 24, 28];
const QUOTA = 10_000;

/** A guest's 9P client, as far as these tests need one. */
function client(tree: Tree) {
  const replies = new Map<number, (reply: Uint8Array) => void>();
  const device = Object.assign(new EventEmitter(), {
    postMessage: ({ id, reply }: { id: number; reply: Uint8Array }) => replies.get(id)?.(reply),
  });
  serveObject(device as unknown as DeviceHandle, tree, { quota: QUOTA });
  let id = 0;
  const raw = (request: Uint8Array, room = 65_536) =>
    new Promise<Uint8Array>((resolve) => {
      replies.set(++id, resolve);
      device.emit('message', { id, request, room });
    });
  /** @returns the reply without its header, or the errno. */
  const call = async (type: number, body: Writer, tag = 1): Promise<Reader | number> => {
    const reply = new Reader(await raw(body.message(type, tag)));
    reply.u32();
    const got = reply.u8();
    expect(reply.u16()).toBe(tag);
    if (got === RLERROR) return reply.u32();
    expect(got).toBe(type + 1);
    return reply;
  };
  const walk = (fid: number, ...names: string[]) => {
    const body = new Writer().u32(0).u32(fid).u16(names.length);
    for (const name of names) body.text(name);
    return call(110, body);
  };
  const write = (fid: number, offset: number, length: number) =>
    call(118, new Writer().u32(fid).u64(offset).u32(length).bytes(new Uint8Array(length)));
  const create = (fid: number, name: string) => call(14, new Writer().u32(fid).text(name).u32(0).u32(0).u32(0));
  const attach = () => call(104, new Writer().u32(0).u32(0xffff_ffff).text('u').text('').u32(0));
  return { raw, call, walk, write, create, attach };
}

test('whatever a guest sends is answered, and leaves the object as it was but for what it may write', async () => {
  const random = new Random();
  const tree: Tree = { file: 'text', folder: { late: async () => 'x' } };
  const guest = client(tree);
  await guest.attach();
  const types = [8, 12, 14, 24, 26, 40, 50, 72, 76, 100, 104, 108, 110, 116, 118, 120];
  for (let n = 0; n < 3000; n++) {
    const body = new Uint8Array(random.below(60));
    random.fill(body);
    if (random.chance(80) && body.length > 4) body.fill(0, 0, 4);
    const message = new Writer().bytes(body).message(random.chance(90) ? random.pick(types) : random.below(256), 1);
    const reply = await guest.raw(message.subarray(0, random.chance(90) ? message.length : random.below(12)));
    expect(new DataView(reply.buffer, reply.byteOffset).getUint32(0, true), `seed ${random.seed}`).toBe(reply.length);
  }
  expect(Object.getPrototypeOf(tree)).toBe(Object.prototype);
});

test('a guest’s writes end at the quota, which it gets back by removing', async () => {
  const tree: Tree = { big: 'x'.repeat(20_000) };
  const guest = client(tree);
  await guest.attach();
  await guest.walk(1);
  await guest.create(1, 'mine');
  expect(await guest.write(1, 0, 9000)).toBeInstanceOf(Reader);
  expect(await guest.write(1, 9000, 2000)).toBe(ENOSPC);
  expect(await guest.write(1, 2 ** 52, 1)).toBe(ENOSPC);
  await guest.walk(2, 'big');
  expect(await guest.write(2, 0, 1)).toBe(ENOSPC); // a copy of its own
  await guest.call(76, new Writer().u32(0).text('mine').u32(0));
  for (let n = 0; ; n++) {
    await guest.walk(3);
    if ((await guest.create(3, `${n}`)) !== ENOSPC) continue;
    expect(n).toBeGreaterThan(20);
    expect(n).toBeLessThan(50);
    break;
  }
});

test('names are only ever the object’s own, and there is nothing above it', async () => {
  const tree: Tree = { folder: { file: 'x' } };
  const guest = client(tree);
  await guest.attach();
  for (const name of ['__proto__', 'constructor', 'toString', '', '.', 'folder/file']) {
    expect(await guest.walk(1, name)).toBe(ENOENT);
  }
  expect(await guest.walk(1, '..', '..', 'folder')).toBeInstanceOf(Reader);
  expect(await guest.create(1, 'file')).toBe(EEXIST);
  expect(await guest.create(1, '__proto__')).toBeInstanceOf(Reader);
  expect(Object.getPrototypeOf(tree.folder)).toBe(Object.prototype);
});

test('what functions give is read as it was when the file was opened, and not written', async () => {
  let calls = 0;
  const guest = client({ count: () => `${++calls}` });
  await guest.attach();
  await guest.walk(1, 'count');
  expect(await guest.call(12, new Writer().u32(1).u32(1))).toBe(EACCES);
  await guest.call(12, new Writer().u32(1).u32(0));
  for (let n = 0; n < 2; n++) {
    const reply = (await guest.call(116, new Writer().u32(1).u64(0).u32(10))) as Reader;
    expect(Buffer.from(reply.bytes(reply.u32())).toString()).toBe('1');
  }
  expect(await guest.write(1, 0, 1)).toBe(EACCES);
});

test('what open files hold of functions counts in the quota', async () => {
  const guest = client({ large: () => 'x'.repeat(4000) });
  await guest.attach();
  const open = async (fid: number) => {
    await guest.walk(fid, 'large');
    return await guest.call(12, new Writer().u32(fid).u32(0));
  };
  for (const fid of [1, 2, 2, 1]) expect(await open(fid)).toBeInstanceOf(Reader);
  expect(await open(3)).toBe(ENOMEM);
  await guest.call(120, new Writer().u32(1));
  expect(await open(3)).toBeInstanceOf(Reader);
});

test('a flush is answered after the request it is for', async () => {
  let give: (content: string) => void = () => {};
  const guest = client({ slow: () => new Promise<string>((resolve) => (give = resolve)) });
  await guest.attach();
  await guest.walk(1, 'slow');
  const order: string[] = [];
  const open = guest.call(12, new Writer().u32(1).u32(0), 7).then(() => order.push('open'));
  const flush = guest.call(108, new Writer().u16(7), 8).then(() => order.push('flush'));
  await new Promise((resolve) => setImmediate(resolve));
  give('at last');
  await Promise.all([open, flush]);
  expect(order).toEqual(['open', 'flush']);
});

test('a guest cannot have more fids than there are', async () => {
  const guest = client({});
  await guest.attach();
  let fid = 1;
  while ((await guest.walk(fid)) !== EMFILE) fid++;
  expect(fid).toBe(4096);
});
