/*
 * Executes a counted number of exits between milestones, several times over, after a warm-up of the same kind.
 *
 * -DCPL=0|3    privilege level of the loop
 * -DPORT=n     one-byte `out` to this port, or
 * -DMMIO=n     four-byte store to this guest physical address (the page is mapped to itself, uncached)
 * -DWARMUP=n -DEXITS=n   how many, multiples of UNROLL; EXITS in each of SEGMENTS segments
 *
 * Milestones 3 to 3 + SEGMENTS on the boot-timer port 0xf8; then code 0 on the debug-exit port 0xf4.
 * No interrupts, no IDT: a fault is a triple fault, which the bench reports.
 */
#define UNROLL 16
#define USER_SS 0x2b
#define USER_CS 0x33
#define TSS_SELECTOR 0x40
#define PORTS 0x400

#define P_TABLE 0x27 /* present, writable, user, accessed */
#define P_LARGE 0xe7 /* and dirty, 2 MiB */
#define P_UNCACHED 0x18

        .text
        .globl _start
_start:
        cli
        mov     $stack_top, %rsp
        lgdt    gdt_pointer(%rip)
        mov     $pml4, %eax
        mov     %rax, %cr3
#if CPL == 3
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
        pushq   $start
        iretq
#endif
start:
#ifdef MMIO
        mov     $MMIO, %ebx
#else
        mov     $PORT, %edx
#endif
        mov     $(WARMUP / UNROLL), %ecx
        call    exits
        mov     $3, %esi
segment:
        mov     %esi, %eax
        out     %al, $0xf8
        mov     $(EXITS / UNROLL), %ecx
        call    exits
        inc     %esi
        cmp     $(3 + SEGMENTS), %esi
        jne     segment
        mov     %esi, %eax
        out     %al, $0xf8
        xor     %eax, %eax
        out     %al, $0xf4
1:      jmp     1b

/* Unrolled, so that what is timed is the exits and not the loop around them, which some hosts interpret. */
exits:
        .rept   UNROLL
#ifdef MMIO
        mov     %eax, (%rbx)
#else
        out     %al, %dx
#endif
        .endr
        dec     %ecx
        jnz     exits
        ret

        .data
        .balign 4096
pml4:   .quad   pdpt + P_TABLE
        .fill   511, 8, 0
pdpt:   .quad   low + P_TABLE
        .quad   0, 0
        .quad   high + P_TABLE
        .fill   508, 8, 0
        /* The first and the fourth GiB, mapped to themselves with 2 MiB pages. */
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
        .quad   gdt

        /* I/O permission by bitmap, all clear, not by IOPL: a nested KVM runs user mode with IOPL 0 whatever iretq loads. */
tss:    .fill   102, 1, 0
        .word   104
        .fill   PORTS / 8, 1, 0
        .byte   0xff
tss_end:

        .bss
        .balign 16
        .skip   4096
stack_top:
        .section .note.GNU-stack, "", @progbits
