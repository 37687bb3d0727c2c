/* SPDX-License-Identifier: Apache-2.0
 *
 * The keyword spotter: samples, front end, network, decision. A segment of the clip length after the other, it answers for
 * what was heard in the latest clip length.
 */
#include "spotter.h"

#include "kestrel_stream.h"

#ifndef SPOTTER_MARGIN
#define SPOTTER_MARGIN 0
#endif

/* The front end's transform and the network's columns are never alive at the same time. */
static union {
    int16_t transform[KSF_WINDOW];
    uint8_t columns[KESTREL_STREAM_SCRATCH_BYTES];
    int32_t aligned;
} work;

static union {
    int16_t features[KSF_BANDS];
    int32_t logits[KESTREL_STREAM_LOGITS];
} values;

static kestrel_shift_frontend frontend;

#ifdef SPOTTER_TIMING
#define TIMED(part, statement)                          \
    do {                                                \
        const uint32_t start_ = spotter_ticks();        \
        statement;                                      \
        spotter_timed(part, spotter_ticks() - start_);  \
    } while (0)
#else
#define TIMED(part, statement) statement
#endif

static int decide(const int32_t *logits)
{
    const int best = kestrel_stream_argmax(logits, KESTREL_STREAM_LOGITS);
    int i;
    for (i = 0; i < KESTREL_STREAM_LOGITS; i++) {
        if (i != best && logits[best] - logits[i] < SPOTTER_MARGIN) {
            return -1;
        }
    }
    return best;
}

int main(void)
{
    int event, done = 0;
    while ((event = spotter_source(&frontend)) != SPOTTER_STOP) {
        if (event == SPOTTER_BEGIN) {
            kestrel_shift_frontend_start(&frontend);
            kestrel_stream_start();
            continue;
        }
        TIMED(0, kestrel_shift_frontend_frame(&frontend, work.transform, values.features));
        TIMED(1, done = kestrel_stream_column(values.features, work.columns));
        if (done) {
            TIMED(2, kestrel_stream_logits(work.columns, values.logits));
            spotter_sink(values.logits, decide(values.logits));
        }
    }
    return 0;
}
