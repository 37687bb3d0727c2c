/* SPDX-License-Identifier: Apache-2.0
 *
 * Kestrel runtime: integer kernels for lowered keyword-spotting networks, C99, no heap, no floating point.
 *
 * docs/integer.md states the arithmetic; these kernels give exactly its bits. A generated model.c holds one constant
 * descriptor per op and calls the kernels in order. Arrays are row-major, images [height, width, channels]. Codes are
 * stored in 8, 16 or 32 bits (`*_bits`), two's complement. Sizes and ranges were proven when the model was lowered, so
 * kernels check nothing: call them only with descriptors that the generator made.
 *
 * Unless a kernel says otherwise its output may not overlap its inputs.
 */
#ifndef KESTREL_H
#define KESTREL_H

#include <stdint.h>

/* y = clamp(round_half_even((x * m + o) / 2^shift), low, high). `multipliers` is NULL where nothing is rescaled. */
typedef struct {
    const int32_t *multipliers;  /* one value, or one per channel (index of the last axis) */
    const int32_t *offsets;      /* the same; NULL = 0 */
    uint8_t multiplier_step;     /* 0: one multiplier for all channels, 1: one each */
    uint8_t offset_step;
    uint8_t shift;               /* 0..62 */
    uint8_t narrow;              /* x * m + o + 2^shift was proven to fit int32 (1), or 53 bits and y int32 (2) */
    int32_t low, high;
} kestrel_rescale;

#ifdef KESTREL_SIMD
/* Computers only: what a vector kernel makes of an op's weights when it runs first. Microcontrollers never see it.
 * It lies in static memory, as do all tensors of a model, so one inference of a model runs at a time: a program whose threads
 * share a model lets them take turns, also for the first inference. Different models may run in different threads. */
typedef struct {
    uint8_t ready, bytes;  /* made; of bytes, not words */
    int8_t *weights;  /* in the order of the instruction set */
    int32_t *start;   /* first value of each sum */
    double *factor, *offset;  /* rescaling of each sum, where double holds it exactly */
    int8_t *rows;     /* inputs, as the products take them */
} kestrel_prepared;
#define KESTREL_ALIGNED __attribute__((aligned(64)))
#define KESTREL_PREPARED(name, weight_bytes, sums, row_bytes)                                                       \
    static int8_t name##_weights[weight_bytes] KESTREL_ALIGNED, name##_rows[row_bytes] KESTREL_ALIGNED;             \
    static int32_t name##_start[sums] KESTREL_ALIGNED;                                                              \
    static double name##_factor[sums] KESTREL_ALIGNED, name##_offset[sums] KESTREL_ALIGNED;                         \
    static kestrel_prepared name = {0, 0, name##_weights, name##_start, name##_factor, name##_offset, name##_rows};
#define KESTREL_USE(name) .prepared = &name,
#define KESTREL_POSITIVE .positive = 1,
#define KESTREL_CHANGES(bytes) .change_bytes = bytes,
#else
#define KESTREL_PREPARED(name, weight_bytes, sums, row_bytes)
#define KESTREL_USE(name)
#define KESTREL_POSITIVE
#define KESTREL_CHANGES(bytes)
#endif

/* How a row of weights is stored. Every row starts at a byte; fields lie least significant bit first. */
enum {
    KESTREL_DIRECT,   /* int8, int16 or int32 elements */
    KESTREL_INT4,     /* two's complement, 2 to a byte */
    KESTREL_INT2,     /* two's complement, 4 to a byte */
    KESTREL_TERNARY,  /* -1, 0, 1, 5 to a byte: ceil(256 q / 243), q the number with digits value + 1 in base 3, first
                         value = most significant digit */
    KESTREL_BINARY,   /* 8 to a byte, bit set = -1, clear = +1 */
    KESTREL_FIELDS,   /* two's complement fields of `field_bits` */
    KESTREL_ODD,      /* fields of `field_bits` that hold k of the value 2k + 1 */
    KESTREL_SPARSE,   /* a bit for every element, set where it is not zero, then fields of `field_bits` of those */
    /* For kestrel_accumulate only: columns of W, each with the weights that are kept and their places. */
    KESTREL_BALANCED, /* int8 values [K][lanes], then local rows [K][lanes]: value (k, lane) belongs to output
                         local * lanes + lane. Local rows have 8 bits, or where outputs / lanes > 256 16 bits, all low
                         bytes in front of all high ones. What pads a lane is a value 0 */
    KESTREL_GROUPS,   /* a byte for each group of `lanes` outputs that is kept, its number; then their int8 values */
    /* Not for kestrel_accumulate. A matrix in one piece: a bit for every element, set where it is not zero, then fields of
     * `field_bits` of those; rows do not start at a byte. In front of it, uint16, low byte first, lies the number of fields of all
     * rows before row 16 k, k = 1, 2, ..., that of k at data - 2 k. */
    KESTREL_MASKED,      /* two's complement fields */
    KESTREL_MASKED_ODD,  /* fields that hold k of the value 2k + 1 */
    KESTREL_POWER     /* rows of +-2^e, 2 to a byte: e in 3 bits, the sign above it; `bits` = 16 */
};
#define KESTREL_MASKED_ROWS 16

typedef struct {
    const void *data;
    uint8_t kind;
    uint8_t bits;        /* of an element behind unpacking: 8, 16 or 32 */
    uint8_t field_bits;  /* KESTREL_FIELDS, KESTREL_ODD, KESTREL_SPARSE, KESTREL_MASKED, KESTREL_MASKED_ODD */
    uint8_t lanes;       /* KESTREL_BALANCED, KESTREL_GROUPS */
    int32_t row_bytes;   /* from one row to the next; KESTREL_MASKED, KESTREL_MASKED_ODD: elements of a row */
    int32_t bitmap_bytes;  /* KESTREL_SPARSE: where the fields of a row begin; KESTREL_MASKED, KESTREL_MASKED_ODD: of the matrix */
} kestrel_weights;

/* Where a kernel is applied to an image; outside the image values are 0. */
typedef struct {
    int32_t height, width, channels;   /* of the input */
    int32_t out_height, out_width;
    int32_t size_y, size_x, stride_y, stride_x;
    int32_t top, left;                 /* padding */
} kestrel_window;

/* ------------------------------------------------------------------------------------------- element by element */

typedef struct {
    kestrel_rescale rescale;
    int32_t rows, channels;
    uint8_t x_bits, y_bits;
} kestrel_requantise_op;

/* y may be x itself where y_bits <= x_bits. */
void kestrel_requantise(const kestrel_requantise_op *op, void *y, const void *x);

typedef struct {
    const int32_t *multipliers;  /* one per input */
    const uint8_t *x_bits;       /* one per input */
    int32_t inputs, size;
    int32_t low, high;
    uint8_t shift, y_bits;
    uint8_t narrow;              /* any sum + 2^shift was proven to fit int32 (1), or 53 bits and y int32 (2) */
} kestrel_add_op;

/* y = clamp(round((sum of x_i m_i) / 2^shift)). y may be any x_i of the same bits or more. */
void kestrel_add(const kestrel_add_op *op, void *y, const void *const *x);

#define KESTREL_RANK 6
typedef struct {
    kestrel_rescale rescale;
    int32_t rank;
    int32_t shape[KESTREL_RANK];     /* of a */
    int32_t b_stride[KESTREL_RANK];  /* elements; 0 where b is repeated */
    uint8_t a_bits, b_bits, y_bits;
} kestrel_multiply_op;

/* y = a b, rescaled over the last axis of `shape`. y may be a where y_bits <= a_bits. */
void kestrel_multiply(const kestrel_multiply_op *op, void *y, const void *a, const void *b);

typedef struct {
    const void *table;  /* elements of y_bits */
    int32_t first, size;
    uint8_t x_bits, y_bits;
} kestrel_lookup_op;

/* y = table[x - first]. y may be x where y_bits <= x_bits. */
void kestrel_lookup(const kestrel_lookup_op *op, void *y, const void *x);

typedef struct {
    const void *nodes;  /* elements of node_bits */
    int32_t first, size;
    int32_t low, high;
    uint8_t step_bits, node_bits, x_bits, y_bits;
} kestrel_interpolate_op;

/* p = x - first, i = p >> step_bits: y = clamp(n[i] + round((n[i+1] - n[i]) (p mod 2^step_bits) / 2^step_bits)).
 * y may be x where y_bits <= x_bits. */
void kestrel_interpolate(const kestrel_interpolate_op *op, void *y, const void *x);

typedef struct {
    int32_t threshold, size;
    uint8_t x_bits, ref_bits, delta_bits, next_bits;
} kestrel_delta_op;

/* Where |x - ref| >= threshold: delta = x - ref, next = x; else delta = 0, next = ref. next may be ref (same bits). */
void kestrel_delta(const kestrel_delta_op *op, void *delta, void *next, const void *x, const void *ref);

/* ------------------------------------------------------------------------------------------------------ products */

typedef struct {
    kestrel_weights weights;  /* rows of `width` */
    const int32_t *bias;      /* NULL = 0 */
    kestrel_rescale rescale;
    int32_t rows, width, outputs;
    uint8_t unpack_rows;      /* 1 or 4: rows of weights that `scratch` holds (direct weights need none) */
    uint8_t x_bits, y_bits;
#ifdef KESTREL_SIMD
    uint8_t positive;         /* no code of x is below 0 */
    kestrel_prepared *prepared;
#endif
} kestrel_matmul_op;

/* y[row][o] = rescale(bias[o] + sum of W[o][i] x[row][i]). scratch: unpack_rows * width unpacked elements. */
void kestrel_matmul(const kestrel_matmul_op *op, void *y, const void *x, void *scratch);

typedef struct {
    kestrel_weights weights;  /* transposed: one row of `outputs` per input, so a change of 0 skips a row */
    int32_t width, outputs;
    uint8_t d_bits, y_bits;   /* the memories have y_bits */
#ifdef KESTREL_SIMD
    uint8_t change_bytes;     /* 1: a change is a sum of two int8, 2: 256 times one and another, 0: neither */
    kestrel_prepared *prepared;
#endif
} kestrel_accumulate_op;

/* y = m + W d. y may be m. scratch: `outputs` unpacked elements (none where the weights leave out zeros). */
void kestrel_accumulate(const kestrel_accumulate_op *op, void *y, const void *m, const void *d, void *scratch);

typedef struct {
    kestrel_weights weights;  /* one row [size_y][size_x][channels] per output */
    const int32_t *bias;
    kestrel_rescale rescale;
    kestrel_window window;
    int32_t outputs;
    uint8_t unpack_rows;
    uint8_t x_bits, y_bits;
#ifdef KESTREL_SIMD
    uint8_t positive;
    kestrel_prepared *prepared;
#endif
} kestrel_conv_op;

/* y[row][column][o]. scratch: unpack_rows rows of weights, unpacked. */
void kestrel_conv(const kestrel_conv_op *op, void *y, const void *x, void *scratch);

#define KESTREL_DEPTHWISE_TILE 40 /* channels: 40 fields of any width end at a byte, 40 ternary values, too */
typedef struct {
    kestrel_weights weights;  /* one row of `channels` per kernel position */
    const int32_t *bias;
    kestrel_rescale rescale;
    kestrel_window window;
    uint8_t x_bits, y_bits;
#ifdef KESTREL_SIMD
    kestrel_prepared *prepared;
#endif
} kestrel_depthwise_op;

/* A kernel of its own per channel. scratch: size_y * size_x * KESTREL_DEPTHWISE_TILE unpacked elements. */
void kestrel_depthwise(const kestrel_depthwise_op *op, void *y, const void *x, void *scratch);

/* ------------------------------------------------------------------------------------------------------- pooling */

typedef struct {
    kestrel_rescale rescale;  /* sum only */
    kestrel_window window;
    uint8_t x_bits, y_bits;
} kestrel_pool_op;

void kestrel_max_pool(const kestrel_pool_op *op, void *y, const void *x);
void kestrel_sum_pool(const kestrel_pool_op *op, void *y, const void *x);

/* ---------------------------------------------------------------------------------------------- moving of values */

typedef struct {
    int32_t outer, inner;        /* `outer` runs of `inner` elements */
    int32_t x_stride, y_stride;  /* elements from run to run */
    uint8_t x_bits, y_bits;
} kestrel_copy_op;

/* Slices, parts of concatenations, states: runs of elements, widened or narrowed. */
void kestrel_copy(const kestrel_copy_op *op, void *y, const void *x);

typedef struct {
    int32_t height, width, channels, factor_y, factor_x;
    uint8_t bits;
} kestrel_upsample_op;

void kestrel_upsample(const kestrel_upsample_op *op, void *y, const void *x);

typedef struct {
    int32_t rank;
    int32_t shape[KESTREL_RANK];     /* of y */
    int32_t x_stride[KESTREL_RANK];  /* elements of x along each axis of y */
    uint8_t bits;
} kestrel_transpose_op;

void kestrel_transpose(const kestrel_transpose_op *op, void *y, const void *x);

/* Index of the largest of `size` elements, the first of equals. */
int32_t kestrel_argmax(const void *x, int bits, int32_t size);

/* A model that is compiled with KESTREL_TRACE calls this with every tensor; the program has to define it. */
void kestrel_trace(int32_t tensor, const void *values, int bits, int32_t count);

#endif
