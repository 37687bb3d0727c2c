/* SPDX-License-Identifier: Apache-2.0
 *
 * Computers only: the few vector operations that kestrel_fast.h is made of, for each level of kestrel_isa.h.
 *
 * `vector` holds LANES int32. dot2 adds products of two int16 to each lane, dot4 (KESTREL_DOT4) of four uint8 with int8;
 * both modulo 2^32, without saturation on the way. load_words reads 2 LANES int8 or int16 as int16; pair interleaves two
 * of these as [a, b] for dot2, with groups of four channels in turn in the first and in the second result (PAIRED_LANE);
 * store_paired writes two such vectors in the order of channels. gather_pairs reads from[index] and its successor into
 * the halves of each lane; one load each, as the instruction for it is slower on many processors.
 */
#ifndef KESTREL_VECTOR_H
#define KESTREL_VECTOR_H

#define PAIRED_SECOND(channel) ((channel) / 4 % 2)
#define PAIRED_LANE(channel) ((channel) / 8 * 4 + (channel) % 4)

#if KESTREL_LEVEL == 2

#include <immintrin.h>

enum { LANES = 16 };
typedef __m512i vector, words;
#define KESTREL_DOT4
#define KESTREL_DOUBLES

static inline vector vector_load(const void *from) { return _mm512_loadu_si512(from); }
static inline void vector_store(void *to, vector x) { _mm512_storeu_si512(to, x); }
static inline vector vector_splat(int32_t x) { return _mm512_set1_epi32(x); }
static inline vector vector_add(vector a, vector b) { return _mm512_add_epi32(a, b); }
static inline vector dot2(vector sum, words a, words b) { return _mm512_dpwssd_epi32(sum, a, b); }
static inline vector dot4(vector sum, vector a, vector b) { return _mm512_dpbusd_epi32(sum, a, b); }
static inline words load_words8(const int8_t *from) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)from));
}
static inline words load_words16(const int16_t *from) { return _mm512_loadu_si512(from); }
static inline words pair_first(words a, words b) { return _mm512_unpacklo_epi16(a, b); }
static inline words pair_second(words a, words b) { return _mm512_unpackhi_epi16(a, b); }
static inline void store_paired(int32_t *to, vector a, vector b) {
    const __m512i low = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i high = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
    vector_store(to, _mm512_permutex2var_epi32(a, low, b));
    vector_store(to + LANES, _mm512_permutex2var_epi32(a, high, b));
}

static inline vector widen16(const int16_t *from) { return _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)from)); }
static inline void narrow16(int16_t *to, vector x) { _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(x)); }
static inline vector vector_sub(vector a, vector b) { return _mm512_sub_epi32(a, b); }
static inline vector vector_times(vector a, vector b) { return _mm512_mullo_epi32(a, b); }
static inline vector vector_and(vector a, vector b) { return _mm512_and_si512(a, b); }
static inline vector vector_clamp(vector x, vector low, vector high) {
    return _mm512_min_epi32(_mm512_max_epi32(x, low), high);
}
static inline vector vector_down(vector x, int shift) { return _mm512_sra_epi32(x, _mm_cvtsi32_si128(shift)); }
static inline vector vector_up(vector x, int shift) { return _mm512_sll_epi32(x, _mm_cvtsi32_si128(shift)); }

enum { DOUBLES = 8 };
typedef __m512d doubles;

static inline doubles doubles_load(const double *from) { return _mm512_loadu_pd(from); }

static inline doubles doubles_of(const int32_t *from) {
    return _mm512_cvtepi32_pd(_mm256_loadu_si256((const __m256i *)from));
}
static inline doubles doubles_splat(double x) { return _mm512_set1_pd(x); }
static inline doubles doubles_add(doubles a, doubles b) { return _mm512_add_pd(a, b); }
static inline doubles doubles_times(doubles a, doubles b) { return _mm512_mul_pd(a, b); }
static inline void store_rounded(int32_t *to, doubles x, doubles low, doubles high) {
    x = _mm512_min_pd(_mm512_max_pd(x, low), high);
    _mm256_storeu_si256((__m256i *)to, _mm512_cvt_roundpd_epi32(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#elif KESTREL_LEVEL == 1

#include <immintrin.h>

enum { LANES = 8 };
typedef __m256i vector, words;
#define KESTREL_DOUBLES

static inline vector vector_load(const void *from) { return _mm256_loadu_si256((const __m256i *)from); }
static inline void vector_store(void *to, vector x) { _mm256_storeu_si256((__m256i *)to, x); }
static inline vector vector_splat(int32_t x) { return _mm256_set1_epi32(x); }
static inline vector vector_add(vector a, vector b) { return _mm256_add_epi32(a, b); }
static inline vector dot2(vector sum, words a, words b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
static inline words load_words8(const int8_t *from) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from));
}
static inline words load_words16(const int16_t *from) { return vector_load(from); }
static inline words pair_first(words a, words b) { return _mm256_unpacklo_epi16(a, b); }
static inline words pair_second(words a, words b) { return _mm256_unpackhi_epi16(a, b); }
static inline void store_paired(int32_t *to, vector a, vector b) {
    vector_store(to, _mm256_permute2x128_si256(a, b, 0x20));
    vector_store(to + LANES, _mm256_permute2x128_si256(a, b, 0x31));
}

static inline vector widen16(const int16_t *from) { return _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)from)); }
static inline void narrow16(int16_t *to, vector x) {
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(x, x), 0x08);
    _mm_storeu_si128((__m128i *)to, _mm256_castsi256_si128(packed));
}
static inline vector vector_sub(vector a, vector b) { return _mm256_sub_epi32(a, b); }
static inline vector vector_times(vector a, vector b) { return _mm256_mullo_epi32(a, b); }
static inline vector vector_and(vector a, vector b) { return _mm256_and_si256(a, b); }
static inline vector vector_clamp(vector x, vector low, vector high) {
    return _mm256_min_epi32(_mm256_max_epi32(x, low), high);
}
static inline vector vector_down(vector x, int shift) { return _mm256_sra_epi32(x, _mm_cvtsi32_si128(shift)); }
static inline vector vector_up(vector x, int shift) { return _mm256_sll_epi32(x, _mm_cvtsi32_si128(shift)); }

enum { DOUBLES = 4 };
typedef __m256d doubles;

static inline doubles doubles_load(const double *from) { return _mm256_loadu_pd(from); }

static inline doubles doubles_of(const int32_t *from) { return _mm256_cvtepi32_pd(_mm_loadu_si128((const __m128i *)from)); }
static inline doubles doubles_splat(double x) { return _mm256_set1_pd(x); }
static inline doubles doubles_add(doubles a, doubles b) { return _mm256_add_pd(a, b); }
static inline doubles doubles_times(doubles a, doubles b) { return _mm256_mul_pd(a, b); }
static inline void store_rounded(int32_t *to, doubles x, doubles low, doubles high) {
    x = _mm256_min_pd(_mm256_max_pd(x, low), high);
    x = _mm256_round_pd(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128((__m128i *)to, _mm256_cvtpd_epi32(x));
}

#else

#include <arm_neon.h>

enum { LANES = 4 };
typedef int32x4_t vector, words;

static inline vector vector_load(const void *from) { return vld1q_s32(from); }
static inline void vector_store(void *to, vector x) { vst1q_s32(to, x); }
static inline vector vector_splat(int32_t x) { return vdupq_n_s32(x); }
static inline vector vector_add(vector a, vector b) { return vaddq_s32(a, b); }
static inline vector dot2_words(vector sum, int16x8_t a, int16x8_t b) {
    const int32x4_t low = vmull_s16(vget_low_s16(a), vget_low_s16(b)), high = vmull_s16(vget_high_s16(a), vget_high_s16(b));
    const int32x2_t first = vpadd_s32(vget_low_s32(low), vget_high_s32(low));
    return vaddq_s32(sum, vcombine_s32(first, vpadd_s32(vget_low_s32(high), vget_high_s32(high))));
}
static inline vector dot2(vector sum, vector a, vector b) {
    return dot2_words(sum, vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b));
}
static inline vector load_words8(const int8_t *from) { return vreinterpretq_s32_s16(vmovl_s8(vld1_s8(from))); }
static inline vector load_words16(const int16_t *from) { return vreinterpretq_s32_s16(vld1q_s16(from)); }
static inline vector pair_first(vector a, vector b) {
    return vreinterpretq_s32_s16(vzipq_s16(vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b)).val[0]);
}
static inline vector pair_second(vector a, vector b) {
    return vreinterpretq_s32_s16(vzipq_s16(vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b)).val[1]);
}
static inline void store_paired(int32_t *to, vector a, vector b) {
    vector_store(to, a);
    vector_store(to + LANES, b);
}

#endif

#ifdef KESTREL_DOUBLES
static inline __m128i gather_four(const int16_t *from, const uint32_t *index) {
    int32_t pair[4];
    int i;
    for (i = 0; i < 4; i++) {
        memcpy(pair + i, from + index[i], 4);
    }
    return _mm_setr_epi32(pair[0], pair[1], pair[2], pair[3]);
}

static inline vector gather_pairs(const int16_t *from, vector places) {
    uint32_t index[LANES];
    vector_store(index, places);
#if KESTREL_LEVEL == 2
    {
        const __m256i low = _mm256_set_m128i(gather_four(from, index + 4), gather_four(from, index));
        const __m256i high = _mm256_set_m128i(gather_four(from, index + 12), gather_four(from, index + 8));
        return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }
#else
    return _mm256_set_m128i(gather_four(from, index + 4), gather_four(from, index));
#endif
}
#endif
#endif
