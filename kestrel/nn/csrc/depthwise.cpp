// Depthwise convolution of images whose clips lie innermost, [C, H, W, N]: forward pass and both gradients. A channel of an
// image may have several results, each with a kernel of its own; the gradient of an image is that of each result by itself.
//
// Every place of a map is a row of N numbers, so that a kernel element is one multiplication of a whole row and zeros around
// the image cost nothing: they are left out. A channel is one task: results do not depend on threads.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "instruction_set.h"

// Mirrors kestrel.nn.depthwise.Shape. All tensors are contiguous float32; batch >= 16.
struct Shape {
  int64_t channels, batch, height, width, out_height, out_width;  // channels: of the result
  int64_t results;                                                // of each channel of the image
  int64_t kernel_height, kernel_width, stride_height, stride_width, pad_height, pad_width;
};

namespace {

constexpr int REGISTERS = 8;  // that hold sums

// For each place of a result: the places that it is a sum of, and the kernel elements that multiply them.
struct Sums {
  std::vector<int32_t> ends, places, taps;
};

// Calls found(result, image, tap) for all products, result being the place of the convolution's result.
template <class Found> void products(const Shape &s, Found found) {
  for (int64_t oh = 0; oh < s.out_height; oh++)
    for (int64_t ow = 0; ow < s.out_width; ow++)
      for (int64_t i = 0; i < s.kernel_height; i++)
        for (int64_t j = 0; j < s.kernel_width; j++) {
          const int64_t h = oh * s.stride_height - s.pad_height + i, w = ow * s.stride_width - s.pad_width + j;
          if (h >= 0 && h < s.height && w >= 0 && w < s.width)
            found(oh * s.out_width + ow, h * s.width + w, i * s.kernel_width + j);
        }
}

Sums sums_of_result(const Shape &s) {
  Sums sums;
  sums.ends.assign(s.out_height * s.out_width, 0);
  products(s, [&](int64_t result, int64_t image, int64_t tap) {
    sums.places.push_back(image), sums.taps.push_back(tap);
    sums.ends[result] = sums.places.size();
  });
  for (size_t i = 1; i < sums.ends.size(); i++) sums.ends[i] = std::max(sums.ends[i], sums.ends[i - 1]);
  return sums;
}

Sums sums_of_image(const Shape &s) {
  Sums sums;
  sums.ends.assign(s.height * s.width + 1, 0);
  products(s, [&](int64_t, int64_t image, int64_t) { sums.ends[image + 1]++; });
  for (size_t i = 1; i < sums.ends.size(); i++) sums.ends[i] += sums.ends[i - 1];
  std::vector<int32_t> next(sums.ends.begin(), sums.ends.end() - 1);
  sums.places.resize(sums.ends.back()), sums.taps.resize(sums.ends.back());
  products(s, [&](int64_t result, int64_t image, int64_t tap) {
    const int32_t at = next[image]++;
    sums.places[at] = result, sums.taps[at] = tap;
  });
  sums.ends.erase(sums.ends.begin());
  return sums;
}

struct Loops {
  void (*gather)(const Sums &sums, const float *from, const float *kernel, float *to, int64_t batch);
  void (*to_kernel)(const Shape &s, const float *grad, const float *image, float *to);
};

namespace baseline {
constexpr int LANES = 4;
typedef float Vector __attribute__((vector_size(16)));
#define MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
#include "depthwise_loops.inc"
#undef MULTIPLY_ADD
}  // namespace baseline

#ifdef KESTREL_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr int LANES = 8;
typedef __m256 Vector;
#define MULTIPLY_ADD(a, b, c) _mm256_fmadd_ps(a, b, c)
#include "depthwise_loops.inc"
#undef MULTIPLY_ADD
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
namespace avx512 {
constexpr int LANES = 16;
typedef __m512 Vector;
#define MULTIPLY_ADD(a, b, c) _mm512_fmadd_ps(a, b, c)
#include "depthwise_loops.inc"
#undef MULTIPLY_ADD
}  // namespace avx512
#pragma GCC pop_options
#endif

const Loops &loops() {
  static const Loops &chosen = KESTREL_LOOPS;
  return chosen;
}

// Images of one column lie in memory like images of one row, whose kernel elements can share what they multiply.
Shape turned(const Shape &s) {
  if (s.width != 1 || s.kernel_width != 1) return s;
  return {s.channels, s.batch, 1, s.height, 1, s.out_height, s.results, 1, s.kernel_height, 1, s.stride_height, 0, s.pad_height};
}

void gather(const Shape &s, const Sums &sums, const float *from, int64_t shared, int64_t from_area, const float *kernel,
            float *to, int64_t to_area) {
  const int64_t taps = s.kernel_height * s.kernel_width;
  at::parallel_for(0, s.channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c++)
      loops().gather(sums, from + c / shared * from_area * s.batch, kernel + c * taps, to + c * to_area * s.batch,
                     s.batch);
  });
}

}  // namespace

extern "C" {

void kestrel_depthwise(const Shape *s, const float *image, const float *kernel, float *result) {
  gather(*s, sums_of_result(*s), image, s->results, s->height * s->width, kernel, result, s->out_height * s->out_width);
}

void kestrel_depthwise_to_image(const Shape *s, const float *grad, const float *kernel, float *to) {
  gather(*s, sums_of_image(*s), grad, 1, s->out_height * s->out_width, kernel, to, s->height * s->width);
}

void kestrel_depthwise_to_kernel(const Shape *given, const float *grad, const float *image, float *to) {
  const Shape s = turned(*given);
  const int64_t taps = s.kernel_height * s.kernel_width;
  at::parallel_for(0, s.channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c++)
      loops().to_kernel(s, grad + c * s.out_height * s.out_width * s.batch,
                        image + c / s.results * s.height * s.width * s.batch, to + c * taps);
  });
}
}
