/* SPDX-License-Identifier: Apache-2.0
 *
 * Computers only (KESTREL_SIMD): every instruction set has a table of kernels with names of their own, and kestrel_isa.c
 * chooses a table when the first kernel is called. Included in front of kestrel.h.
 */
#ifndef KESTREL_ISA_H
#define KESTREL_ISA_H

#if defined __GNUC__ && defined __x86_64__
#define KESTREL_X86
#elif defined __GNUC__ && defined __ARM_NEON
#define KESTREL_NEON
#endif

#ifdef KESTREL_ISA /* a file of kernels */
#define KESTREL_JOIN(a, b) a##_##b
#define KESTREL_JOINED(a, b) KESTREL_JOIN(a, b)
#define KESTREL_NAMED(name) KESTREL_JOINED(name, KESTREL_ISA)

#define kestrel_requantise KESTREL_NAMED(kestrel_requantise)
#define kestrel_add KESTREL_NAMED(kestrel_add)
#define kestrel_multiply KESTREL_NAMED(kestrel_multiply)
#define kestrel_interpolate KESTREL_NAMED(kestrel_interpolate)
#define kestrel_matmul KESTREL_NAMED(kestrel_matmul)
#define kestrel_accumulate KESTREL_NAMED(kestrel_accumulate)
#define kestrel_conv KESTREL_NAMED(kestrel_conv)
#define kestrel_depthwise KESTREL_NAMED(kestrel_depthwise)
/* These take little time, or move values, and have no vector form. */
#define kestrel_lookup kestrel_lookup_portable
#define kestrel_delta kestrel_delta_portable
#define kestrel_max_pool kestrel_max_pool_portable
#define kestrel_sum_pool kestrel_sum_pool_portable
#define kestrel_copy kestrel_copy_portable
#define kestrel_upsample kestrel_upsample_portable
#define kestrel_transpose kestrel_transpose_portable
#endif

#include "kestrel.h"

/* Name, parameters and arguments of all kernels. */
#define KESTREL_KERNELS(K)                                                                                          \
    K(requantise, (const kestrel_requantise_op *op, void *y, const void *x), (op, y, x))                            \
    K(add, (const kestrel_add_op *op, void *y, const void *const *x), (op, y, x))                                   \
    K(multiply, (const kestrel_multiply_op *op, void *y, const void *a, const void *b), (op, y, a, b))              \
    K(lookup, (const kestrel_lookup_op *op, void *y, const void *x), (op, y, x))                                    \
    K(interpolate, (const kestrel_interpolate_op *op, void *y, const void *x), (op, y, x))                          \
    K(delta, (const kestrel_delta_op *op, void *delta, void *next, const void *x, const void *ref),                 \
      (op, delta, next, x, ref))                                                                                    \
    K(matmul, (const kestrel_matmul_op *op, void *y, const void *x, void *scratch), (op, y, x, scratch))            \
    K(accumulate, (const kestrel_accumulate_op *op, void *y, const void *m, const void *d, void *scratch),          \
      (op, y, m, d, scratch))                                                                                       \
    K(conv, (const kestrel_conv_op *op, void *y, const void *x, void *scratch), (op, y, x, scratch))                \
    K(depthwise, (const kestrel_depthwise_op *op, void *y, const void *x, void *scratch), (op, y, x, scratch))      \
    K(max_pool, (const kestrel_pool_op *op, void *y, const void *x), (op, y, x))                                    \
    K(sum_pool, (const kestrel_pool_op *op, void *y, const void *x), (op, y, x))                                    \
    K(copy, (const kestrel_copy_op *op, void *y, const void *x), (op, y, x))                                        \
    K(upsample, (const kestrel_upsample_op *op, void *y, const void *x), (op, y, x))                                \
    K(transpose, (const kestrel_transpose_op *op, void *y, const void *x), (op, y, x))

#define KESTREL_MEMBER(name, parameters, arguments) void(*name) parameters;
typedef struct {
    KESTREL_KERNELS(KESTREL_MEMBER)
} kestrel_kernels;

#ifdef KESTREL_ISA
#define KESTREL_ENTRY(name, parameters, arguments) kestrel_##name,
#define KESTREL_TABLE const kestrel_kernels KESTREL_NAMED(kestrel_kernels) = {KESTREL_KERNELS(KESTREL_ENTRY)};
#endif

extern const kestrel_kernels kestrel_kernels_portable;
#ifdef KESTREL_X86
extern const kestrel_kernels kestrel_kernels_avx2, kestrel_kernels_avx512;
#endif
#ifdef KESTREL_NEON
extern const kestrel_kernels kestrel_kernels_neon;
#endif

/* Of the portable kernels, for the others: elements first .. first + count - 1 of a row of weights, unpacked into scratch
 * where they are packed (`first` a multiple of KESTREL_DEPTHWISE_TILE); rescaling of values from `channel` on. */
const void *kestrel_weight_row(const kestrel_weights *w, int32_t row, int32_t first, int32_t count, void *scratch);
void kestrel_rescale_values(const kestrel_rescale *rescale, int32_t channel, int32_t *values, int32_t count);

#endif
