/* SPDX-License-Identifier: Apache-2.0
 *
 * Candidates of bench_sparse.py: y = W x dense, or y = m + W d of changes, timed in the same way. Compiled with the kernels of
 * the runtime into one library.
 */
#define _POSIX_C_SOURCE 200112L
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kestrel_isa.h"

typedef struct {
    enum { PLAIN, DENSE, CHANGES } kind;
    const kestrel_kernels *kernels;
    const int8_t *weights; /* PLAIN: [outputs][width] */
    int32_t outputs, width;
    kestrel_matmul_op matmul;
    kestrel_accumulate_op accumulate;
    int8_t *scratch;
} candidate;

static const kestrel_kernels *kernels_of(const char *isa) {
    if (strcmp(isa, "portable") == 0) {
        return &kestrel_kernels_portable;
    }
#ifdef KESTREL_X86
    if (strcmp(isa, "avx2") == 0) {
        return &kestrel_kernels_avx2;
    }
    if (strcmp(isa, "avx512") == 0) {
        return &kestrel_kernels_avx512;
    }
#endif
#ifdef KESTREL_NEON
    if (strcmp(isa, "neon") == 0) {
        return &kestrel_kernels_neon;
    }
#endif
    return NULL;
}

static void *zeros(size_t size) {
    void *found = NULL;
    if (posix_memalign(&found, 64, size) != 0) {
        abort();
    }
    return memset(found, 0, size);
}

static kestrel_prepared *prepared(size_t weights, size_t sums, size_t rows) {
    kestrel_prepared *const to = zeros(sizeof *to);
    to->weights = zeros(weights);
    to->start = zeros(sums * 4);
    to->factor = zeros(sums * 8);
    to->offset = zeros(sums * 8);
    to->rows = zeros(rows);
    return to;
}

static candidate *made(const char *isa, int32_t outputs, int32_t width) {
    candidate *const c = zeros(sizeof *c);
    c->kernels = kernels_of(isa);
    c->outputs = outputs;
    c->width = width;
    c->scratch = zeros((size_t)(outputs + width));
    return c;
}

/* The loop that anyone would write. */
static void plain(const candidate *c, int32_t *y, const int8_t *x) {
    int32_t o, i;
    for (o = 0; o < c->outputs; o++) {
        const int8_t *const w = c->weights + (ptrdiff_t)o * c->width;
        int32_t sum = 0;
        for (i = 0; i < c->width; i++) {
            sum += w[i] * x[i];
        }
        y[o] = sum;
    }
}

candidate *make_plain(const int8_t *weights, int32_t outputs, int32_t width) {
    candidate *const c = made("portable", outputs, width);
    c->kind = PLAIN;
    c->weights = weights;
    return c;
}

candidate *make_dense(const char *isa, const int8_t *weights, int32_t outputs, int32_t width) {
    candidate *const c = made(isa, outputs, width);
    const kestrel_weights w = {.data = weights, .kind = KESTREL_DIRECT, .bits = 8, .row_bytes = width};
    const size_t padded = (size_t)(outputs + 63) / 64 * 64;
    c->kind = DENSE;
    c->matmul.weights = w;
    c->matmul.rows = 1;
    c->matmul.width = width;
    c->matmul.outputs = outputs;
    c->matmul.unpack_rows = 1;
    c->matmul.x_bits = 8;
    c->matmul.y_bits = 32;
    c->matmul.prepared = prepared(padded * (size_t)(width + 4) * 2, padded, (size_t)(width + 4) * 8);
    return c;
}

candidate *make_changes(const char *isa, const void *columns, int32_t kind, int32_t lanes, int32_t row_bytes,
                        int32_t bitmap_bytes, int32_t outputs, int32_t width) {
    candidate *const c = made(isa, outputs, width);
    const kestrel_weights w = {.data = columns, .kind = (uint8_t)kind, .bits = 8, .field_bits = 8, .lanes = (uint8_t)lanes,
                               .row_bytes = row_bytes, .bitmap_bytes = bitmap_bytes};
    const size_t padded = (size_t)(outputs + 63) / 64 * 64, list = (size_t)(2 * width + 20) * 8;
    c->kind = CHANGES;
    c->accumulate.weights = w;
    c->accumulate.width = width;
    c->accumulate.outputs = outputs;
    c->accumulate.d_bits = 16;
    c->accumulate.y_bits = 32;
    c->accumulate.change_bytes = 1;
    c->accumulate.prepared = prepared(padded * (size_t)width, 1, list > (size_t)outputs ? list : (size_t)outputs);
    return c;
}

static void run(const candidate *c, int32_t *y, const int8_t *x, const int16_t *d) {
    if (c->kind == PLAIN) {
        plain(c, y, x);
    } else if (c->kind == DENSE) {
        c->kernels->matmul(&c->matmul, y, x, c->scratch);
    } else {
        c->kernels->accumulate(&c->accumulate, y, y, d, c->scratch);
    }
}

/* What one vector gives; memories start at 0. */
void answer(const candidate *c, int32_t *y, const int8_t *x, const int16_t *d) {
    memset(y, 0, (size_t)c->outputs * sizeof *y);
    run(c, y, x, d);
}

/* Nanoseconds of processor time per vector of `count`, [count][width] each. Once without the clock, so that weights and code
 * are near. */
double timed(const candidate *c, int32_t *y, const int8_t *x, const int16_t *d, int32_t count) {
    struct timespec start, end;
    int32_t i, k;
    memset(y, 0, (size_t)c->outputs * sizeof *y);
    for (k = 0; k < 2; k++) {
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &start);
        for (i = 0; i < count; i++) {
            run(c, y, x + (ptrdiff_t)i * c->width, d + (ptrdiff_t)i * c->width);
        }
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &end);
    }
    return ((double)(end.tv_sec - start.tv_sec) * 1e9 + (double)(end.tv_nsec - start.tv_nsec)) / count;
}
