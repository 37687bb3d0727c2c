/* SPDX-License-Identifier: Apache-2.0
 *
 * Sample source and result sink of an ESP32 WROOM (or any board with a microphone on I2S). `board_i2s_read` is a stub that
 * gives silence: replace it with the driver's call that fills `samples` with `count` mono values of 16 bits at 16 kHz.
 */
#include <stdint.h>

#include "spotter.h"

#define BLOCK 32

void board_i2s_read(int16_t *samples, int count);
void board_answer(int answer, const int32_t *logits);

#ifdef __GNUC__
#define STUB __attribute__((weak))
#else
#define STUB
#endif

STUB void board_i2s_read(int16_t *samples, int count)
{
    while (count-- > 0) {
        samples[count] = 0;
    }
}

STUB void board_answer(int answer, const int32_t *logits)
{
    (void)answer;
    (void)logits;
}

int spotter_source(kestrel_shift_frontend *fe)
{
    static int16_t samples[BLOCK];
    static int begun, taken = BLOCK;
    if (!begun) {
        begun = 1;
        return SPOTTER_BEGIN;
    }
    while (!kestrel_shift_frontend_ready(fe)) {
        if (taken == BLOCK) {
            board_i2s_read(samples, BLOCK);
            taken = 0;
        }
        kestrel_shift_frontend_sample(fe, samples[taken++]);
    }
    return SPOTTER_FRAME;
}

void spotter_sink(const int32_t *logits, int answer)
{
    board_answer(answer, logits);
}
