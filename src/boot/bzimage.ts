import { ImageError } from '../errors.js';
import { setup_header as hdr, XLF_KERNEL_64 } from '../kvm/generated/abi.js';
import { type ImageBytes, readUpTo } from './image-file.js';

// All of Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header". Fields are named as there.
export const SETUP_HEADER_OFFSET = 0x1f1;
export const BOOT_FLAG = 0xaa55;
export const HEADER_MAGIC = 0x53726448; // "HdrS"
const SECTOR = 512;
/** The header is at most 144 bytes ("The kernel_info"): what the jump reaches and boot_params has room for. */
const SETUP_HEADER_LIMIT = 0x290 - SETUP_HEADER_OFFSET;
/** The 64-bit entry is this far into the protected-mode code ("64-bit Boot Protocol"). */
const ENTRY_64 = 0x200;
const PROTOCOL_2_12 = 0x020c;

/** A bzImage's header. */
export interface BzImage {
  /** The setup header as it is in the file, for boot_params.hdr. */
  readonly setupHeader: Uint8Array;
  /** Where the protected-mode code is in the file. */
  readonly codeOffset: number;
  readonly codeSize: number;
  /** Where the packed ELF is in the file; absent if the header does not say. */
  readonly payload: { readonly offset: number; readonly size: number } | undefined;
  /** cmdline_size: characters, without the terminating NUL. */
  readonly commandLineSize: number;
  /** initrd_addr_max: the last address an initrd may use. */
  readonly initrdAddressMax: number;
  /** Where to load the protected-mode code when the guest unpacks itself, the entry there, and the RAM it needs. */
  readonly loadAddress: number;
  readonly entry: number;
  readonly initSize: number;
}

export function isBzImage(head: Uint8Array): boolean {
  if (head.length < SETUP_HEADER_OFFSET + hdr.version) return false;
  const view = new DataView(head.buffer, head.byteOffset + SETUP_HEADER_OFFSET);
  return view.getUint16(hdr.boot_flag, true) === BOOT_FLAG && view.getUint32(hdr.header, true) === HEADER_MAGIC;
}

/** Reads and checks the header of a bzImage; ImageError for one that is truncated, older than Linux 3.8 or 32-bit. */
export function parseBzImage(image: ImageBytes): BzImage {
  const fail = (problem: string) => new ImageError(`${image.name}: ${problem}`);
  const truncated = (what: string, end: number) =>
    fail(`is truncated: ${what} ends at byte ${end}, the file at ${image.size}; copy or build it again`);

  const bytes = readUpTo(image, SETUP_HEADER_OFFSET, SETUP_HEADER_LIMIT);
  if (bytes.length < hdr.sizeof) throw truncated('the setup header', SETUP_HEADER_OFFSET + hdr.sizeof);
  const view = new DataView(bytes.buffer);
  const version = view.getUint16(hdr.version, true);
  if (version < PROTOCOL_2_12) {
    const text = `${version >> 8}.${String(version & 0xff).padStart(2, '0')}`;
    throw fail(`is a bzImage of boot protocol ${text}; tsvisor needs 2.12, that is Linux 3.8 or later`);
  }
  if (!(view.getUint16(hdr.xloadflags, true) & XLF_KERNEL_64)) {
    throw fail('is a 32-bit kernel; tsvisor boots x86-64 kernels');
  }

  const codeOffset = ((view.getUint8(hdr.setup_sects) || 4) + 1) * SECTOR;
  // In paragraphs of 16 bytes, rounded up: the file may lack part of the last.
  const promised = view.getUint32(hdr.syssize, true) * 16;
  const codeSize = Math.min(promised, image.size - codeOffset);
  if (promised < ENTRY_64 + 16) throw fail(`has only ${promised} bytes of code; copy or build it again`);
  if (codeSize <= promised - 16) throw truncated('the code', codeOffset + promised);

  const payloadOffset = view.getUint32(hdr.payload_offset, true);
  const payloadSize = view.getUint32(hdr.payload_length, true);
  if (payloadOffset + payloadSize > codeSize) throw truncated('the payload', codeOffset + payloadOffset + payloadSize);

  const preferred = view.getBigUint64(hdr.pref_address, true);
  const alignment = view.getUint32(hdr.kernel_alignment, true);
  const initSize = view.getUint32(hdr.init_size, true);
  // The decompressor moves itself to pref_address if it is lower, and to a multiple of kernel_alignment ("init_size").
  if (preferred > 0xffff_ffffn || alignment === 0 || Number(preferred) % alignment !== 0 || initSize < codeSize) {
    throw fail('has a setup header that contradicts itself; copy or build it again');
  }
  const loadAddress = Number(preferred);
  return {
    // The end of the header: 0x202 and the byte at 0x201, the jump's offset ("32-bit Boot Protocol").
    setupHeader: bytes.subarray(0, hdr.header + view.getUint8(hdr.jump + 1)),
    codeOffset,
    codeSize,
    payload:
      payloadSize > 0 && payloadOffset > 0 ? { offset: codeOffset + payloadOffset, size: payloadSize } : undefined,
    commandLineSize: view.getUint32(hdr.cmdline_size, true),
    initrdAddressMax: view.getUint32(hdr.initrd_addr_max, true),
    loadAddress,
    entry: loadAddress + ENTRY_64,
    initSize,
  };
}
