import { describe, expect, test } from 'vitest';
import { TerminalText } from '#dist/cli/terminal-text.js';

const ESC = '\x1b';

describe('a console’s output, for a terminal that is not its console', () => {
  test.each([
    ['text and layout', 'a\tb\r\nc\b', 'a\tb\r\nc\b'],
    ['UTF-8', 'ü€ ©\u00a0😀', 'ü€ ©\u00a0😀'],
    ['colours', `${ESC}[1;32mOK${ESC}[0m${ESC}[m`, `${ESC}[1;32mOK${ESC}[0m${ESC}[m`],
    ['questions', `/ # ${ESC}[6n${ESC}[c${ESC}[>c${ESC}[?6n${ESC}[18t${ESC}Z\x05x`, '/ # x'],
    ['what looks like a colour', `${ESC}[>4;2m${ESC}[?4mx`, 'x'],
    ['moves, modes and screens', `${ESC}[2J${ESC}[H${ESC}[?1049h${ESC}7${ESC}(B${ESC}cx`, 'x'],
    ['strings, with either end', `${ESC}]0;title\x07a${ESC}P$qm${ESC}\\b${ESC}_x${ESC}\\c`, 'abc'],
    ['a string without an end: the next line is there', `${ESC}]0;title\nnext`, 'next'],
    ['controls of eight bits, in UTF-8', '\u009b6nx\u009d0;t\x07y\u0085', 'xy'],
    ['a sequence in another', `${ESC}[3${ESC}[31mx`, `${ESC}[31mx`],
    ['a sequence without an end', `${ESC}[${'1'.repeat(100)}`, '1'.repeat(35)],
  ])('%s', (_, said, shown) => {
    expect(new TerminalText().push(Buffer.from(said)).toString()).toBe(shown);
    const bytes = new TerminalText();
    expect(Buffer.concat([...Buffer.from(said)].map((byte) => bytes.push(Uint8Array.of(byte)))).toString()).toBe(shown);
  });

  test('bytes that are no UTF-8', () => {
    const bytes = Buffer.from([0xc2, 0x41, 0x9b, 0xc2, 0x1b, 0x5b, 0x36, 0x6e]);
    expect(new TerminalText().push(bytes)).toEqual(Buffer.from([0xc2, 0x41, 0x9b]));
  });
});
