import {
  boot_e820_entry,
  boot_params,
  E820_MAX_ENTRIES_ZEROPAGE,
  setup_header as hdr,
  LOADED_HIGH,
} from '../kvm/generated/abi.js';
import { layout } from '../machine/layout.js';
import type { GuestMemory } from '../memory/guest-memory.js';
import { BOOT_FLAG, HEADER_MAGIC } from './bzimage.js';
import { LINUX_COMMAND_LINE_SIZE } from './command-line.js';
import type { MapEntry } from './memory-map.js';
import type { Range } from './placement.js';

/** "Otherwise, enter 0xFF here": a boot loader without an assigned number (boot.rst, type_of_loader). */
const LOADER_UNDEFINED = 0xff;
const VIDEO_MODE_NORMAL = 0xffff; // boot.rst, "Special Command Line Options": vga=normal
const PROTOCOL_2_15 = 0x020f;

/**
 * Writes the zero page, struct boot_params, at layout.bootParams (zero-page.rst), and returns its address. What is not
 * mentioned here is 0: no screen (screen_info), no EFI, no EDD, and the sentinel (0x1ef) that tells Linux the rest is
 * clean.
 * @param setupHeader a bzImage's own, from 0x1f1 of the file; a bare vmlinux has none
 * @param rsdp of the ACPI tables; 0 if there are none
 */
export function writeBootParams(
  memory: GuestMemory,
  map: readonly MapEntry[],
  initrd: Range | undefined,
  setupHeader: Uint8Array | undefined,
  loadAddress: number,
  rsdp: number,
): number {
  const bytes = new Uint8Array(boot_params.sizeof);
  const view = new DataView(bytes.buffer);
  const header = new DataView(bytes.buffer, boot_params.hdr);
  if (setupHeader) bytes.set(setupHeader, boot_params.hdr);
  else {
    header.setUint16(hdr.boot_flag, BOOT_FLAG, true); // 0x1fe
    header.setUint32(hdr.header, HEADER_MAGIC, true); // 0x202
    // 0x206. Not 0: Linux takes 0 for a zero page it has not copied yet (x86_64_start_reservations in head64.c).
    header.setUint16(hdr.version, PROTOCOL_2_15, true);
    header.setUint32(hdr.cmdline_size, LINUX_COMMAND_LINE_SIZE, true); // 0x238
  }
  header.setUint16(hdr.vid_mode, VIDEO_MODE_NORMAL, true); // 0x1fa, obligatory
  header.setUint8(hdr.type_of_loader, LOADER_UNDEFINED); // 0x210, obligatory
  // 0x211, obligatory. CAN_USE_HEAP and heap_end_ptr are for the real-mode code, which does not run.
  header.setUint8(hdr.loadflags, LOADED_HIGH);
  header.setUint32(hdr.code32_start, loadAddress, true); // 0x214
  header.setUint32(hdr.cmd_line_ptr, layout.commandLine, true); // 0x228, obligatory; ext_cmd_line_ptr (0xc8) stays 0
  header.setBigUint64(hdr.setup_data, 0n, true); // 0x250: no list
  if (initrd) {
    const size = initrd.end - initrd.start;
    header.setUint32(hdr.ramdisk_image, initrd.start % 2 ** 32, true); // 0x218
    header.setUint32(hdr.ramdisk_size, size % 2 ** 32, true); // 0x21c
    view.setUint32(boot_params.ext_ramdisk_image, Math.floor(initrd.start / 2 ** 32), true); // 0xc0
    view.setUint32(boot_params.ext_ramdisk_size, Math.floor(size / 2 ** 32), true); // 0xc4
  }
  view.setBigUint64(boot_params.acpi_rsdp_addr, BigInt(rsdp), true); // 0x70
  const entries = map.slice(0, E820_MAX_ENTRIES_ZEROPAGE);
  view.setUint8(boot_params.e820_entries, entries.length); // 0x1e8
  entries.forEach(({ start, end, type }, i) => {
    const at = boot_params.e820_table + i * boot_e820_entry.sizeof; // 0x2d0
    view.setBigUint64(at + boot_e820_entry.addr, BigInt(start), true);
    view.setBigUint64(at + boot_e820_entry.length, BigInt(end - start), true);
    view.setUint32(at + boot_e820_entry.type, type, true);
  });
  memory.write(layout.bootParams, bytes);
  return layout.bootParams;
}
