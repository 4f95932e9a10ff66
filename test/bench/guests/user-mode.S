/*
 * Enters user_main(hvm_start_info *) in 64-bit mode at privilege level 3, from the 32-bit PVH entry.
 *
 * The first and the fourth GiB are mapped to themselves and all I/O ports are allowed: what comes after needs no kernel,
 * which a nested KVM would interpret. No interrupts, no IDT: a fault is a triple fault, which ends the machine.
 */
#define USER_SS 0x2b
#define USER_CS 0x33
#define KERNEL_CS 0x10
#define TSS_SELECTOR 0x40
#define PORTS 0x400

#define P_TABLE 0x27 /* present, writable, user, accessed */
#define P_LARGE 0xe7 /* and dirty, 2 MiB */
#define P_UNCACHED 0x18

#define CR0_PG 0x80000000
#define CR4_PAE 0x20
#define MSR_EFER 0xc0000080
#define EFER_LME 0x100

        .text
        .code32
        .globl _start
_start:
        cli
        lgdt    gdt_pointer
        mov     %cr4, %eax
        or      $CR4_PAE, %eax
        mov     %eax, %cr4
        mov     $pml4, %eax
        mov     %eax, %cr3
        mov     $MSR_EFER, %ecx
        rdmsr
        or      $EFER_LME, %eax
        wrmsr
        mov     %cr0, %eax
        or      $CR0_PG, %eax
        mov     %eax, %cr0
        ljmp    $KERNEL_CS, $long_mode
        .code64
long_mode:
        mov     $stack_top, %esp
        mov     %ebx, %edi
        /* A descriptor's base is in pieces, which no relocation can fill. */
        mov     $tss, %eax
        mov     %ax, gdt_tss + 2
        shr     $16, %eax
        mov     %al, gdt_tss + 4
        mov     %ah, gdt_tss + 7
        mov     $TSS_SELECTOR, %eax
        ltr     %ax
        pushq   $USER_SS
        pushq   $stack_top
        pushq   $2
        pushq   $USER_CS
        pushq   $user
        iretq
user:
        call    user_main
        ud2

        .data
        .balign 4096
pml4:   .quad   pdpt + P_TABLE
        .fill   511, 8, 0
pdpt:   .quad   low + P_TABLE
        .quad   0, 0
        .quad   high + P_TABLE
        .fill   508, 8, 0
low:    .set    address, 0
        .rept   512
        .quad   address + P_LARGE
        .set    address, address + 0x200000
        .endr
high:   .set    address, 0xc0000000
        .rept   512
        .quad   address + P_LARGE + P_UNCACHED
        .set    address, address + 0x200000
        .endr

        /* Linux' selectors: a nested KVM runs user mode on the host's own descriptors. */
gdt:    .quad   0
        .quad   0
        .quad   0x00af9b000000ffff /* 0x10 kernel code */
        .quad   0x00cf93000000ffff /* 0x18 kernel data */
        .quad   0
        .quad   0x00cff3000000ffff /* 0x28 user data */
        .quad   0x00affb000000ffff /* 0x30 user code */
        .quad   0
gdt_tss:
        .quad   0x0000890000000000 + tss_end - tss - 1 /* 0x40 available 64-bit TSS */
        .quad   0
gdt_pointer:
        .word   . - gdt - 1
        .long   gdt

        /* I/O permission by bitmap, all clear, not by IOPL: a nested KVM runs user mode with IOPL 0 whatever iretq loads. */
tss:    .fill   102, 1, 0
        .word   104
        .fill   PORTS / 8, 1, 0
        .byte   0xff
tss_end:

        .bss
        .balign 16
        .skip   16384
stack_top:

        /* By this note -kernel finds the entry (Xen's elfnote.h, XEN_ELFNOTE_PHYS32_ENTRY). */
        .section .note.Xen, "a", @note
        .long   4, 4, 18
        .asciz  "Xen"
        .long   _start
        .section .note.GNU-stack, "", @progbits
