/* SPDX-License-Identifier: Apache-2.0
 *
 * Runs the clips of sample.h (CLIPS, `clips`) on a microcontroller, or an emulated one, and prints their logits and the
 * instructions of the last inference. Output needs semihosting.
 */
#include <stdint.h>
#include <stdio.h>

#include "model.h"
#include "sample.h"

#ifdef __riscv
static uint32_t instructions(void) {
    uint32_t count;
    __asm__ volatile(".option push\n.option arch, +zicsr\ncsrr %0, minstret\n.option pop" : "=r"(count));
    return count;
}
#else
/* SysTick, 24 bits, counts down at 25 MHz. Under -icount shift=0 an instruction takes 1 ns, so a tick is 40 of them. */
static uint32_t ticks_high, ticks_last;

static uint32_t instructions(void) {
    volatile uint32_t *const systick = (volatile uint32_t *)0xE000E010u;
    uint32_t now;
    if (systick[0] == 0) {
        systick[1] = 0xFFFFFFu;
        systick[2] = 0;
        systick[0] = 5;
        ticks_last = systick[2];
    }
    now = systick[2];
    if (now > ticks_last) {
        ticks_high += 0x1000000u;
    }
    ticks_last = now;
    return 40u * (ticks_high + (0xFFFFFFu - now));
}
#endif

int main(void) {
    int32_t logits[KESTREL_MODEL_LOGITS];
    uint32_t start, used = 0;
    int clip, i;
    for (clip = 0; clip < CLIPS; clip++) {
        start = instructions();
        kestrel_model_run(clips[clip], logits);
        used = instructions() - start;
        for (i = 0; i < KESTREL_MODEL_LOGITS; i++) {
            printf("%s%ld", i ? " " : "", (long)logits[i]);
        }
        printf("\n");
    }
    printf("instructions %lu\n", (unsigned long)used);
    return 0;
}
