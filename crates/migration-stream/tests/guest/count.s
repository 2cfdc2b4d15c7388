# A whole guest in 80 bytes: it takes the place of the BIOS, counts in 128 pages of RAM, and prints a letter
# a pass on the serial port. A page that does not hold the count of the pass before makes it print X and stop.
# Assembled with: as --32 -o count.o count.s && objcopy -O binary -j .text count.o count.bin
.code16
.globl _start
_start:
  cli
  xor %ax,%ax
  mov %ax,%ds
  cld
pass:
  mov $0x1000,%bx
page:
  mov %bx,%es
  mov %es:0x10,%ax
  cmp 0x500,%ax
  jne bad
  inc %ax
  mov %ax,%es:0x10
  add $0x100,%bx
  cmp $0x9000,%bx
  jne page
  incw 0x500
  mov 0x500,%ax
  xor %dx,%dx
  mov $26,%cx
  div %cx
  mov %dl,%al
  add $'a',%al
  mov $0x3f8,%dx
  out %al,%dx
  mov $40,%bx
wait:
  mov $0xffff,%cx
1: loop 1b
  dec %bx
  jnz wait
  jmp pass
bad:
  mov $'X',%al
  mov $0x3f8,%dx
  out %al,%dx
2: hlt
  jmp 2b
