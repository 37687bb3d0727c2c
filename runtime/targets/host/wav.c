/* SPDX-License-Identifier: Apache-2.0
 *
 * Reads wav files.
 */
#include "wav.h"

#include <string.h>

#include "kestrel_frontend.h"
#include "model.h"

static int refuse(const char *name, const char *reason) {
    fprintf(stderr, "%s: %s\n", name, reason);
    return 1;
}

static uint32_t number(const uint8_t *bytes, int count) {
    uint32_t value = 0;
    while (count-- > 0) {
        value = value << 8 | bytes[count];
    }
    return value;
}

int kestrel_wav_samples(FILE *file, const char *name, int16_t *samples) {
    uint8_t head[16];
    uint32_t size, i;
    int known = 0;
    if (fread(head, 1, 12, file) != 12 || memcmp(head, "RIFF", 4) != 0 || memcmp(head + 8, "WAVE", 4) != 0) {
        return refuse(name, "is not a wav file");
    }
    while (fread(head, 1, 8, file) == 8) {
        size = number(head + 4, 4);
        if (memcmp(head, "data", 4) == 0) {
            break;
        }
        if (memcmp(head, "fmt ", 4) == 0) {
            const int held = size >= 16 && fread(head, 1, 16, file) == 16;
            const uint32_t format = held ? number(head, 2) : 0;
            if (!held || (format != 1 && format != 0xFFFE) || number(head + 2, 2) != 1 || number(head + 14, 2) != 16) {
                return refuse(name, "is not 16-bit PCM with one channel");
            }
            if (number(head + 4, 4) != KFE_SAMPLE_RATE) {
                fprintf(stderr, "%s: has %lu samples per second, the model takes %d\n", name,
                        (unsigned long)number(head + 4, 4), KFE_SAMPLE_RATE);
                return 1;
            }
            known = 1;
            size -= 16;
        }
        for (i = 0; i < size + (size & 1u); i++) { /* chunks begin at even bytes */
            if (getc(file) == EOF) {
                return refuse(name, "ends too early");
            }
        }
        head[0] = 0;
    }
    if (!known || memcmp(head, "data", 4) != 0) {
        return refuse(name, "has no sound");
    }
    size /= 2;
    if (size == 0 || size > KESTREL_MODEL_CLIP_SAMPLES) {
        fprintf(stderr, "%s: has %lu samples, the model takes 1 to %d\n", name, (unsigned long)size,
                KESTREL_MODEL_CLIP_SAMPLES);
        return 1;
    }
    memset(samples, 0, KESTREL_MODEL_CLIP_SAMPLES * sizeof samples[0]);
    for (i = 0; i < size; i++) {
        uint8_t bytes[2];
        int32_t value;
        if (fread(bytes, 1, 2, file) != 2) {
            return refuse(name, "ends too early");
        }
        value = (int32_t)number(bytes, 2);
        samples[(KESTREL_MODEL_CLIP_SAMPLES - size) / 2 + i] = (int16_t)(value < 32768 ? value : value - 65536);
    }
    return 0;
}
