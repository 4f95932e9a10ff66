import { layout } from '../machine/layout.js';
import type { GuestMemory } from '../memory/guest-memory.js';
import type { MapEntry } from './memory-map.js';
import type { Range } from './placement.js';

// Xen's public/arch-x86/hvm/start_info.h, which has the layout as comments. It is no uapi header of Linux.
const MAGIC = 0x336ec578; // XEN_HVM_START_MAGIC_VALUE
const VERSION = 1; // the first with a memory map
const START_INFO_SIZE = 56;
const MODULE_SIZE = 32;
const MEMORY_MAP_ENTRY_SIZE = 24;

/**
 * Writes hvm_start_info with the memory map and the initrd as its only module at layout.pvhStartInfo and returns its
 * address, which a PVH guest finds in EBX.
 * @param rsdp of the ACPI tables; 0 if there are none
 */
export function writePvhStartInfo(
  memory: GuestMemory,
  map: readonly MapEntry[],
  initrd: Range | undefined,
  rsdp: number,
): number {
  const modulesAt = START_INFO_SIZE;
  const mapAt = modulesAt + MODULE_SIZE;
  const bytes = new Uint8Array(mapAt + map.length * MEMORY_MAP_ENTRY_SIZE);
  const view = new DataView(bytes.buffer);
  const base = layout.pvhStartInfo;
  view.setUint32(0, MAGIC, true);
  view.setUint32(4, VERSION, true);
  view.setBigUint64(24, BigInt(layout.commandLine), true); // cmdline_paddr
  if (initrd) {
    view.setUint32(12, 1, true); // nr_modules
    view.setBigUint64(16, BigInt(base + modulesAt), true); // modlist_paddr
    view.setBigUint64(modulesAt, BigInt(initrd.start), true); // paddr
    view.setBigUint64(modulesAt + 8, BigInt(initrd.end - initrd.start), true); // size
  }
  view.setBigUint64(32, BigInt(rsdp), true); // rsdp_paddr
  view.setBigUint64(40, BigInt(base + mapAt), true); // memmap_paddr
  view.setUint32(48, map.length, true); // memmap_entries
  map.forEach(({ start, end, type }, i) => {
    const at = mapAt + i * MEMORY_MAP_ENTRY_SIZE;
    view.setBigUint64(at, BigInt(start), true); // addr
    view.setBigUint64(at + 8, BigInt(end - start), true); // size
    view.setUint32(at + 16, type, true); // type
  });
  memory.write(base, bytes);
  return base;
}
