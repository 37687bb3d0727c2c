/*
 * Fixed-point front end; see kestrel_frontend.h. The letters in comments are those of docs/fixed-frontend.md.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#define KFE_WITH_TABLES
#include "kestrel_frontend.h"

#include <stddef.h>
#include <string.h>

#define STATIC_ASSERT(name, condition) typedef char name[(condition) ? 1 : -1]

STATIC_ASSERT(right_shifts_keep_the_sign, (-1 >> 1) == -1);
STATIC_ASSERT(state_has_the_stated_size, sizeof(kestrel_frontend) == KFE_STATE_BYTES);
STATIC_ASSERT(history_holds_a_block, KFE_HISTORY >= KFE_HOP && KFE_HISTORY >= KFE_TAPS);

/* x 2^-bits, rounded to nearest, halves up; negative bits shift left. */
static inline int64_t shift_right(int64_t x, int bits)
{
    return bits > 0 ? (x + ((int64_t)1 << (bits - 1))) >> bits : x * ((int64_t)1 << -bits);
}

/* The same within 32 bits, for |x| < 2^31 - 2^bits: windowed samples and spectra. */
static inline int32_t shift_right_32(int32_t x, int bits)
{
    return bits > 0 ? (x + ((int32_t)1 << (bits - 1))) >> bits : x * ((int32_t)1 << -bits);
}

static inline int16_t saturate16(int64_t x)
{
    return (int16_t)(x > 32767 ? 32767 : x < -32768 ? -32768 : x);
}

static inline uint32_t absolute(int32_t x)
{
    return x < 0 ? 0u - (uint32_t)x : (uint32_t)x;
}

/* Binary digits of x; 0 for 0. */
static int bit_length(uint64_t x)
{
    int bits = 0, step;
    for (step = 32; step > 0; step >>= 1) {
        if (x >> step) {
            x >>= step;
            bits += step;
        }
    }
    return bits + (x != 0);
}

/* log2(x) 2^16 of x >= 1: the first 16 bits of the mantissa, corrected by an interpolated table. */
static int32_t log2_fixed(uint64_t x)
{
    const int octave = bit_length(x) - 1;
    const int32_t fraction = (int32_t)((octave > 16 ? x >> (octave - 16) : x << (16 - octave)) & 0xFFFF);
    const int32_t segment = fraction >> KFE_LOG_SEGMENT_BITS;
    const int32_t rest = fraction & ((1 << KFE_LOG_SEGMENT_BITS) - 1);
    const int32_t low = kfe_log_table[segment], slope = kfe_log_table[segment + 1] - low;
    return octave * 65536 + fraction + low + (int32_t)shift_right(slope * rest, KFE_LOG_SEGMENT_BITS);
}

/* The frame's right shift r: its largest value gets KFE_DATA_BITS bits, unless it is close to silence. */
static int frame_shift(uint32_t largest)
{
    const int shift = bit_length(largest) - KFE_DATA_BITS;
    return shift > KFE_MINIMUM_SHIFT ? shift : KFE_MINIMUM_SHIFT;
}

/* Weight of sample `number` of a frame; the window is symmetric. */
static inline int32_t window(int number)
{
    return kfe_window[number < (KFE_TAPS + 1) / 2 ? number : KFE_TAPS - 1 - number];
}

#if KFE_DENSE

static int32_t even_part(const int16_t *frame, int pair)
{
    const int after = KFE_TAPS / 2 + pair, before = KFE_TAPS - 1 - after;
    return (frame[after] + (after == before ? 0 : frame[before])) * window(before);
}

static int32_t odd_part(const int16_t *frame, int pair)
{
    const int after = KFE_TAPS / 2 + pair, before = KFE_TAPS - 1 - after;
    return (frame[after] - frame[before]) * window(before);
}

/* Spectrum of a frame [KFE_TAPS] by sums over folded samples. Returns r. */
static int spectrum(kestrel_frontend *fe, const int16_t *frame)
{
    uint32_t largest = 0;
    int pair, shift, bin;
    for (pair = 0; pair < KFE_PAIRS; pair++) {
        const uint32_t even = absolute(even_part(frame, pair)), odd = absolute(odd_part(frame, pair));
        largest = even > largest ? even : largest;
        largest = odd > largest ? odd : largest;
    }
    shift = frame_shift(largest);
    for (pair = 0; pair < KFE_PAIRS; pair++) {
        fe->folded[2 * pair] = shift_right_32(even_part(frame, pair), shift);
        fe->folded[2 * pair + 1] = shift_right_32(odd_part(frame, pair), shift);
    }
    for (bin = KFE_LOW_BIN; bin <= KFE_HIGH_BIN; bin++) {
        const int16_t *const end = kfe_wave + 2 * KFE_N_FFT, *wave = kfe_wave + 2 * (KFE_START * bin % KFE_N_FFT);
        const int32_t *folded = fe->folded;
        int32_t *out = fe->spectrum + 2 * (bin - KFE_STORED_FROM);
        int64_t real = 0, imaginary = 0;
        for (pair = 0; pair < KFE_PAIRS; pair++, folded += 2) {
            real += (int64_t)folded[0] * wave[0];
            imaginary += (int64_t)folded[1] * wave[1];
            wave += wave < end - 2 * bin ? 2 * bin : 2 * (bin - KFE_N_FFT);
        }
        out[0] = (int32_t)shift_right(real, KFE_OUTPUT_SHIFT);
        out[1] = (int32_t)shift_right(imaginary, KFE_OUTPUT_SHIFT);
    }
    return shift;
}

#else

#define POINTS (KFE_N_FFT / 2)

/* value * exp(-2 pi i index / KFE_N_FFT), 0 <= index < KFE_N_FFT */
static inline void turn(int32_t *value, int index)
{
    const int64_t cosine = kfe_wave[index + KFE_N_FFT / 4], sine = kfe_wave[index];
    const int64_t real = value[0], imaginary = value[1];
    value[0] = (int32_t)shift_right(real * cosine + imaginary * sine, 15);
    value[1] = (int32_t)shift_right(imaginary * cosine - real * sine, 15);
}

#if KFE_RADIX_2
static void join_2(int32_t *a, int stride)
{
    int32_t *b = a + stride;
    int part;
    for (part = 0; part < 2; part++) {
        const int32_t x = a[part], y = b[part];
        a[part] = x + y;
        b[part] = x - y;
    }
}
#endif

#if KFE_RADIX_4
static void join_4(int32_t *a, int stride)
{
    int32_t *b = a + stride, *c = b + stride, *d = c + stride;
    const int32_t even_re = a[0] + c[0], even_im = a[1] + c[1], odd_re = b[0] + d[0], odd_im = b[1] + d[1];
    const int32_t left_re = a[0] - c[0], left_im = a[1] - c[1], right_re = b[0] - d[0], right_im = b[1] - d[1];
    a[0] = even_re + odd_re;
    a[1] = even_im + odd_im;
    b[0] = left_re + right_im;
    b[1] = left_im - right_re;
    c[0] = even_re - odd_re;
    c[1] = even_im - odd_im;
    d[0] = left_re - right_im;
    d[1] = left_im + right_re;
}
#endif

#if KFE_RADIX_ODD
/* radix 3, 5 or 7 by the definition of the transform; mirrored inputs and outputs share their products */
static void join_odd(int32_t *a, int stride, int radix)
{
    enum { LARGEST_HALF = KFE_RADIX_ODD / 2 };
    int32_t sum[2 * LARGEST_HALF], difference[2 * LARGEST_HALF];
    const int32_t first_re = a[0], first_im = a[1];
    const int half = radix / 2;
    int target, part;
    for (part = 1; part <= half; part++) {
        const int32_t *x = a + part * stride, *y = a + (radix - part) * stride;
        sum[2 * part - 2] = x[0] + y[0];
        sum[2 * part - 1] = x[1] + y[1];
        difference[2 * part - 2] = x[0] - y[0];
        difference[2 * part - 1] = x[1] - y[1];
        a[0] += sum[2 * part - 2];
        a[1] += sum[2 * part - 1];
    }
    for (target = 1; target <= half; target++) {
        int32_t *x = a + target * stride, *y = a + (radix - target) * stride;
        int64_t even_re = 0, even_im = 0, odd_re = 0, odd_im = 0;
        for (part = 1; part <= half; part++) {
            const int index = part * target % radix * (KFE_N_FFT / radix);
            const int32_t cosine = kfe_wave[index + KFE_N_FFT / 4], sine = kfe_wave[index];
            even_re += (int64_t)sum[2 * part - 2] * cosine;
            even_im += (int64_t)sum[2 * part - 1] * cosine;
            odd_re += (int64_t)difference[2 * part - 1] * sine;
            odd_im -= (int64_t)difference[2 * part - 2] * sine;
        }
        x[0] = first_re + (int32_t)shift_right(even_re + odd_re, 15);
        x[1] = first_im + (int32_t)shift_right(even_im + odd_im, 15);
        y[0] = first_re + (int32_t)shift_right(even_re - odd_re, 15);
        y[1] = first_im + (int32_t)shift_right(even_im - odd_im, 15);
    }
}
#endif

/* FFT of z [POINTS] in place, decimation in time; the input stands in the order of kfe_order. */
static void transform(int32_t *z)
{
    int stage, length = 1;
    for (stage = 0; stage < KFE_STAGES; stage++) {
        const int radix = kfe_radices[stage], step = KFE_N_FFT / (length * radix), stride = 2 * length;
        int number, first, part;
        for (number = 0; number < length; number++) {
            for (first = number; first < POINTS; first += length * radix) {
                int32_t *a = z + 2 * first;
                for (part = 1; part < radix && number > 0; part++) {
                    turn(a + part * stride, part * number * step);
                }
#if KFE_RADIX_4
                if (radix == 4) {
                    join_4(a, stride);
                    continue;
                }
#endif
#if KFE_RADIX_2
                if (radix == 2) {
                    join_2(a, stride);
                    continue;
                }
#endif
#if KFE_RADIX_ODD
                join_odd(a, stride, radix);
#endif
            }
        }
        length *= radix;
    }
}

/* From the transform of pairs of real samples to twice the spectrum of the samples, in place. */
static void split(int32_t *z)
{
    const int32_t first = z[0], second = z[1];
    int bin;
    z[0] = 2 * (first + second);
    z[1] = 0;
    z[2 * POINTS] = 2 * (first - second);
    z[2 * POINTS + 1] = 0;
    for (bin = 1; bin <= POINTS / 2; bin++) {
        int32_t *a = z + 2 * bin, *b = z + 2 * (POINTS - bin);
        const int32_t even_re = a[0] + b[0], even_im = a[1] - b[1];
        int32_t odd[2];
        odd[0] = a[0] - b[0];
        odd[1] = a[1] + b[1];
        turn(odd, bin);
        a[0] = even_re + odd[1];
        a[1] = even_im - odd[0];
        b[0] = even_re - odd[1];
        b[1] = -even_im - odd[0];
    }
}

/* Spectrum of a frame [KFE_TAPS] by FFT. Returns r. */
static int spectrum(kestrel_frontend *fe, const int16_t *frame)
{
    uint32_t largest = 0;
    int number, shift;
    for (number = 0; number < KFE_TAPS; number++) {
        const uint32_t value = absolute(frame[number] * window(number));
        largest = value > largest ? value : largest;
    }
    shift = frame_shift(largest);
    memset(fe->spectrum, 0, sizeof fe->spectrum);
    for (number = 0; number < KFE_TAPS; number++) {
        fe->spectrum[2 * kfe_order[number >> 1] + (number & 1)] = shift_right_32(frame[number] * window(number), shift);
    }
    transform(fe->spectrum);
    split(fe->spectrum);
    return shift;
}

#endif

#if KFE_POWER == 1
/* Square root of x < 2^62, rounded down to 16 significant bits. */
static int32_t magnitude(uint64_t x)
{
    const int bits = bit_length(x), half = bits > 31 ? (bits - 31) / 2 : 0;
    uint32_t rest = (uint32_t)(x >> 2 * half), root = 0, bit;
    for (bit = (uint32_t)1 << 30; bit > 0; bit >>= 2) {
        const uint32_t trial = root + bit;
        root >>= 1;
        if (rest >= trial) {
            rest -= trial;
            root += bit;
        }
    }
    return (int32_t)(root << half);
}
#endif

/* fe->logs of a frame [KFE_TAPS] */
static void log_mel(kestrel_frontend *fe, const int16_t *frame)
{
    const int shift = spectrum(fe, frame);
    const int16_t *weight = kfe_weights;
    int32_t *bins = fe->spectrum + 2 * (KFE_LOW_BIN - KFE_STORED_FROM);
    int exponent, value, band;
#if KFE_POWER == 2
    uint32_t largest = 0;
    int cut;
    for (value = 0; value < 2 * KFE_USED_BINS; value++) {
        largest = absolute(bins[value]) > largest ? absolute(bins[value]) : largest;
    }
    cut = bit_length(largest) - KFE_KEEP_BITS;
    cut = cut > 0 ? cut : 0;
    for (value = 0; value < 2 * KFE_USED_BINS; value++) {
        bins[value] = shift_right_32(bins[value], cut);
    }
    exponent = 2 * (KFE_SPECTRUM_BITS - shift - cut) + KFE_WEIGHT_BITS;
#else
    for (value = 0; value < 2 * KFE_USED_BINS; value += 2) {
        const int64_t real = bins[value], imaginary = bins[value + 1];
        bins[value] = magnitude((uint64_t)(real * real + imaginary * imaginary));
    }
    exponent = KFE_SPECTRUM_BITS - shift + KFE_WEIGHT_BITS;
#endif
    for (band = 0; band < KFE_BANDS; band++) {
        const int32_t *bin = bins + 2 * (kfe_filter_first[band] - KFE_LOW_BIN);
        int64_t sum = 0;
        int32_t log = KFE_LOG_FLOOR;
        int left;
        for (left = kfe_filter_count[band]; left > 0; left--, bin += 2, weight++) {
#if KFE_POWER == 2
            sum += ((int64_t)bin[0] * bin[0] + (int64_t)bin[1] * bin[1]) * *weight;
#else
            sum += (int64_t)bin[0] * *weight;
#endif
        }
        sum = shift_right(sum, kfe_filter_shift[band]);
#if KFE_LOG_PLUS_FLOOR
        sum += shift_right(KFE_FLOOR_MANTISSA, KFE_FLOOR_EXPONENT - exponent < 62 ? KFE_FLOOR_EXPONENT - exponent : 62);
#endif
        if (sum > 0) {
            log = log2_fixed((uint64_t)sum) + KFE_LOG_GAIN - exponent * 65536;
            log = log > KFE_LOG_FLOOR ? log : KFE_LOG_FLOOR;
        }
        fe->logs[band] = saturate16(shift_right(log, 16 - KFE_LOG_BITS));
    }
}

void kestrel_frontend_start(kestrel_frontend *fe)
{
    memset(fe, 0, sizeof *fe);
}

/* A sample after the end of a clip, for history[place]. */
static int16_t made_up(kestrel_frontend *fe, int32_t place)
{
#if KFE_LEAD > 0
    const int32_t source = place - 2 - 2 * fe->tail; /* as far before the last sample as `place` lies after it */
    fe->tail += fe->tail < KFE_HISTORY;
    return source >= 0 ? fe->history[source] : 0;
#else
    (void)fe;
    (void)place;
    return 0;
#endif
}

int kestrel_frontend_push(kestrel_frontend *fe, const int16_t *samples, int32_t count)
{
    const int32_t fresh = KFE_HISTORY - KFE_HOP;
    int32_t place;
    count = count < 0 ? 0 : count > KFE_HOP ? KFE_HOP : count;
    memmove(fe->history, fe->history + KFE_HOP, (size_t)fresh * sizeof fe->history[0]);
    if (count > 0) {
        memcpy(fe->history + fresh, samples, (size_t)count * sizeof samples[0]);
    }
    for (place = fresh + count; place < KFE_HISTORY; place++) {
        fe->history[place] = made_up(fe, place);
    }
    if (fe->blocks < KFE_DELAY) {
        fe->blocks++;
        if (fe->blocks < KFE_DELAY) {
            return 0;
        }
#if KFE_LEAD > 0
        for (place = 1; place <= KFE_LEAD; place++) { /* samples before the first are its reflection */
            fe->history[KFE_LEAD - place] = fe->history[KFE_LEAD + place];
        }
#endif
    }
    log_mel(fe, fe->history);
    return 1;
}

void kestrel_frontend_features(const int16_t *logs, int32_t floor, int16_t *features)
{
    int k;
#if KFE_COSINE_TRANSFORM
    for (k = 0; k < KFE_WIDTH; k++) {
        int64_t sum = 0;
        int32_t index = k;
        int band;
        for (band = 0; band < (KFE_BANDS + 1) / 2; band++) {
            const int mirror = KFE_BANDS - 1 - band;
            const int32_t low = logs[band] > floor ? logs[band] : floor;
            const int32_t high = logs[mirror] > floor ? logs[mirror] : floor;
            /* Coefficient k is even or odd about the middle of the bands, as k is. */
            const int32_t pair = k % 2 ? low - high : mirror == band ? low : low + high;
            sum += (int64_t)pair * kfe_cosine_transform[index];
            index += 2 * k;
            index -= index >= 4 * KFE_BANDS ? 4 * KFE_BANDS : 0;
        }
        features[k] = saturate16(shift_right(sum * (k == 0 ? KFE_MULTIPLIER_FIRST : KFE_MULTIPLIER), KFE_FEATURE_SHIFT));
    }
#else
    for (k = 0; k < KFE_WIDTH; k++) {
        const int32_t log = logs[k] > floor ? logs[k] : floor;
        features[k] = saturate16(shift_right((int64_t)log * KFE_MULTIPLIER, KFE_FEATURE_SHIFT));
    }
#endif
}

int32_t kestrel_frontend_floor(int32_t highest)
{
#if KFE_TOP_CODES > 0
    return highest - KFE_TOP_CODES;
#else
    (void)highest;
    return KESTREL_FRONTEND_NO_FLOOR;
#endif
}

int32_t kestrel_frontend_frames(int32_t samples)
{
#if KFE_FRAMING_WINDOW
    const int32_t distance = samples > KFE_WINDOW ? samples - KFE_WINDOW : KFE_WINDOW - samples;
    const int32_t frames = distance / KFE_HOP + (distance % KFE_HOP != 0);
    if (samples < 1) {
        return -1;
    }
    return frames > 1 ? frames : 1;
#else
    return samples < KFE_SHORTEST_CLIP ? -1 : 1 + (samples + 2 * KFE_PADDING - KFE_N_FFT) / KFE_HOP;
#endif
}

int32_t kestrel_frontend_clip(kestrel_frontend *fe, const int16_t *samples, int32_t count, int16_t *logs, int16_t *features)
{
    const int32_t frames = kestrel_frontend_frames(count);
    int32_t done = 0;
#if KFE_TOP_CODES > 0
    int32_t highest = -32768, floor, band;
#endif
    (void)logs;
    kestrel_frontend_start(fe);
    while (done < frames) {
        const int32_t taken = count < KFE_HOP ? count : KFE_HOP;
        const int ready = kestrel_frontend_push(fe, samples, taken);
        samples += taken;
        count -= taken;
        if (ready) {
#if KFE_TOP_CODES > 0
            memcpy(logs + (size_t)done * KFE_BANDS, fe->logs, sizeof fe->logs);
            for (band = 0; band < KFE_BANDS; band++) {
                highest = fe->logs[band] > highest ? fe->logs[band] : highest;
            }
#else
            kestrel_frontend_features(fe->logs, KESTREL_FRONTEND_NO_FLOOR, features + (size_t)done * KFE_WIDTH);
#endif
            done++;
        }
    }
#if KFE_TOP_CODES > 0
    floor = kestrel_frontend_floor(highest);
    for (done = 0; done < frames; done++) {
        kestrel_frontend_features(logs + (size_t)done * KFE_BANDS, floor, features + (size_t)done * KFE_WIDTH);
    }
#endif
    return frames;
}
