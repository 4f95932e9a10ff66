// CRC-32 of IEEE 802.3, reflected, four bytes a step. node:zlib has one from Node 20.15 on only.
const TABLES = Array.from({ length: 4 }, () => new Uint32Array(256)) as [
  Uint32Array,
  Uint32Array,
  Uint32Array,
  Uint32Array,
];
const [T0, T1, T2, T3] = TABLES;
for (let n = 0; n < 256; n++) {
  let crc = n;
  for (let bit = 0; bit < 8; bit++) crc = crc & 1 ? (crc >>> 1) ^ 0xedb88320 : crc >>> 1;
  T0[n] = crc;
}
for (let n = 0; n < 256; n++) {
  for (let t = 1; t < 4; t++) {
    const crc = TABLES[t - 1]?.[n] as number;
    (TABLES[t] as Uint32Array)[n] = (crc >>> 8) ^ (T0[crc & 0xff] as number);
  }
}

export function crc32(bytes: Uint8Array): number {
  let crc = -1;
  let i = 0;
  for (; i + 4 <= bytes.length; i += 4) {
    crc ^=
      (bytes[i] as number) |
      ((bytes[i + 1] as number) << 8) |
      ((bytes[i + 2] as number) << 16) |
      ((bytes[i + 3] as number) << 24);
    crc =
      (T3[crc & 0xff] as number) ^
      (T2[(crc >>> 8) & 0xff] as number) ^
      (T1[(crc >>> 16) & 0xff] as number) ^
      (T0[crc >>> 24] as number);
  }
  for (; i < bytes.length; i++) crc = (crc >>> 8) ^ (T0[(crc ^ (bytes[i] as number)) & 0xff] as number);
  return (crc ^ -1) >>> 0;
}
