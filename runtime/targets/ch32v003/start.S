/* SPDX-License-Identifier: Apache-2.0
 *
 * Reset: stack, data, zeros, then main. The chip reads the table for interrupts; entries are addresses.
 * The stack's free part is filled with a pattern, so that main's caller can see how much was used.
 */
    .section .start, "ax"
    .globl _start
    .option norvc
_start:
    j reset
    .rept 37
    .word stop
    .endr
    .word kestrel_interrupt /* 38: TIM2 */
    .option rvc
    .text
reset:
    .option push
    .option norelax
    la gp, __global_pointer$
    .option pop
    la sp, __stack_top
    la a0, _start
    ori a0, a0, 3
    .option push
    .option arch, +zicsr
    csrw mtvec, a0
    .option pop
    la a0, __data_source
    la a1, __data_start
    la a2, __data_end
1:  bgeu a1, a2, 2f
    lw a3, 0(a0)
    sw a3, 0(a1)
    addi a0, a0, 4
    addi a1, a1, 4
    j 1b
2:  la a1, __bss_start
    la a2, __bss_end
3:  bgeu a1, a2, 4f
    sw zero, 0(a1)
    addi a1, a1, 4
    j 3b
4:  li a0, 0xA5A5A5A5
    la a2, __stack_top
5:  bgeu a1, a2, 6f /* a1: the stack begins behind the zeros */
    sw a0, 0(a1)
    addi a1, a1, 4
    j 5b
6:  call main
stop:
    j stop
    .weak kestrel_interrupt
    .set kestrel_interrupt, stop
