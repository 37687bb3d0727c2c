/* SPDX-License-Identifier: Apache-2.0
 *
 * Computers only: the kernels of the best instruction set that this processor has. The environment variable KESTREL_ISA
 * (portable, avx2, avx512, neon) asks for a lower one; what the processor lacks is never used. All give the same bits.
 */
#include "kestrel_isa.h"

#include <stddef.h>

#ifdef KESTREL_SIMD
#include <stdlib.h>
#include <string.h>

static const kestrel_kernels *choose(void) {
    const char *const wanted = getenv("KESTREL_ISA");
    if (wanted != NULL && strcmp(wanted, "portable") == 0) {
        return &kestrel_kernels_portable;
    }
#ifdef KESTREL_X86
    __builtin_cpu_init();
    if ((wanted == NULL || strcmp(wanted, "avx2") != 0) && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni")) {
        return &kestrel_kernels_avx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        return &kestrel_kernels_avx2;
    }
#endif
#ifdef KESTREL_NEON
    return &kestrel_kernels_neon;
#else
    return &kestrel_kernels_portable;
#endif
}

/* Models of several threads may choose at the same time; all of them choose the same table. */
static const kestrel_kernels *kernels(void) {
    static const kestrel_kernels *chosen;
#ifdef __GNUC__
    const kestrel_kernels *found = __atomic_load_n(&chosen, __ATOMIC_RELAXED);
    if (found == NULL) {
        found = choose();
        __atomic_store_n(&chosen, found, __ATOMIC_RELAXED);
    }
    return found;
#else
    return chosen == NULL ? chosen = choose() : chosen;
#endif
}

#define DISPATCH(name, parameters, arguments)                                                                       \
    void kestrel_##name parameters { kernels()->name arguments; }

KESTREL_KERNELS(DISPATCH)
#endif
