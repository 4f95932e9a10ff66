import { createRequire } from 'node:module';
import type * as Iced from 'iced-x86';

const require = createRequire(import.meta.url);

/**
 * The first instruction of some bytes in Intel syntax, e.g. `vaddps ymm1,ymm2,ymm3`, and its length; `(bad)` for none.
 * For messages only: the first call loads the disassembler, which takes about 0.1 s.
 * @param bits code size: 16, 32 or 64.
 */
export function disassemble(bytes: Uint8Array, bits: number, rip: bigint): { text: string; length: number } {
  const iced = require('iced-x86') as typeof Iced;
  const decoder = new iced.Decoder(bits, bytes, iced.DecoderOptions.None);
  decoder.ip = rip;
  const instruction = decoder.decode();
  const formatter = new iced.Formatter(iced.FormatterSyntax.Intel);
  try {
    if (instruction.code === iced.Code.INVALID) return { text: '(bad)', length: bytes.length };
    return { text: formatter.format(instruction), length: instruction.length };
  } finally {
    formatter.free();
    instruction.free();
    decoder.free();
  }
}
