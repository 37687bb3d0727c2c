/* SPDX-License-Identifier: Apache-2.0
 *
 * The two functions that a board gives to the keyword spotter; nothing else differs between boards.
 */
#ifndef SPOTTER_H
#define SPOTTER_H

#include <stdint.h>

#include "kestrel_shift_frontend.h"
#include "stream_model.h"

enum {
    SPOTTER_STOP,  /* end of the program */
    SPOTTER_BEGIN, /* what comes next has nothing to do with what came before */
    SPOTTER_FRAME  /* the samples of a frame are there */
};

/* Sample source: gives samples to kestrel_shift_frontend_sample until a frame is ready, by itself or in an interrupt. */
int spotter_source(kestrel_shift_frontend *fe);

/* Result sink: `answer` is the class of the latest clip length, or -1 where no logit leads by SPOTTER_MARGIN. */
void spotter_sink(const int32_t *logits, int answer);

#ifdef SPOTTER_TIMING
/* A time in instructions or ticks; part 0 is the front end, 1 the network, 2 the decision. */
uint32_t spotter_ticks(void);
void spotter_timed(int part, uint32_t ticks);
#endif

#endif
