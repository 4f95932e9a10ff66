/**
 * Undoes the x86 branch filter of the .xz format (filter ID 0x04) in place, over one whole block: the operands of CALL
 * (e8) and JMP (e9), which the encoder made absolute, become relative again. What counts as an operand depends on the
 * e8/e9 bytes shortly before, kept in `mask`; the rules are those of XZ Embedded's xz_dec_bcj.c (public domain).
 * @param start the filter's start offset, 0 unless the file gives one
 */
export function undoX86Filter(bytes: Uint8Array, start: number): void {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const end = bytes.length - 4;
  let mask = 0;
  let previous = -1;
  for (let i = 0; i < end; i++) {
    if (((bytes[i] as number) & 0xfe) !== 0xe8) continue;
    const distance = i - previous;
    previous = i;
    mask = distance > 3 ? 0 : (mask << (distance - 1)) & 7;
    if (mask !== 0) {
      const byte = bytes[i + 4 - (MASK_TO_BYTE[mask] as number)] as number;
      if (!MASK_ALLOWED[mask] || isSignByte(byte)) {
        mask = (mask << 1) | 1;
        continue;
      }
    }
    if (!isSignByte(bytes[i + 4] as number)) {
      mask = (mask << 1) | 1;
      continue;
    }
    let operand = view.getUint32(i + 1, true);
    let target = (operand - (start + i + 5)) >>> 0;
    if (mask !== 0) {
      const shift = (MASK_TO_BYTE[mask] as number) * 8;
      while (isSignByte((target >>> (24 - shift)) & 0xff)) {
        operand = (target ^ (2 ** (32 - shift) - 1)) >>> 0;
        target = (operand - (start + i + 5)) >>> 0;
      }
    }
    // Sign-extend from bit 24.
    view.setInt32(i + 1, (target << 7) >> 7, true);
    i += 4;
  }
}

const MASK_ALLOWED = [true, true, true, false, true, false, false, false];
const MASK_TO_BYTE = [0, 1, 2, 2, 3, 3, 3, 3];

function isSignByte(byte: number): boolean {
  return byte === 0 || byte === 0xff;
}
