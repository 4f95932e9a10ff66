import { describe, expect, test } from 'vitest';
import { ConsoleTail } from '#dist/machine/console-tail.js';

function write(tail: ConsoleTail, text: string): void {
  for (const byte of Buffer.from(text)) tail.put(byte);
}

describe('the last of a console', () => {
  test('is its last lines, for whoever shares the memory', () => {
    const tail = new ConsoleTail();
    write(new ConsoleTail(tail.buffer), 'one\r\n\r\ntwo\r\nthree');
    expect(tail.lines(2)).toEqual(['two', 'three']);
    expect(tail.lines(9)).toEqual(['one', 'two', 'three']);
  });

  test('is bounded', () => {
    const tail = new ConsoleTail();
    for (let i = 0; i < 5000; i++) write(tail, `line ${i}\n`);
    const lines = tail.lines(10_000);
    expect(lines.at(-1)).toBe('line 4999');
    expect(lines.length).toBeGreaterThan(1000);
    expect(lines.join('\n').length).toBeLessThanOrEqual(16 * 1024);
  });

  test('has no control characters, whatever the guest writes', () => {
    const tail = new ConsoleTail();
    write(tail, '\x1b[31mred\x1b[0m\tbold\x07\x00\x9b2J\x1b]0;title\x07 æ\n');
    expect(tail.lines(1)).toEqual(['red\tbold2J]0;title æ']);
    for (const byte of [0xff, 0xc3, 0x0a]) tail.put(byte); // no UTF-8
    expect(tail.lines(1)[0]).toMatch(/^\ufffd+$/);
  });

  test('tells one boot from the next, also when the count wraps', () => {
    const tail = new ConsoleTail();
    new Uint32Array(tail.buffer, 0, 1)[0] = 2 ** 32 - 8;
    write(tail, 'before');
    tail.mark();
    expect(tail.sinceMark()).toBe('');
    write(tail, 'after');
    expect(tail.sinceMark()).toBe('after');
  });
});
