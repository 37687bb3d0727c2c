/*
 * Shift-add front end, see kestrel_shift_frontend.h and docs/microcontroller.md.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#define KSF_WITH_TABLES
#include "kestrel_shift_frontend.h"

#include "kestrel_shift_add.h"

enum { POINTS = KSF_WINDOW / 2, QUARTER = 64, TWIDDLE_BITS = 11, STAGE_BITS = 13, SPLIT_BITS = 12 };

/* Flags of a twiddle's digit; the low bits are its exponent. */
enum { NEGATIVE = 0x40, LAST = 0x80 };

#if KSF_DECIMATION == 2
static int16_t saturate16(int32_t x)
{
    return (int16_t)(x > 32767 ? 32767 : x < -32768 ? -32768 : x);
}
#endif

/* A number with as many binary digits as the magnitude of x; for -2^n that of 2^n - 1. */
static inline uint32_t extent(int32_t x)
{
    return (uint32_t)(x ^ (x >> 31));
}

static int digits(uint32_t x)
{
    int count = 0;
    if (x >> 16) {
        x >>= 16;
        count = 16;
    }
    while (x) {
        x >>= 1;
        count++;
    }
    return count;
}

/* x >> bits, halves up */
static inline int32_t shifted(int32_t x, int bits)
{
    return (x + (((int32_t)1 << bits) >> 1)) >> bits;
}

void kestrel_shift_frontend_start(kestrel_shift_frontend *fe)
{
    uint8_t *byte = (uint8_t *)fe, *const end = (uint8_t *)(fe + 1);
    while (byte < end) {
        *byte++ = 0;
    }
}

static void put(kestrel_shift_frontend *fe, int16_t sample)
{
    const uint16_t place = fe->put;
    if ((uint16_t)(fe->filled - fe->taken) >= KSF_RING) {
        fe->lost = 1;
        return;
    }
    fe->ring[place] = sample;
    fe->put = (uint16_t)(place + 1 == KSF_RING ? 0 : place + 1);
    fe->filled++;
}

void kestrel_shift_frontend_sample(kestrel_shift_frontend *fe, int16_t sample)
{
#if KSF_DECIMATION == 2
    /* sums[i] is what samples so far give the output that comes i outputs later. Taps 2, -8, 20, -46, 160 and their mirror
     * image on the second samples of pairs, 256 in the middle on a first one. */
    int32_t *const sums = fe->sums;
    const uint32_t x = (uint32_t)(int32_t)sample, x20 = (x << 4) + (x << 2), x46 = (x << 5) + (x << 4) - (x << 1),
                   x160 = (x << 7) + (x << 5);
    int32_t total;
    if (!fe->second) {
        fe->second = 1;
        sums[4] += (int32_t)(x << 8);
        return;
    }
    fe->second = 0;
    total = sums[0] + (int32_t)(x << 1);
    sums[0] = sums[1] - (int32_t)(x << 3);
    sums[1] = sums[2] + (int32_t)x20;
    sums[2] = sums[3] - (int32_t)x46;
    sums[3] = sums[4] + (int32_t)x160;
    sums[4] = sums[5] + (int32_t)x160;
    sums[5] = sums[6] - (int32_t)x46;
    sums[6] = sums[7] + (int32_t)x20;
    sums[7] = sums[8] - (int32_t)(x << 3);
    sums[8] = (int32_t)(x << 1);
    put(fe, saturate16(shifted(total, 9)));
#else
    put(fe, sample);
#endif
}

int kestrel_shift_frontend_ready(const kestrel_shift_frontend *fe)
{
    return (uint16_t)(fe->filled - fe->taken) >= KSF_WINDOW;
}

/* ------------------------------------------------------------------------------------------------------------ spectrum */

/* value = (real, imaginary) times exp(-2 pi i angle / 256), 0 < angle < 64: a shift and an addition for each digit. */
static void turn(int32_t *value, int angle)
{
    const int32_t x = value[0], y = value[1];
    const uint8_t *digit = kestrel_shift_cosine + 4 * angle;
    uint32_t real = (uint32_t)1 << (TWIDDLE_BITS - 1), imaginary = real, code;
    do {
        code = *digit++;
        if (code & NEGATIVE) {
            real -= (uint32_t)x << (code & 15);
            imaginary -= (uint32_t)y << (code & 15);
        } else {
            real += (uint32_t)x << (code & 15);
            imaginary += (uint32_t)y << (code & 15);
        }
    } while (!(code & LAST));
    digit = kestrel_shift_cosine + 4 * (QUARTER - angle);
    do {
        code = *digit++;
        if (code & NEGATIVE) {
            real -= (uint32_t)y << (code & 15);
            imaginary += (uint32_t)x << (code & 15);
        } else {
            real += (uint32_t)y << (code & 15);
            imaginary -= (uint32_t)x << (code & 15);
        }
    } while (!(code & LAST));
    value[0] = (int32_t)real >> TWIDDLE_BITS;
    value[1] = (int32_t)imaginary >> TWIDDLE_BITS;
}

/* Copies the next frame into z, as pairs in bit-reversed order and lifted to STAGE_BITS. Returns the exponent. */
static int load(kestrel_shift_frontend *fe, int16_t *z)
{
    uint32_t reached = 0;
    int left = POINTS, place = 0, lift, bit;
    uint16_t from = fe->first;
    while (left-- > 0) {
        int part;
        for (part = 0; part < 2; part++) {
            const int16_t sample = fe->ring[from];
            from = (uint16_t)(from + 1 == KSF_RING ? 0 : from + 1);
            reached |= extent(sample);
            z[2 * place + part] = sample;
        }
        for (bit = POINTS / 2; place & bit; bit >>= 1) { /* one more, counted from the top bit down */
            place ^= bit;
        }
        place |= bit;
    }
    place = fe->first + KSF_HOP;
    fe->first = (uint16_t)(place >= KSF_RING ? place - KSF_RING : place);
    fe->taken = (uint16_t)(fe->taken + KSF_HOP);
    lift = STAGE_BITS - digits(reached);
    for (left = 0; left < KSF_WINDOW; left++) {
        z[left] = (int16_t)(lift >= 0 ? (int32_t)((uint32_t)(int32_t)z[left] << lift) : shifted(z[left], -lift));
    }
    return lift;
}

/* Shifts z right until it has at most `bits` digits; returns by how much. */
static int fit(int16_t *z, int bits)
{
    uint32_t reached = 0;
    int i, cut;
    for (i = 0; i < KSF_WINDOW; i++) {
        reached |= extent(z[i]);
    }
    cut = digits(reached) - bits;
    if (cut <= 0) {
        return 0;
    }
    for (i = 0; i < KSF_WINDOW; i++) {
        z[i] = (int16_t)shifted(z[i], cut);
    }
    return cut;
}

/* Joins neighbouring transforms of `half` points; `step` is the angle between their outputs. */
static void stage(int16_t *z, int half, int step)
{
    int number, angle = 0;
    for (number = 0; number < half; number++, angle += step) {
        int16_t *a, *b;
        for (a = z + 2 * number; a < z + KSF_WINDOW; a = b + 2 * half) {
            int32_t value[2], spare;
            b = a + 2 * half;
            value[0] = b[0];
            value[1] = b[1];
            if (angle & (QUARTER - 1)) {
                turn(value, angle & (QUARTER - 1));
            }
            if (angle & QUARTER) {
                spare = value[0];
                value[0] = value[1];
                value[1] = -spare;
            }
            b[0] = (int16_t)(a[0] - value[0]);
            b[1] = (int16_t)(a[1] - value[1]);
            a[0] = (int16_t)(a[0] + value[0]);
            a[1] = (int16_t)(a[1] + value[1]);
        }
    }
}

/* The transform of pairs of samples -> twice the spectrum of the samples, bins 0 .. 127; returns bin 128. */
static int32_t split(int16_t *z)
{
    const int32_t first = z[0], second = z[1];
    int16_t *a = z + 2, *b = z + KSF_WINDOW - 2;
    int k;
    for (k = 1; k <= QUARTER; k++, a += 2, b -= 2) {
        const int32_t even_re = a[0] + b[0], even_im = a[1] - b[1];
        int32_t value[2];
        value[0] = a[0] - b[0];
        value[1] = a[1] + b[1];
        if (k < QUARTER) {
            turn(value, k);
        } else {
            const int32_t spare = value[0];
            value[0] = value[1];
            value[1] = -spare;
        }
        b[0] = (int16_t)(even_re - value[1]);
        b[1] = (int16_t)(-even_im - value[0]);
        a[0] = (int16_t)(even_re + value[1]);
        a[1] = (int16_t)(even_im - value[0]);
    }
    z[0] = (int16_t)(2 * (first + second));
    z[1] = 0;
    return 2 * (first - second);
}

/* ---------------------------------------------------------------------------------------------- filters and logarithm */

/* Magnitude behind a Hann window of the bin at z: real and imaginary parts of three bins. */
static int32_t magnitude(const int16_t *z, int32_t next_re, int32_t next_im)
{
    int32_t x = 2 * z[0] - z[-2] - next_re, y = 2 * z[1] - z[-1] - next_im, spare;
    x = x < 0 ? -x : x;
    y = y < 0 ? -y : y;
    if (x < y) {
        spare = x;
        x = y;
        y = spare;
    }
    spare = x - (x >> 3) + (y >> 1);
    return spare > x ? spare : x;
}

/* 64 log2 of x 2^-(exponent + 18), not below the floor */
static int16_t logarithm(uint32_t x, int exponent)
{
    const int length = digits(x);
    int32_t found;
    if (length == 0) {
        return KSF_FLOOR;
    }
    x = (length < 7 ? x << (7 - length) : x >> (length - 7)) & 63;
    found = (length - 1 - 18 - exponent) * 64 + kestrel_shift_log[x];
    return (int16_t)(found > KSF_FLOOR ? found : KSF_FLOOR);
}

void kestrel_shift_frontend_frame(kestrel_shift_frontend *fe, int16_t *work, int16_t *features)
{
    const uint8_t *const corner = kestrel_shift_corners;
    int exponent = load(fe, work), half, step, segment, bin;
    int32_t last, rising = 0;
    for (half = 1, step = POINTS; half < POINTS; half += half, step >>= 1) {
        exponent -= fit(work, STAGE_BITS);
        stage(work, half, step);
    }
    exponent -= fit(work, SPLIT_BITS);
    last = split(work);
    bin = corner[0];
    for (segment = 0; segment <= KSF_BANDS; segment++) {
        int32_t sum = 0, falling = 0; /* falling: sum of magnitudes times their distance to the next corner */
        const int16_t *z = work + 2 * bin;
        for (; bin < corner[segment + 1]; bin++, z += 2) {
            sum += bin == POINTS - 1 ? magnitude(z, last, 0) : magnitude(z, z[2], z[3]);
            falling += sum;
        }
        falling = shifted(kestrel_times(falling, kestrel_shift_reciprocals[segment]), 10);
        if (segment > 0) {
            features[segment - 1] = logarithm((uint32_t)(rising + falling), exponent);
        }
        rising = sum - falling;
    }
}
