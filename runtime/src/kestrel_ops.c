/* SPDX-License-Identifier: Apache-2.0
 *
 * Kernels of kestrel.h. Element-wise work goes through tiles of int32 on the stack: values are widened on the way in and
 * narrowed on the way out by loops that vectorise, so one kernel serves all combinations of 8, 16 and 32 bits.
 */
#ifdef KESTREL_SIMD
#define KESTREL_ISA portable
#include "kestrel_isa.h"
#endif
#include "kestrel.h"
#include "kestrel_inner.h"

/* Shifts of negative numbers have to be arithmetic, as on every compiler that is in use. */
typedef char kestrel_needs_arithmetic_shift[((int64_t)-3 >> 1) == -2 ? 1 : -1];

enum { TILE = 64 };

static int32_t clamp(int32_t x, int32_t low, int32_t high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

static int32_t clamp64(int64_t x, int32_t low, int32_t high) {
    x = x < low ? low : x;
    return (int32_t)(x > high ? high : x);
}

/* Elements `at`, at + 1, ... of an array, widened. */
static void load(int32_t *restrict tile, const void *x, int bits, int32_t at, int32_t count) {
    int32_t i;
    if (bits == 8) {
        const int8_t *restrict from = (const int8_t *)x + at;
        for (i = 0; i < count; i++) {
            tile[i] = from[i];
        }
    } else if (bits == 16) {
        const int16_t *restrict from = (const int16_t *)x + at;
        for (i = 0; i < count; i++) {
            tile[i] = from[i];
        }
    } else {
        memcpy(tile, (const int32_t *)x + at, (size_t)count * sizeof(int32_t));
    }
}

/* The inverse; values were proven to fit. */
static void store(void *y, int bits, int32_t at, const int32_t *restrict tile, int32_t count) {
    int32_t i;
    if (bits == 8) {
        int8_t *restrict to = (int8_t *)y + at;
        for (i = 0; i < count; i++) {
            to[i] = (int8_t)tile[i];
        }
    } else if (bits == 16) {
        int16_t *restrict to = (int16_t *)y + at;
        for (i = 0; i < count; i++) {
            to[i] = (int16_t)tile[i];
        }
    } else {
        memcpy((int32_t *)y + at, tile, (size_t)count * sizeof(int32_t));
    }
}

/* The loop of rescale_tile. Called with constant steps, so that each combination becomes a loop of its own. */
static inline void rescale_each(int32_t *restrict tile, const int32_t *restrict m, int m_step, const int32_t *restrict o,
                                int o_step, int shift, int32_t low, int32_t high, int32_t count) {
    const int64_t half = shift ? ((int64_t)1 << (shift - 1)) - 1 : 0;
    const int64_t odd = shift ? 1 : 0;
    int32_t i;
    for (i = 0; i < count; i++) {
        const int64_t x = (int64_t)tile[i] * m[i * m_step] + o[i * o_step];
        tile[i] = clamp64((x + half + ((x >> shift) & odd)) >> shift, low, high);
    }
}

/* Rescales a tile whose first element belongs to `channel`. */
static void rescale_tile(const kestrel_rescale *r, int32_t channel, int32_t *tile, int32_t count) {
    static const int32_t none = 0;
    const int32_t low = r->low, high = r->high, *m = r->multipliers, *o = r->offsets == NULL ? &none : r->offsets;
    const int shift = r->shift, own_o = r->offsets != NULL && r->offset_step;
    int32_t i;
    if (m == NULL) {
        return;
    }
    m += r->multiplier_step ? channel : 0;
    o += own_o ? channel : 0;
    if (r->narrow == 1 && shift > 0 && !r->multiplier_step && !own_o) {
        const int32_t half = ((int32_t)1 << (shift - 1)) - 1, factor = m[0], offset = o[0];
        for (i = 0; i < count; i++) {
            const int32_t x = tile[i] * factor + offset;
            tile[i] = clamp((x + half + ((x >> shift) & 1)) >> shift, low, high);
        }
        return;
    }
    if (r->multiplier_step && own_o) {
        rescale_each(tile, m, 1, o, 1, shift, low, high, count);
    } else if (r->multiplier_step) {
        rescale_each(tile, m, 1, o, 0, shift, low, high, count);
    } else if (own_o) {
        rescale_each(tile, m, 0, o, 1, shift, low, high, count);
    } else {
        rescale_each(tile, m, 0, o, 0, shift, low, high, count);
    }
}

/* ------------------------------------------------------------------------------------------- element by element */

void kestrel_requantise(const kestrel_requantise_op *op, void *y, const void *x) {
    int32_t tile[TILE], row, at, count;
    for (row = 0; row < op->rows; row++) {
        for (at = 0; at < op->channels; at += count) {
            count = smaller(TILE, op->channels - at);
            load(tile, x, op->x_bits, row * op->channels + at, count);
            rescale_tile(&op->rescale, at, tile, count);
            store(y, op->y_bits, row * op->channels + at, tile, count);
        }
    }
}

void kestrel_add(const kestrel_add_op *op, void *y, const void *const *x) {
    const int shift = op->shift;
    const int64_t half = shift ? ((int64_t)1 << (shift - 1)) - 1 : 0, odd = shift ? 1 : 0;
    const int32_t low = op->low, high = op->high;
    int64_t sum[TILE];
    int32_t tile[TILE], at, count, input, i;
    for (at = 0; at < op->size; at += count) {
        count = smaller(TILE, op->size - at);
        load(tile, x[0], op->x_bits[0], at, count);
        for (i = 0; i < count; i++) {
            sum[i] = (int64_t)tile[i] * op->multipliers[0];
        }
        for (input = 1; input < op->inputs; input++) {
            const int32_t m = op->multipliers[input];
            load(tile, x[input], op->x_bits[input], at, count);
            for (i = 0; i < count; i++) {
                sum[i] += (int64_t)tile[i] * m;
            }
        }
        for (i = 0; i < count; i++) {
            tile[i] = clamp64((sum[i] + half + ((sum[i] >> shift) & odd)) >> shift, low, high);
        }
        store(y, op->y_bits, at, tile, count);
    }
}

/* Advances `index` over all axes but the last; returns 0 behind the last position. */
static int next_position(int32_t *index, const int32_t *shape, int32_t rank) {
    int32_t axis;
    for (axis = rank - 2; axis >= 0; axis--) {
        if (++index[axis] < shape[axis]) {
            return 1;
        }
        index[axis] = 0;
    }
    return 0;
}

static int32_t offset_of(const int32_t *index, const int32_t *stride, int32_t rank) {
    int32_t axis, at = 0;
    for (axis = 0; axis < rank - 1; axis++) {
        at += index[axis] * stride[axis];
    }
    return at;
}

void kestrel_multiply(const kestrel_multiply_op *op, void *y, const void *a, const void *b) {
    const int32_t width = op->shape[op->rank - 1], step = op->b_stride[op->rank - 1];
    int32_t index[KESTREL_RANK] = {0}, tile[TILE], other[TILE], start = 0, at, count, i;
    do {
        const int32_t b_at = offset_of(index, op->b_stride, op->rank);
        for (at = 0; at < width; at += count) {
            count = smaller(TILE, width - at);
            load(tile, a, op->a_bits, start + at, count);
            if (step) {
                load(other, b, op->b_bits, b_at + at, count);
                for (i = 0; i < count; i++) {
                    tile[i] *= other[i];
                }
            } else {
                load(other, b, op->b_bits, b_at, 1);
                for (i = 0; i < count; i++) {
                    tile[i] *= other[0];
                }
            }
            rescale_tile(&op->rescale, at, tile, count);
            store(y, op->y_bits, start + at, tile, count);
        }
        start += width;
    } while (next_position(index, op->shape, op->rank));
}

void kestrel_lookup(const kestrel_lookup_op *op, void *y, const void *x) {
    int32_t tile[TILE], at, count, i;
    for (at = 0; at < op->size; at += count) {
        count = smaller(TILE, op->size - at);
        load(tile, x, op->x_bits, at, count);
        if (op->y_bits == 8) {
            const int8_t *table = op->table;
            int8_t *to = (int8_t *)y + at;
            for (i = 0; i < count; i++) {
                to[i] = table[tile[i] - op->first];
            }
        } else if (op->y_bits == 16) {
            const int16_t *table = op->table;
            int16_t *to = (int16_t *)y + at;
            for (i = 0; i < count; i++) {
                to[i] = table[tile[i] - op->first];
            }
        } else {
            const int32_t *table = op->table;
            int32_t *to = (int32_t *)y + at;
            for (i = 0; i < count; i++) {
                to[i] = table[tile[i] - op->first];
            }
        }
    }
}

/* start[i], rise[i] = node i, and how much higher the next one is, for the nodes rise[i]. */
#define NODES(NAME, N)                                                                                              \
    static void NAME(int32_t *restrict start, int32_t *restrict rise, const void *nodes, int32_t count) {           \
        const N *const table = nodes;                                                                               \
        int32_t i;                                                                                                  \
        for (i = 0; i < count; i++) {                                                                               \
            start[i] = table[rise[i]];                                                                              \
            rise[i] = table[rise[i] + 1] - start[i];                                                                \
        }                                                                                                           \
    }

NODES(nodes_8, int8_t)
NODES(nodes_16, int16_t)
NODES(nodes_32, int32_t)

void kestrel_interpolate(const kestrel_interpolate_op *op, void *y, const void *x) {
    const int shift = op->step_bits;
    const int32_t mask = ((int32_t)1 << shift) - 1, half = shift ? ((int32_t)1 << (shift - 1)) - 1 : 0, odd = shift ? 1 : 0;
    const int32_t low = op->low, high = op->high;
    const uint32_t origin = (uint32_t)op->first;
    int32_t tile[TILE], rise[TILE], fraction[TILE], at, count, i;
    for (at = 0; at < op->size; at += count) {
        count = smaller(TILE, op->size - at);
        load(tile, x, op->x_bits, at, count);
        for (i = 0; i < count; i++) {
            /* Unsigned: inputs of 32 bits may lie further from `first` than int32 reaches. */
            const uint32_t place = (uint32_t)tile[i] - origin;
            rise[i] = (int32_t)(place >> shift);
            fraction[i] = (int32_t)(place & (uint32_t)mask);
        }
        (op->node_bits == 8 ? nodes_8 : op->node_bits == 16 ? nodes_16 : nodes_32)(tile, rise, op->nodes, count);
        for (i = 0; i < count; i++) {
            /* The rise of a segment was proven to stay below 2^30, so there is room for the rounding. */
            const int32_t up = rise[i] * fraction[i];
            tile[i] = clamp(tile[i] + ((up + half + ((up >> shift) & odd)) >> shift), low, high);
        }
        store(y, op->y_bits, at, tile, count);
    }
}

void kestrel_delta(const kestrel_delta_op *op, void *delta, void *next, const void *x, const void *ref) {
    int32_t now[TILE], before[TILE], change[TILE], at, count, i;
    for (at = 0; at < op->size; at += count) {
        count = smaller(TILE, op->size - at);
        load(now, x, op->x_bits, at, count);
        load(before, ref, op->ref_bits, at, count);
        for (i = 0; i < count; i++) {
            const int32_t d = now[i] - before[i];
            const int32_t sent = d >= op->threshold || d <= -op->threshold;
            change[i] = sent ? d : 0;
            before[i] = sent ? now[i] : before[i];
        }
        store(delta, op->delta_bits, at, change, count);
        store(next, op->next_bits, at, before, count);
    }
}

/* ------------------------------------------------------------------------------------------- weights in few bits */

static void unpack4(int8_t *restrict out, const uint8_t *restrict data, int32_t count) {
    int32_t i;
    for (i = 0; i < count / 2; i++) {
        out[2 * i] = (int8_t)(((data[i] & 15) ^ 8) - 8);
        out[2 * i + 1] = (int8_t)((data[i] >> 4 ^ 8) - 8);
    }
    if (count & 1) {
        out[count - 1] = (int8_t)(((data[count / 2] & 15) ^ 8) - 8);
    }
}

/* Signed powers of two, to int16. */
static void unpack_power(int16_t *restrict out, const uint8_t *restrict data, int32_t count) {
    int32_t i;
    for (i = 0; i < count; i++) {
        const int field = data[i / 2] >> 4 * (i & 1), power = 1 << (field & 7);
        out[i] = (int16_t)(field & 8 ? -power : power);
    }
}

static void unpack2(int8_t *restrict out, const uint8_t *restrict data, int32_t count) {
    int32_t i;
    for (i = 0; i < count / 4; i++) {
        const int byte = data[i];
        out[4 * i] = (int8_t)(((byte & 3) ^ 2) - 2);
        out[4 * i + 1] = (int8_t)(((byte >> 2 & 3) ^ 2) - 2);
        out[4 * i + 2] = (int8_t)(((byte >> 4 & 3) ^ 2) - 2);
        out[4 * i + 3] = (int8_t)((byte >> 6 ^ 2) - 2);
    }
    for (i = count & ~3; i < count; i++) {
        out[i] = (int8_t)(((data[i / 4] >> 2 * (i & 3) & 3) ^ 2) - 2);
    }
}

/* A byte is a fraction of 256 in base 3: its digits are the whole parts of repeated products with 3. */
static void unpack_ternary(int8_t *restrict out, const uint8_t *restrict data, int32_t count) {
    int32_t i, digit;
    for (i = 0; i < count / 5; i++) {
        unsigned rest = data[i];
        for (digit = 0; digit < 5; digit++) {
            rest *= 3;
            out[5 * i + digit] = (int8_t)((int)(rest >> 8) - 1);
            rest &= 255;
        }
    }
    if (count % 5) {
        unsigned rest = data[i];
        for (digit = 0; digit < count % 5; digit++) {
            rest *= 3;
            out[5 * i + digit] = (int8_t)((int)(rest >> 8) - 1);
            rest &= 255;
        }
    }
}

static void unpack_binary(int8_t *restrict out, const uint8_t *restrict data, int32_t count) {
    int32_t i, bit;
    for (i = 0; i < count / 8; i++) {
        for (bit = 0; bit < 8; bit++) {
            out[8 * i + bit] = (int8_t)(1 - 2 * (data[i] >> bit & 1));
        }
    }
    for (i = count & ~7; i < count; i++) {
        out[i] = (int8_t)(1 - 2 * (data[i / 8] >> (i & 7) & 1));
    }
}

static void unpack_fields(int8_t *restrict out, const uint8_t *restrict data, int32_t count, int bits, int odd) {
    const uint32_t mask = ((uint32_t)1 << bits) - 1, sign = (uint32_t)1 << (bits - 1);
    uint32_t window = 0;
    int32_t i;
    int held = 0;
    for (i = 0; i < count; i++) {
        int32_t value;
        if (held < bits) {
            window |= (uint32_t)*data++ << held;
            held += 8;
        }
        value = (int32_t)((window & mask) ^ sign) - (int32_t)sign;
        out[i] = (int8_t)(odd ? 2 * value + 1 : value);
        window >>= bits;
        held -= bits;
    }
}

/* Elements first .. first + count - 1 of a row whose zeros are left out. */
static void unpack_sparse(int8_t *restrict out, const kestrel_weights *w, int32_t row, int32_t first, int32_t count) {
    const int bits = w->field_bits, odd = w->kind == KESTREL_MASKED_ODD;
    const uint32_t mask = ((uint32_t)1 << bits) - 1, sign = (uint32_t)1 << (bits - 1);
    const uint8_t *restrict bitmap = w->data, *restrict fields;
    uint32_t before = 0, window = 0;
    int32_t i, held = 0;
    if (w->kind == KESTREL_SPARSE) {
        bitmap += (ptrdiff_t)row * w->row_bytes;
        fields = bitmap + w->bitmap_bytes;
    } else {
        const int32_t block = row / KESTREL_MASKED_ROWS;
        fields = bitmap + w->bitmap_bytes;
        if (block) {
            before = bitmap[-2 * block] | (uint32_t)bitmap[-2 * block + 1] << 8;
        }
        bitmap += (ptrdiff_t)block * (KESTREL_MASKED_ROWS / 8) * w->row_bytes;
        first += row % KESTREL_MASKED_ROWS * w->row_bytes;
    }
    for (i = 0; i < first; i += 8) {
        uint32_t byte = bitmap[i >> 3];
        byte &= first - i < 8 ? (1u << (first & 7)) - 1 : 255u;
        for (; byte; byte &= byte - 1) {
            before++;
        }
    }
    before *= (uint32_t)bits;
    fields += before / 8;
    if (before & 7) {
        window = (uint32_t)*fields++ >> (before & 7);
        held = 8 - (int32_t)(before & 7);
    }
    for (i = first; i < first + count; i++) {
        int32_t value = 0;
        if (bitmap[i >> 3] >> (i & 7) & 1) {
            if (held < bits) {
                window |= (uint32_t)*fields++ << held;
                held += 8;
            }
            value = ((int32_t)((window & mask) ^ sign) - (int32_t)sign) * (1 + odd) + odd;
            window >>= bits;
            held -= bits;
        }
        *out++ = (int8_t)value;
    }
}

/* Elements of weight row `row`, from `first` on (a multiple of KESTREL_DEPTHWISE_TILE), for direct or unpacked use. */
static const void *weight_row(const kestrel_weights *w, int32_t row, int32_t first, int32_t count, void *scratch) {
    const uint8_t *data = (const uint8_t *)w->data + (ptrdiff_t)row * w->row_bytes;
    switch (w->kind) {
    case KESTREL_DIRECT:
        return element(data, w->bits, first);
    case KESTREL_INT4:
        unpack4(scratch, data + first / 2, count);
        break;
    case KESTREL_POWER:
        unpack_power(scratch, data + first / 2, count);
        break;
    case KESTREL_INT2:
        unpack2(scratch, data + first / 4, count);
        break;
    case KESTREL_TERNARY:
        unpack_ternary(scratch, data + first / 5, count);
        break;
    case KESTREL_BINARY:
        unpack_binary(scratch, data + first / 8, count);
        break;
    case KESTREL_SPARSE:
    case KESTREL_MASKED:
    case KESTREL_MASKED_ODD:
        unpack_sparse(scratch, w, row, first, count);
        break;
    default:
        unpack_fields(scratch, data + first / 8 * w->field_bits, count, w->field_bits, w->kind == KESTREL_ODD);
        break;
    }
    return scratch;
}

/* ------------------------------------------------------------------------------------------------------ products */

/* sums[k] += sum of x[i] w[k * stride + i], for one row of weights or for four that share the loads of x. */
typedef void product(int32_t *restrict sums, const void *x, const void *w, int32_t stride, int32_t count);

#define PRODUCTS(NAME, X, W)                                                                                        \
    static void NAME##_1(int32_t *restrict sums, const void *x, const void *w, int32_t stride, int32_t count) {     \
        const X *restrict a = x;                                                                                    \
        const W *restrict b = w;                                                                                    \
        int32_t sum = 0, i;                                                                                         \
        (void)stride;                                                                                               \
        for (i = 0; i < count; i++) {                                                                               \
            sum += (int32_t)a[i] * b[i];                                                                            \
        }                                                                                                           \
        sums[0] += sum;                                                                                             \
    }                                                                                                               \
    static void NAME##_4(int32_t *restrict sums, const void *x, const void *w, int32_t stride, int32_t count) {     \
        const X *restrict a = x;                                                                                    \
        const W *restrict b0 = w, *restrict b1 = b0 + stride, *restrict b2 = b1 + stride, *restrict b3 = b2 + stride; \
        int32_t sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0, i;                                                          \
        for (i = 0; i < count; i++) {                                                                               \
            sum0 += (int32_t)a[i] * b0[i];                                                                          \
            sum1 += (int32_t)a[i] * b1[i];                                                                          \
            sum2 += (int32_t)a[i] * b2[i];                                                                          \
            sum3 += (int32_t)a[i] * b3[i];                                                                          \
        }                                                                                                           \
        sums[0] += sum0;                                                                                            \
        sums[1] += sum1;                                                                                            \
        sums[2] += sum2;                                                                                            \
        sums[3] += sum3;                                                                                            \
    }                                                                                                               \
    /* sums[i] += x[i] w[i] */                                                                                      \
    static void NAME##_each(int32_t *restrict sums, const void *x, const void *w, int32_t stride, int32_t count) {  \
        const X *restrict a = x;                                                                                    \
        const W *restrict b = w;                                                                                    \
        int32_t i;                                                                                                  \
        (void)stride;                                                                                               \
        for (i = 0; i < count; i++) {                                                                               \
            sums[i] += (int32_t)a[i] * b[i];                                                                        \
        }                                                                                                           \
    }

PRODUCTS(product_8_8, int8_t, int8_t)
PRODUCTS(product_8_16, int8_t, int16_t)
PRODUCTS(product_8_32, int8_t, int32_t)
PRODUCTS(product_16_8, int16_t, int8_t)
PRODUCTS(product_16_16, int16_t, int16_t)
PRODUCTS(product_16_32, int16_t, int32_t)
PRODUCTS(product_32_8, int32_t, int8_t)
PRODUCTS(product_32_16, int32_t, int16_t)
PRODUCTS(product_32_32, int32_t, int32_t)

#define VARIANTS(KIND)                                                                                              \
    {                                                                                                               \
        {product_8_8_##KIND, product_8_16_##KIND, product_8_32_##KIND},                                             \
            {product_16_8_##KIND, product_16_16_##KIND, product_16_32_##KIND},                                      \
            {product_32_8_##KIND, product_32_16_##KIND, product_32_32_##KIND},                                      \
    }

static int place_of(int bits) { return bits >> 4; } /* 8, 16, 32 -> 0, 1, 2 */

static product *product_one(int x_bits, int w_bits) {
    static product *const variants[3][3] = VARIANTS(1);
    return variants[place_of(x_bits)][place_of(w_bits)];
}

static product *product_four(int x_bits, int w_bits) {
    static product *const variants[3][3] = VARIANTS(4);
    return variants[place_of(x_bits)][place_of(w_bits)];
}

static product *product_each(int x_bits, int w_bits) {
    static product *const variants[3][3] = VARIANTS(each);
    return variants[place_of(x_bits)][place_of(w_bits)];
}

/* Rows first .. first + count - 1 of `length` elements, `stride` of them apart; direct or unpacked into scratch. */
static const void *weight_rows(const kestrel_weights *w, int32_t first, int32_t count, int32_t length, void *scratch,
                               int32_t *stride) {
    int32_t row;
    if (w->kind == KESTREL_DIRECT) {
        *stride = w->row_bytes / (w->bits / 8);
        return weight_row(w, first, 0, length, scratch);
    }
    *stride = length;
    for (row = 0; row < count; row++) {
        weight_row(w, first + row, 0, length, (int8_t *)scratch + (ptrdiff_t)row * length * (w->bits / 8));
    }
    return scratch;
}

static int32_t block_of(int32_t left, int unpack_rows) { return left >= 4 && unpack_rows == 4 ? 4 : 1; }

void kestrel_matmul(const kestrel_matmul_op *op, void *y, const void *x, void *scratch) {
    product *const one = product_one(op->x_bits, op->weights.bits), *const four = product_four(op->x_bits, op->weights.bits);
    int32_t sums[TILE], o, block, row, i, stride;
    if (op->weights.kind == KESTREL_DIRECT) {
        /* Whole tiles of outputs per row of x: one call of the rescaling serves many. */
        for (row = 0; row < op->rows; row++) {
            const void *const from = element(x, op->x_bits, row * op->width);
            for (o = 0; o < op->outputs; o += block) {
                block = smaller(TILE, op->outputs - o);
                for (i = 0; i < block; i++) {
                    sums[i] = op->bias == NULL ? 0 : op->bias[o + i];
                }
                for (i = 0; i + 4 <= block; i += 4) {
                    const void *const w = weight_rows(&op->weights, o + i, 4, op->width, scratch, &stride);
                    four(sums + i, from, w, stride, op->width);
                }
                for (; i < block; i++) {
                    one(sums + i, from, weight_rows(&op->weights, o + i, 1, op->width, scratch, &stride), 0, op->width);
                }
                rescale_tile(&op->rescale, o, sums, block);
                store(y, op->y_bits, row * op->outputs + o, sums, block);
            }
        }
        return;
    }
    for (o = 0; o < op->outputs; o += block) {
        const void *w;
        block = block_of(op->outputs - o, op->unpack_rows);
        w = weight_rows(&op->weights, o, block, op->width, scratch, &stride);
        for (row = 0; row < op->rows; row++) {
            for (i = 0; i < block; i++) {
                sums[i] = op->bias == NULL ? 0 : op->bias[o + i];
            }
            (block == 4 ? four : one)(sums, element(x, op->x_bits, row * op->width), w, stride, op->width);
            rescale_tile(&op->rescale, o, sums, block);
            store(y, op->y_bits, row * op->outputs + o, sums, block);
        }
    }
}

static void add_scaled(int32_t *restrict y, const void *w, int bits, int32_t d, int32_t count) {
    int32_t i;
    if (bits == 8) {
        const int8_t *restrict b = w;
        for (i = 0; i < count; i++) {
            y[i] += d * b[i];
        }
    } else if (bits == 16) {
        const int16_t *restrict b = w;
        for (i = 0; i < count; i++) {
            y[i] += d * b[i];
        }
    } else {
        const int32_t *restrict b = w;
        for (i = 0; i < count; i++) {
            y[i] += d * b[i];
        }
    }
}

/* y[at] .. += d w for `count` <= TILE elements, or any number of 32 bits. */
static void add_part(const kestrel_accumulate_op *op, void *y, int32_t at, const void *w, int32_t d, int32_t count) {
    int32_t tile[TILE];
    if (op->y_bits == 32) {
        add_scaled((int32_t *)y + at, w, op->weights.bits, d, count);
        return;
    }
    load(tile, y, op->y_bits, at, count);
    add_scaled(tile, w, op->weights.bits, d, count);
    store(y, op->y_bits, at, tile, count);
}

static void add_one(void *y, int bits, int32_t at, int32_t change) {
    if (bits == 32) {
        ((int32_t *)y)[at] += change;
    } else {
        int32_t value;
        load(&value, y, bits, at, 1);
        value += change;
        store(y, bits, at, &value, 1);
    }
}

/* y += d (column of W), whose zeros are left out one by one. */
static void add_sparse(const kestrel_accumulate_op *op, void *y, const uint8_t *column, int32_t d) {
    const kestrel_weights *const w = &op->weights;
    const uint8_t *fields = column + w->bitmap_bytes;
    const int bits = w->field_bits;
    const uint32_t mask = ((uint32_t)1 << bits) - 1, sign = (uint32_t)1 << (bits - 1);
    uint32_t window = 0;
    int32_t i;
    int held = 0;
    for (i = 0; i < w->bitmap_bytes; i++) {
        int set = column[i], at = 8 * i;
        for (; set; set >>= 1, at++) {
            if (!(set & 1)) {
                continue;
            }
            if (held < bits) {
                window |= (uint32_t)*fields++ << held;
                held += 8;
            }
            add_one(y, op->y_bits, at, d * ((int32_t)((window & mask) ^ sign) - (int32_t)sign));
            window >>= bits;
            held -= bits;
        }
    }
}

/* One byte for a local row, memories of 32 bits. */
static void add_balanced_bytes(int32_t *restrict y, const int8_t *restrict value, const uint8_t *restrict local,
                               int32_t lanes, int32_t kept, int32_t d) {
    int32_t first, lane;
    for (first = 0; first < kept; first += lanes) {
        for (lane = 0; lane < lanes; lane++) {
            y[local[first + lane] * lanes + lane] += d * value[first + lane];
        }
    }
}

static void add_balanced(const kestrel_accumulate_op *op, void *y, const uint8_t *column, int32_t d) {
    const int32_t lanes = op->weights.lanes, wide = op->outputs / lanes > 256;
    const int32_t kept = op->weights.row_bytes / (wide ? 3 : 2);
    const int8_t *const value = (const int8_t *)column;
    const uint8_t *const low = column + kept, *const high = low + kept;
    int32_t i, lane = 0;
    if (op->y_bits == 32 && !wide) {
        add_balanced_bytes(y, value, low, lanes, kept, d);
        return;
    }
    for (i = 0; i < kept; i++) {
        const int32_t local = low[i] | (wide ? high[i] << 8 : 0);
        add_one(y, op->y_bits, local * lanes + lane, d * value[i]);
        lane = lane + 1 == lanes ? 0 : lane + 1;
    }
}

static void add_groups(const kestrel_accumulate_op *op, void *y, const uint8_t *column, int32_t d) {
    const int32_t lanes = op->weights.lanes, kept = op->weights.row_bytes / (lanes + 1);
    int32_t i;
    for (i = 0; i < kept; i++) {
        add_part(op, y, column[i] * lanes, column + kept + i * lanes, d, lanes);
    }
}

/* y += d (column of W). */
static void add_column(const kestrel_accumulate_op *op, void *y, int32_t column, int32_t d, void *scratch) {
    const uint8_t *const data = (const uint8_t *)op->weights.data + (ptrdiff_t)column * op->weights.row_bytes;
    const void *w;
    int32_t at, count;
    switch (op->weights.kind) {
    case KESTREL_SPARSE:
        add_sparse(op, y, data, d);
        break;
    case KESTREL_BALANCED:
        add_balanced(op, y, data, d);
        break;
    case KESTREL_GROUPS:
        add_groups(op, y, data, d);
        break;
    default:
        w = weight_row(&op->weights, column, 0, op->outputs, scratch);
        for (at = 0; at < op->outputs; at += count) {
            count = op->y_bits == 32 ? op->outputs : smaller(TILE, op->outputs - at);
            add_part(op, y, at, element(w, op->weights.bits, at), d, count);
        }
        break;
    }
}

void kestrel_accumulate(const kestrel_accumulate_op *op, void *y, const void *m, const void *d, void *scratch) {
    int32_t changes[TILE], i, k, count;
    if (y != m) {
        memcpy(y, m, (size_t)op->outputs * (size_t)(op->y_bits / 8));
    }
    for (i = 0; i < op->width; i += count) {
        count = smaller(TILE, op->width - i);
        load(changes, d, op->d_bits, i, count);
        for (k = 0; k < count; k++) {
            if (changes[k] != 0) {
                add_column(op, y, i + k, changes[k], scratch);
            }
        }
    }
}

void kestrel_conv(const kestrel_conv_op *op, void *y, const void *x, void *scratch) {
    const kestrel_window *const g = &op->window;
    const int32_t kernel_row = g->size_x * g->channels, length = g->size_y * kernel_row;
    const int direct = op->weights.kind == KESTREL_DIRECT;
    product *const one = product_one(op->x_bits, op->weights.bits), *const four = product_four(op->x_bits, op->weights.bits);
    int32_t sums[TILE], o, block, row, column, i, k, stride;
    for (o = 0; o < op->outputs; o += block) {
        const void *w;
        /* Rows that are unpacked serve all pixels; direct ones come in whole tiles, which are rescaled at once. */
        block = direct ? smaller(TILE, op->outputs - o) : block_of(op->outputs - o, op->unpack_rows);
        w = weight_rows(&op->weights, o, block, length, scratch, &stride);
        for (row = 0; row < g->out_height; row++) {
            const int32_t top = row * g->stride_y - g->top;
            int32_t first_row, last_row;
            inside(top, g->size_y, g->height, &first_row, &last_row);
            for (column = 0; column < g->out_width; column++) {
                const int32_t left = column * g->stride_x - g->left;
                int32_t first, last;
                inside(left, g->size_x, g->width, &first, &last);
                for (i = 0; i < block; i++) {
                    sums[i] = op->bias == NULL ? 0 : op->bias[o + i];
                }
                for (i = first_row; i < last_row && first < last; i++) {
                    const int32_t at = ((top + i) * g->width + left + first) * g->channels;
                    const int32_t start = i * kernel_row + first * g->channels, count = (last - first) * g->channels;
                    const void *const pixels = element(x, op->x_bits, at);
                    for (k = 0; k + 4 <= block; k += 4) {
                        four(sums + k, pixels, element(w, op->weights.bits, start + k * stride), stride, count);
                    }
                    for (; k < block; k++) {
                        one(sums + k, pixels, element(w, op->weights.bits, start + k * stride), stride, count);
                    }
                }
                rescale_tile(&op->rescale, o, sums, block);
                store(y, op->y_bits, (row * g->out_width + column) * op->outputs + o, sums, block);
            }
        }
    }
}

void kestrel_depthwise(const kestrel_depthwise_op *op, void *y, const void *x, void *scratch) {
    const kestrel_window *const g = &op->window;
    const int32_t places = g->size_y * g->size_x, bytes = op->weights.bits / 8;
    product *const each = product_each(op->x_bits, op->weights.bits);
    int32_t sums[KESTREL_DEPTHWISE_TILE], c, count, row, column, i, j;
    for (c = 0; c < g->channels; c += count) {
        count = smaller(KESTREL_DEPTHWISE_TILE, g->channels - c);
        if (op->weights.kind != KESTREL_DIRECT) {
            for (i = 0; i < places; i++) {
                weight_row(&op->weights, i, c, count, (int8_t *)scratch + i * KESTREL_DEPTHWISE_TILE * bytes);
            }
        }
        for (row = 0; row < g->out_height; row++) {
            const int32_t top = row * g->stride_y - g->top;
            int32_t first_row, last_row;
            inside(top, g->size_y, g->height, &first_row, &last_row);
            for (column = 0; column < g->out_width; column++) {
                const int32_t left = column * g->stride_x - g->left;
                int32_t first, last;
                inside(left, g->size_x, g->width, &first, &last);
                for (i = 0; i < count; i++) {
                    sums[i] = op->bias == NULL ? 0 : op->bias[c + i];
                }
                for (i = first_row; i < last_row; i++) {
                    for (j = first; j < last; j++) {
                        const int32_t at = ((top + i) * g->width + left + j) * g->channels + c, place = i * g->size_x + j;
                        const void *const w = op->weights.kind == KESTREL_DIRECT
                                                  ? weight_row(&op->weights, place, c, count, NULL)
                                                  : (const int8_t *)scratch + place * KESTREL_DEPTHWISE_TILE * bytes;
                        each(sums, element(x, op->x_bits, at), w, 0, count);
                    }
                }
                rescale_tile(&op->rescale, c, sums, count);
                store(y, op->y_bits, (row * g->out_width + column) * g->channels + c, sums, count);
            }
        }
    }
}

/* ------------------------------------------------------------------------------------------------------- pooling */

static void pool(const kestrel_pool_op *op, void *y, const void *x, int sum) {
    const kestrel_window *const g = &op->window;
    int32_t tile[TILE], found[TILE], row, column, c, count, i, j, k;
    for (row = 0; row < g->out_height; row++) {
        for (column = 0; column < g->out_width; column++) {
            for (c = 0; c < g->channels; c += count) {
                count = smaller(TILE, g->channels - c);
                for (i = 0; i < g->size_y; i++) {
                    for (j = 0; j < g->size_x; j++) {
                        const int32_t pixel = (row * g->stride_y + i) * g->width + column * g->stride_x + j;
                        load(i + j ? tile : found, x, op->x_bits, pixel * g->channels + c, count);
                        for (k = 0; k < count && i + j; k++) {
                            found[k] = sum ? found[k] + tile[k] : tile[k] > found[k] ? tile[k] : found[k];
                        }
                    }
                }
                if (sum) {
                    rescale_tile(&op->rescale, c, found, count);
                }
                store(y, op->y_bits, (row * g->out_width + column) * g->channels + c, found, count);
            }
        }
    }
}

void kestrel_max_pool(const kestrel_pool_op *op, void *y, const void *x) { pool(op, y, x, 0); }

void kestrel_sum_pool(const kestrel_pool_op *op, void *y, const void *x) { pool(op, y, x, 1); }

/* ---------------------------------------------------------------------------------------------- moving of values */

void kestrel_copy(const kestrel_copy_op *op, void *y, const void *x) {
    int32_t tile[TILE], run, at, count;
    for (run = 0; run < op->outer; run++) {
        if (op->x_bits == op->y_bits) {
            memcpy((uint8_t *)y + (ptrdiff_t)run * op->y_stride * (op->y_bits / 8),
                   element(x, op->x_bits, run * op->x_stride), (size_t)op->inner * (size_t)(op->x_bits / 8));
            continue;
        }
        for (at = 0; at < op->inner; at += count) {
            count = smaller(TILE, op->inner - at);
            load(tile, x, op->x_bits, run * op->x_stride + at, count);
            store(y, op->y_bits, run * op->y_stride + at, tile, count);
        }
    }
}

void kestrel_upsample(const kestrel_upsample_op *op, void *y, const void *x) {
    const size_t pixel = (size_t)op->channels * (size_t)(op->bits / 8);
    uint8_t *to = y;
    int32_t row, column, i;
    for (row = 0; row < op->height * op->factor_y; row++) {
        const uint8_t *from = (const uint8_t *)x + (size_t)(row / op->factor_y) * (size_t)op->width * pixel;
        for (column = 0; column < op->width; column++, from += pixel) {
            for (i = 0; i < op->factor_x; i++, to += pixel) {
                memcpy(to, from, pixel);
            }
        }
    }
}

void kestrel_transpose(const kestrel_transpose_op *op, void *y, const void *x) {
    const int32_t width = op->shape[op->rank - 1], step = op->x_stride[op->rank - 1];
    const size_t bytes = op->bits / 8;
    int32_t index[KESTREL_RANK] = {0}, i;
    uint8_t *to = y;
    do {
        const uint8_t *from = element(x, op->bits, offset_of(index, op->x_stride, op->rank));
        for (i = 0; i < width; i++, to += bytes, from += (size_t)step * bytes) {
            memcpy(to, from, bytes);
        }
    } while (next_position(index, op->shape, op->rank));
}

int32_t kestrel_argmax(const void *x, int bits, int32_t size) {
    int32_t largest, value, i, found = 0;
    load(&largest, x, bits, 0, 1);
    for (i = 1; i < size; i++) {
        load(&value, x, bits, i, 1);
        if (value > largest) {
            largest = value;
            found = i;
        }
    }
    return found;
}

#ifdef KESTREL_SIMD
const void *kestrel_weight_row(const kestrel_weights *w, int32_t row, int32_t first, int32_t count, void *scratch) {
    return weight_row(w, row, first, count, scratch);
}

void kestrel_rescale_values(const kestrel_rescale *rescale, int32_t channel, int32_t *values, int32_t count) {
    rescale_tile(rescale, channel, values, count);
}

KESTREL_TABLE
#endif
