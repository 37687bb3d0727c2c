/* SPDX-License-Identifier: Apache-2.0
 *
 * Sample source and result sink under QEMU, through semihosting: clips of CLIP_SAMPLES int16 from the file clips.bin; logits as
 * int32 into logits.bin, after them the bytes of the stack that were used and, with SPOTTER_TIMING, instructions of
 * (samples, front end, network, logits) in all.
 */
#include "spotter.h"

#ifndef CLIP_SAMPLES
#define CLIP_SAMPLES 16000
#endif

enum { OPEN = 0x01, WRITE = 0x05, READ = 0x06, EXIT = 0x18 };

extern uint32_t __bss_end[], __stack_top[];

static int16_t clip[CLIP_SAMPLES];
static int32_t next = -1;
static int32_t input, output;
static uint32_t spent[4];

static int32_t call(int32_t operation, const void *arguments)
{
    register int32_t a0 __asm__("a0") = operation;
    register const void *a1 __asm__("a1") = arguments;
    __asm__ volatile(".option push\n.option norvc\nslli x0, x0, 0x1f\nebreak\nsrai x0, x0, 7\n.option pop"
                     : "+r"(a0)
                     : "r"(a1)
                     : "memory");
    return a0;
}

static int32_t open_file(const char *name, uint32_t mode, uint32_t length)
{
    uint32_t arguments[3];
    arguments[0] = (uint32_t)name;
    arguments[1] = mode;
    arguments[2] = length;
    return call(OPEN, arguments);
}

static int32_t transfer(int32_t operation, int32_t file, const void *bytes, uint32_t count)
{
    uint32_t arguments[3];
    arguments[0] = (uint32_t)file;
    arguments[1] = (uint32_t)bytes;
    arguments[2] = count;
    return call(operation, arguments);
}

uint32_t spotter_ticks(void)
{
    uint32_t count;
    __asm__ volatile(".option push\n.option arch, +zicsr\ncsrr %0, minstret\n.option pop" : "=r"(count));
    return count;
}

void spotter_timed(int part, uint32_t ticks)
{
    spent[part + 1] += ticks;
}

static void finish(void)
{
    static int32_t report[5];
    const uint32_t *word = __bss_end;
    int i;
    while (word < __stack_top && *word == 0xA5A5A5A5u) {
        word++;
    }
    report[0] = (int32_t)((const char *)__stack_top - (const char *)word);
    for (i = 0; i < 4; i++) {
        report[i + 1] = (int32_t)spent[i];
    }
    transfer(WRITE, output, report, sizeof report);
    call(EXIT, (const void *)0x20026);
}

int spotter_source(kestrel_shift_frontend *fe)
{
    while (next >= 0 && next < CLIP_SAMPLES && !kestrel_shift_frontend_ready(fe)) {
#ifdef SPOTTER_TIMING
        const uint32_t start = spotter_ticks();
#endif
        kestrel_shift_frontend_sample(fe, clip[next++]);
#ifdef SPOTTER_TIMING
        spent[0] += spotter_ticks() - start;
#endif
    }
    if (next >= 0 && kestrel_shift_frontend_ready(fe)) {
        return SPOTTER_FRAME;
    }
    if (next < 0) {
        input = open_file("clips.bin", 1, 9);
        output = open_file("logits.bin", 5, 10);
    }
    next = 0;
    if (transfer(READ, input, clip, sizeof clip) == 0) {
        return SPOTTER_BEGIN;
    }
    finish();
    return SPOTTER_STOP;
}

void spotter_sink(const int32_t *logits, int answer)
{
    (void)answer;
    transfer(WRITE, output, logits, 4 * KESTREL_STREAM_LOGITS);
}
