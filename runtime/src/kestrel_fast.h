/* SPDX-License-Identifier: Apache-2.0
 *
 * Computers only: products of codes of at most 16 bits on the vectors of kestrel_vector.h. Part of kestrel_ops.c.
 *
 * When an op runs first, its weights are brought into panels of LANES outputs: step by step 32 bits for each output, which
 * are four int8 (KESTREL_DOT4, where codes and weights have 8 bits) or two int16. So a step multiplies 32 bits of the input,
 * the same for all lanes, and no sum is ever taken across lanes. dot4 takes codes + 128, and the sums start at
 * bias - 128 (sum of weights) instead. Sums are exact modulo 2^32, and proven to fit int32 in the end.
 */
enum {
    SPAN = 128, /* outputs that are rescaled at once */
    ROWS = 4,   /* inputs that share the loads of weights */
    MAX_TAPS = 64
};

static int takes_words(int x_bits, int w_bits) { return x_bits <= 16 && w_bits <= 16; }

static int takes_bytes(int x_bits, int w_bits) {
#ifdef KESTREL_DOT4
    return x_bits == 8 && w_bits == 8;
#else
    (void)x_bits;
    (void)w_bits;
    return 0;
#endif
}

static int32_t weight_value(const void *w, int bits, int32_t i) {
    return bits == 8 ? ((const int8_t *)w)[i] : ((const int16_t *)w)[i];
}

/* Panels of the weight rows, and what sums start with. */
static void prepare_panels(kestrel_prepared *to, const kestrel_weights *weights, const int32_t *bias, int32_t outputs,
                           int32_t length, int bytes, void *scratch) {
    const int32_t group = bytes ? 4 : 2, steps = (length + group - 1) / group;
    int32_t o, i;
    for (o = 0; o < outputs; o++) {
        const void *const row = weight_row(weights, o, 0, length, scratch);
        int8_t *const panel = to->weights + ((ptrdiff_t)(o / LANES) * steps * LANES + o % LANES) * 4;
        uint32_t sum = 0;
        for (i = 0; i < length; i++) {
            const int32_t value = weight_value(row, weights->bits, i);
            int8_t *const place = panel + (ptrdiff_t)(i / group) * LANES * 4;
            sum += (uint32_t)value;
            if (bytes) {
                place[i % 4] = (int8_t)value;
            } else {
                ((int16_t *)(void *)place)[i % 2] = (int16_t)value;
            }
        }
        sum = bytes ? 0u - 128u * sum : 0u;
        to->start[o] = (int32_t)(sum + (uint32_t)(bias == NULL ? 0 : bias[o]));
    }
    to->ready = 1;
}

/* Multipliers and offsets of all sums as doubles that are divided by 2^shift already. */
static void prepare_scaling(kestrel_prepared *to, const kestrel_rescale *r, int32_t count) {
#ifdef KESTREL_DOUBLES
    const double unit = 1.0 / (double)((int64_t)1 << r->shift);
    int32_t i;
    for (i = 0; i < count && r->multipliers != NULL; i++) {
        to->factor[i] = unit * r->multipliers[r->multiplier_step ? i : 0];
        to->offset[i] = r->offsets == NULL ? 0.0 : unit * r->offsets[r->offset_step ? i : 0];
    }
#else
    (void)to;
    (void)r;
    (void)count;
#endif
}

/* Rescales sums that begin with output `first`. With doubles whole vectors: the sums behind the last one may change. */
static void rescale_sums(const kestrel_prepared *ready, const kestrel_rescale *r, int32_t first, int32_t *sums,
                         int32_t count) {
#ifdef KESTREL_DOUBLES
    const doubles low = doubles_splat(r->low), high = doubles_splat(r->high);
    int32_t i;
    if (r->multipliers != NULL && r->narrow) {
        for (i = 0; i < count; i += DOUBLES) {
            const doubles x = doubles_times(doubles_of(sums + i), doubles_load(ready->factor + first + i));
            store_rounded(sums + i, doubles_add(x, doubles_load(ready->offset + first + i)), low, high);
        }
        return;
    }
#else
    (void)ready;
#endif
    rescale_tile(r, first, sums, count);
}

/* Sums of `rows` inputs and `panels` panels; all counts are constants where this is called. */
INLINE void dot_block(const int rows, const int panels, const int bytes, int32_t *sums, const int32_t *start,
                      const int8_t *weights, const int8_t *x, ptrdiff_t x_row, int32_t steps) {
    const ptrdiff_t panel = (ptrdiff_t)steps * LANES * 4;
    vector sum[ROWS * 2];
    int32_t step, broadcast;
    int r, p;
#pragma GCC unroll 4
    for (r = 0; r < rows; r++) {
#pragma GCC unroll 8
        for (p = 0; p < panels; p++) {
            sum[r * panels + p] = vector_load(start + p * LANES);
        }
    }
    for (step = 0; step < steps; step++) {
#pragma GCC unroll 8
        for (p = 0; p < panels; p++) {
            const vector w = vector_load(weights + p * panel + (ptrdiff_t)step * LANES * 4);
#pragma GCC unroll 4
            for (r = 0; r < rows; r++) {
                memcpy(&broadcast, x + r * x_row + 4 * (ptrdiff_t)step, 4);
#ifdef KESTREL_DOT4
                if (bytes) {
                    sum[r * panels + p] = dot4(sum[r * panels + p], vector_splat(broadcast), w);
                    continue;
                }
#endif
                sum[r * panels + p] = dot2(sum[r * panels + p], vector_splat(broadcast), w);
            }
        }
    }
    (void)bytes;
#pragma GCC unroll 4
    for (r = 0; r < rows; r++) {
#pragma GCC unroll 8
        for (p = 0; p < panels; p++) {
            vector_store(sums + r * SPAN + p * LANES, sum[r * panels + p]);
        }
    }
}

/* sums[row * SPAN + output] for panels of at most SPAN outputs. */
INLINE void dot_span(const int rows, const int bytes, int32_t *sums, const int32_t *start, const int8_t *weights,
                     const int8_t *x, ptrdiff_t x_row, int32_t steps, int32_t panels) {
    const ptrdiff_t panel = (ptrdiff_t)steps * LANES * 4;
    const int most = rows == 1 ? 8 : 2;
    int32_t p = 0;
    for (; p + most <= panels; p += most) {
        dot_block(rows, most, bytes, sums + p * LANES, start + p * LANES, weights + p * panel, x, x_row, steps);
    }
    for (; rows == 1 && p + 4 <= panels; p += 4) {
        dot_block(rows, 4, bytes, sums + p * LANES, start + p * LANES, weights + p * panel, x, x_row, steps);
    }
    for (; p < panels; p++) {
        dot_block(rows, 1, bytes, sums + p * LANES, start + p * LANES, weights + p * panel, x, x_row, steps);
    }
}

#define DOT_SPAN(NAME, R, BYTES)                                                                                    \
    static void NAME(int32_t *sums, const int32_t *start, const int8_t *weights, const int8_t *x, ptrdiff_t x_row,  \
                     int32_t steps, int32_t panels) {                                                               \
        dot_span(R, BYTES, sums, start, weights, x, x_row, steps, panels);                                          \
    }

DOT_SPAN(dot_words_1, 1, 0)
DOT_SPAN(dot_words_4, ROWS, 0)
#ifdef KESTREL_DOT4
DOT_SPAN(dot_bytes_1, 1, 1)
DOT_SPAN(dot_bytes_4, ROWS, 1)
#endif

/* Codes as the products take them: one part of a row. */
static void take_part(int8_t *restrict to, int32_t at, const void *x, int x_bits, int32_t from, int32_t count, int bytes) {
    int32_t i;
    if (bytes) {
        const int8_t *restrict source = (const int8_t *)x + from;
        for (i = 0; i < count; i++) {
            to[at + i] = (int8_t)(source[i] ^ -128);
        }
    } else if (x_bits == 8) {
        const int8_t *restrict source = (const int8_t *)x + from;
        int16_t *restrict words_ = (int16_t *)(void *)to + at;
        for (i = 0; i < count; i++) {
            words_[i] = source[i];
        }
    } else {
        memcpy(to + 2 * (ptrdiff_t)at, (const int16_t *)x + from, (size_t)count * 2);
    }
}

/* The pixels under the kernel at (row, column), zeros outside the image. */
static void take_window(int8_t *to, const kestrel_window *g, const void *x, int x_bits, int32_t row, int32_t column,
                        int bytes) {
    const int32_t top = row * g->stride_y - g->top, left = column * g->stride_x - g->left;
    const int32_t kernel_row = g->size_x * g->channels;
    int32_t first_row, last_row, first, last, i;
    inside(top, g->size_y, g->height, &first_row, &last_row);
    inside(left, g->size_x, g->width, &first, &last);
    if (first_row > 0 || first > 0 || last_row < g->size_y || last < g->size_x) {
        memset(to, bytes ? -128 : 0, (size_t)g->size_y * (size_t)kernel_row * (bytes ? 1 : 2));
    }
    for (i = first_row; i < last_row && first < last; i++) {
        const int32_t from = ((top + i) * g->width + left + first) * g->channels;
        take_part(to, i * kernel_row + first * g->channels, x, x_bits, from, (last - first) * g->channels, bytes);
    }
}

static void fast_products(kestrel_prepared *ready, const kestrel_weights *weights, const int32_t *bias,
                          const kestrel_rescale *rescale, const kestrel_window *g, int32_t outputs, int x_bits, int y_bits,
                          void *y, const void *x, void *scratch) {
    const int bytes = takes_bytes(x_bits, weights->bits);
    const int32_t group = bytes ? 4 : 2, length = g->size_y * g->size_x * g->channels, steps = (length + group - 1) / group;
    const int32_t pixels = g->out_height * g->out_width;
    const ptrdiff_t x_row = 4 * (ptrdiff_t)steps;
    int32_t sums[ROWS * SPAN] KESTREL_ALIGNED;
    int32_t pixel, o, r, rows, count;
    if (!ready->ready) {
        prepare_panels(ready, weights, bias, outputs, length, bytes, scratch);
        prepare_scaling(ready, rescale, outputs);
    }
    for (pixel = 0; pixel < pixels; pixel += rows) {
        rows = pixels - pixel >= ROWS ? ROWS : 1;
        for (r = 0; r < rows; r++) {
            take_window(ready->rows + r * x_row, g, x, x_bits, (pixel + r) / g->out_width, (pixel + r) % g->out_width, bytes);
        }
        for (o = 0; o < outputs; o += count) {
            const int8_t *const panels = ready->weights + (ptrdiff_t)o * steps * 4;
            int32_t needed;
            count = smaller(SPAN, outputs - o);
            needed = (count + LANES - 1) / LANES;
#ifdef KESTREL_DOT4
            if (bytes) {
                (rows == 1 ? dot_bytes_1 : dot_bytes_4)(sums, ready->start + o, panels, ready->rows, x_row, steps, needed);
            } else
#endif
            {
                (rows == 1 ? dot_words_1 : dot_words_4)(sums, ready->start + o, panels, ready->rows, x_row, steps, needed);
            }
            for (r = 0; r < rows; r++) {
                rescale_sums(ready, rescale, o, sums + r * SPAN, count);
                store(y, y_bits, (pixel + r) * outputs + o, sums + r * SPAN, count);
            }
        }
    }
}

void kestrel_conv(const kestrel_conv_op *op, void *y, const void *x, void *scratch) {
    if (!takes_words(op->x_bits, op->weights.bits)) {
        kestrel_kernels_portable.conv(op, y, x, scratch);
        return;
    }
    fast_products(op->prepared, &op->weights, op->bias, &op->rescale, &op->window, op->outputs, op->x_bits, op->y_bits, y, x,
                  scratch);
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
    fast_products(op->prepared, &op->weights, op->bias, &op->rescale, &g, op->outputs, op->x_bits, op->y_bits, y, x, scratch);
}

/* ------------------------------------------------------------------------------------------------------ depthwise */

/* First channel of a block of 2 LANES; the last block ends with the last channel and may overlap the one before. */
static int32_t block_start(int32_t block, int32_t channels) { return smaller(2 * LANES * block, channels - 2 * LANES); }

/* Pairs of kernel positions: [block][pair][2 LANES lanes, as pair_first and pair_second give them][2]. */
static void prepare_taps(const kestrel_depthwise_op *op, int32_t places, int32_t blocks, void *scratch) {
    kestrel_prepared *const to = op->prepared;
    const int32_t channels = op->window.channels, pairs = (places + 1) / 2;
    int16_t *const taps = (int16_t *)(void *)to->weights;
    int32_t block, place, c, count, part;
    for (place = 0; place < places; place++) {
        for (part = 0; part < channels; part += count) {
            const void *row;
            count = smaller(KESTREL_DEPTHWISE_TILE, channels - part);
            row = weight_row(&op->weights, place, part, count, scratch);
            for (block = 0; block < blocks; block++) {
                const int32_t start = block_start(block, channels);
                for (c = start > part ? start : part; c < start + 2 * LANES && c < part + count; c++) {
                    const int32_t lane = PAIRED_SECOND(c - start) * LANES + PAIRED_LANE(c - start);
                    taps[((block * pairs + place / 2) * 2 * LANES + lane) * 2 + place % 2] =
                        (int16_t)weight_value(row, op->weights.bits, c - part);
                }
            }
        }
    }
    to->ready = 1;
}

/* Sums of 2 LANES channels; pixels[i] is what kernel position i sees, its first channel. */
INLINE void tap_block(const int x_bits, int32_t *sums, const void *const *pixels, int32_t channel, const int8_t *taps,
                      int32_t pairs) {
    vector first = vector_splat(0), second = first;
    int32_t pair;
    for (pair = 0; pair < pairs; pair++) {
        const int8_t *const w = taps + (ptrdiff_t)pair * 2 * LANES * 4;
        const void *const p = pixels[2 * pair], *const q = pixels[2 * pair + 1];
        const words a = x_bits == 8 ? load_words8((const int8_t *)p + channel) : load_words16((const int16_t *)p + channel);
        const words b = x_bits == 8 ? load_words8((const int8_t *)q + channel) : load_words16((const int16_t *)q + channel);
        first = dot2(first, pair_first(a, b), vector_load(w));
        second = dot2(second, pair_second(a, b), vector_load(w + LANES * 4));
    }
    store_paired(sums, first, second);
}

void kestrel_depthwise(const kestrel_depthwise_op *op, void *y, const void *x, void *scratch) {
    const kestrel_window *const g = &op->window;
    const int32_t places = g->size_y * g->size_x, pairs = (places + 1) / 2;
    const int32_t blocks = (g->channels + 2 * LANES - 1) / (2 * LANES);
    const ptrdiff_t pixel_bytes = (ptrdiff_t)g->channels * (op->x_bits / 8);
    const void *const zeros = op->prepared->rows;
    const void *pixels[MAX_TAPS + 1];
    int32_t sums[2 * LANES] KESTREL_ALIGNED;
    int32_t row, column, i, j, block;
    if (!takes_words(op->x_bits, op->weights.bits) || g->channels < 2 * LANES || places > MAX_TAPS) {
        kestrel_kernels_portable.depthwise(op, y, x, scratch);
        return;
    }
    if (!op->prepared->ready) {
        prepare_taps(op, places, blocks, scratch);
        prepare_scaling(op->prepared, &op->rescale, g->channels);
    }
    pixels[places] = zeros;
    for (row = 0; row < g->out_height; row++) {
        for (column = 0; column < g->out_width; column++) {
            const int32_t top = row * g->stride_y - g->top, left = column * g->stride_x - g->left;
            const int whole = top >= 0 && top + g->size_y <= g->height && left >= 0 && left + g->size_x <= g->width;
            for (i = 0; i < g->size_y; i++) {
                const uint8_t *const from = element(x, op->x_bits, ((top + i) * g->width + left) * g->channels);
                for (j = 0; j < g->size_x; j++) {
                    const int in = whole || (top + i >= 0 && top + i < g->height && left + j >= 0 && left + j < g->width);
                    pixels[i * g->size_x + j] = in ? from + (ptrdiff_t)j * pixel_bytes : zeros;
                }
            }
            for (block = 0; block < blocks; block++) {
                const int32_t channel = block_start(block, g->channels);
                const int8_t *const taps = op->prepared->weights + (ptrdiff_t)block * pairs * 2 * LANES * 4;
                if (op->x_bits == 8) {
                    tap_block(8, sums, pixels, channel, taps, pairs);
                } else {
                    tap_block(16, sums, pixels, channel, taps, pairs);
                }
                for (i = 0; i < 2 * LANES && op->bias != NULL; i++) {
                    sums[i] += op->bias[channel + i];
                }
                rescale_sums(op->prepared, &op->rescale, channel, sums, 2 * LANES);
                store(y, op->y_bits, (row * g->out_width + column) * g->channels + channel, sums, 2 * LANES);
            }
        }
    }
}
