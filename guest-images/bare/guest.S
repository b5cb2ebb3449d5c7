/*
 * The bare-metal guest: a few hundred instructions that use minivmm's machine as a kernel would.
 *
 * Owns both entries, the ways to end, and the choice of the scenario by the command line; disk.S
 * drives the disk, text.S prints. Knows no interrupts: it polls.
 * Only plain integer instructions (no SSE, int3, iret; cmpxchg16b where it is asked for), so that it
 * also runs on a KVM that emulates CPL 0.
 *
 * Entries
 *   elf_start   the ELF entry: long mode, the low 4 GiB mapped 1:1, rsi = boot_params (x86 boot
 *               protocol, 64-bit)
 *   pvh_start   the PVH entry, where the file is built with -DPVH_NOTE: 32-bit protected mode, no
 *               paging, ebx = hvm_start_info
 *
 * Scenarios (scenario=NAME in the command line), and what ends the machine
 *   io          a disk's whole life; exit code 0x20. Variants, as further words:
 *                 noflush   does not negotiate FLUSH, and sends none
 *                 nowce     does not negotiate CONFIG_WCE
 *                 wb=0 wb=1 sets `writeback` before the first write, in the first round only
 *                 discard   negotiates DISCARD too, and discards sectors 64 to 71
 *                 zeroes    negotiates WRITE_ZEROES too, and zeroes sectors 72 to 79
 *                 second    uses the second device
 *                 twice     does all of it again after the reset
 *   audit       writes and FLUSHes, told one by one, for the auditor; exit code 0x2a. Variants as above
 *   inflight    resets the device with a write in flight; exit code 0x23
 *   echo        echoes COM1 until it reads a `q`; exit code 0x21
 *   badinsn     lock cmpxchg16b, which an emulating KVM lacks; exit code 0x22
 *   exit=N      exit code N, decimal, below 128
 *   reset       ACPI's reset register
 *   i8042       0xfe to port 0x64
 *   poweroff    ACPI's sleep control register, soft off
 *   panic       pvpanic, port 0x505
 *   triple      a fault without an IDT
 *   hang        halts with interrupts off
 *   spin        loops for ever
 *   chatter     prints for ever
 *   oops        prints what a kernel prints when it panics, with control sequences in it, and resets by the i8042;
 *               with the further word `stay` it halts
 *
 * Exit codes: a code C at the exit port becomes the status (C << 1) | 1. Failures:
 *   0x01  the command line names no scenario we know
 *   0x02  a PVH entry without hvm_start_info's magic
 *   0x03  reset, power-off or panic did not end the machine
 *   0x10  the used ring named another chain, or a length other than what was written
 *   0x11  no virtio magic     0x12  version is not 2     0x13  not a block device
 *   0x14  VERSION_1, FLUSH or CONFIG_WCE is not offered  0x15  FEATURES_OK was refused
 *   0x16  the queue is too small, or ready before its time
 *   0x17  the queue or DRIVER_OK did not stay
 *   0x18  write   0x19  flush   0x1a  read: its status was not OK
 *   0x1b  the data read is not what was written
 *   0x1c  a read beyond the capacity was not IOERR
 *   0x1d  an unknown request type was not UNSUPP
 *   0x1e  GET_ID was not OK
 *   0x1f  after reset, status or QueueReady is not 0
 *   0x24  a status byte was not written
 *   0x25  `writeback` does not read back what was written
 *   0x27  discard   0x28  write-zeroes: its status was not OK
 *   0x26  after reset, the device has still written to the used ring
 */

/* Ports. Those of ACPI, and VIRTIO_MMIO_BASE, are given to the linker. */
#define PORT_COM1       0x3f8
#define PORT_EXIT       0xf4
#define PORT_PVPANIC    0x505
#define PORT_I8042_CMD  0x64

        .macro say text
        .section .data
9876:   .asciz "\text"
        .text
        movl    $9876b, %esi
        call    puts
        .endm

/* ------------------------------------------------------------------ the PVH entry, and its note */

#ifdef PVH_NOTE
        .section .note.Xen, "a", @note
        .balign 4
        .long   2f - 1f, 4f - 3f, 18            /* XEN_ELFNOTE_PHYS32_ENTRY */
1:      .asciz  "Xen"
2:      .balign 4
3:      .long   pvh_start
4:      .balign 4
#endif

        .text
        .code32
        .globl  pvh_start
pvh_start:
        cli
        cld
        movl    $stack_top, %esp
        movl    %ebx, %ebp                      /* hvm_start_info */

        /* Page tables: the low 4 GiB, 1:1, in pages of 2 MiB. */
        movl    $pdpt + 3, pml4
        movl    $page_dirs + 3, %eax
        movl    $pdpt, %edi
1:      movl    %eax, (%edi)
        addl    $8, %edi
        addl    $0x1000, %eax
        cmpl    $pdpt + 32, %edi
        jne     1b
        movl    $0x83, %eax                     /* present, writable, large */
        movl    $page_dirs, %edi
2:      movl    %eax, (%edi)
        addl    $8, %edi
        addl    $0x200000, %eax
        jnc     2b

        movl    %cr4, %eax
        orl     $0x20, %eax                     /* PAE */
        movl    %eax, %cr4
        movl    $pml4, %eax
        movl    %eax, %cr3
        movl    $0xc0000080, %ecx               /* EFER */
        rdmsr
        orl     $0x100, %eax                    /* LME */
        wrmsr
        movl    %cr0, %eax
        orl     $0x80000001, %eax               /* PG, PE */
        movl    %eax, %cr0
        lgdt    gdt_pointer
        ljmp    $0x08, $pvh_long_mode

        .code64
pvh_long_mode:
        movl    $0x10, %eax
        movl    %eax, %ds
        movl    %eax, %es
        movl    %eax, %ss
        movl    $stack_top, %esp
        movl    %ebp, %ebp                      /* the upper half is undefined after 32-bit mode */
        movl    $text_pvh, %r13d
        cmpl    $0x336ec578, 0(%rbp)
        movl    $0x02, %edi
        jne     fail
        movq    24(%rbp), %r12                  /* cmdline_paddr */
        jmp     main

/* ------------------------------------------------------------------ the ELF entry */

        .globl  elf_start
elf_start:
        cli
        cld
        movl    $stack_top, %esp
        movl    $text_elf, %r13d
        movl    0x228(%rsi), %r12d              /* cmd_line_ptr */

/* ------------------------------------------------------------------ common: r12 = command line */

main:
        say     "bare guest: entered by "
        movl    %r13d, %esi
        call    puts
        say     "\r\nbare guest: command line: "
        movq    %r12, %rsi
        call    puts
        call    newline

        movl    $word_scenario, %edi
        call    find
        testq   %rax, %rax
        jz      unknown
        movq    %rax, %r14                      /* the scenario's name, and what follows it */
        movl    $scenarios, %ebp
1:      movq    0(%rbp), %rdi
        testq   %rdi, %rdi
        jz      unknown
        movq    %r14, %rsi
        call    begins
        jne     2f
        movq    8(%rbp), %rax
        jmp     *%rax
2:      addq    $16, %rbp
        jmp     1b
unknown:
        movl    $0x01, %edi
        jmp     fail

        .section .data
scenarios:
        .quad   1f, scenario_io
        .quad   2f, scenario_echo
        .quad   3f, scenario_badinsn
        .quad   4f, scenario_exit
        .quad   5f, scenario_reset
        .quad   6f, scenario_i8042
        .quad   7f, scenario_poweroff
        .quad   8f, scenario_panic
        .quad   9f, scenario_triple
        .quad   10f, scenario_hang
        .quad   11f, scenario_spin
        .quad   12f, scenario_inflight
        .quad   13f, scenario_chatter
        .quad   14f, scenario_audit
        .quad   15f, scenario_oops
        .quad   0
1:      .asciz  "io"
2:      .asciz  "echo"
3:      .asciz  "badinsn"
4:      .asciz  "exit="
5:      .asciz  "reset"
6:      .asciz  "i8042"
7:      .asciz  "poweroff"
8:      .asciz  "panic"
9:      .asciz  "triple"
10:     .asciz  "hang"
11:     .asciz  "spin"
12:     .asciz  "inflight"
13:     .asciz  "chatter"
14:     .asciz  "audit"
15:     .asciz  "oops"
word_scenario:  .asciz "scenario="
word_noflush:   .asciz "noflush"
word_nowce:     .asciz "nowce"
word_wb:        .asciz "wb="
word_discard:   .asciz "discard"
word_zeroes:    .asciz "zeroes"
word_second:    .asciz "second"
word_twice:     .asciz "twice"
word_stay:      .asciz "stay"
text_elf:       .asciz "ELF"
text_pvh:       .asciz "PVH"
        .text

/* ------------------------------------------------------------------ the ways to end */

scenario_exit:
        leaq    5(%r14), %rsi                   /* behind "exit=" */
        xorl    %edi, %edi
1:      movzbl  (%rsi), %eax
        subl    $'0', %eax
        cmpl    $9, %eax
        ja      exit
        imull   $10, %edi, %edi
        addl    %eax, %edi
        incq    %rsi
        jmp     1b

scenario_reset:
        movl    $PORT_ACPI_RESET, %edx          /* RESET_REG, RESET_VALUE 1 */
        movb    $1, %al
        jmp     last_write
scenario_poweroff:
        movl    $PORT_ACPI_SLEEP_CONTROL, %edx  /* SLEEP_CONTROL_REG */
        movb    $(5 << 2 | 0x20), %al           /* SLP_TYP 5, SLP_EN */
        jmp     last_write
scenario_panic:
        movl    $PORT_PVPANIC, %edx
        movb    $1, %al                         /* PVPANIC_PANICKED */
        jmp     last_write
scenario_i8042:
        movl    $PORT_I8042_CMD, %edx
        movb    $0xfe, %al                      /* pulse the reset line */
last_write:
        outb    %al, %dx
        movl    $0x03, %edi
        jmp     fail

scenario_triple:
        say     "bare guest: a fault without an IDT\r\n"
        lidt    no_idt
        ud2

scenario_hang:
        say     "bare guest: halting\r\n"
        jmp     halt

scenario_spin:
        say     "bare guest: spinning\r\n"
1:      pause
        jmp     1b

scenario_chatter:
        say     "bare guest: chatter\r\n"
        jmp     scenario_chatter

scenario_oops:
        say     "[    0.000001] all is well\r\n"
        say     "[    0.000002] BUG: kernel NULL pointer dereference, address: 0000000000000000\r\n"
        say     "[    0.000003] Code: \033]0;title\007\033[2J\377\r\n"
        say     "[    0.000004] Kernel panic - not syncing: Fatal exception\r\n"
        movl    $word_stay, %edi
        call    find
        testq   %rax, %rax
        jnz     halt
        jmp     scenario_i8042

scenario_badinsn:
        say     "bare guest: cmpxchg16b\r\n"
        xorl    %eax, %eax
        xorl    %edx, %edx
        movl    $1, %ebx
        xorl    %ecx, %ecx
        lock cmpxchg16b cell
        movl    $0x22, %edi
        jmp     exit

scenario_echo:
        say     "bare guest: echoing until q\r\n"
1:      movl    $PORT_COM1 + 5, %edx
        inb     %dx, %al
        testb   $0x01, %al                      /* LSR: data ready */
        jnz     2f
        pause
        jmp     1b
2:      movl    $PORT_COM1, %edx
        inb     %dx, %al
        movb    %al, %bl
        call    putc
        cmpb    $'q', %bl
        jne     1b
        movl    $0x21, %edi
        jmp     exit

/* Says which check failed, and exits with its code: edi. */
fail:
        movl    %edi, %ebp
        say     "bare guest: FAILED, code 0x"
        movl    %ebp, %edi
        call    puthex
        call    newline
        movl    %ebp, %edi
/* Exits with code edi. */
exit:
        movl    %edi, %eax
        movl    $PORT_EXIT, %edx
        outb    %al, %dx
halt:
        cli
        hlt
        jmp     halt

#include "disk.S"
#include "audit.S"
#include "text.S"

/* ------------------------------------------------------------------ data */

        .section .data
digits:         .ascii "0123456789abcdef"
        .balign 8
gdt:            .quad   0
                .quad   0x00af9b000000ffff      /* 64-bit code */
                .quad   0x00cf93000000ffff      /* data */
gdt_pointer:    .word   gdt_pointer - gdt - 1
                .long   gdt
no_idt:         .word   0
                .quad   0

        .section .bss
        .balign 4096
pml4:           .skip   4096
pdpt:           .skip   4096
page_dirs:      .skip   4 * 4096
pattern:        .skip   BLOCK
readback:       .skip   BLOCK
descriptors:    .skip   16 * QUEUE_SIZE
        .balign 4096
available:      .skip   6 + 2 * QUEUE_SIZE
        .balign 4096
used:           .skip   6 + 8 * QUEUE_SIZE
        .balign 16
cell:           .skip   16
erased:         .skip   16
header:         .skip   16
rounds:         .skip   4
status:         .skip   1
id:             .skip   21
        .balign 4096
                .skip   4096
stack_top:
        .section .note.GNU-stack, "", @progbits
