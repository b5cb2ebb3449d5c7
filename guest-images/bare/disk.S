/*
 * The bare-metal guest's virtio-blk driver (virtio 2.7, 4.2, 5.2): the scenarios io and inflight.
 * Included by guest.S. Polls the used ring; one request at a time.
 */

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
#define F_DISCARD       (1 << 13)
#define F_WRITE_ZEROES  (1 << 14)
#define F_HI_VERSION_1  (1 << 0)

/* Requests (virtio 5.2.6). */
#define T_IN            0
#define T_OUT           1
#define T_FLUSH         4
#define T_GET_ID        8
#define T_DISCARD       11
#define T_WRITE_ZEROES  13
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
#define SECTOR_DISCARD  64
#define SECTOR_ZEROES   72
#define ERASE_SECTORS   8
/* The pattern: dword i of the block is PATTERN + i. */
#define PATTERN         0x6d760000

        .macro reg_write reg, value
        movl    \value, \reg(%rbx)
        .endm

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
        testl   $F_DISCARD, %r14d
        jz      1f
        movl    $T_DISCARD, %edi
        movl    $SECTOR_DISCARD, %esi
        call    erase
        movl    $0x27, %edi
        movl    $1, %r9d
        call    must_be_ok
        say     "bare guest: discarded\r\n"
1:
        testl   $F_WRITE_ZEROES, %r14d
        jz      1f
        movl    $T_WRITE_ZEROES, %edi
        movl    $SECTOR_ZEROES, %esi
        call    erase
        movl    $0x28, %edi
        movl    $1, %r9d
        call    must_be_ok
        say     "bare guest: zeroed\r\n"
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
        movl    $20000, %ecx
        movl    $0x26, %edi
1:      pause
        cmpw    used + 2, %r10w
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

/* A DISCARD or WRITE_ZEROES (edi) of one range, from sector esi. */
erase:
        movl    %esi, erased
        movl    $0, erased + 4
        movl    $ERASE_SECTORS, erased + 8
        movl    $0, erased + 12
        xorl    %esi, %esi
        movl    $erased, %edx
        movl    $16, %ecx
        xorl    %r8d, %r8d
        jmp     request

/* r10w = the used index at once after the reset: before anything else takes time. */
reset_device:
        reg_write R_STATUS, $0
        movw    used + 2, %r10w
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
2:      movl    $word_discard, %edi
        call    find
        testq   %rax, %rax
        jz      3f
        orl     $F_DISCARD, %r14d
3:      movl    $word_zeroes, %edi
        call    find
        testq   %rax, %rax
        jz      4f
        orl     $F_WRITE_ZEROES, %r14d
4:
        reg_write R_STATUS, $0
        reg_write R_STATUS, $S_ACKNOWLEDGE
        reg_write R_STATUS, $(S_ACKNOWLEDGE | S_DRIVER)

        movl    $0x14, %edi
        reg_write R_DEVICE_FEAT_SEL, $1
        testl   $F_HI_VERSION_1, R_DEVICE_FEATURES(%rbx)
        jz      fail
        reg_write R_DEVICE_FEAT_SEL, $0
        movl    R_DEVICE_FEATURES(%rbx), %eax
        movl    %r14d, %ecx
        orl     $F_FLUSH | F_CONFIG_WCE, %ecx
        andl    %ecx, %eax
        cmpl    %ecx, %eax
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
