/*
 * The bare-metal guest's scenario audit: writes and FLUSHes, each told on COM1 before it is submitted and
 * after its end was seen, for the auditor (docs/auditor.md has the grammar). Included by guest.S; the
 * driver's set-up is disk.S. Up to two requests in flight, so that FLUSHes meet writes.
 */

#define SLOT_DESCRIPTORS    3

/* One step: 'W' sector, 'F' 0, or '.' 0 for "wait until nothing is in flight". */
        .macro step kind, sector=0
        .word   \kind, \sector
        .endm

        .section .data
        .balign 4
audit_steps:
        step 'W', 8
        step '.'
        step 'W', 16
        step '.'
        step 'F'
        step '.'
        step 'W', 24                            /* the first write behind a FLUSH */
        step '.'
        step 'W', 8                             /* again */
        step '.'
        step 'F'
        step '.'
        step 'W', 32                            /* two at a time */
        step 'W', 40
        step '.'
        step 'F'
        step '.'
        step 'W', 48                            /* a FLUSH that need not cover the write in flight */
        step 'F'
        step '.'
        step 'F'                                /* this one must */
        step '.'
        step 'F'                                /* nothing is dirty */
        step '.'
        step 'W', 56
        step '.'
        .word 0
        .text

/* rbx = registers, r15w = requests made so far, r12 = command line, r14d = the features taken,
 * rbp = the step, r13d = the next request's number */
scenario_audit:
        call    bring_up
        call    set_writeback
        say     "@N"
        xorl    %edi, %edi
        testl   $F_FLUSH, %r14d
        setnz   %dil
        call    space_hex
        xorl    %edi, %edi
        testl   $F_CONFIG_WCE, %r14d
        setnz   %dil
        call    space_hex
        movzbl  C_WRITEBACK(%rbx), %edi
        call    space_hex
        call    newline

        movl    $audit_steps, %ebp
        movl    $1, %r13d
1:      movzwl  (%rbp), %eax
        testl   %eax, %eax
        jz      4f
        cmpl    $'.', %eax
        je      3f
        cmpl    $'F', %eax
        jne     2f
        testl   $F_FLUSH, %r14d
        jz      5f
2:      call    audit_submit
        jmp     5f
3:      call    audit_wait
5:      addq    $4, %rbp
        jmp     1b
4:      movl    $0x2a, %edi
        jmp     exit

/* Tells of the request of the step at rbp, then makes it available and rings the doorbell. */
audit_submit:
        say     "@S"
        movl    %r13d, %edi
        call    space_hex
        say     " "
        movb    (%rbp), %al
        call    putc
        cmpb    $'W', (%rbp)
        jne     1f
        movzbl  3(%rbp), %edi
        call    space_hex
        movzbl  2(%rbp), %edi
        call    puthex
        movl    $BLOCK / 512, %edi
        call    space_hex
1:      call    newline

        movl    audit_in_flight, %r8d           /* the slot */
        incl    audit_in_flight
        movl    %r13d, audit_numbers(, %r8, 4)
        incl    %r13d
        movb    $ST_UNTOUCHED, audit_statuses(%r8)
        movl    %r8d, %r9d
        shll    $4, %r9d
        addl    $audit_headers, %r9d
        movl    $0, 4(%r9)
        movzwl  2(%rbp), %eax
        movq    %rax, 8(%r9)

        leal    (%r8, %r8, 2), %ecx             /* the slot's first descriptor */
        movl    %ecx, %eax
        shll    $4, %eax
        addl    $descriptors, %eax
        movq    %r9, 0(%rax)
        movl    $16, 8(%rax)
        movw    $D_NEXT, 12(%rax)
        leal    1(%rcx), %edx
        movw    %dx, 14(%rax)
        movl    $T_FLUSH, (%r9)
        cmpb    $'W', (%rbp)
        jne     2f
        movl    $T_OUT, (%r9)
        addq    $16, %rax
        movq    $pattern, 0(%rax)
        movl    $BLOCK, 8(%rax)
        movw    $D_NEXT, 12(%rax)
        leal    2(%rcx), %edx
        movw    %dx, 14(%rax)
2:      addq    $16, %rax
        leaq    audit_statuses(%r8), %rdx
        movq    %rdx, 0(%rax)
        movl    $1, 8(%rax)
        movw    $D_WRITE, 12(%rax)
        movw    $0, 14(%rax)

        movl    %r15d, %eax
        andl    $QUEUE_SIZE - 1, %eax
        movw    %cx, available + 4(%rax, %rax)
        incl    %r15d
        movw    %r15w, available + 2
        reg_write R_QUEUE_NOTIFY, $0
        ret

/* Tells of each end, in the order of the used ring, until nothing is in flight. */
audit_wait:
        cmpl    $0, audit_in_flight
        jne     1f
        ret
1:      movzwl  audit_seen, %eax
2:      pause
        cmpw    %ax, used + 2
        je      2b
        incw    audit_seen
        decl    audit_in_flight
        andl    $QUEUE_SIZE - 1, %eax
        movl    used + 4(, %rax, 8), %eax       /* the chain's first descriptor */
        xorl    %edx, %edx
        movl    $SLOT_DESCRIPTORS, %ecx
        divl    %ecx
        movl    $0x10, %edi
        cmpl    $1, %eax
        ja      fail
        testl   %edx, %edx
        jnz     fail
        movl    %eax, %r8d
        say     "@A"
        movl    audit_numbers(, %r8, 4), %edi
        call    space_hex
        movzbl  audit_statuses(%r8), %edi
        call    space_hex
        call    newline
        jmp     audit_wait

/* Prints a space and the byte edi in hexadecimal. */
space_hex:
        pushq   %rdi
        say     " "
        popq    %rdi
        andl    $255, %edi
        jmp     puthex

        .section .bss
        .balign 16
audit_headers:      .skip   32
audit_numbers:      .skip   8
audit_in_flight:    .skip   4
audit_seen:         .skip   2
audit_statuses:     .skip   2
        .text
