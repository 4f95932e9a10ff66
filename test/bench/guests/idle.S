/*
 * Says that it runs, by a byte to the serial port and milestone 3, and then halts for good: a machine with nothing to do.
 *
 * The same bytes run in 64-bit mode, where the 64-bit boot protocol enters them, and in the 32-bit protected mode of PVH.
 */
        .text
        .globl _start
_start:
        cli
        mov     $'!', %al
        mov     $0x3f8, %edx
        out     %al, %dx
        mov     $3, %al
        out     %al, $0xf8
1:      hlt
        jmp     1b

        /* By this note QEMU's -kernel finds the entry (Xen's elfnote.h, XEN_ELFNOTE_PHYS32_ENTRY). */
        .section .note.Xen, "a", @note
        .long   4, 4, 18
        .asciz  "Xen"
        .long   _start
        .section .note.GNU-stack, "", @progbits
