/*
 * The shortest guest: stamps milestone 3 with its first instructions and ends with code 0.
 *
 * The same bytes run in 64-bit mode, where the 64-bit boot protocol enters them, and in the 32-bit protected mode of PVH.
 * -DPVH adds the note by which QEMU's -kernel finds the entry of an ELF (Xen's elfnote.h, XEN_ELFNOTE_PHYS32_ENTRY).
 */
        .text
        .globl _start
_start:
        mov     $3, %al
        out     %al, $0xf8
        xor     %eax, %eax
        out     %al, $0xf4
1:      jmp     1b

#ifdef PVH
        .section .note.Xen, "a", @note
        .long   4, 4, 18
        .asciz  "Xen"
        .long   _start
#endif
        .section .note.GNU-stack, "", @progbits
