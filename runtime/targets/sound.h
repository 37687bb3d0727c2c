/* SPDX-License-Identifier: Apache-2.0
 *
 * Sound into a model: the fixed-point front end in front of kestrel_model. One clip at a time, static memory.
 */
#ifndef KESTREL_SOUND_H
#define KESTREL_SOUND_H

#include <stdint.h>

/* Features [KESTREL_MODEL_FEATURES] of a whole clip of KESTREL_MODEL_CLIP_SAMPLES samples. */
void kestrel_sound_features(const int16_t *samples, int16_t *features);

/*
 * The same clip as it comes from a microphone, and the logits [KESTREL_MODEL_LOGITS] behind it: start, then push KFE_HOP
 * samples at a time until KESTREL_MODEL_CLIP_SAMPLES have come (the last block may hold fewer), then finish.
 * A model that takes frames one by one runs during the pushes and stores no features.
 */
void kestrel_sound_start(void);
void kestrel_sound_push(const int16_t *samples, int32_t count);
void kestrel_sound_finish(int32_t *logits);

#endif
