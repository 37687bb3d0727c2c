/* SPDX-License-Identifier: Apache-2.0
 *
 * Computers only: products of codes of at most 16 bits. Part of kestrel_fast.h.
 *
 * When an op runs first, its weights are brought into panels of LANES outputs: step by step 32 bits for each output, which
 * are four int8 (where codes and weights have 8 bits and dot4 takes them) or two int16. So a step multiplies 32 bits of the
 * input, the same for all lanes, and no sum is ever taken across lanes. Panels lie in groups, in which a step of one follows
 * that of another, so that memory is read in one stream. KESTREL_DOT4 takes codes + 128, and the sums start at
 * bias - 128 (sum of weights) instead. Sums are exact modulo 2^32, and proven to fit int32 in the end.
 */
enum {
    GROUP = 8, /* panels */
    ROWS = 4,  /* inputs that share the loads of weights */
    MAX_TAPS = 64
};

static int takes_words(int x_bits, int w_bits) { return x_bits <= 16 && w_bits <= 16; }

static int32_t weight_value(const void *w, int bits, int32_t i) {
    return bits == 8 ? ((const int8_t *)w)[i] : ((const int16_t *)w)[i];
}

/* What dot4 takes instead of a code: code ^ CODE_FLIP as a byte, which is CODE_START more. */
#ifdef KESTREL_DOT4
enum { CODE_FLIP = 0x80, CODE_START = 128 };
#else
enum { CODE_FLIP = 0, CODE_START = 0 };
#endif

/* Multiplier and offset of sum `place`, which belongs to `channel`, divided by 2^shift. */
static void prepare_scaling(const kestrel_prepared *to, const kestrel_rescale *r, int32_t place, int32_t channel) {
#ifdef KESTREL_DOUBLES
    if (r->multipliers != NULL) {
        to->factor[place] = unit_of(r->shift) * r->multipliers[r->multiplier_step ? channel : 0];
        to->offset[place] = r->offsets == NULL ? 0.0 : unit_of(r->shift) * r->offsets[r->offset_step ? channel : 0];
    }
#else
    (void)to;
    (void)r;
    (void)place;
    (void)channel;
#endif
}

static inline int in_doubles(const kestrel_rescale *r) {
#ifdef KESTREL_DOUBLES
    return r->multipliers != NULL && r->narrow;
#else
    (void)r;
    return 0;
#endif
}

#ifdef KESTREL_DOUBLES
/* Sums whose scaling begins at `place`, in the order of doubles_shuffled. */
INLINE vector shuffled_sums(const kestrel_prepared *ready, int32_t place, vector sums) {
    const double *const factor = ready->factor + place, *const offset = ready->offset + place;
    const doubles low = doubles_scaled(doubles_low(sums), doubles_load(factor), doubles_load(offset));
    return doubles_shuffled(
        low, doubles_scaled(doubles_high(sums), doubles_load(factor + DOUBLES), doubles_load(offset + DOUBLES)));
}

/* Values of 2 LANES sums as codes of 8 or 16 bits. */
INLINE void store_words(void *y, int bits, int32_t at, words x) {
    if (bits == 8) {
        narrow_words((int8_t *)y + at, x);
    } else {
        vector_store((int16_t *)y + at, x);
    }
}
#endif

/* Rescales and stores `count` sums from output `first` on; there is room for whole vectors of sums. */
static void put_sums(const kestrel_prepared *ready, const kestrel_rescale *r, int32_t first, int32_t *sums, int32_t count,
                     void *y, int bits, int32_t at) {
    int32_t i = 0;
#ifdef KESTREL_DOUBLES
    if (in_doubles(r) && bits < 32) {
        for (; i < count; i += 2 * LANES) {
            const vector a = shuffled_sums(ready, first + i, vector_load(sums + i));
            const vector b = shuffled_sums(ready, first + i + LANES, vector_load(sums + i + LANES));
            const words x = words_clamp(pack_shuffled(a, b), r->low, r->high);
            if (i + 2 * LANES <= count) {
                store_words(y, bits, at + i, x);
            } else {
                int16_t rest[2 * LANES];
                int32_t k;
                vector_store(rest, x);
                for (k = 0; k < count - i; k++) {
                    sums[k] = rest[k];
                }
                store_values(y, bits, at + i, sums, count - i);
            }
        }
        return;
    }
#else
    (void)ready;
#endif
    if (r->multipliers != NULL) {
        kestrel_rescale_values(r, first, sums, count);
    }
    for (; i + LANES <= count; i += LANES) {
        store_codes(y, bits, at + i, vector_load(sums + i));
    }
    store_values(y, bits, at + i, sums + i, count - i);
}

/* -------------------------------------------------------------------------------------------------- dense products */

/* Whether the products take four bytes at a time. */
static int takes_bytes(int x_bits, int w_bits, int positive, int32_t rows) {
#if defined KESTREL_DOT4
    (void)positive;
    (void)rows;
    return x_bits == 8 && w_bits == 8;
#elif defined KESTREL_SIGNED_DOT4
    return x_bits == 8 && w_bits == 8 && (rows < ROWS || positive); /* with several rows words are as fast */
#else
    (void)x_bits;
    (void)w_bits;
    (void)positive;
    (void)rows;
    return 0;
#endif
}

/* What the products of one row of bytes lack. */
static int32_t missing(const int8_t *x, int32_t count) {
    int32_t sum = 0;
#ifdef KESTREL_SIGNED_DOT4
    int32_t i;
    for (i = 0; i < count; i++) {
        sum += x[i] < 0 ? -x[i] : 0;
    }
#else
    (void)x;
    (void)count;
#endif
    return sum;
}

/* Panels of the weight rows, and what sums start with. */
static void prepare_panels(kestrel_prepared *to, const kestrel_weights *weights, const int32_t *bias,
                           const kestrel_rescale *rescale, int32_t outputs, int32_t length, void *scratch) {
    const int32_t unit = to->bytes ? 4 : 2, steps = (length + unit - 1) / unit, panels = (outputs + LANES - 1) / LANES;
    int32_t o, i;
    for (o = 0; o < outputs; o++) {
        const void *const row = kestrel_weight_row(weights, o, 0, length, scratch);
        const int32_t panel = o / LANES, first = panel / GROUP * GROUP, size = smaller(GROUP, panels - first);
        int8_t *const to_lane = to->weights + (((ptrdiff_t)first * steps + panel - first) * LANES + o % LANES) * 4;
        uint32_t sum = 0;
        for (i = 0; i < length; i++) {
            const int32_t value = weight_value(row, weights->bits, i);
            int8_t *const place = to_lane + (ptrdiff_t)(i / unit) * size * LANES * 4;
            sum += (uint32_t)value;
            if (to->bytes) {
                place[i % 4] = (int8_t)value;
            } else {
                ((int16_t *)(void *)place)[i % 2] = (int16_t)value;
            }
        }
        sum = to->bytes ? 0u - CODE_START * sum : 0u;
        to->start[o] = (int32_t)(sum + (uint32_t)(bias == NULL ? 0 : bias[o]));
        prepare_scaling(to, rescale, o, o);
    }
    to->ready = 1;
}

/* sums[row * GROUP * LANES + output] of `rows` inputs and `panels` panels of one group, whose steps are `stride` bytes apart;
 * all counts are constants where this is called. */
INLINE void dot_block(const int rows, const int panels, const int bytes, int32_t *sums, const int32_t *start,
                      const int8_t *weights, int32_t stride, const int8_t *x, ptrdiff_t x_row, int32_t steps,
                      int32_t extra) {
    vector sum[16];
    int32_t step, four;
    int r, p;
#pragma GCC unroll 4
    for (r = 0; r < rows; r++) {
#pragma GCC unroll 8
        for (p = 0; p < panels; p++) {
            sum[r * panels + p] = vector_add(vector_load(start + p * LANES), vector_splat(extra));
        }
    }
    for (step = 0; step < steps; step++, weights += stride, x += 4) {
        vector in[ROWS];
#pragma GCC unroll 4
        for (r = 0; r < rows; r++) {
            memcpy(&four, x + r * x_row, 4);
            in[r] = vector_splat(four);
        }
#pragma GCC unroll 8
        for (p = 0; p < panels; p++) {
            const vector w = vector_load(weights + p * LANES * 4);
#pragma GCC unroll 4
            for (r = 0; r < rows; r++) {
#ifdef KESTREL_SIGNED_DOT4
                if (bytes == 2) {
                    sum[r * panels + p] = dot4_positive(sum[r * panels + p], in[r], w);
                    continue;
                }
#endif
#if defined KESTREL_DOT4 || defined KESTREL_SIGNED_DOT4
                if (bytes) {
                    sum[r * panels + p] = dot4(sum[r * panels + p], in[r], w);
                    continue;
                }
#endif
                sum[r * panels + p] = dot2(sum[r * panels + p], in[r], w);
            }
        }
    }
    (void)bytes;
#pragma GCC unroll 4
    for (r = 0; r < rows; r++) {
#pragma GCC unroll 8
        for (p = 0; p < panels; p++) {
            vector_store(sums + (r * GROUP + p) * LANES, sum[r * panels + p]);
        }
    }
}

/* The same for the `size` panels of a whole group. */
INLINE void dot_group(const int rows, const int bytes, int32_t *sums, const int32_t *start, const int8_t *weights,
                      const int8_t *x, ptrdiff_t x_row, int32_t steps, int32_t size, int32_t extra) {
    const int most = rows == 1 ? 8 : LANES == 16 ? 4 : 2;
    const int32_t stride = size * LANES * 4;
    int32_t p = 0;
#define BLOCKS(n)                                                                                                   \
    for (; p + (n) <= size; p += (n)) {                                                                             \
        dot_block(rows, n, bytes, sums + p * LANES, start + p * LANES, weights + p * LANES * 4, stride, x, x_row, steps, \
                  extra);                                                                                           \
    }
    BLOCKS(most)
    if (rows == 1) {
        BLOCKS(4)
    }
    if (most > 2) {
        BLOCKS(2)
    }
    BLOCKS(1)
#undef BLOCKS
}

/* `extra` is added to all sums. */
typedef void dot(int32_t *sums, const int32_t *start, const int8_t *weights, const int8_t *x, ptrdiff_t x_row, int32_t steps,
                 int32_t size, int32_t extra);
#define DOT(NAME, R, BYTES)                                                                                         \
    static void NAME(int32_t *sums, const int32_t *start, const int8_t *weights, const int8_t *x, ptrdiff_t x_row,  \
                     int32_t steps, int32_t size, int32_t extra) {                                                  \
        dot_group(R, BYTES, sums, start, weights, x, x_row, steps, size, extra);                                    \
    }

DOT(dot_words_1, 1, 0)
DOT(dot_words_rows, ROWS, 0)
#if defined KESTREL_DOT4 || defined KESTREL_SIGNED_DOT4
DOT(dot_bytes_1, 1, 1)
#endif
#ifdef KESTREL_DOT4
DOT(dot_bytes_rows, ROWS, 1)
#endif
#ifdef KESTREL_SIGNED_DOT4
DOT(dot_positive_1, 1, 2)
DOT(dot_positive_rows, ROWS, 2)
#endif

static dot *dot_for(int rows, int bytes, int positive) {
    (void)positive;
#if defined KESTREL_DOT4
    if (bytes) {
        return rows == 1 ? dot_bytes_1 : dot_bytes_rows;
    }
#elif defined KESTREL_SIGNED_DOT4
    if (bytes && positive) {
        return rows == 1 ? dot_positive_1 : dot_positive_rows;
    }
    if (bytes) {
        return dot_bytes_1; /* see takes_bytes */
    }
#else
    (void)bytes;
#endif
    return rows == 1 ? dot_words_1 : dot_words_rows;
}

/* Codes from `x` on as the products take them, `to` of bytes or words. */
static void take_codes(int8_t *restrict to, const void *x, int x_bits, int32_t count, int bytes) {
    const int8_t *restrict from = x;
    int32_t i = 0;
    if (bytes) {
        for (; i + 4 * LANES <= count; i += 4 * LANES) {
            vector_store(to + i, flipped(vector_load(from + i)));
        }
        for (; i + 4 <= count; i += 4) {
            uint32_t four;
            memcpy(&four, from + i, 4);
            four ^= CODE_FLIP * 0x01010101u;
            memcpy(to + i, &four, 4);
        }
        for (; i < count; i++) {
            to[i] = (int8_t)(from[i] ^ CODE_FLIP);
        }
    } else if (x_bits == 8) {
        int16_t *restrict words_ = (int16_t *)(void *)to;
        for (; i + 2 * LANES <= count; i += 2 * LANES) {
            vector_store(words_ + i, load_words8(from + i));
        }
        for (; i < count; i++) {
            words_[i] = from[i];
        }
    } else {
        memcpy(to, x, (size_t)count * 2);
    }
}

/* The pixels under the kernel at (row, column), zeros outside the image. */
static void take_window(int8_t *to, const kestrel_window *g, const void *x, int x_bits, int32_t row, int32_t column,
                        int bytes) {
    const int32_t top = row * g->stride_y - g->top, left = column * g->stride_x - g->left, width = bytes ? 1 : 2;
    const int32_t kernel_row = g->size_x * g->channels;
    int32_t first_row, last_row, first, last, i;
    inside(top, g->size_y, g->height, &first_row, &last_row);
    inside(left, g->size_x, g->width, &first, &last);
    if (first_row > 0 || first > 0 || last_row < g->size_y || last < g->size_x) {
        memset(to, bytes ? CODE_FLIP : 0, (size_t)g->size_y * (size_t)kernel_row * (size_t)width);
    }
    for (i = first_row; i < last_row && first < last; i++) {
        const int32_t from = ((top + i) * g->width + left + first) * g->channels;
        int8_t *const part = to + (ptrdiff_t)(i * kernel_row + first * g->channels) * width;
        take_codes(part, element(x, x_bits, from), x_bits, (last - first) * g->channels, bytes);
    }
}

/* The next `rows` inputs: where they lie, `x_row` bytes apart, as the products take them. */
static const int8_t *take_rows(const kestrel_prepared *ready, const kestrel_window *g, int flat, const void *x, int x_bits,
                               int32_t *row, int32_t *column, int32_t rows, ptrdiff_t x_row) {
    const int32_t length = g->size_y * g->size_x * g->channels;
    int32_t r;
    if (flat) {
        const void *const from = element(x, x_bits, *column * length);
        const int whole = x_row == (ptrdiff_t)length * (ready->bytes ? 1 : 2);
        *column += rows;
        if (whole && (ready->bytes ? !CODE_FLIP : x_bits == 16)) {
            return from;
        }
        if (whole) {
            take_codes(ready->rows, from, x_bits, rows * length, ready->bytes);
            return ready->rows;
        }
        for (r = 0; r < rows; r++) {
            take_codes(ready->rows + r * x_row, element(from, x_bits, r * length), x_bits, length, ready->bytes);
        }
        return ready->rows;
    }
    for (r = 0; r < rows; r++) {
        take_window(ready->rows + r * x_row, g, x, x_bits, *row, *column, ready->bytes);
        if (++*column == g->out_width) {
            *column = 0;
            ++*row;
        }
    }
    return ready->rows;
}

static void products(kestrel_prepared *ready, const kestrel_weights *weights, const int32_t *bias,
                     const kestrel_rescale *rescale, const kestrel_window *g, int32_t outputs, int x_bits, int positive,
                     int y_bits, void *y, const void *x, void *scratch) {
    const int32_t length = g->size_y * g->size_x * g->channels, pixels = g->out_height * g->out_width;
    const int32_t panels = (outputs + LANES - 1) / LANES, groups = (panels + GROUP - 1) / GROUP;
    const int flat = g->size_y == 1 && g->size_x == 1 && g->stride_y == 1 && g->stride_x == 1 && g->top == 0 &&
                     g->left == 0 && g->out_width == g->width && g->out_height == g->height;
    int32_t sums[ROWS * GROUP * LANES] KESTREL_ALIGNED;
    int32_t steps, pixel, rows, extra, r, i, row = 0, column = 0;
    ptrdiff_t x_row;
    if (!ready->ready) {
        ready->bytes = (uint8_t)takes_bytes(x_bits, weights->bits, positive, pixels);
        prepare_panels(ready, weights, bias, rescale, outputs, length, scratch);
    }
    steps = ready->bytes ? (length + 3) / 4 : (length + 1) / 2;
    x_row = 4 * (ptrdiff_t)steps;
    for (pixel = 0; pixel < pixels; pixel += rows) {
        const int8_t *from;
        rows = pixels - pixel >= ROWS ? ROWS : 1;
        from = take_rows(ready, g, flat, x, x_bits, &row, &column, rows, x_row);
        extra = ready->bytes && !positive ? missing(from, length) : 0; /* a single row, see takes_bytes */
        for (i = 0; i < groups; i++) {
            const int32_t o = i * GROUP * LANES, count = smaller(GROUP * LANES, outputs - o);
            const int8_t *const group = ready->weights + (ptrdiff_t)o * steps * 4;
            dot_for(rows, ready->bytes, positive)(sums, ready->start + o, group, from, x_row, steps,
                                                  smaller(GROUP, panels - i * GROUP), extra);
            for (r = 0; r < rows; r++) {
                put_sums(ready, rescale, o, sums + r * GROUP * LANES, count, y, y_bits, (pixel + r) * outputs + o);
            }
        }
    }
}

void kestrel_conv(const kestrel_conv_op *op, void *y, const void *x, void *scratch) {
    if (!takes_words(op->x_bits, op->weights.bits)) {
        kestrel_kernels_portable.conv(op, y, x, scratch);
        return;
    }
    products(op->prepared, &op->weights, op->bias, &op->rescale, &op->window, op->outputs, op->x_bits, op->positive,
             op->y_bits, y, x, scratch);
}

void kestrel_matmul(const kestrel_matmul_op *op, void *y, const void *x, void *scratch) {
    kestrel_window g = {0};
    if (!takes_words(op->x_bits, op->weights.bits)) {
        kestrel_kernels_portable.matmul(op, y, x, scratch);
        return;
    }
    g.height = g.size_y = g.size_x = g.stride_y = g.stride_x = g.out_height = 1;
    g.width = g.out_width = op->rows;
    g.channels = op->width;
    products(op->prepared, &op->weights, op->bias, &op->rescale, &g, op->outputs, op->x_bits, op->positive, op->y_bits, y, x,
             scratch);
}

/* ------------------------------------------------------------------------------------------------------ depthwise */

/* A block of channels is computed in 2 vectors (words) or 4 (bytes, KESTREL_DOT4), as interleaving of pixels gives them:
 * the channel of a lane. */
static int32_t channel_of(int32_t vectors, int32_t which, int32_t lane) {
    return lane / 4 * 4 * vectors + which * 4 + lane % 4;
}

/* First channel of a block; the last block ends with the last channel and may overlap the one before. */
static int32_t block_start(int32_t block, int32_t width, int32_t channels) {
    return smaller(width * block, channels - width);
}

/* [block][step][vector][lane][taps of a step]: weights of 2 or 4 kernel positions. */
static void prepare_taps(const kestrel_depthwise_op *op, int32_t places, int32_t vectors, int32_t blocks, void *scratch) {
    kestrel_prepared *const to = op->prepared;
    const int32_t width = vectors * LANES, unit = vectors, steps = (places + unit - 1) / unit;
    int32_t place, first, count, block, which, lane;
    for (first = 0; first < op->window.channels; first += count) {
        count = smaller(KESTREL_DEPTHWISE_TILE, op->window.channels - first);
        for (place = 0; place < places; place++) {
            const void *const row = kestrel_weight_row(&op->weights, place, first, count, scratch);
            for (block = 0; block < blocks; block++) {
                for (which = 0; which < vectors; which++) {
                    for (lane = 0; lane < LANES; lane++) {
                        const int32_t own = channel_of(vectors, which, lane);
                        const int32_t channel = block_start(block, width, op->window.channels) + own;
                        const int32_t at = block * width + which * LANES + lane;
                        const int32_t tap = (((block * steps + place / unit) * vectors + which) * LANES + lane) * unit;
                        int32_t value;
                        if (channel < first || channel >= first + count) {
                            continue;
                        }
                        value = weight_value(row, op->weights.bits, channel - first);
                        if (place == 0) {
                            to->start[at] = op->bias == NULL ? 0 : op->bias[channel];
                            prepare_scaling(to, &op->rescale, at, channel);
                        }
                        if (unit == 4) {
                            to->weights[tap + place % 4] = (int8_t)value;
                            to->start[at] = (int32_t)((uint32_t)to->start[at] - CODE_START * (uint32_t)value);
                        } else {
                            ((int16_t *)(void *)to->weights)[tap + place % 2] = (int16_t)value;
                        }
                    }
                }
            }
        }
    }
    to->bytes = unit == 4;
    to->ready = 1;
}

/* pixels[i] is what kernel position i sees, its first channel. */
INLINE void tap_words(const int x_bits, vector *sums, const void *const *pixels, int32_t channel, const int8_t *taps,
                      int32_t steps) {
    int32_t step;
    for (step = 0; step < steps; step++, taps += 2 * LANES * 4) {
        const void *const p = pixels[2 * step], *const q = pixels[2 * step + 1];
        const words a = x_bits == 8 ? load_words8((const int8_t *)p + channel) : load_words16((const int16_t *)p + channel);
        const words b = x_bits == 8 ? load_words8((const int8_t *)q + channel) : load_words16((const int16_t *)q + channel);
        sums[0] = dot2(sums[0], pair_first(a, b), vector_load(taps));
        sums[1] = dot2(sums[1], pair_second(a, b), vector_load(taps + LANES * 4));
    }
}

#ifdef KESTREL_DOT4
INLINE void tap_bytes(vector *sums, const void *const *pixels, int32_t channel, const int8_t *taps, int32_t steps) {
    int32_t step;
    for (step = 0; step < steps; step++, taps += 4 * LANES * 4) {
        const int8_t *const *const p = (const int8_t *const *)(pixels + 4 * step);
        const vector a = flipped(vector_load(p[0] + channel)), b = flipped(vector_load(p[1] + channel));
        const vector c = flipped(vector_load(p[2] + channel)), d = flipped(vector_load(p[3] + channel));
        const vector ab = pair_bytes_low(a, b), cd = pair_bytes_low(c, d);
        const vector ab_high = pair_bytes_high(a, b), cd_high = pair_bytes_high(c, d);
        sums[0] = dot4(sums[0], pair_first(ab, cd), vector_load(taps));
        sums[1] = dot4(sums[1], pair_second(ab, cd), vector_load(taps + LANES * 4));
        sums[2] = dot4(sums[2], pair_first(ab_high, cd_high), vector_load(taps + 2 * LANES * 4));
        sums[3] = dot4(sums[3], pair_second(ab_high, cd_high), vector_load(taps + 3 * LANES * 4));
    }
}
#endif

/* Rescales and stores a block of channels from `channel` on, whose scaling begins at `place`. */
INLINE void put_block(const int vectors, const kestrel_depthwise_op *op, int32_t place, int32_t channel, vector *sums,
                      void *y, int32_t at) {
    const kestrel_rescale *const r = &op->rescale;
    int32_t lanes[4 * LANES] KESTREL_ALIGNED, values[4 * LANES];
    int32_t which, lane;
#ifdef KESTREL_DOUBLES
    if (in_doubles(r) && (op->y_bits == 8 || (op->y_bits == 16 && vectors == 2))) {
        words low;
#pragma GCC unroll 4
        for (which = 0; which < vectors; which++) {
            sums[which] = shuffled_sums(op->prepared, place + which * LANES, sums[which]);
        }
        low = words_clamp(pack_paired(sums[0], sums[1]), r->low, r->high);
#ifdef KESTREL_DOT4
        if (vectors == 4) {
            const words high = words_clamp(pack_paired(sums[2], sums[3]), r->low, r->high);
            vector_store((int8_t *)y + at, pack_bytes(low, high));
            return;
        }
#endif
        store_words(y, op->y_bits, at, low);
        return;
    }
#else
    (void)place;
#endif
#pragma GCC unroll 4
    for (which = 0; which < vectors; which++) {
        vector_store(lanes + which * LANES, sums[which]);
    }
    for (which = 0; which < vectors; which++) {
        for (lane = 0; lane < LANES; lane++) {
            values[channel_of(vectors, which, lane)] = lanes[which * LANES + lane];
        }
    }
    if (r->multipliers != NULL) {
        kestrel_rescale_values(r, channel, values, vectors * LANES);
    }
    store_values(y, op->y_bits, at, values, vectors * LANES);
}

#define BLOCK(NAME, VECTORS, TAKE)                                                                                  \
    static void NAME(const kestrel_depthwise_op *op, int32_t place, int32_t channel, const void *const *pixels,     \
                     const int8_t *taps, int32_t steps, void *y, int32_t at) {                                      \
        vector sums[VECTORS];                                                                                       \
        int32_t i;                                                                                                  \
        _Pragma("GCC unroll 4") for (i = 0; i < VECTORS; i++) {                                                     \
            sums[i] = vector_load(op->prepared->start + place + i * LANES);                                         \
        }                                                                                                           \
        TAKE;                                                                                                       \
        put_block(VECTORS, op, place, channel, sums, y, at);                                                        \
    }

BLOCK(block_words8, 2, tap_words(8, sums, pixels, channel, taps, steps))
BLOCK(block_words16, 2, tap_words(16, sums, pixels, channel, taps, steps))
#ifdef KESTREL_DOT4
BLOCK(block_bytes, 4, tap_bytes(sums, pixels, channel, taps, steps))
#endif

/* pixels[i]: what kernel position i sees at (row, column), or zeros. */
static void find_pixels(const void **pixels, const kestrel_window *g, const uint8_t *x, ptrdiff_t pixel_bytes,
                        const void *zeros, int32_t row, int32_t column) {
    const int32_t top = row * g->stride_y - g->top, left = column * g->stride_x - g->left;
    const int whole = top >= 0 && top + g->size_y <= g->height && left >= 0 && left + g->size_x <= g->width;
    int32_t i, j;
    for (i = 0; i < g->size_y; i++) {
        const ptrdiff_t from = ((ptrdiff_t)(top + i) * g->width + left) * pixel_bytes;
        for (j = 0; j < g->size_x; j++) {
            const int in = whole || (top + i >= 0 && top + i < g->height && left + j >= 0 && left + j < g->width);
            *pixels++ = in ? x + (from + j * pixel_bytes) : zeros;
        }
    }
}

void kestrel_depthwise(const kestrel_depthwise_op *op, void *y, const void *x, void *scratch) {
    const kestrel_window *const g = &op->window;
    const int32_t places = g->size_y * g->size_x;
#ifdef KESTREL_DOT4
    const int bytes = op->x_bits == 8 && op->weights.bits == 8 && g->channels >= 4 * LANES;
#else
    const int bytes = 0;
#endif
    const int32_t vectors = bytes ? 4 : 2, width = vectors * LANES, blocks = (g->channels + width - 1) / width;
    const int32_t steps = (places + vectors - 1) / vectors;
    const void *pixels[MAX_TAPS + 4];
    int32_t row, column, block, i;
    if (!takes_words(op->x_bits, op->weights.bits) || g->channels < 2 * LANES || places > MAX_TAPS) {
        kestrel_kernels_portable.depthwise(op, y, x, scratch);
        return;
    }
    if (!op->prepared->ready) {
        prepare_taps(op, places, vectors, blocks, scratch);
    }
    for (i = places; i < places + 4; i++) {
        pixels[i] = op->prepared->rows;
    }
    for (row = 0; row < g->out_height; row++) {
        for (column = 0; column < g->out_width; column++) {
            find_pixels(pixels, g, x, (ptrdiff_t)g->channels * (op->x_bits / 8), op->prepared->rows, row, column);
            for (block = 0; block < blocks; block++) {
                const int32_t channel = block_start(block, width, g->channels), place = block * width;
                const int32_t at = (row * g->out_width + column) * g->channels + channel;
                const int8_t *const taps = op->prepared->weights + (ptrdiff_t)place * steps * 4;
#ifdef KESTREL_DOT4
                if (bytes) {
                    block_bytes(op, place, channel, pixels, taps, steps, y, at);
                    continue;
                }
#endif
                (op->x_bits == 8 ? block_words8 : block_words16)(op, place, channel, pixels, taps, steps, y, at);
            }
        }
    }
}
