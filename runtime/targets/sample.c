/* SPDX-License-Identifier: Apache-2.0
 *
 * Runs the clips of sample.h (CLIPS, `clips`) on a microcontroller, or an emulated one, and prints their logits, then the
 * instructions of the last inference and the most bytes of stack that one took. Clips are features, or with SOUND defined
 * samples, which go through the front end block by block. Output needs semihosting.
 */
#include <stdint.h>
#include <stdio.h>

#include "model.h"
#include "sample.h"
#ifdef SOUND
#include "kestrel_frontend.h"
#include "sound.h"
#endif

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

#define STACK 16384 /* bytes that are watched */
#define PATTERN 0xA5
#define APART __attribute__((noinline))

static volatile uint8_t *stack_top;

APART static void paint(void) {
    volatile uint8_t *byte;
    stack_top = __builtin_frame_address(0);
    for (byte = stack_top - STACK; byte < stack_top - 64; byte++) { /* the rest is in use by this function */
        *byte = PATTERN;
    }
}

APART static uint32_t painted(void) {
    uint32_t count = 0;
    while (count < STACK - 64 && stack_top[(int32_t)count - STACK] == PATTERN) {
        count++;
    }
    return count;
}

#ifdef SOUND
APART static void infer(const int16_t *samples, int32_t *logits) {
    int32_t left = KESTREL_MODEL_CLIP_SAMPLES;
    kestrel_sound_start();
    while (left > 0) {
        kestrel_sound_push(samples, left < KFE_HOP ? left : KFE_HOP);
        samples += KFE_HOP;
        left -= KFE_HOP;
    }
    kestrel_sound_finish(logits);
}
#else
APART static void infer(const int16_t *features, int32_t *logits) {
    kestrel_model_run(features, logits);
}
#endif

int main(void) {
    int32_t logits[KESTREL_MODEL_LOGITS];
    uint32_t start, used = 0, stack = 0;
    int clip, i;
    for (clip = 0; clip < CLIPS; clip++) {
        paint();
        start = instructions();
        infer(clips[clip], logits);
        used = instructions() - start;
        stack = STACK - painted() > stack ? STACK - painted() : stack;
        for (i = 0; i < KESTREL_MODEL_LOGITS; i++) {
            printf("%s%ld", i ? " " : "", (long)logits[i]);
        }
        printf("\n");
    }
    printf("instructions %lu\nstack %lu\n", (unsigned long)used, (unsigned long)stack);
    return 0;
}
