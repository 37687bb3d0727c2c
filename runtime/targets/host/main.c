/* SPDX-License-Identifier: Apache-2.0
 *
 * Classifies clips on a computer: model [-s] [-f FILE] <features file | clip.wav | -> ...
 *
 * A features file holds int16, little-endian, MODEL_FEATURES of them per clip, any number of clips; - reads them from
 * standard input. A .wav file (16 bits, mono) is one clip, where the model was exported with a front end; with -s the other
 * files hold samples instead of features, int16 as well, MODEL_CLIP_SAMPLES per clip. Output, one line per clip: number,
 * class, its name, logits, separated by tabs (logits by blanks). -f writes the features of all clips into a file.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kestrel.h"
#include "model.h"
#ifdef KESTREL_MODEL_CLIP_SAMPLES
#include "sound.h"
#include "wav.h"
static int16_t samples[KESTREL_MODEL_CLIP_SAMPLES];
#endif

static int16_t features[KESTREL_MODEL_FEATURES];
static long clips;
static int from_samples;
static FILE *features_file;

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
    if (features_file != NULL) {
        for (i = 0; i < KESTREL_MODEL_FEATURES; i++) {
            putc(features[i] & 255, features_file);
            putc(features[i] >> 8 & 255, features_file);
        }
    }
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

/* Reads `count` values; returns 1, 0 at the end of the file, or -1 after one line on stderr. */
static int read_values(FILE *file, const char *name, int16_t *values, int32_t count) {
    int32_t i;
    for (i = 0; i < count; i++) {
        const int low = getc(file), high = getc(file);
        if (high == EOF) {
            if (i == 0 && low == EOF && !ferror(file)) {
                return 0;
            }
            fprintf(stderr, "%s: ends within a clip, which has %ld bytes: give int16 %s of this model\n", name,
                    2L * count, from_samples ? "samples" : "features");
            return -1;
        }
        values[i] = (int16_t)(high < 128 ? low | high << 8 : (low | high << 8) - 65536);
    }
    return 1;
}

static int read_clips(FILE *file, const char *name) {
    int more;
#ifdef KESTREL_MODEL_CLIP_SAMPLES
    if (from_samples) {
        while ((more = read_values(file, name, samples, KESTREL_MODEL_CLIP_SAMPLES)) > 0) {
            kestrel_sound_features(samples, features);
            classify();
        }
        return more != 0;
    }
#endif
    while ((more = read_values(file, name, features, KESTREL_MODEL_FEATURES)) > 0) {
        classify();
    }
    return more != 0;
}

static int is_wav(const char *name) {
    const size_t length = strlen(name);
    return length > 4 && strcmp(name + length - 4, ".wav") == 0;
}

static int run(const char *name) {
    FILE *file;
    int failed;
    if (strcmp(name, "-") == 0) {
        return read_clips(stdin, "standard input");
    }
    file = fopen(name, "rb");
    if (file == NULL) {
        fprintf(stderr, "%s: cannot be read\n", name);
        return 1;
    }
    if (is_wav(name)) {
#ifdef KESTREL_MODEL_CLIP_SAMPLES
        failed = kestrel_wav_samples(file, name, samples);
        if (!failed) {
            kestrel_sound_features(samples, features);
            classify();
        }
#else
        fprintf(stderr, "%s: this model was exported without a front end, give it features\n", name);
        failed = 1;
#endif
    } else {
        failed = read_clips(file, name);
    }
    fclose(file);
    return failed;
}

static int usage(const char *name) {
    fprintf(stderr, "usage: %s [-s] [-f features.i16] <features.i16 | clip.wav | -> ...\n", name);
    return 2;
}

int main(int count, char **names) {
    int i, failed = 0;
    for (i = 1; i < count && names[i][0] == '-' && names[i][1] != '\0'; i++) {
        if (strcmp(names[i], "-s") == 0) {
#ifndef KESTREL_MODEL_CLIP_SAMPLES
            fprintf(stderr, "-s: this model was exported without a front end, give it features\n");
            return 1;
#endif
            from_samples = 1;
        } else if (strcmp(names[i], "-f") == 0 && i + 1 < count && features_file == NULL) {
            features_file = fopen(names[++i], "wb");
            if (features_file == NULL) {
                fprintf(stderr, "%s: cannot be written\n", names[i]);
                return 1;
            }
        } else {
            return usage(names[0]);
        }
    }
    if (i == count) {
        return usage(names[0]);
    }
#ifdef KESTREL_TRACE
    trace_file = fopen("trace", "wb");
    if (trace_file == NULL) {
        fprintf(stderr, "trace: cannot be written\n");
        return 1;
    }
#endif
    for (; i < count; i++) {
        failed |= run(names[i]);
    }
#ifdef KESTREL_TRACE
    failed |= fclose(trace_file) != 0;
#endif
    if (features_file != NULL) {
        const int broken = ferror(features_file);
        if (fclose(features_file) != 0 || broken) {
            fprintf(stderr, "-f: the features cannot be written\n");
            failed = 1;
        }
    }
    return failed;
}
