/*
 * The bare-metal guest: a few hundred instructions that use minivmm's machine as a kernel would.
 *
 * Owns both entries and the scenarios that the command line chooses. Knows no interrupts: it polls.
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
 *                 second    uses the second device
 *                 twice     does all of it again after the reset
 *   inflight    resets the device with a write in flight; exit code 0x23
 *   echo        echoes COM1 until it reads a `q`; exit code 0x21
 *   badinsn     lock cmpxchg16b, which an emulating KVM lacks; exit code 0x22
 *   exit=N      exit code N, decimal, below 128
 *   reset       ACPI's reset register
 *   i8042       0xfe to port 0x64
 *   poweroff    ACPI's sleep control register, S5
 *   panic       pvpanic, port 0x505
 *   triple      a fault without an IDT
 *   hang        halts with interrupts off
 *   spin        loops for ever
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
 *   0x26  after reset, the device has still written to the used ring
 */

/* Ports. PORT_ACPI and VIRTIO_MMIO_BASE are given to the linker. */
#define PORT_COM1       0x3f8
#define PORT_EXIT       0xf4
#define PORT_PVPANIC    0x505
#define PORT_I8042_CMD  0x64

/* virtio-mmio registers (virtio 4.2.2). */
#define R_MAGIC             0x000
#define R_VERSION           0x004
#define R_DEVICE_ID         0x008
#define R_DEVICE_FEATURES   0x010
#define R_DEVICE_FEAT_SEL   0x014
#define R_DRIVER_FEATURES   0x020
#define R_DRIVER_FEAT_SEL   0x024
#define R_QUEUE_SEL         0x030
#define R_QUEUE_SIZE_MAX    0x034
#define R_QUEUE_SIZE        0x038
#define R_QUEUE_READY       0x044
#define R_QUEUE_NOTIFY      0x050
#define R_STATUS            0x070
#define R_QUEUE_DESC        0x080
#define R_QUEUE_DRIVER      0x090
#define R_QUEUE_DEVICE      0x0a0
#define R_CONFIG            0x100
#define C_CAPACITY          (R_CONFIG + 0)
#define C_WRITEBACK         (R_CONFIG + 32)

#define S_ACKNOWLEDGE   1
#define S_DRIVER        2
#define S_DRIVER_OK     4
#define S_FEATURES_OK   8

/* Features, low word and high word. */
#define F_FLUSH         (1 << 9)
#define F_CONFIG_WCE    (1 << 11)
#define F_HI_VERSION_1  (1 << 0)

/* Requests (virtio 5.2.6). */
#define T_IN            0
#define T_OUT           1
#define T_FLUSH         4
#define T_GET_ID        8
#define T_UNKNOWN       0x4d56
#define ST_OK           0
#define ST_IOERR        1
#define ST_UNSUPP       2
#define ST_UNTOUCHED    0xaa

#define D_NEXT          1
#define D_WRITE         2

#define QUEUE_SIZE      8
#define BLOCK           4096
#define SECTOR          8
/* The pattern: dword i of the block is PATTERN + i. */
#define PATTERN         0x6d760000

        .macro say text
        .section .data
9876:   .asciz "\text"
        .text
        movl    $9876b, %esi
        call    puts
        .endm

        .macro reg_write reg, value
        movl    \value, \reg(%rbx)
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
word_scenario:  .asciz "scenario="
word_noflush:   .asciz "noflush"
word_nowce:     .asciz "nowce"
word_wb:        .asciz "wb="
word_second:    .asciz "second"
word_twice:     .asciz "twice"
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
        movl    $PORT_ACPI + 2, %edx            /* RESET_REG, RESET_VALUE 1 */
        movb    $1, %al
        jmp     last_write
scenario_poweroff:
        movl    $PORT_ACPI, %edx                /* SLEEP_CONTROL_REG */
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

/* ------------------------------------------------------------------ io: a disk's whole life */

/* rbx = registers, r15w = requests made so far, r12 = command line, r14d = the features taken */
scenario_io:
        call    bring_up
        call    set_writeback

        call    describe_write
        call    request
        movl    $0x18, %edi
        movl    $1, %r9d
        call    must_be_ok
        say     "bare guest: wrote\r\n"

        testl   $F_FLUSH, %r14d
        jz      1f
        movl    $T_FLUSH, %edi
        xorl    %esi, %esi
        xorl    %ecx, %ecx
        call    request
        movl    $0x19, %edi
        movl    $1, %r9d
        call    must_be_ok
        say     "bare guest: flushed\r\n"
1:
        movl    $T_IN, %edi
        movl    $SECTOR, %esi
        movl    $readback, %edx
        movl    $BLOCK, %ecx
        movl    $D_WRITE, %r8d
        call    request
        movl    $0x1a, %edi
        movl    $BLOCK + 1, %r9d
        call    must_be_ok
        call    compare
        say     "bare guest: read back what was written\r\n"

        movl    $T_IN, %edi
        movl    C_CAPACITY(%rbx), %esi
        movl    C_CAPACITY + 4(%rbx), %eax
        shlq    $32, %rax
        orq     %rax, %rsi
        movl    $readback, %edx
        movl    $BLOCK, %ecx
        movl    $D_WRITE, %r8d
        call    request
        movl    $0x1c, %edi
        cmpl    $ST_IOERR, %eax
        jne     fail

        movl    $T_UNKNOWN, %edi
        xorl    %esi, %esi
        xorl    %ecx, %ecx
        call    request
        movl    $0x1d, %edi
        cmpl    $ST_UNSUPP, %eax
        jne     fail

        movl    $T_GET_ID, %edi
        xorl    %esi, %esi
        movl    $id, %edx
        movl    $20, %ecx
        movl    $D_WRITE, %r8d
        call    request
        movl    $0x1e, %edi
        movl    $21, %r9d
        call    must_be_ok
        say     "bare guest: id "
        movl    $id, %esi                       /* 20 bytes and a NUL of ours */
        call    puts
        call    newline

        call    reset_device
        incl    rounds
        cmpl    $1, rounds
        jne     1f
        movl    $word_twice, %edi
        call    find
        testq   %rax, %rax
        jnz     scenario_io
1:      movl    $0x20, %edi
        jmp     exit

/* A reset waits for what is in flight; behind it the device touches nothing (virtio 2.4.1). */
scenario_inflight:
        call    bring_up
        call    describe_write
        call    post
        call    reset_device
        movw    used + 2, %ax
        movl    $20000, %ecx
        movl    $0x26, %edi
1:      pause
        cmpw    used + 2, %ax
        jne     fail
        decl    %ecx
        jnz     1b
        movl    $0x23, %edi
        jmp     exit

/* From nothing to DRIVER_OK, with the pattern ready to be written. */
bring_up:
        movl    $VIRTIO_MMIO_BASE, %ebx
        movl    $word_second, %edi
        call    find
        testq   %rax, %rax
        jz      1f
        addl    $0x1000, %ebx
1:      movl    $0x11, %edi
        cmpl    $0x74726976, R_MAGIC(%rbx)
        jne     fail
        movl    $0x12, %edi
        cmpl    $2, R_VERSION(%rbx)
        jne     fail
        movl    $0x13, %edi
        cmpl    $2, R_DEVICE_ID(%rbx)
        jne     fail
        call    negotiate
        call    queue_up
        jmp     fill_pattern

/* The arguments of `request` for the one write. */
describe_write:
        movl    $T_OUT, %edi
        movl    $SECTOR, %esi
        movl    $pattern, %edx
        movl    $BLOCK, %ecx
        xorl    %r8d, %r8d
        ret

reset_device:
        reg_write R_STATUS, $0
        movl    $0x1f, %edi
        cmpl    $0, R_STATUS(%rbx)
        jne     fail
        reg_write R_QUEUE_SEL, $0
        cmpl    $0, R_QUEUE_READY(%rbx)
        jne     fail
        say     "bare guest: reset the device\r\n"
        ret

/* Reset, ACKNOWLEDGE, DRIVER, features, FEATURES_OK (virtio 3.1.1). r14d = low features taken. */
negotiate:
        movl    $F_FLUSH | F_CONFIG_WCE, %r14d
        movl    $word_noflush, %edi
        call    find
        testq   %rax, %rax
        jz      1f
        andl    $~F_FLUSH, %r14d
1:      movl    $word_nowce, %edi
        call    find
        testq   %rax, %rax
        jz      2f
        andl    $~F_CONFIG_WCE, %r14d
2:
        reg_write R_STATUS, $0
        reg_write R_STATUS, $S_ACKNOWLEDGE
        reg_write R_STATUS, $(S_ACKNOWLEDGE | S_DRIVER)

        movl    $0x14, %edi
        reg_write R_DEVICE_FEAT_SEL, $1
        testl   $F_HI_VERSION_1, R_DEVICE_FEATURES(%rbx)
        jz      fail
        reg_write R_DEVICE_FEAT_SEL, $0
        movl    R_DEVICE_FEATURES(%rbx), %eax
        andl    $F_FLUSH | F_CONFIG_WCE, %eax
        cmpl    $F_FLUSH | F_CONFIG_WCE, %eax
        jne     fail

        reg_write R_DRIVER_FEAT_SEL, $1
        reg_write R_DRIVER_FEATURES, $F_HI_VERSION_1
        reg_write R_DRIVER_FEAT_SEL, $0
        reg_write R_DRIVER_FEATURES, %r14d
        reg_write R_STATUS, $(S_ACKNOWLEDGE | S_DRIVER | S_FEATURES_OK)
        movl    $0x15, %edi
        testl   $S_FEATURES_OK, R_STATUS(%rbx)
        jz      fail
        ret

/* One queue of eight descriptors, then DRIVER_OK (virtio 4.2.3.2). */
queue_up:
        reg_write R_QUEUE_SEL, $0
        movl    $0x16, %edi
        cmpl    $0, R_QUEUE_READY(%rbx)
        jne     fail
        cmpl    $QUEUE_SIZE, R_QUEUE_SIZE_MAX(%rbx)
        jb      fail
        reg_write R_QUEUE_SIZE, $QUEUE_SIZE
        reg_write R_QUEUE_DESC, $descriptors
        reg_write R_QUEUE_DESC + 4, $0
        reg_write R_QUEUE_DRIVER, $available
        reg_write R_QUEUE_DRIVER + 4, $0
        reg_write R_QUEUE_DEVICE, $used
        reg_write R_QUEUE_DEVICE + 4, $0
        movl    $1, available                   /* no interrupts, please; index 0 */
        movw    $0, used + 2
        xorl    %r15d, %r15d
        reg_write R_QUEUE_READY, $1
        movl    $0x17, %edi
        cmpl    $1, R_QUEUE_READY(%rbx)
        jne     fail
        reg_write R_STATUS, $(S_ACKNOWLEDGE | S_DRIVER | S_FEATURES_OK | S_DRIVER_OK)
        movl    R_STATUS(%rbx), %eax
        cmpl    $(S_ACKNOWLEDGE | S_DRIVER | S_FEATURES_OK | S_DRIVER_OK), %eax
        jne     fail
        ret

/* wb=N: sets the writeback byte. Says its value in any case. */
set_writeback:
        cmpl    $0, rounds
        jne     1f
        movl    $word_wb, %edi
        call    find
        testq   %rax, %rax
        jz      1f
        movb    (%rax), %cl
        subb    $'0', %cl
        movb    %cl, C_WRITEBACK(%rbx)
        movl    $0x25, %edi
        cmpb    %cl, C_WRITEBACK(%rbx)
        jne     fail
1:      say     "bare guest: writeback 0x"
        movzbl  C_WRITEBACK(%rbx), %edi
        call    puthex
        jmp     newline

fill_pattern:
        movl    $PATTERN, %eax
        movl    $pattern, %edi
1:      movl    %eax, (%rdi)
        addq    $4, %rdi
        incl    %eax
        cmpl    $PATTERN + BLOCK / 4, %eax
        jne     1b
        ret

compare:
        xorl    %ecx, %ecx
        movl    $0x1b, %edi
1:      movl    pattern(%rcx), %eax
        cmpl    %eax, readback(%rcx)
        jne     fail
        addl    $4, %ecx
        cmpl    $BLOCK, %ecx
        jne     1b
        ret

/* The request before must have ended with OK and, in the used ring, with length r9d; else code edi. */
must_be_ok:
        testl   %eax, %eax
        jnz     fail
        movl    $0x10, %edi
        cmpl    %r9d, %edx
        jne     fail
        ret

/*
 * One request, to its end: edi = type, rsi = sector, edx = data, ecx = its length (0: none),
 * r8d = D_WRITE where the device writes the data. Returns eax = status, edx = the used length.
 */
request:
        call    post
1:      pause
        cmpw    %r15w, used + 2
        jne     1b
        movl    $0x10, %edi
        cmpl    $0, used + 4(, %rax, 8)
        jne     fail
        movl    used + 8(, %rax, 8), %edx
        movzbl  status, %eax
        movl    $0x24, %edi
        cmpl    $ST_UNTOUCHED, %eax
        je      fail
        ret

/* Makes a request available and rings the doorbell; arguments as above. eax = its place in the used ring. */
post:
        movl    %edi, header
        movl    $0, header + 4
        movq    %rsi, header + 8
        movb    $ST_UNTOUCHED, status

        movl    $descriptors, %eax
        movq    $header, 0(%rax)
        movl    $16, 8(%rax)
        movw    $D_NEXT, 12(%rax)
        movw    $1, 14(%rax)
        testl   %ecx, %ecx
        jz      1f
        addq    $16, %rax
        movl    %edx, %edx
        movq    %rdx, 0(%rax)
        movl    %ecx, 8(%rax)
        orl     $D_NEXT, %r8d
        movw    %r8w, 12(%rax)
        movw    $2, 14(%rax)
1:      addq    $16, %rax
        movq    $status, 0(%rax)
        movl    $1, 8(%rax)
        movw    $D_WRITE, 12(%rax)
        movw    $0, 14(%rax)

        /* The ring entry before the index; x86 keeps the order of stores. */
        movl    %r15d, %eax
        andl    $QUEUE_SIZE - 1, %eax
        movw    $0, available + 4(%rax, %rax)
        incl    %r15d
        movw    %r15w, available + 2
        reg_write R_QUEUE_NOTIFY, $0
        ret

/* ------------------------------------------------------------------ text */

/* Prints al; keeps everything but rdx. */
putc:
        pushq   %rax
        movl    $PORT_COM1 + 5, %edx
1:      inb     %dx, %al
        testb   $0x20, %al                      /* LSR: transmitter empty */
        jz      1b
        popq    %rax
        movl    $PORT_COM1, %edx
        outb    %al, %dx
        ret

/* Prints the string at rsi. */
puts:
        movb    (%rsi), %al
        testb   %al, %al
        jz      1f
        call    putc
        incq    %rsi
        jmp     puts
1:      ret

newline:
        say     "\r\n"
        ret

/* Prints the byte edi as two hexadecimal digits. */
puthex:
        movl    %edi, %eax
        shrl    $4, %eax
        call    1f
        movl    %edi, %eax
1:      andl    $15, %eax
        movb    digits(%rax), %al
        jmp     putc

/* Does the string at rsi begin with that at rdi? ZF = yes. */
begins:
        movb    (%rdi), %al
        testb   %al, %al
        jz      1f
        cmpb    %al, (%rsi)
        jne     1f
        incq    %rdi
        incq    %rsi
        jmp     begins
1:      ret

/* Where in the command line the word at edi ends, or 0 if it is not in it: rax. */
find:
        movl    %edi, %ecx
        movq    %r12, %rdx
1:      cmpb    $0, (%rdx)
        je      2f
        movl    %ecx, %edi
        movq    %rdx, %rsi
        call    begins
        je      3f
        incq    %rdx
        jmp     1b
2:      xorl    %eax, %eax
        ret
3:      movq    %rsi, %rax
        ret

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
header:         .skip   16
rounds:         .skip   4
status:         .skip   1
id:             .skip   21
        .balign 4096
                .skip   4096
stack_top:
        .section .note.GNU-stack, "", @progbits
