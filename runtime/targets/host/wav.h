/* SPDX-License-Identifier: Apache-2.0 */
#ifndef KESTREL_WAV_H
#define KESTREL_WAV_H

#include <stdint.h>
#include <stdio.h>

/* Samples [KESTREL_MODEL_CLIP_SAMPLES] of a wav file: 16 bits, mono, KFE_SAMPLE_RATE, at most KESTREL_MODEL_CLIP_SAMPLES;
 * shorter clips lie in the middle of zeros, as in training. Returns 0, or 1 after one line on stderr. */
int kestrel_wav_samples(FILE *file, const char *name, int16_t *samples);

#endif
