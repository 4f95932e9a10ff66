import { guestProgram } from './guest-program.js';

/**
 * A guest whose boot processor starts the others and waits until each has done port I/O a hundred times; then it does
 * `then`. Each counts for ever, processor N in the doubleword at 0x71000 + 4 * N, and exits at every tenth.
 */
export function smpGuest(cpus: number, then: string): string {
  return guestProgram(`
      .set APIC, 0xfee00000
      lea rsi, [rip + trampoline]
      mov edi, 0x70000
      mov ecx, offset trampoline_end - trampoline
      rep movsb
      mov eax, APIC + 0xf0
      mov dword ptr [rax], 0x1ff       # software-enabled
      mov eax, APIC + 0x300
      mov dword ptr [rax], 0x000c4500  # INIT to all but this one
      mov dword ptr [rax], 0x000c4670  # SIPI: begin at 0x70000
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
