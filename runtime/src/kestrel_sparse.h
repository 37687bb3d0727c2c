/* SPDX-License-Identifier: Apache-2.0
 *
 * Computers only: y = m + W d where many changes d are 0. Part of kestrel_fast.h.
 *
 * A step first lists the changes that are not 0. Columns of W then follow each other as bytes: four columns of the list are
 * interleaved in registers for dot4, two for dot2 where changes are wide or the processor has no dot4. Sums of BLOCKS blocks
 * of outputs stay in registers while the list is walked, so memories are read and written once. The order of outputs in a
 * column is such that interleaving gives them back in order (place_of_output). A change beyond int8 is listed twice, or where
 * changes may be larger still, its high byte has a sum of its own.
 *
 * Of weights in groups, only those that are kept are read, where they lie. Weights that are kept one by one take a step each.
 * Where a whole column of bytes takes less than either, it is unpacked once and used as above. Sums are exact modulo 2^32, and
 * proven to fit int32 in the end.
 */
#if defined KESTREL_DOT4
/* PER_WEIGHT: outputs of a whole column in the time of one weight that is kept; PER_GROUPED: the same of one in a group. */
enum { BLOCKS = 4, PER_WEIGHT = 64, PER_GROUPED = 3 };
#elif defined KESTREL_SIGNED_DOT4
enum { BLOCKS = 2, PER_WEIGHT = 24, PER_GROUPED = 5 };
#else
enum { BLOCKS = 2, PER_WEIGHT = 8, PER_GROUPED = 2 };
#endif

/* Vectors of sums that interleaved columns give. */
static int32_t vectors_of(int bytes) { return bytes ? 4 : 2; }

static int32_t padded_outputs(int bytes, int32_t outputs) {
    const int32_t block = vectors_of(bytes) * LANES;
    return (outputs + block - 1) / block * block;
}

/* Where output `o` lies in its column: interleaving takes groups of four from each 16 bytes (bytes) or 8 words. */
static int32_t place_of_output(int bytes, int32_t o) {
    const int32_t vectors = vectors_of(bytes), block = vectors * LANES, in = o % block;
    const int32_t vector_ = in / LANES, lane = in % LANES;
    return o - in + lane / 4 * 4 * vectors + vector_ * 4 + lane % 4;
}

/* A column of weights that leave out zeros, unpacked. */
static const int8_t *whole_column(const kestrel_accumulate_op *op, int32_t column, int8_t *to, void *scratch) {
    const kestrel_weights *const w = &op->weights;
    const uint8_t *const data = (const uint8_t *)w->data + (ptrdiff_t)column * w->row_bytes;
    const int32_t wide = op->outputs / (w->lanes ? w->lanes : 1) > 256, kept = w->row_bytes / (wide ? 3 : 2);
    int32_t i;
    if (w->kind == KESTREL_GROUPS) {
        const int32_t groups = w->row_bytes / (w->lanes + 1);
        int32_t k;
        memset(to, 0, (size_t)op->outputs);
        for (i = 0; i < groups; i++) {
            for (k = 0; k < w->lanes; k++) {
                int8_t *const own = to + data[i] * w->lanes + k;
                *own = (int8_t)(*own + (int8_t)data[groups + i * w->lanes + k]); /* groups that pad are 0 */
            }
        }
        return to;
    }
    if (w->kind != KESTREL_BALANCED) {
        return kestrel_weight_row(w, column, 0, op->outputs, w->kind == KESTREL_SPARSE ? to : scratch);
    }
    memset(to, 0, (size_t)op->outputs);
    for (i = 0; i < kept; i++) {
        const int32_t local = data[kept + i] | (wide ? data[2 * kept + i] << 8 : 0), o = local * w->lanes + i % w->lanes;
        to[o] = (int8_t)(to[o] + (int8_t)data[i]); /* a padding of 0 may name the place of a weight */
    }
    return to;
}

static void prepare_columns(const kestrel_accumulate_op *op, int bytes, void *scratch) {
    kestrel_prepared *const to = op->prepared;
    const int32_t stride = padded_outputs(bytes, op->outputs);
    int32_t column, o;
    for (column = 0; column < op->width; column++) {
        const int8_t *const w = whole_column(op, column, to->rows, scratch);
        int8_t *const own = to->weights + (ptrdiff_t)column * stride;
        for (o = 0; o < op->outputs; o++) {
            own[place_of_output(bytes, o)] = bytes ? (int8_t)(w[o] ^ CODE_FLIP) : w[o];
        }
    }
    to->bytes = (uint8_t)bytes;
    to->ready = 1;
}

/* ------------------------------------------------------------------------------------------------------- changes */

/* `count` columns, the byte at which they begin, and by how much they change; there is room for a few more. */
typedef struct {
    int32_t count, lacking, lacking_high;
    uint32_t *start;
    int16_t *change;
    int8_t *bytes, *high; /* the changes, or what they are less 256 times `high` */
} changes;

/* The list lies in `rows`, with room for 2 width + 20 of each. */
static changes list_in(const kestrel_accumulate_op *op) {
    const ptrdiff_t most = 2 * (ptrdiff_t)op->width + 20;
    changes list;
    list.count = list.lacking = list.lacking_high = 0;
    list.start = (uint32_t *)(void *)op->prepared->rows;
    list.change = (int16_t *)(void *)(op->prepared->rows + 4 * most);
    list.bytes = op->prepared->rows + 6 * most;
    list.high = list.bytes + most;
    return list;
}

/* d != 0, with where their columns of `stride` bytes begin. */
static void list_changes(changes *list, const void *d, int d_bits, int32_t width, int32_t stride) {
    int32_t i = 0, n = 0;
#if KESTREL_LEVEL == 2
    const vector step = vector_splat(stride * LANES);
    vector start = vector_times(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), vector_splat(stride));
    for (; i + LANES <= width; i += LANES) {
        const vector x = d_bits == 8 ? widen8((const int8_t *)d + i) : widen16((const int16_t *)d + i);
        const __mmask16 found = _mm512_test_epi32_mask(x, x);
        vector_store(list->start + n, _mm512_maskz_compress_epi32(found, start));
        narrow16(list->change + n, _mm512_maskz_compress_epi32(found, x));
        n += __builtin_popcount(found);
        start = vector_add(start, step);
    }
#endif
    for (; i < width; i++) {
        const int32_t bytes = d_bits / 8;
        int32_t value;
        uint64_t eight;
        if (i + 8 / bytes <= width) {
            memcpy(&eight, (const int8_t *)d + (ptrdiff_t)i * bytes, 8);
            if (eight == 0) {
                i += 8 / bytes - 1;
                continue;
            }
        }
        value = d_bits == 8 ? ((const int8_t *)d)[i] : ((const int16_t *)d)[i];
        list->start[n] = (uint32_t)i * (uint32_t)stride;
        list->change[n] = (int16_t)value;
        n += value != 0;
    }
    list->count = n;
}

/* Fills up to a multiple of `unit` with changes of 0. */
static void fill_list(changes *list, int32_t unit) {
    while (list->count % unit) {
        list->start[list->count] = 0;
        list->change[list->count++] = 0;
    }
}

/* What a sum needs added because dot4 takes other codes than those that it is given, see kestrel_vector.h. */
static int32_t lacking(int32_t change) {
#ifdef KESTREL_SIGNED_DOT4
    return change < 0 ? -change : 0;
#else
    return -CODE_START * change;
#endif
}

/* Changes as bytes; what int8 does not hold is split. Returns whether `high` is used. */
static int byte_changes(changes *list, int change_bytes) {
    int32_t i, wide = 0, sum = 0, sum_high = 0;
    for (i = 0; i < list->count; i++) {
        wide |= list->change[i] != (int8_t)list->change[i];
    }
    if (wide && change_bytes == 2) {
        fill_list(list, 4);
        for (i = 0; i < list->count; i++) {
            const int32_t low = (int8_t)list->change[i], high = (list->change[i] - low) / 256;
            list->bytes[i] = (int8_t)low;
            list->high[i] = (int8_t)high;
            sum += lacking(low);
            sum_high += lacking(high);
        }
        list->lacking = sum;
        list->lacking_high = sum_high;
        return 1;
    }
    for (i = list->count - 1; wide && i >= 0; i--) {
        const int32_t change = list->change[i], first = change > 127 ? 127 : change < -128 ? -128 : change;
        if (change != first) {
            list->change[i] = (int16_t)first;
            list->start[list->count] = list->start[i];
            list->change[list->count++] = (int16_t)(change - first);
        }
    }
    fill_list(list, 4);
    for (i = 0; i < list->count; i++) {
        list->bytes[i] = (int8_t)list->change[i];
        sum += lacking(list->change[i]);
    }
    list->lacking = sum;
    return 0;
}

/* ------------------------------------------------------------------------------------------------- whole columns */

#if defined KESTREL_DOT4 || defined KESTREL_SIGNED_DOT4
INLINE vector dot_columns(vector sum, vector w, vector change) {
#ifdef KESTREL_DOT4
    return dot4(sum, w, change);
#else
    return dot4(sum, change, w);
#endif
}

/* y = m + the listed changes, for `blocks` blocks of outputs from `at` on. two: `high` is used. */
INLINE void add_bytes(const int blocks, const int two, const int8_t *weights, const changes *list, int32_t *y,
                      const int32_t *m, int32_t at) {
    vector sum[4 * BLOCKS], high_sum[4 * BLOCKS];
    int32_t i, four;
    int b, v;
#pragma GCC unroll 16
    for (v = 0; v < 4 * blocks; v++) {
        sum[v] = vector_add(vector_load(m + at + v * LANES), vector_splat(list->lacking));
        high_sum[v] = vector_splat(list->lacking_high);
    }
    for (i = 0; i < list->count; i += 4) {
        const int8_t *const p = weights + list->start[i] + at, *const q = weights + list->start[i + 1] + at;
        const int8_t *const r = weights + list->start[i + 2] + at, *const s = weights + list->start[i + 3] + at;
        vector change, high_change;
        memcpy(&four, list->bytes + i, 4);
        change = vector_splat(four);
        memcpy(&four, list->high + i, 4);
        high_change = vector_splat(four);
#pragma GCC unroll 4
        for (b = 0; b < blocks; b++) {
            const vector a = vector_load(p + b * 4 * LANES), c = vector_load(q + b * 4 * LANES);
            const vector e = vector_load(r + b * 4 * LANES), f = vector_load(s + b * 4 * LANES);
            const vector low = pair_bytes_low(a, c), high = pair_bytes_high(a, c);
            const vector low_ = pair_bytes_low(e, f), high_ = pair_bytes_high(e, f);
            const vector rows[4] = {pair_first(low, low_), pair_second(low, low_), pair_first(high, high_),
                                    pair_second(high, high_)};
#pragma GCC unroll 4
            for (v = 0; v < 4; v++) {
                sum[4 * b + v] = dot_columns(sum[4 * b + v], rows[v], change);
                if (two) {
                    high_sum[4 * b + v] = dot_columns(high_sum[4 * b + v], rows[v], high_change);
                }
            }
        }
    }
#pragma GCC unroll 16
    for (v = 0; v < 4 * blocks; v++) {
        vector_store(y + at + v * LANES, two ? vector_add(sum[v], vector_up(high_sum[v], 8)) : sum[v]);
    }
}
#endif

/* The same in words. */
INLINE void add_words_of(const int blocks, const int8_t *weights, const changes *list, int32_t *y, const int32_t *m,
                         int32_t at) {
    vector sum[2 * BLOCKS];
    int32_t i;
    int b, v;
#pragma GCC unroll 8
    for (v = 0; v < 2 * blocks; v++) {
        sum[v] = vector_load(m + at + v * LANES);
    }
    for (i = 0; i < list->count; i += 2) {
        const int8_t *const p = weights + list->start[i] + at, *const q = weights + list->start[i + 1] + at;
        int32_t both;
        vector change;
        memcpy(&both, list->change + i, 4);
        change = vector_splat(both);
#pragma GCC unroll 4
        for (b = 0; b < blocks; b++) {
            const words a = load_words8(p + b * 2 * LANES), c = load_words8(q + b * 2 * LANES);
            sum[2 * b] = dot2(sum[2 * b], pair_first(a, c), change);
            sum[2 * b + 1] = dot2(sum[2 * b + 1], pair_second(a, c), change);
        }
    }
#pragma GCC unroll 8
    for (v = 0; v < 2 * blocks; v++) {
        vector_store(y + at + v * LANES, sum[v]);
    }
}

/* Outputs from `at` on, as far as whole blocks go; returns where they end. */
static int32_t add_blocks(const int8_t *weights, int bytes, int two, const changes *list, int32_t *y, const int32_t *m, int32_t at,
                          int32_t end) {
    const int32_t block = vectors_of(bytes) * LANES;
#if defined KESTREL_DOT4 || defined KESTREL_SIGNED_DOT4
    if (bytes && two) {
        for (; at + 2 * block <= end; at += 2 * block) {
            add_bytes(2, 1, weights, list, y, m, at);
        }
        for (; at + block <= end; at += block) {
            add_bytes(1, 1, weights, list, y, m, at);
        }
        return at;
    }
    if (bytes) {
        for (; at + BLOCKS * block <= end; at += BLOCKS * block) {
            add_bytes(BLOCKS, 0, weights, list, y, m, at);
        }
        for (; at + block <= end; at += block) {
            add_bytes(1, 0, weights, list, y, m, at);
        }
        return at;
    }
#else
    (void)two;
#endif
    for (; at + BLOCKS * block <= end; at += BLOCKS * block) {
        add_words_of(BLOCKS, weights, list, y, m, at);
    }
    for (; at + block <= end; at += block) {
        add_words_of(1, weights, list, y, m, at);
    }
    return at;
}

static void accumulate_columns(const kestrel_accumulate_op *op, int bytes, int32_t *y, const int32_t *m, const void *d,
                               void *scratch) {
    const int32_t block = vectors_of(bytes) * LANES;
    int32_t rest[4 * LANES] KESTREL_ALIGNED, at;
    int two = 0;
    changes list = list_in(op);
    if (!op->prepared->ready) {
        prepare_columns(op, bytes, scratch); /* uses the memory of the list */
    }
    list_changes(&list, d, op->d_bits, op->width, padded_outputs(bytes, op->outputs));
    if (bytes) {
        two = byte_changes(&list, op->change_bytes);
    } else {
        fill_list(&list, 2);
    }
    at = add_blocks(op->prepared->weights, bytes, two, &list, y, m, 0, op->outputs);
    if (at < op->outputs) {
        const size_t left = (size_t)(op->outputs - at) * sizeof(int32_t);
        memset(rest, 0, sizeof rest);
        memcpy(rest, m + at, left);
        add_blocks(op->prepared->weights + at, bytes, two, &list, rest, rest, 0, block);
        memcpy(y + at, rest, left);
    }
}

/* -------------------------------------------------------------------------------------------------------- groups */

/* y += d (kept groups of `lanes` outputs of a column). */
INLINE void add_kept_groups(const int lanes, int32_t *y, const uint8_t *column, int32_t kept, int32_t d) {
    const vector change = vector_splat(d & 0xFFFF); /* times the upper half of a weight, its sign: 0 */
    const int8_t *w = (const int8_t *)column + kept;
    int32_t i;
    int v;
    for (i = 0; i < kept; i++, w += lanes) {
        int32_t *const to = y + (ptrdiff_t)column[i] * lanes;
#pragma GCC unroll 8
        for (v = 0; v < lanes; v += LANES) {
            vector_store(to + v, dot2(vector_load(to + v), widen8(w + v), change));
        }
    }
}

static void accumulate_groups(const kestrel_accumulate_op *op, int32_t *y, const int32_t *m, const void *d) {
    const kestrel_weights *const w = &op->weights;
    const int32_t kept = w->row_bytes / (w->lanes + 1);
    changes list = list_in(op);
    int32_t i;
    if (y != m) {
        memcpy(y, m, (size_t)op->outputs * sizeof *y);
    }
    list_changes(&list, d, op->d_bits, op->width, w->row_bytes);
    for (i = 0; i < list.count; i++) {
        const uint8_t *const column = (const uint8_t *)w->data + list.start[i];
        if (w->lanes == 64) {
            add_kept_groups(64, y, column, kept, list.change[i]);
        } else {
            add_kept_groups(16, y, column, kept, list.change[i]);
        }
    }
}

/* ------------------------------------------------------------------------------------------------------- the kernel */

/* Whether weights that are kept take less time than whole columns. */
static int sparse_enough(const kestrel_accumulate_op *op) {
    const kestrel_weights *const w = &op->weights;
    int32_t kept = op->outputs;
    if (w->kind == KESTREL_GROUPS) {
        return w->row_bytes / (w->lanes + 1) * w->lanes < op->outputs / PER_GROUPED;
    }
    if (w->kind == KESTREL_BALANCED) {
        kept = w->row_bytes / (op->outputs / w->lanes > 256 ? 3 : 2);
    } else if (w->kind == KESTREL_SPARSE) {
        kept = (w->row_bytes - w->bitmap_bytes) * 8 / w->field_bits + op->outputs / 16; /* finding them */
    }
    return kept < op->outputs / PER_WEIGHT;
}

void kestrel_accumulate(const kestrel_accumulate_op *op, void *y, const void *m, const void *d, void *scratch) {
#if defined KESTREL_DOT4
    const int bytes = op->change_bytes != 0;
#elif defined KESTREL_SIGNED_DOT4
    const int bytes = op->change_bytes == 1; /* two bytes are no faster than a word */
#else
    const int bytes = 0;
#endif
    const int vectors = op->y_bits == 32 && op->d_bits <= 16 && op->weights.bits == 8;
    if (vectors && !sparse_enough(op)) {
        accumulate_columns(op, bytes, y, m, d, scratch);
    } else if (vectors && op->weights.kind == KESTREL_GROUPS) {
        accumulate_groups(op, y, m, d);
    } else {
        kestrel_kernels_portable.accumulate(op, y, m, d, scratch);
    }
}
