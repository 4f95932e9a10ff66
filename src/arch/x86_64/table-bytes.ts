/** What the MP table and the ACPI tables have in common. */

/** Writes text of ASCII characters, without a terminator. */
export function setAscii(view: DataView, offset: number, text: string): void {
  for (let i = 0; i < text.length; i++) view.setUint8(offset + i, text.charCodeAt(i));
}

/** What a checksum byte that is still 0 must become for all bytes to sum to 0 modulo 256. */
export function checksum(bytes: Uint8Array): number {
  let sum = 0;
  for (const byte of bytes) sum += byte;
  return -sum & 0xff;
}
