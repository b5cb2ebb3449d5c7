/*
 * The entry (PVH) of guests without a kernel, and their way to CPL 3.
 *
 * Long mode with the low 4 GiB mapped 1:1, all of it open to CPL 3, ports below 0x2000 too (by the bitmap
 * in the TSS: such a KVM does not keep IOPL), interrupts off.
 * With `ring=3` on the command line the rest runs at CPL 3, entered by sysexit: on a KVM without hardware
 * virtualization only that code runs on the processor, all of CPL 0 is emulated. With hardware the rest
 * stays at CPL 0. No other instruction is used that such a KVM lacks (iret, sysret).
 */
        .section .note.Xen, "a", @note
        .balign 4
        .long   2f - 1f, 4f - 3f, 18            /* XEN_ELFNOTE_PHYS32_ENTRY */
1:      .asciz  "Xen"
2:      .balign 4
3:      .long   pvh_start
4:      .balign 4

        .text
        .code32
        .globl  pvh_start
pvh_start:
        cli
        cld
        movl    $stack_top, %esp
        movl    %ebx, %ebp                      /* hvm_start_info */

        movl    $pdpt + 7, pml4
        movl    $page_dirs + 7, %eax
        movl    $pdpt, %edi
1:      movl    %eax, (%edi)
        addl    $8, %edi
        addl    $0x1000, %eax
        cmpl    $pdpt + 32, %edi
        jne     1b
        movl    $0x87, %eax                     /* present, writable, user, large */
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
        ljmp    $0x08, $long_mode

        .code64
long_mode:
        movw    $0x10, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movw    $0x38, %ax
        ltr     %ax
        /* struct hvm_start_info: the command line's address is at 24. */
        movl    %ebp, %ebp
        movq    24(%rbp), %rdi
        movq    %rdi, command_line
        call    wants_ring_3
        testl   %eax, %eax
        jz      at_ring_0

        movl    $0x174, %ecx                    /* IA32_SYSENTER_CS: CPL 3's selectors follow from it */
        movl    $0x08, %eax
        xorl    %edx, %edx
        wrmsr
        movw    $0x33, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movl    $stack_top, %ecx
        movl    $at_ring_3, %edx
        sysexitq

at_ring_0:
at_ring_3:
        movq    command_line, %rdi
        call    run
1:      jmp     1b

/* rdi = the command line; eax = whether it has "ring=3". Few instructions: they may be emulated. */
wants_ring_3:
        xorl    %eax, %eax
        testq   %rdi, %rdi
        jz      2f
1:      movq    %rdi, %rdx
        cmpb    $0, (%rdx)
        je      2f
        incq    %rdi
        cmpl    $0x676e6972, (%rdx)             /* "ring" */
        jne     1b
        cmpw    $0x333d, 4(%rdx)                /* "=3" */
        jne     1b
        movl    $1, %eax
2:      ret

        .section .data
        .balign 8
gdt:    .quad   0
        .quad   0x00af9a000000ffff              /* 0x08 code, 64-bit */
        .quad   0x00cf92000000ffff              /* 0x10 data */
        .quad   0
        .quad   0
        .quad   0x00affa000000ffff              /* 0x28 code of CPL 3, 64-bit: SYSENTER_CS + 32 */
        .quad   0x00cff2000000ffff              /* 0x30 data of CPL 3: SYSENTER_CS + 40 */
        /* 0x38 the TSS: its limit is that of the bitmap, its address is put in by the linker. */
        .word   tss_end - tss - 1
        .word   tss_low
        .byte   tss_middle
        .byte   0x89, 0, 0
        .quad   0
gdt_pointer:
        .word   . - gdt - 1
        .long   gdt
        .balign 8
        /* 104 bytes, of which only the bitmap's offset counts: nothing comes back from CPL 3. */
        .globl  tss
tss:    .skip   102
        .word   tss_bitmap - tss
tss_bitmap:
        .skip   0x2000 / 8
        .byte   0xff
tss_end:
        .balign 8
command_line:
        .quad   0

        .section .bss
        .balign 4096
pml4:   .skip   4096
pdpt:   .skip   4096
page_dirs:
        .skip   4 * 4096
        .balign 16
stack:  .skip   32768
stack_top:

        .section .note.GNU-stack, "", @progbits
