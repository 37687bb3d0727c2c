/*
 * Kernels of streamed networks, see kestrel_stream.h.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#include "kestrel_stream.h"

#include "kestrel_shift_add.h"

int32_t kestrel_stream_value(const void *x, int bits, int32_t i)
{
    return bits == 8 ? ((const int8_t *)x)[i] : bits == 16 ? ((const int16_t *)x)[i] : ((const int32_t *)x)[i];
}

static void store(void *y, int bits, int i, int32_t value)
{
    if (bits == 8) {
        ((int8_t *)y)[i] = (int8_t)value;
    } else {
        ((int16_t *)y)[i] = (int16_t)value;
    }
}

/* x times a multiplier of three signed digits */
static int32_t times_digits(int32_t x, uint32_t code)
{
    uint32_t product = 0;
    int left;
    for (left = 3; left > 0; left--) {
        const uint32_t part = (uint32_t)x << (code & 15);
        product = code & 16 ? product - part : product + part;
        code >>= 5;
    }
    return (int32_t)product;
}

/* x / 2^shift, halves to even, within the limits */
static int32_t rounded(const kestrel_stream_scaling *s, int32_t x)
{
    const int shift = s->shift;
    if (shift > 0) {
        x = (x + ((int32_t)1 << (shift - 1)) - 1 + (x >> shift & 1)) >> shift;
    }
    return x < s->low ? s->low : x > s->high ? s->high : x;
}

void kestrel_stream_scale(const kestrel_stream_scaling *s, const void *x, int x_bits, int count, void *y)
{
    const uint16_t *digits = s->digits;
    const int32_t *offset = s->offsets;
    int channel = 0, i;
    for (i = 0; i < count; i++) {
        int32_t value = times_digits(kestrel_stream_value(x, x_bits, i), *digits);
        if (offset) {
            value += *offset;
            offset += s->each_offset;
        }
        digits += s->each_digits;
        store(y, s->bits, i, rounded(s, value));
        if (++channel == s->channels) {
            channel = 0;
            digits = s->digits;
            offset = s->offsets;
        }
    }
}

void kestrel_stream_add(const kestrel_stream_scaling *s, const int8_t *a, const int8_t *b, int count, void *y)
{
    int i;
    for (i = 0; i < count; i++) {
        store(y, s->bits, i, rounded(s, times_digits(a[i], s->digits[0]) + times_digits(b[i], s->digits[1])));
    }
}

static int32_t product_8(int32_t a, int32_t b)
{
    const int32_t product = kestrel_times(a, (uint32_t)(b < 0 ? -b : b));
    return b < 0 ? -product : product;
}

void kestrel_stream_multiply(const kestrel_stream_scaling *s, const int8_t *a, const int8_t *b, int run, int size, int count,
                             void *y)
{
    int i, j = 0, left = run;
    for (i = 0; i < count; i++) {
        int32_t value = product_8(a[i], b[j]);
        if (s->digits) {
            value = rounded(s, times_digits(value, s->digits[0]));
        }
        store(y, s->bits, i, value);
        if (--left == 0) {
            left = run;
            j = j + 1 == size ? 0 : j + 1;
        }
    }
}

void kestrel_stream_bias(const void *bias, int bits, int outputs, int32_t *sums)
{
    int i;
    for (i = 0; i < outputs; i++) {
        sums[i] = bias ? kestrel_stream_value(bias, bits, i) : 0;
    }
}

static void fill(int16_t *table, uint32_t value, uint32_t step, int count)
{
    int16_t *const end = table + count;
    while (table < end) {
        table[0] = (int16_t)value;
        value += step;
        table[1] = (int16_t)value;
        value += step;
        table[2] = (int16_t)value;
        value += step;
        table[3] = (int16_t)value;
        value += step;
        table += 4;
    }
}

static uint32_t next(const int8_t **x, const int8_t *end)
{
    return *x < end ? (uint32_t)(int32_t) * (*x)++ : 0;
}

/* Tables of four numbers: of 4 inputs, 8 inputs (PAIR) or 2 inputs (WIDE). */
static const int8_t *make_tables(int kind, int odd, const int8_t *x, const int8_t *end, int16_t *table)
{
    int number, row;
    for (number = 0; number < 4; number++, table += 16) {
        const uint32_t value = next(&x, end), one = odd ? value : 0;
        switch (kind) {
        case KESTREL_STREAM_QUAD:
            fill(table, one - (value << (3 + odd)), value << odd, 16);
            break;
        case KESTREL_STREAM_PAIR: {
            const uint32_t second = next(&x, end);
            uint32_t high = (odd ? second : 0) - (second << (1 + odd));
            for (row = 0; row < 16; row += 4) {
                fill(table + row, high + one - (value << (1 + odd)), value << odd, 4);
                high += second << odd;
            }
            break;
        }
        case KESTREL_STREAM_WIDE:
            fill(table, one, value << odd, 16);
            number++;
            table += 16;
            fill(table, 0 - (value << (7 + odd)), value << (4 + odd), 16);
            break;
        default:
            for (row = 0; row < 8; row++) {
                table[row] = (int16_t)(value << row);
                table[row + 8] = (int16_t)(0 - (value << row));
            }
        }
    }
    return x;
}

void kestrel_stream_product(const kestrel_stream_matrix *m, const int8_t *x, int32_t *sums, int16_t *tables)
{
    const uint16_t *weights = m->weights;
    const int8_t *const end = x + m->inputs;
    int32_t *const last = sums + m->outputs;
    while (x < end) {
        int32_t *sum = sums;
        x = make_tables(m->kind, m->odd, x, end, tables);
        do {
            const uint32_t four = *weights++;
            *sum += tables[four & 15] + tables[16 + (four >> 4 & 15)] + tables[32 + (four >> 8 & 15)] +
                    tables[48 + (four >> 12)];
            sum++;
        } while (sum < last);
    }
}

void kestrel_stream_taps(const int8_t *w, const int8_t *x, int taps, int step, int channels, int32_t *sums)
{
    int channel;
    while (taps-- > 0) {
        for (channel = 0; channel < channels; channel++) {
            sums[channel] += product_8(x[channel], *w++);
        }
        x += step;
    }
}

void kestrel_stream_shift(void *window, int bytes, const void *column, int size)
{
    int8_t *to = window, *const old_end = to + bytes - size;
    const int8_t *from = to + size;
    while (to < old_end) {
        *to++ = *from++;
    }
    from = column;
    while (size-- > 0) {
        *to++ = *from++;
    }
}

void kestrel_stream_put(uint8_t *queue, int held, const void *column, int size)
{
    const uint8_t *from = column;
    int left;
    for (; held > 0; held--) {
        queue += size;
    }
    for (left = size; left > 0; left--) {
        *queue++ = *from++;
    }
}

void kestrel_stream_patch(const int8_t *columns, int depth, int bytes, int first, int size, int8_t *patch)
{
    int place;
    for (; depth > 0; depth--) {
        for (place = first; place < first + size; place++) {
            *patch++ = place >= 0 && place < bytes ? columns[place] : 0;
        }
        columns += bytes;
    }
}

void kestrel_stream_largest(const int8_t *x, int rows, int channels, int8_t *y)
{
    int channel;
    for (channel = 0; channel < channels; channel++) {
        y[channel] = x[channel];
    }
    while (--rows > 0) {
        x += channels;
        for (channel = 0; channel < channels; channel++) {
            y[channel] = x[channel] > y[channel] ? x[channel] : y[channel];
        }
    }
}

void kestrel_stream_collect16(const int8_t *x, int rows, int channels, int16_t *sums)
{
    int channel;
    for (; rows > 0; rows--) {
        for (channel = 0; channel < channels; channel++) {
            sums[channel] = (int16_t)(sums[channel] + *x++);
        }
    }
}

void kestrel_stream_collect32(const int8_t *x, int rows, int channels, int32_t *sums)
{
    int channel;
    for (; rows > 0; rows--) {
        for (channel = 0; channel < channels; channel++) {
            sums[channel] += *x++;
        }
    }
}

void kestrel_stream_total(const int16_t *segments, int rows, int channels, int32_t *sums)
{
    int channel;
    for (channel = 0; channel < channels; channel++) {
        sums[channel] = 0;
    }
    for (; rows > 0; rows--) {
        for (channel = 0; channel < channels; channel++) {
            sums[channel] += *segments++;
        }
    }
}

void kestrel_stream_clear(void *bytes, int count)
{
    uint8_t *byte = bytes;
    while (count-- > 0) {
        *byte++ = 0;
    }
}

int kestrel_stream_argmax(const int32_t *logits, int count)
{
    int best = 0, i;
    for (i = 1; i < count; i++) {
        best = logits[i] > logits[best] ? i : best;
    }
    return best;
}
