/*
 * Fixed-point front end: 16-bit samples to 16-bit features. C99, no allocation, no floating point.
 *
 * One front end per program: kestrel_frontend_tables.h is generated from its settings and holds its constants (KFE_...).
 * The arithmetic is that of docs/fixed-frontend.md; kestrel/frontend/fixed.py computes the same bits.
 *
 * A feature is code * 2^-KFE_FRACTION_BITS. Samples are mono, KFE_SAMPLE_RATE per second.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef KESTREL_FRONTEND_H
#define KESTREL_FRONTEND_H

#include <stdint.h>

#include "kestrel_frontend_tables.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Pass it as `floor` where no floor is wanted. */
#define KESTREL_FRONTEND_NO_FLOOR (-32768)

/* All memory of the front end: KFE_STATE_BYTES. Only `logs` is of interest from outside. */
typedef struct {
    int32_t spectrum[2 * KFE_STORED_BINS]; /* real and imaginary parts */
#if KFE_DENSE
    int32_t folded[2 * KFE_PAIRS]; /* sums and differences of the samples on both sides of the window's middle */
#endif
    int32_t blocks;               /* blocks received, up to KFE_DELAY */
    int32_t tail;                 /* samples made up after the end of a clip */
    int16_t history[KFE_HISTORY]; /* latest samples; a frame starts with the first */
    int16_t logs[KFE_BANDS];      /* latest frame: log2 of the filters' outputs, times 2^KFE_LOG_BITS */
} kestrel_frontend;

/* Start of a clip or of a stream. */
void kestrel_frontend_start(kestrel_frontend *fe);

/*
 * Takes the next KFE_HOP samples and returns 1 where fe->logs holds a new frame, 0 in the first KFE_DELAY - 1 calls.
 * A clip ends with the first call of fewer samples (`count` 0 .. KFE_HOP - 1): the rest is made up as the settings say
 * (reflected, or zeros). Later calls with count 0 give the frames that are still missing.
 */
int kestrel_frontend_push(kestrel_frontend *fe, const int16_t *samples, int32_t count);

/*
 * Features [KFE_WIDTH] of one frame's logs [KFE_BANDS]; logs below `floor` count as `floor`.
 * Front ends with top_db (KFE_TOP_CODES > 0) use floor = kestrel_frontend_floor(the clip's highest log).
 */
void kestrel_frontend_features(const int16_t *logs, int32_t floor, int16_t *features);

/* The floor of a clip whose highest log is `highest`; KESTREL_FRONTEND_NO_FLOOR for front ends without top_db. */
int32_t kestrel_frontend_floor(int32_t highest);

/* Frames of a clip, or -1 where it is too short. */
int32_t kestrel_frontend_frames(int32_t samples);

/*
 * A whole clip: features [frames][KFE_WIDTH]. `logs` [frames][KFE_BANDS] is scratch memory that only front ends with top_db
 * need; the others accept a null pointer. Returns the number of frames, or -1 where the clip is too short.
 */
int32_t kestrel_frontend_clip(kestrel_frontend *fe, const int16_t *samples, int32_t count, int16_t *logs, int16_t *features);

#ifdef __cplusplus
}
#endif

#endif
