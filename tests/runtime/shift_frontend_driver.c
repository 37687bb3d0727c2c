/* Feeds int16 clips from stdin (driver CLIPS SAMPLES), sample by sample, and writes the features to stdout. */
#include "kestrel_shift_frontend.h"

#include <stdio.h>
#include <stdlib.h>

int main(int count, char **words)
{
    static kestrel_shift_frontend fe;
    int16_t work[KSF_WINDOW], features[KSF_BANDS], sample;
    long clips = count > 2 ? atol(words[1]) : 0, samples = count > 2 ? atol(words[2]) : 0, left;
    while (clips-- > 0) {
        kestrel_shift_frontend_start(&fe);
        for (left = samples; left > 0; left--) {
            if (fread(&sample, sizeof sample, 1, stdin) != 1) {
                return 1;
            }
            kestrel_shift_frontend_sample(&fe, sample);
            while (kestrel_shift_frontend_ready(&fe)) {
                kestrel_shift_frontend_frame(&fe, work, features);
                if (fwrite(features, sizeof features, 1, stdout) != 1) {
                    return 1;
                }
            }
        }
        if (fe.lost) {
            return 2;
        }
    }
    return 0;
}
