/* SPDX-License-Identifier: Apache-2.0
 *
 * Computers only: the kernels for x86-64 with AVX-512 F, BW, DQ, VL and VNNI.
 */
#define KESTREL_LEVEL 2
#define KESTREL_ISA avx512
#include "kestrel_isa.h"

#if defined KESTREL_SIMD && defined KESTREL_X86
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")
#endif
#include "kestrel_fast.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
