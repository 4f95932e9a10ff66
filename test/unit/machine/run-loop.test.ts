import { afterEach, beforeEach, expect, test } from 'vitest';
import { addon } from '#dist/kvm/addon.js';
import { EPOLLIN } from '#dist/kvm/generated/abi.js';
import { FdEvents } from '#dist/machine/fd-events.js';
import { type LoopMember, RunLoop } from '#dist/machine/run-loop.js';

let loop: RunLoop;
let members: Member[];

/** A machine with one descriptor, of which every event is counted. */
class Member implements LoopMember {
  waiter: LoopMember['waiter'];
  due = false;
  rests = 0;
  seen = 0;
  failure: Error | undefined;
  onEvent = () => {};
  readonly fd = addon.eventfd(0);
  readonly events = new FdEvents<LoopMember>(loop.host, loop.tokens, this);

  constructor() {
    members.push(this);
    const count = new Uint8Array(8);
    const watch = this.events.add(this.fd, () => {
      addon.read(this.fd, count, 0, 8);
      watch(EPOLLIN);
      this.seen++;
      this.onEvent();
    });
    watch(EPOLLIN);
  }

  fail(error: Error): void {
    this.failure = error;
    this.due = true;
  }

  rest(): void {
    this.rests++;
  }

  ring(): void {
    addon.write(this.fd, new Uint8Array(new BigUint64Array([1n]).buffer), 0, 8);
  }
}

beforeEach(() => {
  loop = new RunLoop(true);
  members = [];
});
afterEach(() => {
  loop[Symbol.dispose]();
  for (const { fd } of members) addon.close(fd);
});

/** What a machine does until it is due by its nth event. */
function dueAt(member: Member, count: number): void {
  member.onEvent = () => {
    member.due = member.seen === count;
    if (!member.due) member.ring();
  };
}

test('a machine’s events are handled until it is due', async () => {
  loop.enter();
  const member = new Member();
  dueAt(member, 5);
  member.ring();
  await loop.until(member);
  loop.leave();
  expect([member.seen, member.rests]).toEqual([5, 1]);
});

test('those that come while it waits for promises are handled when it waits for events again, while others’ go on', async () => {
  loop.enter();
  loop.enter();
  const [building, running] = [new Member(), new Member()];
  dueAt(running, 3);
  building.ring();
  running.ring();
  await loop.until(running);
  expect([building.seen, running.seen]).toEqual([0, 3]);
  loop.leave();
  dueAt(building, 1);
  await loop.until(building);
  loop.leave();
  expect([building.seen, running.seen]).toEqual([1, 3]);
});

test('what was forgotten meanwhile is not handled', async () => {
  loop.enter();
  loop.enter();
  const [building, running] = [new Member(), new Member()];
  dueAt(running, 2);
  building.ring();
  running.ring();
  await loop.until(running);
  building.events.close();
  building.due = true;
  await loop.until(building);
  loop.leave();
  running.due = false;
  dueAt(running, 4);
  running.ring();
  await loop.until(running);
  loop.leave();
  expect([building.seen, running.seen]).toEqual([0, 4]);
});

test('what a handler throws is its machine’s failure, and no other’s', async () => {
  loop.enter();
  loop.enter();
  const [bad, good] = [new Member(), new Member()];
  bad.onEvent = () => {
    throw new Error('bad');
  };
  dueAt(good, 50);
  bad.ring();
  good.ring();
  await Promise.all([bad, good].map((member) => loop.until(member).then(() => loop.leave())));
  expect(bad.failure?.message).toBe('bad');
  expect([good.failure, good.seen]).toEqual([undefined, 50]);
});
