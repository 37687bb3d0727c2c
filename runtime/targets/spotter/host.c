/* SPDX-License-Identifier: Apache-2.0
 *
 * Sample source and result sink on a computer: clips of CLIP_SAMPLES int16 on standard input, logits as int32 on standard output.
 */
#include <stdio.h>

#include "spotter.h"

#ifndef CLIP_SAMPLES
#define CLIP_SAMPLES 16000
#endif

static int16_t clip[CLIP_SAMPLES];
static int32_t next = CLIP_SAMPLES;

int spotter_source(kestrel_shift_frontend *fe)
{
    while (next < CLIP_SAMPLES && !kestrel_shift_frontend_ready(fe)) {
        kestrel_shift_frontend_sample(fe, clip[next++]);
    }
    if (kestrel_shift_frontend_ready(fe)) {
        return SPOTTER_FRAME;
    }
    next = 0;
    return fread(clip, sizeof clip, 1, stdin) == 1 ? SPOTTER_BEGIN : SPOTTER_STOP;
}

void spotter_sink(const int32_t *logits, int answer)
{
    (void)answer;
    fwrite(logits, sizeof *logits, KESTREL_STREAM_LOGITS, stdout);
}
