/* SPDX-License-Identifier: Apache-2.0
 *
 * Computers only: the kernels for Arm with NEON (AArch64, or 32 bits with -mfpu=neon).
 */
#define KESTREL_LEVEL 3
#define KESTREL_ISA neon
#include "kestrel_isa.h"

#if defined KESTREL_SIMD && defined KESTREL_NEON
#include "kestrel_fast.h"
#endif
