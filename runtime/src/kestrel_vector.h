/* SPDX-License-Identifier: Apache-2.0
 *
 * Computers only: the few vector operations that kestrel_fast.h is made of, for each level of kestrel_isa.h.
 *
 * `vector` holds LANES int32. dot2 adds products of two int16 to each lane, dot4 of four bytes: uint8 with int8
 * (KESTREL_DOT4), or on AVX2 int8 with int8 less the sum of all |x| of x < 0 (dot4_positive: for x >= 0). All are modulo
 * 2^32, without saturation on the way. narrow8, narrow16 and words_add (int16) saturate. load_words reads 2 LANES int8 or
 * int16 as int16; pair_first and pair_second interleave two of these as [a, b] for dot2, groups of four channels in turn in
 * the first and in the second result. interpolate_pairs is n[0] w[0] + n[1] w[1] of pairs of int16. `flipped` adds CODE_START
 * to bytes, see kestrel_products.h.
 *
 * doubles_rounded (KESTREL_DOUBLES) is a vector of doubles below 2^31 as int32, half to even, however the program has
 * set the processor's rounding. doubles_shuffled is the same in an order of its own, from which pack_shuffled makes 2 LANES int16 in order, and pack_paired where sums were paired as above.
 */
#ifndef KESTREL_VECTOR_H
#define KESTREL_VECTOR_H

#include <stdint.h>
#include <string.h>

/* 1.5 * 2^52: added to a double it leaves an integer, rounded half to even, in the low bits. */
#define LARGE 6755399441055744.0

#define INLINE static inline __attribute__((always_inline))

#if KESTREL_LEVEL == 2

#include <immintrin.h>

enum { LANES = 16, DOUBLES = 8 };
typedef __m512i vector, words;
typedef __m512d doubles;
#define KESTREL_DOT4
#define KESTREL_DOUBLES

INLINE vector vector_load(const void *from) { return _mm512_loadu_si512(from); }
INLINE void vector_store(void *to, vector x) { _mm512_storeu_si512(to, x); }
INLINE vector vector_splat(int32_t x) { return _mm512_set1_epi32(x); }
INLINE vector vector_add(vector a, vector b) { return _mm512_add_epi32(a, b); }
INLINE vector vector_sub(vector a, vector b) { return _mm512_sub_epi32(a, b); }
INLINE vector vector_times(vector a, vector b) { return _mm512_mullo_epi32(a, b); }
INLINE vector vector_and(vector a, vector b) { return _mm512_and_si512(a, b); }
INLINE vector vector_xor(vector a, vector b) { return _mm512_xor_si512(a, b); }
INLINE vector interpolate_pairs(vector pairs, vector weights) { return _mm512_madd_epi16(pairs, weights); }
INLINE vector flipped(vector x) { return _mm512_xor_si512(x, _mm512_set1_epi8(-128)); } /* + 128 */
INLINE vector vector_clamp(vector x, vector low, vector high) {
    return _mm512_min_epi32(_mm512_max_epi32(x, low), high);
}
INLINE vector vector_down(vector x, int shift) { return _mm512_sra_epi32(x, _mm_cvtsi32_si128(shift)); }
INLINE vector vector_up(vector x, int shift) { return _mm512_sll_epi32(x, _mm_cvtsi32_si128(shift)); }
INLINE vector dot2(vector sum, words a, words b) { return _mm512_dpwssd_epi32(sum, a, b); }
INLINE vector dot4(vector sum, vector x, vector w) { return _mm512_dpbusd_epi32(sum, x, w); }

INLINE vector widen8(const int8_t *from) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)); }
INLINE vector widen16(const int16_t *from) { return _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)from)); }
INLINE void narrow8(int8_t *to, vector x) { _mm_storeu_si128((__m128i *)to, _mm512_cvtsepi32_epi8(x)); }
INLINE void narrow16(int16_t *to, vector x) { _mm256_storeu_si256((__m256i *)to, _mm512_cvtsepi32_epi16(x)); }

INLINE words load_words8(const int8_t *from) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)from)); }
INLINE words load_words16(const int16_t *from) { return _mm512_loadu_si512(from); }
INLINE words words_add(words a, words b) { return _mm512_adds_epi16(a, b); }
INLINE words pair_first(words a, words b) { return _mm512_unpacklo_epi16(a, b); }
INLINE words pair_second(words a, words b) { return _mm512_unpackhi_epi16(a, b); }
INLINE void narrow_words(int8_t *to, words x) { _mm256_storeu_si256((__m256i *)to, _mm512_cvtsepi16_epi8(x)); }
INLINE vector pair_bytes_low(vector a, vector b) { return _mm512_unpacklo_epi8(a, b); }
INLINE vector pair_bytes_high(vector a, vector b) { return _mm512_unpackhi_epi8(a, b); }
INLINE vector pack_bytes(words a, words b) { return _mm512_packs_epi16(a, b); }

INLINE doubles doubles_load(const double *from) { return _mm512_loadu_pd(from); }
INLINE doubles doubles_splat(double x) { return _mm512_set1_pd(x); }
INLINE doubles doubles_low(vector x) { return _mm512_cvtepi32_pd(_mm512_castsi512_si256(x)); }
INLINE doubles doubles_high(vector x) { return _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(x, 1)); }
INLINE doubles doubles_scaled(doubles x, doubles factor, doubles offset) { return _mm512_fmadd_pd(x, factor, offset); }
INLINE vector doubles_rounded(doubles low, doubles high) {
    const doubles large = doubles_splat(LARGE);
    const __m512d a = _mm512_add_round_pd(low, large, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512d b = _mm512_add_round_pd(high, large, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    return _mm512_permutex2var_epi32(_mm512_castpd_si512(a), even, _mm512_castpd_si512(b));
}
INLINE vector doubles_shuffled(doubles low, doubles high) { return doubles_rounded(low, high); }
INLINE words pack_shuffled(vector a, vector b) {
    const __m512i even = _mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0);
    return _mm512_permutexvar_epi64(even, _mm512_packs_epi32(a, b));
}
INLINE words pack_paired(vector a, vector b) { return _mm512_packs_epi32(a, b); }
INLINE words words_clamp(words x, int low, int high) {
    return _mm512_min_epi16(_mm512_max_epi16(x, _mm512_set1_epi16((short)low)), _mm512_set1_epi16((short)high));
}

#elif KESTREL_LEVEL == 1

#include <immintrin.h>

enum { LANES = 8, DOUBLES = 4 };
typedef __m256i vector, words;
typedef __m256d doubles;
#define KESTREL_SIGNED_DOT4
#define KESTREL_DOUBLES

INLINE vector vector_load(const void *from) { return _mm256_loadu_si256((const __m256i *)from); }
INLINE void vector_store(void *to, vector x) { _mm256_storeu_si256((__m256i *)to, x); }
INLINE vector vector_splat(int32_t x) { return _mm256_set1_epi32(x); }
INLINE vector vector_add(vector a, vector b) { return _mm256_add_epi32(a, b); }
INLINE vector vector_sub(vector a, vector b) { return _mm256_sub_epi32(a, b); }
INLINE vector vector_times(vector a, vector b) { return _mm256_mullo_epi32(a, b); }
INLINE vector vector_and(vector a, vector b) { return _mm256_and_si256(a, b); }
INLINE vector vector_xor(vector a, vector b) { return _mm256_xor_si256(a, b); }
INLINE vector interpolate_pairs(vector pairs, vector weights) { return _mm256_madd_epi16(pairs, weights); }
INLINE vector vector_clamp(vector x, vector low, vector high) {
    return _mm256_min_epi32(_mm256_max_epi32(x, low), high);
}
INLINE vector vector_down(vector x, int shift) { return _mm256_sra_epi32(x, _mm_cvtsi32_si128(shift)); }
INLINE vector vector_up(vector x, int shift) { return _mm256_sll_epi32(x, _mm_cvtsi32_si128(shift)); }
INLINE vector dot2(vector sum, words a, words b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
INLINE vector dot4(vector sum, vector x, vector w) {
    /* |x| with w where x >= 0 and -1 - w elsewhere: two products are at least -2 * 128 * 128, which int16 holds. */
    const __m256i other = _mm256_xor_si256(w, _mm256_cmpgt_epi8(_mm256_setzero_si256(), x));
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), other);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
INLINE vector flipped(vector x) { return x; }
INLINE vector dot4_positive(vector sum, vector x, vector w) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(x, w), _mm256_set1_epi16(1)));
}

INLINE vector widen8(const int8_t *from) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)); }
INLINE vector widen16(const int16_t *from) { return _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)from)); }
INLINE __m128i narrowed16(vector x) {
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packs_epi32(x, x), 0x08));
}
INLINE void narrow8(int8_t *to, vector x) {
    const __m128i short_ = narrowed16(x);
    _mm_storel_epi64((__m128i *)to, _mm_packs_epi16(short_, short_));
}
INLINE void narrow16(int16_t *to, vector x) { _mm_storeu_si128((__m128i *)to, narrowed16(x)); }

INLINE words load_words8(const int8_t *from) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from)); }
INLINE words load_words16(const int16_t *from) { return vector_load(from); }
INLINE words words_add(words a, words b) { return _mm256_adds_epi16(a, b); }
INLINE words pair_first(words a, words b) { return _mm256_unpacklo_epi16(a, b); }
INLINE words pair_second(words a, words b) { return _mm256_unpackhi_epi16(a, b); }
INLINE vector pair_bytes_low(vector a, vector b) { return _mm256_unpacklo_epi8(a, b); }
INLINE vector pair_bytes_high(vector a, vector b) { return _mm256_unpackhi_epi8(a, b); }
INLINE void narrow_words(int8_t *to, words x) {
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storeu_si128((__m128i *)to, bytes);
}

INLINE doubles doubles_load(const double *from) { return _mm256_loadu_pd(from); }
INLINE doubles doubles_splat(double x) { return _mm256_set1_pd(x); }
INLINE doubles doubles_low(vector x) { return _mm256_cvtepi32_pd(_mm256_castsi256_si128(x)); }
INLINE doubles doubles_high(vector x) { return _mm256_cvtepi32_pd(_mm256_extracti128_si256(x, 1)); }
INLINE doubles doubles_scaled(doubles x, doubles factor, doubles offset) { return _mm256_fmadd_pd(x, factor, offset); }
INLINE doubles doubles_nearest(doubles x) { return _mm256_round_pd(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vector doubles_shuffled(doubles low, doubles high) { /* the sums are of integers, exact whatever the rounding */
    const __m256 a = _mm256_castpd_ps(_mm256_add_pd(doubles_nearest(low), doubles_splat(LARGE)));
    const __m256 b = _mm256_castpd_ps(_mm256_add_pd(doubles_nearest(high), doubles_splat(LARGE)));
    return _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88));
}
INLINE vector doubles_rounded(doubles low, doubles high) {
    return _mm256_permute4x64_epi64(doubles_shuffled(low, high), 0xD8);
}
INLINE words pack_shuffled(vector a, vector b) {
    return _mm256_permutevar8x32_epi32(_mm256_packs_epi32(a, b), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
INLINE words pack_paired(vector a, vector b) {
    return _mm256_permutevar8x32_epi32(_mm256_packs_epi32(a, b), _mm256_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7));
}
INLINE words words_clamp(words x, int low, int high) {
    return _mm256_min_epi16(_mm256_max_epi16(x, _mm256_set1_epi16((short)low)), _mm256_set1_epi16((short)high));
}

#else

#include <arm_neon.h>

enum { LANES = 4 };
typedef int32x4_t vector, words;

INLINE vector vector_load(const void *from) { return vld1q_s32(from); }
INLINE void vector_store(void *to, vector x) { vst1q_s32(to, x); }
INLINE vector vector_splat(int32_t x) { return vdupq_n_s32(x); }
INLINE vector vector_add(vector a, vector b) { return vaddq_s32(a, b); }
INLINE vector vector_sub(vector a, vector b) { return vsubq_s32(a, b); }
INLINE vector vector_times(vector a, vector b) { return vmulq_s32(a, b); }
INLINE vector vector_and(vector a, vector b) { return vandq_s32(a, b); }
INLINE vector vector_xor(vector a, vector b) { return veorq_s32(a, b); }
INLINE vector vector_clamp(vector x, vector low, vector high) { return vminq_s32(vmaxq_s32(x, low), high); }
INLINE vector vector_down(vector x, int shift) { return vshlq_s32(x, vdupq_n_s32(-shift)); }
INLINE vector vector_up(vector x, int shift) { return vshlq_s32(x, vdupq_n_s32(shift)); }
INLINE int32x2_t neighbours(int32x4_t x) { return vpadd_s32(vget_low_s32(x), vget_high_s32(x)); }
INLINE vector dot2(vector sum, words a, words b) {
    const int16x8_t x = vreinterpretq_s16_s32(a), w = vreinterpretq_s16_s32(b);
    const int32x4_t low = vmull_s16(vget_low_s16(x), vget_low_s16(w)), high = vmull_s16(vget_high_s16(x), vget_high_s16(w));
    return vaddq_s32(sum, vcombine_s32(neighbours(low), neighbours(high)));
}
INLINE vector interpolate_pairs(vector pairs, vector weights) { return dot2(vdupq_n_s32(0), pairs, weights); }
INLINE vector flipped(vector x) { return x; }

INLINE vector widen16(const int16_t *from) { return vmovl_s16(vld1_s16(from)); }
INLINE vector widen8(const int8_t *from) {
    int32_t four;
    memcpy(&four, from, 4);
    return vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)))));
}
INLINE void narrow16(int16_t *to, vector x) { vst1_s16(to, vqmovn_s32(x)); }
INLINE void narrow8(int8_t *to, vector x) {
    const int8x8_t bytes = vqmovn_s16(vcombine_s16(vqmovn_s32(x), vqmovn_s32(x)));
    const int32_t four = vget_lane_s32(vreinterpret_s32_s8(bytes), 0);
    memcpy(to, &four, 4);
}

INLINE words load_words8(const int8_t *from) { return vreinterpretq_s32_s16(vmovl_s8(vld1_s8(from))); }
INLINE words load_words16(const int16_t *from) { return vreinterpretq_s32_s16(vld1q_s16(from)); }
INLINE words words_add(words a, words b) {
    return vreinterpretq_s32_s16(vqaddq_s16(vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b)));
}
INLINE words pair_first(words a, words b) {
    return vreinterpretq_s32_s16(vzipq_s16(vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b)).val[0]);
}
INLINE words pair_second(words a, words b) {
    return vreinterpretq_s32_s16(vzipq_s16(vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b)).val[1]);
}

#endif

/* from[index] and its successor in the halves of each lane, for indices of 16 bits; one load each, as the instructions that
 * gather are slower on many processors. */
#ifdef KESTREL_DOUBLES
INLINE int32_t pair_at(const int16_t *from, uint64_t index) {
    int32_t pair;
    memcpy(&pair, from + (index & 0xFFFF), 4);
    return pair;
}

INLINE __m128i gather_four(const int16_t *from, int64_t four) {
    const uint64_t index = (uint64_t)four;
    return _mm_setr_epi32(pair_at(from, index), pair_at(from, index >> 16), pair_at(from, index >> 32),
                          pair_at(from, index >> 48));
}
#endif

INLINE vector gather_pairs(const int16_t *from, vector places) {
#if KESTREL_LEVEL == 2
    const __m256i index = _mm512_cvtepi32_epi16(places);
    const __m128i low = _mm256_castsi256_si128(index), high = _mm256_extracti128_si256(index, 1);
    const __m128i a = gather_four(from, _mm_cvtsi128_si64(low)), b = gather_four(from, _mm_extract_epi64(low, 1));
    const __m128i c = gather_four(from, _mm_cvtsi128_si64(high)), d = gather_four(from, _mm_extract_epi64(high, 1));
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set_m128i(b, a)), _mm256_set_m128i(d, c), 1);
#elif KESTREL_LEVEL == 1
    const __m256i index = _mm256_packus_epi32(places, places);
    const __m128i low = _mm256_castsi256_si128(index), high = _mm256_extracti128_si256(index, 1);
    return _mm256_set_m128i(gather_four(from, _mm_cvtsi128_si64(high)), gather_four(from, _mm_cvtsi128_si64(low)));
#else
    uint32_t index[LANES];
    int32_t pair[LANES];
    int i;
    vector_store(index, places);
    for (i = 0; i < LANES; i++) {
        memcpy(pair + i, from + index[i], 4);
    }
    return vector_load(pair);
#endif
}

#endif
