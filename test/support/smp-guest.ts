import { guestProgram } from './guest-program.js';

/** Has every processor but this one begin at a copy of what is between `trampoline` and `trampoline_end`, at 0x70000. */
const START_OTHERS = `
      .set APIC, 0xfee00000
      lea rsi, [rip + trampoline]
      mov edi, 0x70000
      mov ecx, offset trampoline_end - trampoline
      rep movsb
      mov eax, APIC + 0xf0
      mov dword ptr [rax], 0x1ff       # software-enabled
      mov eax, APIC + 0x300
      mov dword ptr [rax], 0x000c4500  # INIT to all but this one
      mov dword ptr [rax], 0x000c4670  # SIPI: begin at 0x70000`;

/**
 * A guest whose boot processor starts the others and waits until each has done port I/O a hundred times; then it does
 * `then`. Each counts for ever, processor N in the doubleword at 0x71000 + 4 * N, and exits at every tenth.
 */
export function smpGuest(cpus: number, then: string): string {
  return guestProgram(`
      ${START_OTHERS}
      mov esi, ${cpus - 1}
    next_processor:
      test esi, esi
      jz all_run
    wait_for_it:
      in al, 0x80
      cmp dword ptr [0x71000 + rsi * 4], 1000
      jb wait_for_it
      dec esi
      jmp next_processor
    all_run:
      ${then}
    trampoline:
      .code16
      cli
      mov ax, 0x7000
      mov ds, ax
      mov bx, 4
      lock xadd word ptr [0x1ff0], bx  # 4, 8, 12 … less 4
      add bx, 4
    count:
      mov cx, 10
    inner:
      inc dword ptr [bx + 0x1000]
      loop inner
      in al, 0x80
      jmp count
    trampoline_end:
      .code64`);
}

/**
 * A guest all of whose processors run `each` in long mode, with the processor's number, from 0, in edi; `each` must leave
 * by `jmp finished`. When all have, the boot processor does `then`.
 */
export function parallelGuest(cpus: number, each: string, then: string): string {
  return guestProgram(`
      mov rax, cr3
      mov [0x70ff0], eax               # for the trampoline
      ${START_OTHERS}
      xor edi, edi
    begin:
      ${each}
    finished:
      lock inc dword ptr [0x71ff0]
      test edi, edi
      jz wait
      hang: jmp hang
    wait:
      in al, 0x80
      cmp dword ptr [0x71ff0], ${cpus}
      jne wait
      ${then}
    trampoline:
      .code16
      cli
      mov ax, 0x7000
      mov ds, ax
      mov eax, 0x20                    # PAE
      mov cr4, eax
      mov eax, [0xff0]
      mov cr3, eax
      mov ecx, 0xc0000080              # EFER.LME
      rdmsr
      or eax, 0x100
      wrmsr
      mov eax, 0x80000001
      mov cr0, eax
      lgdt [gdt_pointer - trampoline]
      .byte 0x66, 0xff, 0x2e           # far jump by the pointer there
      .word long_pointer - trampoline
    gdt:
      .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
    gdt_pointer:
      .word 23
      .long 0x70000 + gdt - trampoline
    long_pointer:
      .long long_mode
      .word 8
    trampoline_end:
      .code64
    long_mode:
      mov ax, 16
      mov ds, ax
      mov es, ax
      mov ss, ax
      mov edi, 1
      lock xadd [0x71ff8], edi
      inc edi
      jmp begin`);
}
