/*
 * Runs the front end for the tests. On a host: `driver clip|stream CLIPS SAMPLES` reads int16 clips from stdin and writes the
 * features, and in mode stream also the logs before them, to stdout. With EMBEDDED: prints a checksum of the features of the
 * clip in clip.h, and on RISC-V the instructions per frame.
 */
#include "kestrel_frontend.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef EMBEDDED
#include "clip.h"

static kestrel_frontend frontend;
static int16_t logs[FRAMES * KFE_BANDS], features[FRAMES * KFE_WIDTH];

static uint32_t instructions(void)
{
    uint32_t count = 0;
#ifdef __riscv
    __asm__ volatile(".option push\n.option arch, +zicsr\ncsrr %0, minstret\n.option pop" : "=r"(count));
#endif
    return count;
}

int main(void)
{
    const uint32_t start = instructions();
    const int32_t frames = kestrel_frontend_clip(&frontend, clip, SAMPLES, logs, features);
    const uint32_t used = instructions() - start;
    uint32_t sum = 2166136261u; /* FNV-1a over the features, low byte first */
    int32_t place;
    for (place = 0; place < frames * KFE_WIDTH; place++) {
        const uint16_t code = (uint16_t)features[place];
        sum = (sum ^ (code & 255u)) * 16777619u;
        sum = (sum ^ (code >> 8)) * 16777619u;
    }
    printf("frames %d checksum %08lx instructions %lu\n", (int)frames, (unsigned long)sum, (unsigned long)(used / FRAMES));
    return 0;
}

#else

static int32_t stream(kestrel_frontend *fe, const int16_t *clip, int32_t samples, int16_t *logs, int16_t *features)
{
    const int32_t frames = kestrel_frontend_frames(samples);
    int32_t frame = 0, place, highest = -32768;
    kestrel_frontend_start(fe);
    while (frame < frames) {
        int16_t block[KFE_HOP]; /* as it would come from a microphone: not from the clip's memory */
        const int32_t count = samples < KFE_HOP ? samples : KFE_HOP;
        memcpy(block, clip, (size_t)count * sizeof block[0]);
        clip += count;
        samples -= count;
        if (kestrel_frontend_push(fe, block, count)) {
            memcpy(logs + frame * KFE_BANDS, fe->logs, sizeof fe->logs);
            frame++;
        }
    }
    for (place = 0; place < frames * KFE_BANDS; place++) {
        highest = logs[place] > highest ? logs[place] : highest;
    }
    for (frame = 0; frame < frames; frame++) {
        kestrel_frontend_features(logs + frame * KFE_BANDS, kestrel_frontend_floor(highest), features + frame * KFE_WIDTH);
    }
    return frames;
}

int main(int argc, char **argv)
{
    kestrel_frontend *fe = malloc(sizeof *fe);
    const int32_t clips = argc == 4 ? atoi(argv[2]) : 0, samples = argc == 4 ? atoi(argv[3]) : 0;
    const int streaming = argc == 4 && strcmp(argv[1], "stream") == 0;
    const int32_t frames = kestrel_frontend_frames(samples);
    const size_t rows = frames > 0 ? (size_t)frames : 1;
    int16_t *clip = malloc((size_t)(samples > 0 ? samples : 1) * sizeof *clip);
    int16_t *logs = malloc(rows * KFE_BANDS * sizeof *logs), *features = malloc(rows * KFE_WIDTH * sizeof *features);
    int32_t number, failed = 0;
    memset(fe, 0xA5, sizeof *fe);
    for (number = 0; number < clips && !failed; number++) {
        int32_t done;
        failed |= fread(clip, sizeof *clip, (size_t)samples, stdin) != (size_t)samples;
        if (streaming) {
            done = stream(fe, clip, samples, logs, features);
            failed |= fwrite(logs, sizeof *logs, rows * KFE_BANDS, stdout) != rows * KFE_BANDS;
        } else {
            done = kestrel_frontend_clip(fe, clip, samples, KFE_TOP_CODES > 0 ? logs : NULL, features);
        }
        failed |= done != frames || frames < 1;
        failed |= fwrite(features, sizeof *features, rows * KFE_WIDTH, stdout) != rows * KFE_WIDTH;
    }
    free(fe);
    free(clip);
    free(logs);
    free(features);
    return failed;
}

#endif
