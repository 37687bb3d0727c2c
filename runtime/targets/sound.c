/* SPDX-License-Identifier: Apache-2.0
 *
 * The fixed-point front end in front of a model.
 */
#include "sound.h"

#include <stddef.h>

#include "kestrel_frontend.h"
#include "model.h"

enum { FRAMES = KESTREL_MODEL_FEATURES / KFE_WIDTH, SHIFT = KESTREL_MODEL_FEATURE_SHIFT };

/* Frames go into the model as they come, unless a clip's loudest frame decides about all of them (top_db). The model may
 * take several frames of the front end at a time. */
#if KFE_TOP_CODES == 0 && defined(KESTREL_MODEL_FRAME_VALUES)
#define BY_FRAMES (KESTREL_MODEL_FRAME_VALUES % KFE_WIDTH == 0 && KESTREL_MODEL_FIRST_VALUE % KFE_WIDTH == 0)
#else
#define BY_FRAMES 0
#endif

static kestrel_frontend front_end;
#if KFE_TOP_CODES > 0
static int16_t clip_logs[FRAMES * KFE_BANDS];
static int32_t highest;
#else
static int16_t *const clip_logs = NULL;
#endif
#if BY_FRAMES
static int16_t frame[KESTREL_MODEL_FRAME_VALUES];
#else
static int16_t clip_features[KESTREL_MODEL_FEATURES];
#endif
static int32_t frames; /* so far */

/* A code of the front end in steps of the model: x / 2^SHIFT, half to even, saturated. */
static int16_t rescaled(int32_t x) {
#if KESTREL_MODEL_FEATURE_SHIFT > 0
    x = (x + (((int32_t)1 << (SHIFT - 1)) - 1) + (x >> SHIFT & 1)) >> SHIFT;
#else
    x *= (int32_t)1 << -SHIFT;
#endif
    return (int16_t)(x < -32768 ? -32768 : x > 32767 ? 32767 : x);
}

static void rescale(int16_t *features, int32_t count) {
    int32_t i;
    for (i = 0; i < count; i++) {
        features[i] = rescaled(features[i]);
    }
}

void kestrel_sound_features(const int16_t *samples, int16_t *features) {
    kestrel_frontend_clip(&front_end, samples, KESTREL_MODEL_CLIP_SAMPLES, clip_logs, features);
    rescale(features, KESTREL_MODEL_FEATURES);
}

void kestrel_sound_start(void) {
    frames = 0;
    kestrel_frontend_start(&front_end);
#if BY_FRAMES
    kestrel_model_init();
#elif KFE_TOP_CODES > 0
    highest = KESTREL_FRONTEND_NO_FLOOR;
#endif
}

/* The front end has the logs of the next frame. */
static void take_frame(void) {
#if BY_FRAMES
    const int32_t place = frames * KFE_WIDTH - KESTREL_MODEL_FIRST_VALUE;
    if (place >= 0) {
        int16_t *const part = frame + place % KESTREL_MODEL_FRAME_VALUES;
        kestrel_frontend_features(front_end.logs, KESTREL_FRONTEND_NO_FLOOR, part);
        rescale(part, KFE_WIDTH);
        if ((place + KFE_WIDTH) % KESTREL_MODEL_FRAME_VALUES == 0) {
            kestrel_model_push_frame(frame);
        }
    }
#elif KFE_TOP_CODES > 0
    int32_t i;
    for (i = 0; i < KFE_BANDS; i++) {
        const int16_t value = front_end.logs[i];
        clip_logs[frames * KFE_BANDS + i] = value;
        highest = value > highest ? value : highest;
    }
#else
    kestrel_frontend_features(front_end.logs, KESTREL_FRONTEND_NO_FLOOR, clip_features + frames * KFE_WIDTH);
#endif
    frames++;
}

void kestrel_sound_push(const int16_t *samples, int32_t count) {
    if (kestrel_frontend_push(&front_end, samples, count) != 0 && frames < FRAMES) {
        take_frame();
    }
}

void kestrel_sound_finish(int32_t *logits) {
    static const int16_t none = 0;
    while (frames < FRAMES) {
        kestrel_sound_push(&none, 0); /* the front end makes up what follows the clip's end */
    }
#if BY_FRAMES
    kestrel_model_finish(logits);
#else
#if KFE_TOP_CODES > 0
    {
        const int32_t floor = kestrel_frontend_floor(highest);
        int32_t t;
        for (t = 0; t < FRAMES; t++) {
            kestrel_frontend_features(clip_logs + t * KFE_BANDS, floor, clip_features + t * KFE_WIDTH);
        }
    }
#endif
    rescale(clip_features, KESTREL_MODEL_FEATURES);
    kestrel_model_run(clip_features, logits);
#endif
}
