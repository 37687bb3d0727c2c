/*
 * Products by shifts and additions.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef KESTREL_SHIFT_ADD_H
#define KESTREL_SHIFT_ADD_H

#include <stdint.h>

/* x * factor, modulo 2^32: one shift, and at most one addition, for each digit of the factor. */
static inline int32_t kestrel_times(int32_t x, uint32_t factor)
{
    uint32_t product = 0, shifted = (uint32_t)x;
    while (factor) {
        if (factor & 1) {
            product += shifted;
        }
        shifted <<= 1;
        factor >>= 1;
    }
    return (int32_t)product;
}

#endif
