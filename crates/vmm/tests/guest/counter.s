# A guest in one boot sector. It fills memory with a pattern, and then on every timer tick counts up,
# checks the whole pattern, writes the counter to sector 1 of its disk, reads it back, and prints
# it on the first serial port. A difference prints "M" (memory) or "D" (disk) and stops the guest.
#
# Memory: the counter is the 32-bit word at 0x8000. From 16 MiB on, the first word of each 4 KiB page
# holds its own address. How many pages: the 32-bit word at offset 0x1f0 of this sector.
# Disk: sector 1 holds the counter in its first word; sector 2 + (counter mod 2048) does too.
#
# Assembled by:
#   as --32 counter.s -o counter.o
#   ld -m elf_i386 --oformat binary -Ttext 0x7c00 counter.o -o counter.bin
        .code16
        .globl _start
_start: cli
        xorw %ax, %ax
        movw %ax, %ds
        movw %ax, %es
        movw %ax, %ss
        movw $0x7c00, %sp
        movb %dl, drive
        movl $0, 0x8000
        call flat
        movl $0x1000000, %edi
        movl pages, %ecx
fill:   movl %edi, %es:(%edi)
        addl $0x1000, %edi
        decl %ecx
        jnz fill
tick:   sti
        hlt
        cli
        incl 0x8000
        call flat
        movl $0x1000000, %edi
        movl pages, %ecx
check:  cmpl %edi, %es:(%edi)
        jne badmem
        addl $0x1000, %edi
        decl %ecx
        jnz check
        xorw %ax, %ax
        movw %ax, %es
        sti
        # write the counter to sector 1 and to the moving sector
        movl 0x8000, %eax
        movl %eax, 0x9000
        movl $1, lba
        movb $0x43, %ah
        call disk
        movl 0x8000, %eax
        andl $2047, %eax
        addl $2, %eax
        movl %eax, lba
        movb $0x43, %ah
        call disk
        # read it back
        movl $0, 0x9000
        movb $0x42, %ah
        call disk
        movl 0x9000, %eax
        cmpl 0x8000, %eax
        jne baddsk
        # print eight hexadecimal digits and a line feed
        movl 0x8000, %ebx
        movw $8, %cx
digit:  roll $4, %ebx
        movb %bl, %al
        andb $15, %al
        cmpb $10, %al
        jb 1f
        addb $39, %al
1:      addb $48, %al
        call put
        loop digit
        movb $10, %al
        call put
        jmp tick

badmem: movb $'M', %al
        jmp fail
baddsk: movb $'D', %al
fail:   call put
        movb $10, %al
        call put
        cli
2:      hlt
        jmp 2b

put:    pushw %ax
        movw $0x3fd, %dx
3:      inb %dx, %al
        testb $0x20, %al
        jz 3b
        popw %ax
        movw $0x3f8, %dx
        outb %al, %dx
        ret

disk:   movb $0, %al
        movb drive, %dl
        movw $packet, %si
        int $0x13
        jc baddsk
        ret

# Gives es a base of zero and a limit of 4 GiB ("unreal mode").
flat:   lgdtl table
        movl %cr0, %eax
        orb $1, %al
        movl %eax, %cr0
        jmp 4f
4:      movw $8, %bx
        movw %bx, %es
        andb $0xfe, %al
        movl %eax, %cr0
        jmp 5f
5:      ret

        .balign 8
gdt:    .quad 0
        .quad 0x00cf92000000ffff
table:  .word 15
        .long gdt
packet: .byte 16, 0
        .word 1
        .word 0x9000, 0
lba:    .long 0, 0
drive:  .byte 0
        .org 0x1f0
pages:  .long 1024
        .org 510
        .word 0xaa55
