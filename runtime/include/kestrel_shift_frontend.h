/*
 * Shift-add front end: 16-bit samples, one by one, to 16-bit features on a processor without a multiplier. C99, no
 * allocation, no floating point.
 *
 * One front end per program: kestrel_shift_frontend_tables.h is generated from its settings and holds its constants
 * (KSF_...). The arithmetic is that of docs/microcontroller.md; kestrel/frontend/shift_add.py computes the same bits.
 *
 * Samples may be taken in an interrupt while the program computes a frame or sleeps. A feature is an octave / 64.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef KESTREL_SHIFT_FRONTEND_H
#define KESTREL_SHIFT_FRONTEND_H

#include <stdint.h>

#include "kestrel_shift_frontend_tables.h"

#ifdef __cplusplus
extern "C" {
#endif

#define KSF_WINDOW 256
#define KSF_SLACK 8  /* samples that may arrive while a frame is copied */
#define KSF_RING (KSF_WINDOW + KSF_SLACK)
#define KSF_SUMS 9

/* All memory that lives from frame to frame. Only the interrupt writes what is volatile. */
typedef struct {
    int16_t ring[KSF_RING]; /* latest samples behind the half-band filter */
#if KSF_DECIMATION == 2
    int32_t sums[KSF_SUMS]; /* of the half-band filter, for outputs to come */
    uint8_t second;         /* the next sample is the second of its pair */
#endif
    volatile uint8_t lost;    /* samples arrived that found no room: the program is too slow */
    volatile uint16_t put;    /* where the next sample goes */
    volatile uint16_t filled; /* samples taken so far, modulo 2^16 */
    uint16_t taken;           /* samples before the next frame, modulo 2^16 */
    uint16_t first;           /* place of the next frame's first sample */
} kestrel_shift_frontend;

/* Start of a clip or of a stream: silence before the first sample. */
void kestrel_shift_frontend_start(kestrel_shift_frontend *fe);

/* Takes the next sample. */
void kestrel_shift_frontend_sample(kestrel_shift_frontend *fe, int16_t sample);

/* Whether the samples of the next frame are there. */
int kestrel_shift_frontend_ready(const kestrel_shift_frontend *fe);

/* Features [KSF_BANDS] of the next frame, which is ready. `work` is memory for KSF_WINDOW values, any content. */
void kestrel_shift_frontend_frame(kestrel_shift_frontend *fe, int16_t *work, int16_t *features);

#ifdef __cplusplus
}
#endif

#endif
