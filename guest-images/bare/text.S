/*
 * The bare-metal guest's strings: printing on COM1, and finding words in the command line.
 * Included by guest.S.
 */

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
