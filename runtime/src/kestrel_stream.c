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

/* Compilers would follow the stores and compute with 16 bits, which costs instructions on a 32-bit processor. */
#ifdef __GNUC__
#define KEEP_WIDE(x) __asm__("" : "+r"(x))
#define APART __attribute__((noinline))
#else
#define KEEP_WIDE(x)
#define APART
#endif

#define ENTRY(place)                  \
    table[place] = (int16_t)value;    \
    value += step;                    \
    KEEP_WIDE(value)

#define FOUR_ENTRIES(first) \
    ENTRY(first);           \
    ENTRY(first + 1);       \
    ENTRY(first + 2);       \
    ENTRY(first + 3)

/* table [16] = value, value + step, ... */
APART static void fill_16(int16_t *table, int32_t value, int32_t step)
{
    FOUR_ENTRIES(0);
    FOUR_ENTRIES(4);
    FOUR_ENTRIES(8);
    FOUR_ENTRIES(12);
}

/* Without any of two steps, with the first, the second, both; `second` is what it has more than the first. */
#define FOUR_STEPS(place)      \
    table[place] = (int16_t)value;     \
    value += first;                    \
    KEEP_WIDE(value);                  \
    table[place + 1] = (int16_t)value; \
    value += second;                   \
    KEEP_WIDE(value);                  \
    table[place + 2] = (int16_t)value; \
    value += first;                    \
    KEEP_WIDE(value);                  \
    table[place + 3] = (int16_t)value

static int32_t left(int32_t x, int bits)
{
    return (int32_t)((uint32_t)x << bits);
}

/* table [16] = d x + e y: d and e = -2, -1, 0, 1, or where odd -3, -1, 1, 3; d changes first. */
APART static void pair_table(int16_t *table, int32_t x, int32_t y, int odd)
{
    int16_t *const end = table + 16;
    int32_t value = -left(x + y, 1 + odd), step = left(x, odd);
    if (odd) {
        value += x + y;
    }
    y = left(y, odd) - left(step, 2);
    do {
        FOUR_ENTRIES(0);
        value += y;
        table += 4;
    } while (table < end);
}

APART static void power_table(int16_t *table, int32_t x)
{
    int16_t *const end = table + 8;
    do {
        table[0] = (int16_t)x;
        table[8] = (int16_t)-x;
        x = left(x, 1);
        table++;
    } while (table < end);
}

APART static void wide_tables(int16_t *table, int32_t x, int odd)
{
    fill_16(table, odd ? x : 0, left(x, odd));
    x = left(x, 4 + odd);
    fill_16(table + 16, -left(x, 3), x);
}

/* Tables of four numbers: of 4 inputs (POWER), 8 inputs (PAIR) or 2 inputs (WIDE); of fewer at the end, where others hold 0. */
static const int8_t *make_tables(const kestrel_stream_matrix *m, const int8_t *x, const int8_t *end, int16_t *table)
{
    int number;
    for (number = 0; number < 4; number++) {
        const int32_t value = x < end ? *x++ : 0;
        if (m->kind == KESTREL_STREAM_PAIR) {
            pair_table(table, value, x < end ? *x++ : 0, m->odd);
        } else if (m->kind == KESTREL_STREAM_WIDE) {
            wide_tables(table, value, m->odd);
            number++;
            table += 16;
        } else {
            power_table(table, value);
        }
        table += 16;
    }
    return x;
}

#define LOOKED_UP(number, two_bytes) (*(const int16_t *)((const char *)(tables + 16 * (number)) + ((two_bytes) & 30)))

/* Adds the entries that a group's weights name to the sums of all outputs. */
APART static const uint16_t *add_entries(const uint16_t *weights, const int16_t *tables, int32_t *sum, const int32_t *last)
{
    do {
        const uint32_t four = *weights++;
        *sum += LOOKED_UP(0, four << 1) + LOOKED_UP(1, four >> 3) + LOOKED_UP(2, four >> 7) + LOOKED_UP(3, four >> 11);
        sum++;
    } while (sum < last);
    return weights;
}

/*
 * table [16] of four inputs, of which `count` are there: for every set of four binary digits the sum of what they say of the
 * inputs, the first digit that of the first input. A digit is 0 or 1, where odd -1 or 1.
 */
APART static void digit_table(int16_t *table, const int8_t *x, int count, int odd)
{
    int16_t *const end = table + 16;
    const int32_t a = x[0], b = count > 1 ? x[1] : 0, c = count > 2 ? x[2] : 0, d = count > 3 ? x[3] : 0;
    int32_t value = odd ? -(a + b + c + d) : 0;
    const int32_t first = left(a, odd), second = left(b - a, odd), third = left(c - a - b, odd);
    const int32_t fourth = left(d - c - a - b, odd);
    do {
        FOUR_STEPS(0);
        value += third;
        FOUR_STEPS(4);
        value += fourth;
        table += 8;
    } while (table < end);
}

/* The same of QUAD, by binary digits; that of -8 is the last. */
APART static const uint16_t *add_digits(const uint16_t *weights, const int16_t *tables, int32_t *sum, const int32_t *last)
{
    do {
        const uint32_t four = *weights++;
        int32_t value = LOOKED_UP(0, four >> 7) - left(LOOKED_UP(0, four >> 11), 1);
        value = left(value, 1) + LOOKED_UP(0, four >> 3);
        *sum += left(value, 1) + LOOKED_UP(0, four << 1);
        sum++;
        KEEP_WIDE(weights);
    } while (sum < last);
    return weights;
}

void kestrel_stream_product(const kestrel_stream_matrix *m, const int8_t *x, int32_t *sums, int16_t *tables)
{
    const uint16_t *weights = m->weights;
    const int8_t *const end = x + m->inputs;
    int32_t *const last = sums + m->outputs;
    if (m->kind == KESTREL_STREAM_QUAD) {
        for (; x < end; x += 4) {
            digit_table(tables, x, (int)(end - x), m->odd);
            weights = add_digits(weights, tables, sums, last);
        }
        return;
    }
    while (x < end) {
        x = make_tables(m, x, end, tables);
        weights = add_entries(weights, tables, sums, last);
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

void kestrel_stream_larger(void *kept, const void *column, int size, int anew)
{
    int8_t *old = kept;
    const int8_t *x = column;
    for (; size > 0; size--, old++, x++) {
        *old = anew || *x > *old ? *x : *old;
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
