/* SPDX-License-Identifier: Apache-2.0
 *
 * What the files of kernels share.
 */
#ifndef KESTREL_INNER_H
#define KESTREL_INNER_H

#include "kestrel.h"

#include <stddef.h>
#include <string.h>

static inline int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }

/* Element `at` of an array of `bits`. */
static inline const void *element(const void *x, int bits, int32_t at) {
    return (const uint8_t *)x + (ptrdiff_t)at * (bits / 8);
}

/* The part first .. last - 1 of a kernel of `size` at `start` that lies inside 0 .. length - 1. */
static inline void inside(int32_t start, int32_t size, int32_t length, int32_t *first, int32_t *last) {
    *first = start < 0 ? -start : 0;
    *last = smaller(size, length - start);
}

#endif
