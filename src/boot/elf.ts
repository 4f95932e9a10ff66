import { ImageError } from '../errors.js';
import {
  EM_386,
  EM_X86_64,
  ET_DYN,
  ET_EXEC,
  elf32_hdr,
  elf32_phdr,
  elf64_hdr,
  elf64_phdr,
  PT_INTERP,
  PT_LOAD,
  PT_NOTE,
} from '../kvm/generated/abi.js';
import { type ImageBytes, readUpTo } from './image-file.js';
import { hex } from './text.js';

/** What goes where: a PT_LOAD segment that is not empty. */
export interface Segment {
  /** Where its bytes are in the file. */
  readonly offset: number;
  readonly fileSize: number;
  /** p_paddr. */
  readonly gpa: number;
  /** At least fileSize; what is beyond is zero. */
  readonly size: number;
  readonly virtual: bigint;
}

/** An ELF that could be a kernel. */
export interface Elf {
  readonly is64: boolean;
  /** e_entry, a virtual address. */
  readonly entry: bigint;
  /** In file order; they do not overlap. */
  readonly segments: readonly Segment[];
  /** Where a PVH boot enters: the XEN_ELFNOTE_PHYS32_ENTRY note, if there is one. */
  readonly pvhEntry: number | undefined;
  /** Whether the notes say that it is Linux. */
  readonly isLinux: boolean;
}

// System V gABI chapter 4, "ELF Header".
const EI_CLASS = 4;
const EI_DATA = 5;
const ELFCLASS32 = 1;
const ELFCLASS64 = 2;
const ELFDATA2LSB = 1;
const MAGIC = 0x464c457f;
const ET_REL = 1;
const ET_CORE = 4;
const machineNames: Record<number, string> = {
  2: 'a SPARC',
  8: 'a MIPS',
  20: 'a PowerPC',
  21: 'a PowerPC64',
  22: 'an S/390',
  40: 'an Arm',
  183: 'an AArch64',
  243: 'a RISC-V',
  258: 'a LoongArch',
};

// Kernels have fewer than ten; this bounds the work on an image that means harm.
const MAX_PROGRAM_HEADERS = 128;
const MAX_NOTES = 64 * 1024;

// Xen's public/elfnote.h.
const XEN_ELFNOTE_GUEST_OS = 6;
const XEN_ELFNOTE_PHYS32_ENTRY = 18;

export function isElf(head: Uint8Array): boolean {
  return head.length >= 4 && new DataView(head.buffer, head.byteOffset).getUint32(0, true) === MAGIC;
}

/** Reads and checks the headers and notes of an ELF; ImageError for one that is no x86 kernel or is damaged. */
export function parseElf(image: ImageBytes): Elf {
  const fail = (problem: string) => new ImageError(`${image.name}: ${problem}`);
  const truncated = (what: string, end: number) =>
    fail(`is truncated: ${what} ends at byte ${end}, the file at ${image.size}; copy or build it again`);

  const header = viewOf(readUpTo(image, 0, elf64_hdr.sizeof));
  if (header.byteLength < elf32_hdr.sizeof) throw truncated('the ELF header', elf64_hdr.sizeof);
  const elfClass = header.getUint8(EI_CLASS);
  if (elfClass !== ELFCLASS32 && elfClass !== ELFCLASS64) throw fail(`is an ELF of unknown class ${elfClass}`);
  if (header.getUint8(EI_DATA) !== ELFDATA2LSB) throw fail('is a big-endian ELF; tsvisor boots x86-64 kernels');
  const is64 = elfClass === ELFCLASS64;
  const [ehdr, phdr] = is64 ? [elf64_hdr, elf64_phdr] : [elf32_hdr, elf32_phdr];
  if (header.byteLength < ehdr.sizeof) throw truncated('the ELF header', ehdr.sizeof);

  const machine = header.getUint16(ehdr.e_machine, true);
  if (machine !== EM_X86_64 && (is64 || machine !== EM_386)) {
    throw fail(`is ${machineNames[machine] ?? `a (machine ${machine})`} ELF; tsvisor boots x86-64 kernels`);
  }
  const type = header.getUint16(ehdr.e_type, true);
  if (type !== ET_EXEC && type !== ET_DYN) {
    const kind = type === ET_REL ? 'an object file' : type === ET_CORE ? 'a core dump' : `an ELF of type ${type}`;
    throw fail(`is ${kind}, not a kernel; name a vmlinux or bzImage`);
  }

  /** An address or size: 32 or 64 bits by class. Beyond 2^53 no file or memory reaches. */
  const word = (view: DataView, offset: number, what: string): number => {
    const value = is64 ? view.getBigUint64(offset, true) : view.getUint32(offset, true);
    if (value > Number.MAX_SAFE_INTEGER) throw fail(`${what} is ${hex(value)}, out of range; link or copy it again`);
    return Number(value);
  };

  const count = header.getUint16(ehdr.e_phnum, true);
  const entrySize = header.getUint16(ehdr.e_phentsize, true);
  const tableOffset = word(header, ehdr.e_phoff, 'e_phoff');
  if (count === 0) throw fail('has no program headers, so nothing to load; name a linked kernel');
  if (count > MAX_PROGRAM_HEADERS) throw fail(`has ${count} program headers, more than ${MAX_PROGRAM_HEADERS}`);
  if (entrySize !== phdr.sizeof) throw fail(`has program headers of ${entrySize} bytes, not ${phdr.sizeof}`);
  const tableEnd = tableOffset + count * entrySize;
  if (tableEnd > image.size) throw truncated('the program header table', tableEnd);
  const table = viewOf(readUpTo(image, tableOffset, count * entrySize));

  const segments: Segment[] = [];
  const notes: Note[] = [];
  for (let i = 0; i < count; i++) {
    const view = new DataView(table.buffer, i * entrySize, entrySize);
    const kind = view.getUint32(phdr.p_type, true);
    if (kind === PT_INTERP) throw fail('is a program, not a kernel: it asks for a dynamic linker; name a kernel');
    if (kind !== PT_LOAD && kind !== PT_NOTE) continue;
    const offset = word(view, phdr.p_offset, `p_offset of program header ${i}`);
    const fileSize = word(view, phdr.p_filesz, `p_filesz of program header ${i}`);
    if (offset + fileSize > image.size) throw truncated(`segment ${i}`, offset + fileSize);
    if (kind === PT_NOTE) {
      const align = word(view, phdr.p_align, `p_align of program header ${i}`) === 8 ? 8 : 4;
      notes.push(...parseNotes(viewOf(readUpTo(image, offset, Math.min(fileSize, MAX_NOTES))), align));
      continue;
    }
    const gpa = word(view, phdr.p_paddr, `p_paddr of program header ${i}`);
    const size = word(view, phdr.p_memsz, `p_memsz of program header ${i}`);
    if (fileSize > size) throw fail(`segment ${i} has more bytes in the file than in memory; build it again`);
    if (gpa + size > Number.MAX_SAFE_INTEGER) throw fail(`segment ${i} ends beyond 2^53; link it lower`);
    const virtual = is64 ? view.getBigUint64(phdr.p_vaddr, true) : BigInt(view.getUint32(phdr.p_vaddr, true));
    if (size > 0) segments.push({ offset, fileSize, gpa, size, virtual });
  }
  if (segments.length === 0) throw fail('has no PT_LOAD segment, so nothing to load; name a linked kernel');
  checkOverlap(segments, fail);

  const entry = is64 ? header.getBigUint64(ehdr.e_entry, true) : BigInt(header.getUint32(ehdr.e_entry, true));
  return { is64, entry, segments, pvhEntry: pvhEntryOf(notes), isLinux: notes.some(isLinuxNote) };
}

/** The physical address of the entry point; undefined if it is in no segment. */
export function physicalEntry({ entry, segments }: Elf): number | undefined {
  // Linux sets e_entry to the physical address of startup_64 (phys_startup_64 in arch/x86/kernel/vmlinux.lds.S); others
  // leave it virtual.
  if (segments.some(({ gpa, size }) => entry >= gpa && entry < gpa + size)) return Number(entry);
  const home = segments.find(({ virtual, size }) => entry >= virtual && entry < virtual + BigInt(size));
  return home && home.gpa + Number(entry - home.virtual);
}

/** Two segments at one address mean a damaged file, and would let a small file cause endless work. */
function checkOverlap(segments: readonly Segment[], fail: (problem: string) => ImageError): void {
  const sorted = [...segments].sort((a, b) => a.gpa - b.gpa);
  for (let i = 1; i < sorted.length; i++) {
    const [before, after] = [sorted[i - 1] as Segment, sorted[i] as Segment];
    if (before.gpa + before.size > after.gpa) throw fail(`has two segments at ${hex(after.gpa)}; link it again`);
  }
}

interface Note {
  readonly name: string;
  readonly type: number;
  readonly description: DataView;
}

/** System V gABI chapter 5, "Note Section". Stops at the first that does not fit. */
function parseNotes(view: DataView, align: number): Note[] {
  const notes: Note[] = [];
  const padded = (size: number) => Math.ceil(size / align) * align;
  for (let at = 0; at + 12 <= view.byteLength; ) {
    const nameSize = view.getUint32(at, true);
    const descriptionSize = view.getUint32(at + 4, true);
    const descriptionAt = padded(at + 12 + nameSize);
    if (descriptionAt + descriptionSize > view.byteLength) break;
    const name = text(new DataView(view.buffer, at + 12, nameSize));
    const description = new DataView(view.buffer, descriptionAt, descriptionSize);
    notes.push({ name, type: view.getUint32(at + 8, true), description });
    at = padded(descriptionAt + descriptionSize);
  }
  return notes;
}

function pvhEntryOf(notes: readonly Note[]): number | undefined {
  const description = notes.find((n) => n.name === 'Xen' && n.type === XEN_ELFNOTE_PHYS32_ENTRY)?.description;
  // A 32-bit address; Linux stores it in a word of its own size.
  if (!description || description.byteLength < 4) return undefined;
  return description.getUint32(0, true);
}

/**
 * Linux marks itself: a note named `Linux` (LINUX_ELFNOTE_BUILD_SALT, always there since 4.19: include/linux/build-salt.h),
 * or with CONFIG_XEN_PV XEN_ELFNOTE_GUEST_OS. Kernels with a PVH entry and neither are older than 4.19, and boot by it.
 */
function isLinuxNote({ name, type, description }: Note): boolean {
  return name === 'Linux' || (name === 'Xen' && type === XEN_ELFNOTE_GUEST_OS && text(description) === 'linux');
}

function text(view: DataView): string {
  const bytes = new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
  const end = bytes.indexOf(0);
  return String.fromCharCode(...bytes.subarray(0, Math.min(end < 0 ? 16 : end, 16)));
}

function viewOf(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}
