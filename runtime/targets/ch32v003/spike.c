/* SPDX-License-Identifier: Apache-2.0
 *
 * Sample source and result sink under spike, the reference simulator, which refuses registers x16-x31: clips of CLIP_SAMPLES
 * int16 are linked in from clips.bin; logits go to the host's console, a line of hexadecimal numbers for each clip.
 */
#include "spotter.h"

#ifndef CLIP_SAMPLES
#define CLIP_SAMPLES 16000
#endif

__asm__(".section .data.clips, \"aw\"\n.balign 4\nclips_start: .incbin \"clips.bin\"\nclips_end:\n.previous");

extern const int16_t clips_start[], clips_end[];

/* The host takes commands from here: device, command and value in one doubleword; 1 ends the program. */
volatile uint32_t tohost[2] __attribute__((aligned(64)));
volatile uint32_t fromhost[2] __attribute__((aligned(64)));

static const int16_t *next_sample;
static int32_t left;

static void tell(uint32_t high, uint32_t low)
{
    while (tohost[0] || tohost[1]) {
        fromhost[0] = fromhost[1] = 0;
    }
    tohost[1] = high;
    tohost[0] = low;
}

static void put(uint32_t letter)
{
    tell(0x01010000u, letter);
}

int spotter_source(kestrel_shift_frontend *fe)
{
    while (left > 0 && !kestrel_shift_frontend_ready(fe)) {
        kestrel_shift_frontend_sample(fe, *next_sample++);
        left--;
    }
    if (kestrel_shift_frontend_ready(fe)) {
        return SPOTTER_FRAME;
    }
    if (!next_sample) {
        next_sample = clips_start;
    }
    if (next_sample < clips_end) {
        left = CLIP_SAMPLES;
        return SPOTTER_BEGIN;
    }
    tell(0, 1);
    return SPOTTER_STOP;
}

void spotter_sink(const int32_t *logits, int answer)
{
    int i, shift;
    (void)answer;
    for (i = 0; i < KESTREL_STREAM_LOGITS; i++) {
        for (shift = 28; shift >= 0; shift -= 4) {
            const uint32_t digit = (uint32_t)logits[i] >> shift & 15;
            put(digit + (digit < 10 ? '0' : 'a' - 10));
        }
        put(i + 1 < KESTREL_STREAM_LOGITS ? ' ' : '\n');
    }
}
