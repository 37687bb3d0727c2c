/* SPDX-License-Identifier: Apache-2.0
 *
 * Classifies clips on a computer: model <features file | clip.wav | ->...
 *
 * A features file holds int16, little-endian, MODEL_FEATURES of them per clip, any number of clips; - reads them from
 * standard input. A .wav file (16 bits, mono) is one clip, where the model was exported with a front end. Output, one
 * line per clip: number, class, its name, logits, separated by tabs (logits by blanks).
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kestrel.h"
#include "model.h"
#ifdef KESTREL_MODEL_CLIP_SAMPLES
#include "wav.h"
#endif

static int16_t features[KESTREL_MODEL_FEATURES];
static long clips;

#ifdef KESTREL_TRACE
/* Every tensor goes to the file "trace" as int32: number, count, values. */
static FILE *trace_file;

void kestrel_trace(int32_t tensor, const void *values, int bits, int32_t count) {
    int32_t i;
    fwrite(&tensor, sizeof tensor, 1, trace_file);
    fwrite(&count, sizeof count, 1, trace_file);
    for (i = 0; i < count; i++) {
        const int32_t value = bits == 8    ? ((const int8_t *)values)[i]
                              : bits == 16 ? ((const int16_t *)values)[i]
                                           : ((const int32_t *)values)[i];
        fwrite(&value, sizeof value, 1, trace_file);
    }
}
#endif

static void classify(void) {
    int32_t logits[KESTREL_MODEL_LOGITS], found, i;
#ifdef KESTREL_MODEL_CLASS_NAMES
    static const char *const names[KESTREL_MODEL_LOGITS] = KESTREL_MODEL_CLASS_NAMES;
#endif
    kestrel_model_run(features, logits);
    found = kestrel_argmax(logits, 32, KESTREL_MODEL_LOGITS);
#ifdef KESTREL_MODEL_CLASS_NAMES
    printf("%ld\t%ld\t%s\t", clips++, (long)found, names[found]);
#else
    printf("%ld\t%ld\t-\t", clips++, (long)found);
#endif
    for (i = 0; i < KESTREL_MODEL_LOGITS; i++) {
        printf("%s%ld", i ? " " : "", (long)logits[i]);
    }
    putchar('\n');
}

static int read_features(FILE *file, const char *name) {
    static uint8_t bytes[2 * KESTREL_MODEL_FEATURES];
    size_t held;
    int32_t i;
    while ((held = fread(bytes, 1, sizeof bytes, file)) == sizeof bytes) {
        for (i = 0; i < KESTREL_MODEL_FEATURES; i++) {
            const int32_t code = bytes[2 * i] | bytes[2 * i + 1] << 8;
            features[i] = (int16_t)(code < 32768 ? code : code - 65536);
        }
        classify();
    }
    if (held != 0 || ferror(file)) {
        fprintf(stderr, "%s: %lu bytes left over, a clip has %lu: give int16 features of this model\n", name,
                (unsigned long)held, (unsigned long)sizeof bytes);
        return 1;
    }
    return 0;
}

static int is_wav(const char *name) {
    const size_t length = strlen(name);
    return length > 4 && strcmp(name + length - 4, ".wav") == 0;
}

static int run(const char *name) {
    FILE *file;
    int failed;
    if (strcmp(name, "-") == 0) {
        return read_features(stdin, "standard input");
    }
    file = fopen(name, "rb");
    if (file == NULL) {
        fprintf(stderr, "%s: cannot be read\n", name);
        return 1;
    }
    if (is_wav(name)) {
#ifdef KESTREL_MODEL_CLIP_SAMPLES
        failed = kestrel_wav_features(file, name, features);
        if (!failed) {
            classify();
        }
#else
        fprintf(stderr, "%s: this model was exported without a front end, give it features\n", name);
        failed = 1;
#endif
    } else {
        failed = read_features(file, name);
    }
    fclose(file);
    return failed;
}

int main(int count, char **names) {
    int i, failed = 0;
    if (count < 2) {
        fprintf(stderr, "usage: %s <features.i16 | clip.wav | -> ...\n", names[0]);
        return 2;
    }
#ifdef KESTREL_TRACE
    trace_file = fopen("trace", "wb");
    if (trace_file == NULL) {
        fprintf(stderr, "trace: cannot be written\n");
        return 1;
    }
#endif
    for (i = 1; i < count; i++) {
        failed |= run(names[i]);
    }
#ifdef KESTREL_TRACE
    failed |= fclose(trace_file) != 0;
#endif
    return failed;
}
