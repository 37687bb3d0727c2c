// Forward and backward pass of N quantised LSTM blocks over a whole sequence (equations: kestrel/nn/quant_lstm.py).
//
// One task = one block and one slice of the batch. A task runs its whole sequence with single-threaded matrix products
// and fused element-wise loops, so threads never wait for each other inside a sequence. Slices depend on the problem and
// not on the number of threads, and partial sums are added in a fixed order: results do not depend on threads.
//
// Sigmoid and tanh act on values that are already quantised, so they are tables over the codes, made by PyTorch itself.
// The forward pass keeps one code and one byte of clipping flags per gate; the backward pass recomputes the rest.
//
// Compiled with -ffp-contract=off: products and sums round as in PyTorch's separate operators, on every machine.

#include <ATen/Parallel.h>
#ifndef KESTREL_SGEMM
#include <ATen/ATen.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__linux__)
#include <dlfcn.h>
#endif

#define INLINE static inline __attribute__((always_inline))

// Vector code for several instruction sets in one library; the loader takes the widest one that the processor has.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define VECTORISED __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define VECTORISED
#endif

namespace {

enum Range { A1, A3, A4, A5, A6, A7, A8, A9, A10, A11, A12, A13, A14, RANGES };
enum Table { FORGET, KEEP, CANDIDATE, OUT, CELL, TABLES };

constexpr int64_t LINE = 16;        // floats of a cache line
constexpr float SATURATED = -1.0f;  // entry of a slope table where the value is clipped

}  // namespace

// Mirrors kestrel.nn.native.Problem. All tensors are contiguous float32.
struct Problem {
  int64_t blocks, batch, steps, input, hidden, slices, chunk;
  int64_t inp_bits, mvm_bits, nm_bits;  // 0 = analog
  int64_t keep;                         // whether a backward pass will follow
  double noise;                         // standard deviation of the weight noise
  uint64_t seed;
  const float *x;                   // [B, T, I]
  const float *w_ih, *w_hh;         // forward weights [N, I, 4H], [N, H, 4H]
  const float *b_ih, *b_hh;         // forward biases [N, 4H]
  const float *back_ih, *back_hh;   // weights that the gradient sees
  const float *ranges;              // [13, N]
  const float *value, *slope;       // [5, N, 2^nm] quantised value and masked derivative of each gate and of tanh c
  void *saved, *scratch;            // saved_bytes, scratch_bytes; 64-byte aligned
  float *h;                         // [N, B, H]
  const float *grad_h;              // [N, B, H]
  float *d_ih, *d_hh;               // [N, I, 4H], [N, H, 4H]
  float *db_ih, *db_hh;             // [N, 4H]
  double *d_ranges;                 // [13, N]
  float *d_x;                       // [N, B, T, I] or null
};

namespace {

INLINE int64_t padded(int64_t count) { return (count + LINE - 1) / LINE * LINE; }

// ---- element-wise numerics -------------------------------------------------------------------------------------------

// Round half to even for |x| < 2^22; needs no instruction beyond add, so every instruction set vectorises it.
INLINE float round_even(float x) {
  const float shift = 12582912.0f;
  return (x + shift) - shift;
}

INLINE float clamp(float x, float low, float high) { return std::min(std::max(x, low), high); }

// A clipping quantiser of given bits over +-range.
struct Levels {
  float range, half, inverse_half, bound;
  Levels(float range_, int64_t bits)
      : range(range_), half(bits ? float(int64_t(1) << (bits - 1)) : 0), inverse_half(bits ? 1 / half : 0),
        bound(bits ? 1 - inverse_half : 0) {}
};

template <bool Quantised> INLINE float code_of(float x, const Levels &q) {
  return round_even(clamp(x / q.range, -q.bound, q.bound) * q.half);
}
INLINE float value_of(float code, const Levels &q) { return code * q.inverse_half * q.range; }

template <bool Quantised> INLINE float quantise(float x, const Levels &q) {
  return Quantised ? value_of(code_of<true>(x, q), q) : clamp(x, -q.range, q.range);
}

// Two flags: above the range, below it.
INLINE int clipped(float x, float range) { return int(x > range) | int(x < -range) << 1; }
INLINE float sign_of(int flags) { return float(flags & 1) - float(flags >> 1 & 1); }

INLINE float exp_approx(float x) {  // relative error < 2e-7 for |x| <= 87; Cody-Waite reduction, minimax polynomial
  x = clamp(x, -87.0f, 87.0f);
  const float n = round_even(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const int32_t bits = (int32_t(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return p * scale;
}
INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp_approx(-x)); }
INLINE float tanh_approx(float x) {
  const float far = 1.0f - 2.0f / (exp_approx(2.0f * x) + 1.0f);
  const float z = x * x;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z + -5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z + -3.33332819422e-1f;
  const float near = p * z * x + x;
  return std::fabs(x) < 0.625f ? near : far;
}

// ---- weight noise ----------------------------------------------------------------------------------------------------

INLINE uint64_t mix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}
INLINE uint32_t mix32(uint32_t counter, uint32_t key0, uint32_t key1) {
  uint32_t x = counter * 0x9E3779B9u + key0;
  x = (x ^ (x >> 16)) * 0x21F0AAADu;
  x = (x ^ (x >> 15)) + key1;
  x = (x ^ (x >> 16)) * 0x735A2D97u;
  x = (x ^ (x >> 15)) * 0x85EBCA6Bu;
  return x ^ (x >> 16);
}
INLINE float log_unit(float x) {  // natural logarithm of 2^-24 <= x <= 1
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  float exponent = float((bits >> 23) - 126);
  bits = (bits & 0x007FFFFF) | 0x3F000000;
  float m;  // in [0.5, 1)
  std::memcpy(&m, &bits, 4);
  const bool low = m < 0.70710678f;
  exponent = low ? exponent - 1.0f : exponent;
  m = (low ? m + m : m) - 1.0f;
  const float z = m * m;
  float p = 7.0376836292e-2f;
  p = p * m + -1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m + -1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m + -1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m + -2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  return (p * m * z + exponent * -2.12194440e-4f - 0.5f * z) + m + exponent * 0.693359375f;
}

// to[i] = from[i] + deviation * normal(i) for two halves of `pairs` entries each: Box-Muller on counter-based bits.
VECTORISED void add_normal(const float *from, float *to, int64_t pairs, uint32_t key0,
                           uint32_t key1, float deviation) {
  const float *from2 = from + pairs;
  float *to2 = to + pairs;
  const int32_t count = int32_t(pairs);
#pragma omp simd
  for (int32_t i = 0; i < count; i++) {
    const uint32_t a = mix32(2u * uint32_t(i), key0, key1), b = mix32(2u * uint32_t(i) + 1u, key0, key1);
    const float u = float(int32_t(a >> 8) + 1) * 5.9604644775390625e-8f;  // (0, 1], steps of 2^-24
    const float radius = deviation * std::sqrt(-2.0f * log_unit(u));
    // The angle is (quadrant + t) quarter turns with |t| <= 1/2.
    const float t = (float(int32_t(b & 0x3FFFFFFFu)) - 536870912.0f) * (1.57079633f / 1073741824.0f);
    const float z = t * t;
    const float sine = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z + -1.6666654611e-1f) * z * t + t;
    const float cosine = ((2.443315711809948e-5f * z + -1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z -
                         0.5f * z + 1.0f;
    const bool swap = (b >> 30 & 1u) != 0;
    const float first = (swap ? sine : cosine) * radius, second = (swap ? cosine : sine) * radius;
    const float turn = (b >> 31) != 0 ? -1.0f : 1.0f;
    to[i] = from[i] + turn * first;
    to2[i] = from2[i] + (swap ? -turn : turn) * second;
  }
}

// Fresh noise on weights [rows, columns] and the bias row after them.
void noisy_weights(const Problem &p, int64_t block, int64_t step, int product, const float *from, float *to,
                   int64_t count) {
  const uint64_t key = mix64(p.seed ^ mix64(uint64_t((block * p.steps + step) * 2 + product)));
  add_normal(from, to, count / 2, uint32_t(key), uint32_t(key >> 32), float(p.noise));
}

// ---- forward loops ---------------------------------------------------------------------------------------------------

// x (one time step of a slice, rows `stride` apart) to crossbar inputs with a constant 1 for the bias row.
template <bool Inp>
INLINE int input_body(const float *__restrict x, int64_t stride, int64_t rows, int64_t width, const Levels &q,
                      float *__restrict to, int64_t to_stride) {
  int bad = 0;
  for (int64_t row = 0; row < rows; row++, x += stride, to += to_stride) {
    int row_bad = 0;
#pragma omp simd reduction(| : row_bad)
    for (int64_t i = 0; i < width; i++) {
      row_bad |= int(x[i] != x[i]);
      to[i] = quantise<Inp>(x[i], q);
    }
    to[width] = 1.0f;
    bad |= row_bad;
  }
  return bad;
}
VECTORISED int input_analog(const float *x, int64_t stride, int64_t rows, int64_t width, const Levels &q, float *to,
                            int64_t to_stride) {
  return input_body<false>(x, stride, rows, width, q, to, to_stride);
}
VECTORISED int input_quantised(const float *x, int64_t stride, int64_t rows, int64_t width, const Levels &q, float *to,
                               int64_t to_stride) {
  return input_body<true>(x, stride, rows, width, q, to, to_stride);
}

template <class Code> INLINE constexpr bool is_digital() { return !std::is_same<Code, float>::value; }

// Crossbar outputs of a row -> gate pre-activations as codes (values where analog) and clipping flags.
template <class Code, bool Mvm>
INLINE void gates_body(const float *__restrict raw1, const float *__restrict raw2, int64_t count, const Levels &q12,
                       const Levels &q13, const Levels &q14, Code *__restrict code, uint8_t *__restrict flags) {
#pragma omp simd
  for (int64_t e = 0; e < count; e++) {
    const float r1 = raw1[e], r2 = raw2[e];
    const float g = quantise<Mvm>(r1, q12) + quantise<Mvm>(r2, q13);
    flags[e] = uint8_t(clipped(r1, q12.range) | clipped(r2, q13.range) << 2 | clipped(g, q14.range) << 4);
    if constexpr (is_digital<Code>())
      code[e] = Code(int32_t(code_of<true>(g, q14) + q14.half));
    else
      code[e] = quantise<false>(g, q14);
  }
}

struct Cell {
  const float *value[TABLES], *slope[TABLES];
  Levels a3, a4, a5, a6, a7, a8, a9, a10, a11, a11_inp;
};

// The value that a gate or tanh c takes for a code.
template <class Code, bool Tanh> INLINE float activate(Code code, const float *table, const Levels &q) {
  if constexpr (is_digital<Code>())
    return table[code];
  else
    return quantise<false>(Tanh ? tanh_approx(code) : sigmoid(code), q);
}

// One row: codes of the gates (order i, j, f, o) and c -> new c and h, h as crossbar input, flags of clipped values.
template <class Code, bool Inp>
INLINE void cell_body(const Code *__restrict code, int64_t hidden, const Cell &cell, const Code *__restrict c_old,
                      Code *__restrict c_new, float *__restrict h, float *__restrict h_inp, uint8_t *__restrict flags) {
  constexpr bool Nm = is_digital<Code>();
  const Code *ci = code, *cj = code + hidden, *cf = code + 2 * hidden, *co = code + 3 * hidden;
#pragma omp simd
  for (int64_t u = 0; u < hidden; u++) {
    const float forget = activate<Code, false>(cf[u], cell.value[FORGET], cell.a3);
    const float keep = activate<Code, false>(ci[u], cell.value[KEEP], cell.a4);
    const float candidate = activate<Code, true>(cj[u], cell.value[CANDIDATE], cell.a5);
    const float out = activate<Code, false>(co[u], cell.value[OUT], cell.a6);
    float c;
    if constexpr (Nm)
      c = value_of(float(int32_t(c_old[u])) - cell.a9.half, cell.a9);
    else
      c = c_old[u];
    const float kept = c * forget, added = keep * candidate;
    const float sum = quantise<Nm>(kept, cell.a7) + quantise<Nm>(added, cell.a8);
    if constexpr (Nm)
      c_new[u] = Code(int32_t(code_of<true>(sum, cell.a9) + cell.a9.half));
    else
      c_new[u] = quantise<false>(sum, cell.a9);
    const float shown = activate<Code, true>(c_new[u], cell.value[CELL], cell.a10) * out;
    const float now = quantise<Nm>(shown, cell.a11);
    h[u] = now;
    h_inp[u] = quantise<Inp>(now, cell.a11_inp);
    flags[u] = uint8_t(clipped(kept, cell.a7.range) | clipped(added, cell.a8.range) << 2 |
                       clipped(sum, cell.a9.range) << 4 | clipped(shown, cell.a11.range) << 6);
  }
}

// ---- backward loops --------------------------------------------------------------------------------------------------

struct Sums {
  float of[RANGES] = {};
};

// Derivative of an activation, 0 where its range clips it; adds what the range gets to `sum`.
template <class Code, bool Tanh>
INLINE float through(float grad, Code code, float value, const float *table, const Levels &q, float &sum) {
  float slope;
  if constexpr (is_digital<Code>()) {
    slope = table[code];
  } else {
    const float plain = Tanh ? tanh_approx(code) : sigmoid(code);
    slope = std::fabs(plain) > q.range ? SATURATED : Tanh ? 1.0f - plain * plain : plain * (1.0f - plain);
  }
  const bool saturated = slope < 0.0f;
  sum += saturated ? (value < 0.0f ? -grad : grad) : 0.0f;
  return saturated ? 0.0f : grad * slope;
}

// Gradient behind a clip with the given flags; adds what the range gets to `sum`.
INLINE float behind(float grad, int flags, float &sum) {
  sum += grad * sign_of(flags);
  return (flags & 3) ? 0.0f : grad;
}

// One row, one step back. dh: gradient of h_t; dc: of c_t, replaced by that of c_{t-1}; d1, d2: of the crossbar outputs.
template <class Code>
INLINE void back_body(const Code *__restrict code, const uint8_t *__restrict gate_flags, int64_t hidden,
                      const Cell &cell, const Code *__restrict c_old, const Code *__restrict c_new,
                      const uint8_t *__restrict flags, const float *__restrict dh, float *__restrict dc,
                      float *__restrict d1, float *__restrict d2, Sums &sums) {
  const Code *ci = code, *cj = code + hidden, *cf = code + 2 * hidden, *co = code + 3 * hidden;
  const uint8_t *fi = gate_flags, *fj = gate_flags + hidden, *ff = gate_flags + 2 * hidden,
                *fo = gate_flags + 3 * hidden;
  float *d1i = d1, *d1j = d1 + hidden, *d1f = d1 + 2 * hidden, *d1o = d1 + 3 * hidden;
  float *d2i = d2, *d2j = d2 + hidden, *d2f = d2 + 2 * hidden, *d2o = d2 + 3 * hidden;
  float s3 = 0, s4 = 0, s5 = 0, s6 = 0, s7 = 0, s8 = 0, s9 = 0, s10 = 0, s11 = 0, s12 = 0, s13 = 0, s14 = 0;
#pragma omp simd reduction(+ : s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14)
  for (int64_t u = 0; u < hidden; u++) {
    const float forget = activate<Code, false>(cf[u], cell.value[FORGET], cell.a3);
    const float keep = activate<Code, false>(ci[u], cell.value[KEEP], cell.a4);
    const float candidate = activate<Code, true>(cj[u], cell.value[CANDIDATE], cell.a5);
    const float out = activate<Code, false>(co[u], cell.value[OUT], cell.a6);
    const float bent = activate<Code, true>(c_new[u], cell.value[CELL], cell.a10);
    float c;
    if constexpr (is_digital<Code>())
      c = value_of(float(int32_t(c_old[u])) - cell.a9.half, cell.a9);
    else
      c = c_old[u];
    const int flag = flags[u];
    const float shown = behind(dh[u], flag >> 6, s11);
    const float d_bent = through<Code, true>(shown * out, c_new[u], bent, cell.slope[CELL], cell.a10, s10);
    const float sum = behind(dc[u] + d_bent, flag >> 4, s9);
    const float kept = behind(sum, flag, s7), added = behind(sum, flag >> 2, s8);
    dc[u] = kept * forget;
    const float gi = through<Code, false>(added * candidate, ci[u], keep, cell.slope[KEEP], cell.a4, s4);
    const float gj = through<Code, true>(added * keep, cj[u], candidate, cell.slope[CANDIDATE], cell.a5, s5);
    const float gf = through<Code, false>(kept * c, cf[u], forget, cell.slope[FORGET], cell.a3, s3);
    const float go = through<Code, false>(shown * bent, co[u], out, cell.slope[OUT], cell.a6, s6);
    const float pi = behind(gi, fi[u] >> 4, s14), pj = behind(gj, fj[u] >> 4, s14);
    const float pf = behind(gf, ff[u] >> 4, s14), po = behind(go, fo[u] >> 4, s14);
    d1i[u] = behind(pi, fi[u], s12), d2i[u] = behind(pi, fi[u] >> 2, s13);
    d1j[u] = behind(pj, fj[u], s12), d2j[u] = behind(pj, fj[u] >> 2, s13);
    d1f[u] = behind(pf, ff[u], s12), d2f[u] = behind(pf, ff[u] >> 2, s13);
    d1o[u] = behind(po, fo[u], s12), d2o[u] = behind(po, fo[u] >> 2, s13);
  }
  const float all[RANGES] = {0, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14};
  for (int k = 0; k < RANGES; k++) sums.of[k] += all[k];
}

VECTORISED float dot(const float *__restrict a, const float *__restrict b, int64_t count) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; i++) sum += a[i] * b[i];
  return sum;
}

VECTORISED void add_to(float *__restrict to, const float *__restrict from, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; i++) to[i] += from[i];
}

// Instances of the loops for codes of one byte, of two bytes, and analog values.
#define GATES(NAME, CODE, MVM)                                                                                        \
  VECTORISED void NAME(const float *raw1, const float *raw2, int64_t count, const Levels &q12, const Levels &q13,      \
                       const Levels &q14, CODE *code, uint8_t *flags) {                                               \
    gates_body<CODE, MVM>(raw1, raw2, count, q12, q13, q14, code, flags);                                             \
  }
#define CELLS(NAME, CODE, INP)                                                                                        \
  VECTORISED void NAME(const CODE *code, int64_t rows, int64_t hidden, const Cell &cell, const CODE *c_old,            \
                       CODE *c_new, float *h, float *h_inp, int64_t h_inp_stride, uint8_t *flags) {                   \
    for (int64_t row = 0; row < rows; row++, code += 4 * hidden, c_old += hidden, c_new += hidden, h += hidden,        \
                 h_inp += h_inp_stride, flags += hidden)                                                              \
      cell_body<CODE, INP>(code, hidden, cell, c_old, c_new, h, h_inp, flags);                                         \
  }
#define BACK(NAME, CODE)                                                                                              \
  VECTORISED void NAME(const CODE *code, const uint8_t *gate_flags, int64_t rows, int64_t hidden, const Cell &cell,    \
                       const CODE *c_old, const CODE *c_new, const uint8_t *flags, const float *dh, float *dc,        \
                       float *d1, float *d2, double *sums) {                                                          \
    for (int64_t row = 0; row < rows; row++) {                                                                        \
      Sums of_row;                                                                                                    \
      back_body<CODE>(code + row * 4 * hidden, gate_flags + row * 4 * hidden, hidden, cell, c_old + row * hidden,      \
                      c_new + row * hidden, flags + row * hidden, dh + row * hidden, dc + row * hidden,               \
                      d1 + row * 4 * hidden, d2 + row * 4 * hidden, of_row);                                          \
      for (int k = 0; k < RANGES; k++) sums[k] += of_row.of[k];                                                        \
    }                                                                                                                 \
  }
GATES(gates_8, uint8_t, true)
GATES(gates_8_analog, uint8_t, false)
GATES(gates_16, uint16_t, true)
GATES(gates_16_analog, uint16_t, false)
GATES(gates_f, float, true)
GATES(gates_f_analog, float, false)
CELLS(cells_8, uint8_t, true)
CELLS(cells_8_analog, uint8_t, false)
CELLS(cells_16, uint16_t, true)
CELLS(cells_16_analog, uint16_t, false)
CELLS(cells_f, float, true)
CELLS(cells_f_analog, float, false)
BACK(back_8, uint8_t)
BACK(back_16, uint16_t)
BACK(back_f, float)

template <class Code> struct Loops;
template <> struct Loops<uint8_t> {
  static constexpr auto gates = gates_8, gates_analog = gates_8_analog;
  static constexpr auto cells = cells_8, cells_analog = cells_8_analog;
  static constexpr auto back = back_8;
};
template <> struct Loops<uint16_t> {
  static constexpr auto gates = gates_16, gates_analog = gates_16_analog;
  static constexpr auto cells = cells_16, cells_analog = cells_16_analog;
  static constexpr auto back = back_16;
};
template <> struct Loops<float> {
  static constexpr auto gates = gates_f, gates_analog = gates_f_analog;
  static constexpr auto cells = cells_f, cells_analog = cells_f_analog;
  static constexpr auto back = back_f;
};

// ---- matrix products -------------------------------------------------------------------------------------------------

}  // namespace
#ifdef KESTREL_SGEMM  // the BLAS that PyTorch was built with, where it exports it
extern "C" void sgemm_(const char *, const char *, const int *, const int *, const int *, const float *, const float *,
                       const int *, const float *, const int *, const float *, float *, const int *);
#endif
namespace {

// Row-major C [m, n] = op(A) op(B) + beta C.
void product(bool a_transposed, bool b_transposed, int64_t m, int64_t n, int64_t k, const float *a, int64_t a_stride,
             const float *b, int64_t b_stride, float beta, float *c, int64_t c_stride) {
#ifdef KESTREL_SGEMM  // column-major: C^T = op(B)^T op(A)^T
  const int rows = int(n), columns = int(m), inner = int(k);
  const int lead_a = int(a_stride), lead_b = int(b_stride), lead_c = int(c_stride);
  const float one = 1.0f;
  sgemm_(b_transposed ? "T" : "N", a_transposed ? "T" : "N", &rows, &columns, &inner, &one, b, &lead_b, a, &lead_a,
         &beta, c, &lead_c);
#else
  const c10::InferenceMode guard;
  auto matrix = [](const float *data, int64_t rows, int64_t columns, int64_t stride) {
    return at::from_blob(const_cast<float *>(data), {rows, columns}, {stride, 1}, at::kFloat);
  };
  const auto left = a_transposed ? matrix(a, k, m, a_stride).t() : matrix(a, m, k, a_stride);
  const auto right = b_transposed ? matrix(b, n, k, b_stride).t() : matrix(b, k, n, b_stride);
  auto to = matrix(c, m, n, c_stride);
  if (beta == 0)
    at::mm_out(to, left, right);
  else
    to.addmm_(left, right, beta);
#endif
}

// Intel MKL would start threads of its own where a task runs outside a parallel region.
struct SingleThreadedProducts {
  using Setter = int (*)(int);
  Setter set = nullptr;
  int before = 0;
  SingleThreadedProducts() {
#if defined(__linux__)
    static const Setter found = reinterpret_cast<Setter>(dlsym(RTLD_DEFAULT, "MKL_Set_Num_Threads_Local"));
    set = found;
#endif
    if (set) before = set(1);
  }
  ~SingleThreadedProducts() {
    if (set) set(before);
  }
};

// ---- memory ----------------------------------------------------------------------------------------------------------

// Hands out cache-line aligned parts of a buffer; with a null base it only measures.
struct Arena {
  char *base;
  int64_t used = 0;
  template <class T> T *take(int64_t count) {
    T *part = reinterpret_cast<T *>(base + used);
    used += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return part;
  }
};

struct Slice {
  int64_t block, start, rows, task;
};

Slice slice_of(const Problem &p, int64_t task) {
  const int64_t block = task / p.slices, part = task % p.slices;
  const int64_t start = p.batch * part / p.slices;
  return {block, start, p.batch * (part + 1) / p.slices - start, task};
}
int64_t most_rows(const Problem &p) { return (p.batch + p.slices - 1) / p.slices; }

// What a task keeps for its backward pass; without one, two steps take turns.
INLINE int64_t slot(const Problem &p, int64_t step) { return p.keep ? step : step % 2; }

template <class Code> struct Kept {
  float *x, *h;         // crossbar inputs [T, rows, padded(I + 1)], [T, rows, padded(H + 1)], last column 1
  Code *code;           // gates [T, rows, 4H]
  uint8_t *gate_flags;  // [T, rows, 4H]
  Code *c;              // [T + 1, rows, H], c[0] = 0
  uint8_t *cell_flags;  // [T, rows, H]
  Kept(const Problem &p, Arena &arena) {
    const int64_t rows = (p.keep ? p.steps + 1 : 2) * most_rows(p);
    x = arena.take<float>(rows * padded(p.input + 1));
    h = arena.take<float>(rows * padded(p.hidden + 1));
    code = arena.take<Code>(rows * 4 * p.hidden);
    gate_flags = arena.take<uint8_t>(rows * 4 * p.hidden);
    c = arena.take<Code>(rows * p.hidden);
    cell_flags = arena.take<uint8_t>(rows * p.hidden);
  }
};

struct ForwardScratch {
  float *raw1, *raw2, *h, *w_ih, *w_hh, *noisy_ih, *noisy_hh;
  ForwardScratch(const Problem &p, Arena &arena) {
    const int64_t rows = most_rows(p), gates = 4 * p.hidden;
    raw1 = arena.take<float>(rows * gates);
    raw2 = arena.take<float>(rows * gates);
    h = arena.take<float>(rows * p.hidden);
    w_ih = arena.take<float>((p.input + 1) * gates);
    w_hh = arena.take<float>((p.hidden + 1) * gates);
    noisy_ih = arena.take<float>(p.noise > 0 ? (p.input + 1) * gates : 0);
    noisy_hh = arena.take<float>(p.noise > 0 ? (p.hidden + 1) * gates : 0);
  }
};

struct BackwardScratch {
  float *d1, *d2, *dh, *dc, *dx, *d_ih, *d_hh, *w_hh;
  double *sums;
  BackwardScratch(const Problem &p, Arena &arena) {
    const int64_t rows = most_rows(p), gates = 4 * p.hidden;
    d_ih = arena.take<float>((p.input + 1) * gates);
    d_hh = arena.take<float>((p.hidden + 1) * gates);
    sums = arena.take<double>(RANGES);
    d1 = arena.take<float>(p.chunk * rows * gates);
    d2 = arena.take<float>(p.chunk * rows * gates);
    dh = arena.take<float>(rows * p.hidden);
    dc = arena.take<float>(rows * p.hidden);
    dx = arena.take<float>(p.chunk * rows * p.input);
    w_hh = arena.take<float>(p.hidden * gates);
  }
};

template <class Part> int64_t size_of(const Problem &p) {
  Arena arena{nullptr};
  Part part(p, arena);
  return arena.used;
}

// ---- passes ----------------------------------------------------------------------------------------------------------

float range_of(const Problem &p, int64_t block, Range range) { return p.ranges[range * p.blocks + block]; }

Cell cell_of(const Problem &p, int64_t block) {
  auto levels = [&](Range range, int64_t bits) { return Levels(range_of(p, block, range), bits); };
  const int64_t nm = p.nm_bits;
  Cell cell{{},
            {},
            levels(A3, nm),
            levels(A4, nm),
            levels(A5, nm),
            levels(A6, nm),
            levels(A7, nm),
            levels(A8, nm),
            levels(A9, nm),
            levels(A10, nm),
            levels(A11, nm),
            levels(A11, p.inp_bits)};
  const int64_t entries = nm ? int64_t(1) << nm : 0;
  for (int table = 0; table < TABLES; table++) {
    cell.value[table] = p.value + (table * p.blocks + block) * entries;
    cell.slope[table] = p.slope + (table * p.blocks + block) * entries;
  }
  return cell;
}

// Returns whether an input is not a number (codes could not carry it on).
template <class Code> bool forward_task(const Problem &p, const Slice &s, char *saved, char *scratch) {
  Arena kept_arena{saved}, scratch_arena{scratch};
  const Kept<Code> kept(p, kept_arena);
  const ForwardScratch work(p, scratch_arena);
  const int64_t hidden = p.hidden, gates = 4 * hidden, x_stride = padded(p.input + 1), h_stride = padded(hidden + 1);
  const Cell cell = cell_of(p, s.block);
  const Levels q1(range_of(p, s.block, A1), p.inp_bits), q12(range_of(p, s.block, A12), p.mvm_bits),
      q13(range_of(p, s.block, A13), p.mvm_bits), q14(range_of(p, s.block, A14), p.nm_bits);

  // Weights with the bias as their last row.
  std::copy_n(p.w_ih + s.block * p.input * gates, p.input * gates, work.w_ih);
  std::copy_n(p.b_ih + s.block * gates, gates, work.w_ih + p.input * gates);
  std::copy_n(p.w_hh + s.block * hidden * gates, hidden * gates, work.w_hh);
  std::copy_n(p.b_hh + s.block * gates, gates, work.w_hh + hidden * gates);

  std::fill_n(kept.c, s.rows * hidden, Code(p.nm_bits ? cell.a9.half : 0));
  std::fill_n(kept.h, s.rows * h_stride, 0.0f);
  bool bad = false;
  for (int64_t step = 0; step < p.steps; step++) {
    float *x_now = kept.x + slot(p, step) * s.rows * x_stride, *h_now = kept.h + slot(p, step) * s.rows * h_stride;
    const float *x = p.x + (s.start * p.steps + step) * p.input;
    bad |= 0 != (p.inp_bits ? input_quantised : input_analog)(x, p.steps * p.input, s.rows, p.input, q1, x_now, x_stride);
    for (int64_t row = 0; row < s.rows; row++) h_now[row * h_stride + hidden] = 1.0f;
    const float *w_ih = work.w_ih, *w_hh = work.w_hh;
    if (p.noise > 0) {
      noisy_weights(p, s.block, step, 0, work.w_ih, work.noisy_ih, (p.input + 1) * gates);
      noisy_weights(p, s.block, step, 1, work.w_hh, work.noisy_hh, (hidden + 1) * gates);
      w_ih = work.noisy_ih, w_hh = work.noisy_hh;
    }
    product(false, false, s.rows, gates, p.input + 1, x_now, x_stride, w_ih, gates, 0, work.raw1, gates);
    product(false, false, s.rows, gates, hidden + 1, h_now, h_stride, w_hh, gates, 0, work.raw2, gates);
    Code *code = kept.code + slot(p, step) * s.rows * gates;
    (p.mvm_bits ? Loops<Code>::gates : Loops<Code>::gates_analog)(work.raw1, work.raw2, s.rows * gates, q12, q13, q14,
                                                                  code, kept.gate_flags + slot(p, step) * s.rows * gates);
    // The last hidden state leaves the block; its crossbar input would be that of a step that does not come.
    const bool last = step + 1 == p.steps;
    float *h = last ? p.h + (s.block * p.batch + s.start) * hidden : work.h;
    float *h_next = last ? work.raw2 : kept.h + slot(p, step + 1) * s.rows * h_stride;
    (p.inp_bits ? Loops<Code>::cells : Loops<Code>::cells_analog)(
        code, s.rows, hidden, cell, kept.c + slot(p, step) * s.rows * hidden, kept.c + slot(p, step + 1) * s.rows * hidden, h, h_next,
        last ? hidden : h_stride, kept.cell_flags + slot(p, step) * s.rows * hidden);
  }
  return bad;
}

// Range a1 (and x itself where wanted) from the gradients of the input product in the steps `first`..`end`.
void input_gradient(const Problem &p, const Slice &s, const BackwardScratch &work, int64_t first, int64_t end) {
  const int64_t gates = 4 * p.hidden;
  const float limit = range_of(p, s.block, A1);
  const float *weight = p.back_ih + s.block * p.input * gates;
  int64_t outside = 0;
  for (int64_t row = s.start; row < s.start + s.rows; row++) {
    const float *x = p.x + (row * p.steps + first) * p.input;
    for (int64_t i = 0; i < (end - first) * p.input; i++) outside += std::fabs(x[i]) > limit;
  }
  if (!outside && !p.d_x) return;
  // A single entry costs a dot product; a matrix product runs about eight times faster per entry.
  const bool whole = p.d_x || outside * 8 > (end - first) * s.rows * p.input;
  if (whole)
    product(false, true, (end - first) * s.rows, p.input, gates, work.d1, gates, weight, gates, 0, work.dx, p.input);
  for (int64_t step = first; step < end; step++) {
    double sum = 0;
    for (int64_t row = 0; row < s.rows; row++) {
      const int64_t at = (step - first) * s.rows + row;
      const float *x = p.x + ((s.start + row) * p.steps + step) * p.input;
      float *to = p.d_x ? p.d_x + ((s.block * p.batch + s.start + row) * p.steps + step) * p.input : nullptr;
      for (int64_t i = 0; i < p.input; i++) {
        const bool out = std::fabs(x[i]) > limit;
        if (to) to[i] = out ? 0.0f : work.dx[at * p.input + i];
        if (!out) continue;
        const float grad = whole ? work.dx[at * p.input + i] : dot(work.d1 + at * gates, weight + i * gates, gates);
        sum += x[i] > 0 ? grad : -grad;
      }
    }
    work.sums[A1] += sum;
  }
}

template <class Code> void backward_task(const Problem &p, const Slice &s, char *saved, char *scratch) {
  Arena kept_arena{saved}, scratch_arena{scratch};
  const Kept<Code> kept(p, kept_arena);
  const BackwardScratch work(p, scratch_arena);
  const int64_t hidden = p.hidden, gates = 4 * hidden, x_stride = padded(p.input + 1), h_stride = padded(hidden + 1);
  const Cell cell = cell_of(p, s.block);
  std::copy_n(p.back_hh + s.block * hidden * gates, hidden * gates, work.w_hh);
  std::copy_n(p.grad_h + (s.block * p.batch + s.start) * hidden, s.rows * hidden, work.dh);
  std::fill_n(work.dc, s.rows * hidden, 0.0f);
  std::fill_n(work.sums, int(RANGES), 0.0);
  for (int64_t end = p.steps; end > 0; end -= std::min(p.chunk, end)) {
    const int64_t first = std::max<int64_t>(0, end - p.chunk);
    for (int64_t step = end - 1; step >= first; step--) {
      float *d1 = work.d1 + (step - first) * s.rows * gates, *d2 = work.d2 + (step - first) * s.rows * gates;
      Loops<Code>::back(kept.code + step * s.rows * gates, kept.gate_flags + step * s.rows * gates, s.rows, hidden, cell,
                        kept.c + step * s.rows * hidden, kept.c + (step + 1) * s.rows * hidden,
                        kept.cell_flags + step * s.rows * hidden, work.dh, work.dc, d1, d2, work.sums);
      if (step > 0)  // h as crossbar input never leaves its range, so the gradient passes both quantisers
        product(false, true, s.rows, hidden, gates, d2, gates, work.w_hh, gates, 0, work.dh, hidden);
    }
    const float beta = end == p.steps ? 0.0f : 1.0f;
    const int64_t rows = (end - first) * s.rows;
    product(true, false, p.input + 1, gates, rows, kept.x + first * s.rows * x_stride, x_stride, work.d1, gates, beta,
            work.d_ih, gates);
    product(true, false, hidden + 1, gates, rows, kept.h + first * s.rows * h_stride, h_stride, work.d2, gates, beta,
            work.d_hh, gates);
    input_gradient(p, s, work, first, end);
  }
}

// Adds the slices of block `block` in their order.
void gather(const Problem &p, int64_t block, char *scratch, int64_t scratch_size) {
  const int64_t gates = 4 * p.hidden;
  for (int64_t part = 0; part < p.slices; part++) {
    Arena arena{scratch + (block * p.slices + part) * scratch_size};
    const BackwardScratch work(p, arena);
    auto put = [&](float *to, const float *from, int64_t count) {
      if (part == 0)
        std::copy_n(from, count, to);
      else
        add_to(to, from, count);
    };
    put(p.d_ih + block * p.input * gates, work.d_ih, p.input * gates);
    put(p.db_ih + block * gates, work.d_ih + p.input * gates, gates);
    put(p.d_hh + block * p.hidden * gates, work.d_hh, p.hidden * gates);
    put(p.db_hh + block * gates, work.d_hh + p.hidden * gates, gates);
    for (int k = 0; k < RANGES; k++) {
      double &to = p.d_ranges[k * p.blocks + block];
      to = (part == 0 ? 0.0 : to) + work.sums[k];
    }
  }
}

template <class Code> void forward(const Problem &p) {
  const int64_t kept = size_of<Kept<Code>>(p), work = size_of<ForwardScratch>(p);
  at::parallel_for(0, p.blocks * p.slices, 1, [&](int64_t begin, int64_t end) {
    const SingleThreadedProducts guard;
    for (int64_t task = begin; task < end; task++) {
      const Slice s = slice_of(p, task);
      const bool bad = forward_task<Code>(p, s, static_cast<char *>(p.saved) + task * kept,
                                          static_cast<char *>(p.scratch) + task * work);
      if (bad)
        std::fill_n(p.h + (s.block * p.batch + s.start) * p.hidden, s.rows * p.hidden,
                    std::numeric_limits<float>::quiet_NaN());
    }
  });
}

template <class Code> void backward(const Problem &p) {
  const int64_t kept = size_of<Kept<Code>>(p), work = size_of<BackwardScratch>(p);
  at::parallel_for(0, p.blocks * p.slices, 1, [&](int64_t begin, int64_t end) {
    const SingleThreadedProducts guard;
    for (int64_t task = begin; task < end; task++)
      backward_task<Code>(p, slice_of(p, task), static_cast<char *>(p.saved) + task * kept,
                          static_cast<char *>(p.scratch) + task * work);
  });
  for (int64_t block = 0; block < p.blocks; block++) gather(p, block, static_cast<char *>(p.scratch), work);
}

template <class Code> int64_t saved_bytes(const Problem &p) { return p.blocks * p.slices * size_of<Kept<Code>>(p); }

}  // namespace

#define DISPATCH(CALL)                                                                                                \
  (p->nm_bits == 0 ? CALL<float>(*p) : p->nm_bits <= 8 ? CALL<uint8_t>(*p) : CALL<uint16_t>(*p))

extern "C" {

int64_t kestrel_saved_bytes(const Problem *p) { return DISPATCH(saved_bytes); }

int64_t kestrel_scratch_bytes(const Problem *p) {
  return p->blocks * p->slices * std::max(size_of<ForwardScratch>(*p), size_of<BackwardScratch>(*p));
}

void kestrel_forward(const Problem *p) { DISPATCH(forward); }

void kestrel_backward(const Problem *p) { DISPATCH(backward); }

// The noise that a forward pass adds at a step to product 0 (input) or 1 (recurrent): [rows + 1, 4H], bias row last.
void kestrel_noise(const Problem *p, int64_t block, int64_t step, int64_t which, float *to) {
  const int64_t count = ((which ? p->hidden : p->input) + 1) * 4 * p->hidden;
  std::fill_n(to, count, 0.0f);
  const uint64_t key = mix64(p->seed ^ mix64(uint64_t((block * p->steps + step) * 2 + which)));
  add_normal(to, to, count / 2, uint32_t(key), uint32_t(key >> 32), float(p->noise));
}
}
