const MiB = 1024 * 1024;

/** A guest physical address as people read it. */
export function hex(value: number | bigint): string {
  return `0x${value.toString(16)}`;
}

/** A size in MiB, rounded up: what to ask for. */
export function mebibytes(bytes: number): string {
  return `${Math.ceil(bytes / MiB)} MiB`;
}

/** A size as it is: `8 MiB`, `12.3 MiB`, `640 KiB`, `17 bytes`. */
export function sizeText(bytes: number): string {
  if (bytes < 1024) return `${bytes} bytes`;
  const [unit, name] = bytes < MiB ? [1024, 'KiB'] : [MiB, 'MiB'];
  return `${Number((bytes / unit).toFixed(1))} ${name}`;
}
