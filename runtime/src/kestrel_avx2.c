/* SPDX-License-Identifier: Apache-2.0
 *
 * Computers only: the kernels for x86-64 with AVX2 and FMA.
 */
#define KESTREL_LEVEL 1
#define KESTREL_ISA avx2
#include "kestrel_isa.h"

#if defined KESTREL_SIMD && defined KESTREL_X86
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include "kestrel_fast.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
