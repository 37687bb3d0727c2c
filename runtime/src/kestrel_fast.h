/* SPDX-License-Identifier: Apache-2.0
 *
 * Computers only: kernels on the vectors of kestrel_vector.h, compiled once for each instruction set. What has no vector form
 * here goes to the portable kernels. Element-wise ones are in this file, products in kestrel_products.h, those of
 * changes in kestrel_sparse.h.
 */
#include "kestrel_inner.h"
#include "kestrel_vector.h"

/* -------------------------------------------------------------------------------------------- codes and rescaling */

INLINE vector load_codes(const void *x, int bits, int32_t at) {
    return bits == 8    ? widen8((const int8_t *)x + at)
           : bits == 16 ? widen16((const int16_t *)x + at)
                        : vector_load((const int32_t *)x + at);
}

INLINE void store_codes(void *y, int bits, int32_t at, vector x) {
    if (bits == 8) {
        narrow8((int8_t *)y + at, x);
    } else if (bits == 16) {
        narrow16((int16_t *)y + at, x);
    } else {
        vector_store((int32_t *)y + at, x);
    }
}

static void store_values(void *y, int bits, int32_t at, const int32_t *values, int32_t count) {
    int32_t i;
    for (i = 0; i < count; i++) {
        if (bits == 8) {
            ((int8_t *)y)[at + i] = (int8_t)values[i];
        } else if (bits == 16) {
            ((int16_t *)y)[at + i] = (int16_t)values[i];
        } else {
            ((int32_t *)y)[at + i] = values[i];
        }
    }
}

/* y[at] .. = VALUE(at) for `size` >= LANES elements. The last vector may overlap the one before. Its value is computed first,
 * so that y may be an input as far as the kernels allow it. */
#define FOR_VECTORS(y, bits, size, VALUE)                                                                           \
    do {                                                                                                            \
        int32_t at = (size) - LANES;                                                                                \
        const vector last = VALUE;                                                                                  \
        for (at = 0; at + LANES <= (size); at += LANES) {                                                           \
            store_codes(y, bits, at, VALUE);                                                                        \
        }                                                                                                           \
        if (at < (size)) {                                                                                          \
            store_codes(y, bits, (size) - LANES, last);                                                             \
        }                                                                                                           \
    } while (0)

/* Rounding by 2^shift, half to even, of what fits int32 with 2^shift added. */
typedef struct {
    int shift;
    vector half, odd, low, high;
} rounding;

INLINE rounding rounding_of(int shift, int32_t low, int32_t high) {
    const int32_t half = shift ? ((int32_t)1 << (shift - 1)) - 1 : 0;
    const rounding r = {shift, vector_splat(half), vector_splat(shift ? 1 : 0), vector_splat(low), vector_splat(high)};
    return r;
}

INLINE vector rounded(const rounding *r, vector x) {
    const vector odd = vector_and(vector_down(x, r->shift), r->odd);
    return vector_clamp(vector_down(vector_add(vector_add(x, r->half), odd), r->shift), r->low, r->high);
}

#ifdef KESTREL_DOUBLES
static inline double unit_of(int shift) { return 1.0 / (double)((int64_t)1 << shift); }
#endif

/* A rescaling that is the same for all channels. */
typedef struct {
    int in_int32;
    rounding r;
    vector m, o;
#ifdef KESTREL_DOUBLES
    doubles factor, offset;
#endif
} scaling;

/* Whether `s` can stand for the rescaling; the caller takes the portable kernel otherwise. */
INLINE int same_scaling(scaling *s, const kestrel_rescale *r) {
    const int32_t o = r->offsets == NULL ? 0 : r->offsets[0];
    if (r->multiplier_step || (r->offsets != NULL && r->offset_step)) {
        return 0;
    }
    s->in_int32 = r->narrow == 1;
    s->r = rounding_of(s->in_int32 ? r->shift : 0, r->low, r->high);
    s->m = vector_splat(r->multipliers[0]);
    s->o = vector_splat(o);
#ifdef KESTREL_DOUBLES
    s->factor = doubles_splat(unit_of(r->shift) * r->multipliers[0]);
    s->offset = doubles_splat(unit_of(r->shift) * o);
    return r->narrow != 0;
#else
    return s->in_int32;
#endif
}

INLINE vector scaled(const scaling *s, vector x) {
#ifdef KESTREL_DOUBLES
    if (!s->in_int32) {
        const doubles low = doubles_scaled(doubles_low(x), s->factor, s->offset);
        const doubles high = doubles_scaled(doubles_high(x), s->factor, s->offset);
        return vector_clamp(doubles_rounded(low, high), s->r.low, s->r.high);
    }
#endif
    return rounded(&s->r, vector_add(vector_times(x, s->m), s->o));
}

/* ------------------------------------------------------------------------------------------- element by element */

#ifdef KESTREL_DOUBLES
/* Constants `from` on, divided by 2^shift, or the same one for all channels. */
INLINE void divided(doubles *low, doubles *high, const int32_t *constants, int own, int32_t from, doubles unit) {
    const vector c = own ? vector_load(constants + from) : vector_splat(constants[0]);
    *low = doubles_scaled(doubles_low(c), unit, doubles_splat(0));
    *high = doubles_scaled(doubles_high(c), unit, doubles_splat(0));
}

/* Rescaling of x, channels from `channel` on. */
INLINE vector scaled_channels(const kestrel_rescale *r, vector x, int32_t channel) {
    const doubles unit = doubles_splat(unit_of(r->shift));
    doubles factor_low, factor_high, low = doubles_splat(0), high = low;
    divided(&factor_low, &factor_high, r->multipliers, r->multiplier_step, channel, unit);
    if (r->offsets != NULL) {
        divided(&low, &high, r->offsets, r->offset_step, channel, unit);
    }
    low = doubles_scaled(doubles_low(x), factor_low, low);
    high = doubles_scaled(doubles_high(x), factor_high, high);
    return vector_clamp(doubles_rounded(low, high), vector_splat(r->low), vector_splat(r->high));
}
#endif

void kestrel_requantise(const kestrel_requantise_op *op, void *y, const void *x) {
    const int32_t size = op->rows * op->channels;
    const int x_bits = op->x_bits, y_bits = op->y_bits;
    scaling s;
#ifdef KESTREL_DOUBLES
    if (op->rows == 1 && size >= LANES && op->rescale.narrow && (op->rescale.multiplier_step || op->rescale.offset_step)) {
        FOR_VECTORS(y, y_bits, size, scaled_channels(&op->rescale, load_codes(x, x_bits, at), at));
        return;
    }
#endif
    if (size < LANES || !same_scaling(&s, &op->rescale)) {
        kestrel_kernels_portable.requantise(op, y, x);
        return;
    }
    FOR_VECTORS(y, y_bits, size, scaled(&s, load_codes(x, x_bits, at)));
}

/* Sums that fit int32. */
INLINE vector add_vectors(const kestrel_add_op *op, const rounding *r, const void *const *x, int32_t at) {
    vector sum = vector_times(load_codes(x[0], op->x_bits[0], at), vector_splat(op->multipliers[0]));
    int32_t i;
    for (i = 1; i < op->inputs; i++) {
        sum = vector_add(sum, vector_times(load_codes(x[i], op->x_bits[i], at), vector_splat(op->multipliers[i])));
    }
    return rounded(r, sum);
}

/* The sum of two times int16, limited to int16. */
static void add_words(const int16_t *a, const int16_t *b, int16_t *y, int32_t size) {
    const words last = words_add(load_words16(a + size - 2 * LANES), load_words16(b + size - 2 * LANES));
    int32_t at;
    for (at = 0; at + 2 * LANES <= size; at += 2 * LANES) {
        vector_store(y + at, words_add(load_words16(a + at), load_words16(b + at)));
    }
    vector_store(y + size - 2 * LANES, last); /* may overlap, see FOR_VECTORS */
}

static int adds_words(const kestrel_add_op *op) {
    return op->inputs == 2 && op->shift == 0 && op->multipliers[0] == 1 && op->multipliers[1] == 1 && op->x_bits[0] == 16 &&
           op->x_bits[1] == 16 && op->y_bits == 16 && op->low == INT16_MIN && op->high == INT16_MAX && op->size >= 2 * LANES;
}

#ifdef KESTREL_DOUBLES
/* Sums that fit 53 bits. */
INLINE vector add_doubles(const kestrel_add_op *op, double unit, const rounding *r, const void *const *x, int32_t at) {
    doubles first = doubles_splat(0), second = first;
    int32_t i;
    for (i = 0; i < op->inputs; i++) {
        const vector codes = load_codes(x[i], op->x_bits[i], at);
        const doubles factor = doubles_splat(unit * op->multipliers[i]);
        first = doubles_scaled(doubles_low(codes), factor, first);
        second = doubles_scaled(doubles_high(codes), factor, second);
    }
    return vector_clamp(doubles_rounded(first, second), r->low, r->high);
}
#endif

void kestrel_add(const kestrel_add_op *op, void *y, const void *const *x) {
    const rounding r = rounding_of(op->narrow == 1 ? op->shift : 0, op->low, op->high);
    const int y_bits = op->y_bits;
    if (op->size < LANES) {
        kestrel_kernels_portable.add(op, y, x);
    } else if (adds_words(op)) {
        add_words(x[0], x[1], y, op->size);
    } else if (op->narrow == 1) {
        FOR_VECTORS(y, y_bits, op->size, add_vectors(op, &r, x, at));
#ifdef KESTREL_DOUBLES
    } else if (op->narrow == 2) {
        FOR_VECTORS(y, y_bits, op->size, add_doubles(op, unit_of(op->shift), &r, x, at));
#endif
    } else {
        kestrel_kernels_portable.add(op, y, x);
    }
}

INLINE vector product(const kestrel_multiply_op *op, const void *a, const void *b, int32_t at) {
    return vector_times(load_codes(a, op->a_bits, at), load_codes(b, op->b_bits, at));
}

void kestrel_multiply(const kestrel_multiply_op *op, void *y, const void *a, const void *b) {
    const int32_t size = op->shape[0];
    const int y_bits = op->y_bits;
    scaling s;
    if (op->rank > 1 || op->b_stride[0] != 1 || size < LANES) {
        kestrel_kernels_portable.multiply(op, y, a, b);
    } else if (op->rescale.multipliers == NULL) {
        FOR_VECTORS(y, y_bits, size, product(op, a, b, at));
    } else if (same_scaling(&s, &op->rescale)) {
        FOR_VECTORS(y, y_bits, size, scaled(&s, product(op, a, b, at)));
    } else {
        kestrel_kernels_portable.multiply(op, y, a, b);
    }
}

/* int16 all along, so that a place is below 2^16. With k = step_bits: n 2^k + rise f, rounded as rise f alone would be. */
INLINE vector interpolated(const kestrel_interpolate_op *op, const rounding *r, vector first, vector mask, const int16_t *x,
                           int32_t at) {
    const vector place = vector_sub(widen16(x + at), first), f = vector_and(place, mask);
    const vector pair = gather_pairs(op->nodes, vector_down(place, r->shift));
    const vector weights = vector_add(vector_sub(vector_up(f, 16), f), vector_splat((int32_t)1 << r->shift));
    const vector sum = interpolate_pairs(pair, weights);
    const vector odd = vector_and(vector_xor(vector_down(sum, r->shift), pair), r->odd);
    return vector_clamp(vector_down(vector_add(vector_add(sum, r->half), odd), r->shift), r->low, r->high);
}

void kestrel_interpolate(const kestrel_interpolate_op *op, void *y, const void *x) {
    if (op->node_bits != 16 || op->x_bits != 16 || op->y_bits != 16 || op->first < INT16_MIN || op->step_bits > 14 ||
        op->size < LANES) {
        kestrel_kernels_portable.interpolate(op, y, x);
    } else {
        const vector first = vector_splat(op->first), mask = vector_splat(((int32_t)1 << op->step_bits) - 1);
        const rounding r = rounding_of(op->step_bits, op->low, op->high);
        FOR_VECTORS(y, 16, op->size, interpolated(op, &r, first, mask, x, at));
    }
}

#include "kestrel_products.h"
#include "kestrel_sparse.h"

KESTREL_TABLE
