/* Runs clips of features from stdin, frame by frame, and writes their logits to stdout as int32. */
#include <stdio.h>

#include "stream_model.h"

int main(void)
{
    static uint8_t scratch[KESTREL_STREAM_SCRATCH_BYTES] __attribute__((aligned(4)));
    int16_t features[KESTREL_STREAM_WIDTH];
    int32_t logits[KESTREL_STREAM_LOGITS];
    int frame = 0, ready = 0, i;
    kestrel_stream_start();
    while (fread(features, sizeof features, 1, stdin) == 1) {
        for (i = 0; i < KESTREL_STREAM_SCRATCH_BYTES; i++) {
            scratch[i] = (uint8_t)(0xA5 + i + frame); /* what the front end leaves there */
        }
        ready = kestrel_stream_column(features, scratch) || ready;
        if (++frame == KESTREL_STREAM_FRAMES) {
            kestrel_stream_logits(scratch, logits);
            if (!ready || fwrite(logits, sizeof logits, 1, stdout) != 1) {
                return 1;
            }
            kestrel_stream_start();
            frame = ready = 0;
        }
    }
    return 0;
}
