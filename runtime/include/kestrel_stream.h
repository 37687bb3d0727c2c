/*
 * Kernels of networks that take one column of features at a time, for processors without a multiplier. C99, no allocation,
 * no floating point, int32 throughout. The generated stream_model.c calls them; docs/microcontroller.md describes both.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef KESTREL_STREAM_H
#define KESTREL_STREAM_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/*
 * y = clamp(half_even((sum of three signed digits of x, plus offset) / 2^shift)). A multiplier is three digits of five bits:
 * exponent, and 16 for a negative one. `digits` and `offsets` hold one value, or one per channel; offsets may be null.
 */
typedef struct {
    const uint16_t *digits;
    const int32_t *offsets;
    uint16_t channels;
    int16_t low, high;
    uint8_t shift;
    uint8_t each_digits, each_offset; /* 1: per channel */
    uint8_t bits;                     /* of y: 8 or 16 */
} kestrel_stream_scaling;

/*
 * A function of straight-line code. Inlined, its sums would take registers and stack from the rest. A compiler that puts additions
 * off until their result is needed holds all values until then; those of GCC do without.
 */
#if defined(__GNUC__) && !defined(__clang__)
#define KESTREL_STREAM_STRAIGHT __attribute__((noinline, optimize("no-tree-ter")))
#elif defined(__GNUC__)
#define KESTREL_STREAM_STRAIGHT __attribute__((noinline))
#else
#define KESTREL_STREAM_STRAIGHT
#endif

/* How four bits of packed weights are read; see kestrel_stream_product. */
enum {
    KESTREL_STREAM_QUAD, /* bit b of four weights of up to 4 bits: four of these numbers, b = 0..3, hold four weights */
    KESTREL_STREAM_PAIR, /* two weights of up to 2 bits */
    KESTREL_STREAM_WIDE, /* the low, then the high half of a weight of 5 to 8 bits */
    KESTREL_STREAM_POWER /* a sign (8) and an exponent */
};

/* A matrix: sums[o] = bias[o] + sum of w[o][i] x[i]. bias may be null; bias_bits 16 or 32. */
typedef struct {
    const uint16_t *weights; /* for each group of four table numbers, for each output: the four */
    const void *bias;
    uint16_t inputs, outputs;
    uint8_t kind, odd; /* odd: a number n stands for 2n + 1 */
    uint8_t bias_bits;
} kestrel_stream_matrix;

/* Value i of an array of 8, 16 or 32 bits. */
int32_t kestrel_stream_value(const void *x, int bits, int32_t i);

/* y [count] of x [count] (x_bits 8, 16 or 32). */
void kestrel_stream_scale(const kestrel_stream_scaling *s, const void *x, int x_bits, int count, void *y);

/* y = the scaled sum of `count` values of two int8 arrays, each with a multiplier of its own (s->digits[0] and [1]). */
void kestrel_stream_add(const kestrel_stream_scaling *s, const int8_t *a, const int8_t *b, int count, void *y);

/* y = scaled a[i] b[j] of int8 values; b has one value for `run` neighbours of a, and begins anew after `size`. */
void kestrel_stream_multiply(const kestrel_stream_scaling *s, const int8_t *a, const int8_t *b, int run, int size, int count,
                             void *y);

/* sums [outputs] = bias. */
void kestrel_stream_bias(const void *bias, int bits, int outputs, int32_t *sums);

/*
 * sums [outputs] += W x. For four numbers at a time, tables [64] hold what any of them makes of their inputs, so a weight
 * costs a few loads and an addition; making the tables is shared by all outputs. Of QUAD all binary
 * digits of four weights look into the same table.
 */
void kestrel_stream_product(const kestrel_stream_matrix *m, const int8_t *x, int32_t *sums, int16_t *tables);

/* sums [channels] += w[tap][channel] x[tap][channel], taps `step` apart in x. */
void kestrel_stream_taps(const int8_t *w, const int8_t *x, int taps, int step, int channels, int32_t *sums);

/* Drops the oldest of the columns in `window` (`bytes` in all) and appends `column` (`size` bytes). */
void kestrel_stream_shift(void *window, int bytes, const void *column, int size);

/* Puts `column` (`size` bytes) behind the `held` columns of a queue. */
void kestrel_stream_put(uint8_t *queue, int held, const void *column, int size);

/* Of `depth` columns of `bytes` each, the `size` bytes from `first` on, which may lie outside: zeros there. */
void kestrel_stream_patch(const int8_t *columns, int depth, int bytes, int first, int size, int8_t *patch);

/* Keeps the larger values of a column (`size`, int8) and of what is kept, or the column `anew`. */
void kestrel_stream_larger(void *kept, const void *column, int size, int anew);

/* y [channels] = largest of x [rows][channels]. */
void kestrel_stream_largest(const int8_t *x, int rows, int channels, int8_t *y);

/* sums [channels] += x [rows][channels], int8 to int16 or int32. */
void kestrel_stream_collect16(const int8_t *x, int rows, int channels, int16_t *sums);
void kestrel_stream_collect32(const int8_t *x, int rows, int channels, int32_t *sums);

/* sums [channels] = sum of segments [rows][channels]. */
void kestrel_stream_total(const int16_t *segments, int rows, int channels, int32_t *sums);

/* Sets bytes to 0. */
void kestrel_stream_clear(void *bytes, int count);

/* Index of the largest of the logits, the first of equals. */
int kestrel_stream_argmax(const int32_t *logits, int count);

#ifdef __cplusplus
}
#endif

#endif
