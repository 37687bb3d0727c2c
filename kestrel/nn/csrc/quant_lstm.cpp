// Forward and backward pass of N quantised LSTM blocks over a whole sequence (equations: kestrel/nn/quant_lstm.py).
//
// One task = one block and one slice of the batch. A task runs its whole sequence with single-threaded matrix products
// and fused element-wise loops, so threads never wait for each other inside a sequence; a thread that is done takes the
// next task. Slices depend on the problem and not on the number of threads, and partial sums are added in a fixed order:
// results do not depend on threads.
//
// The forward pass keeps one code and one byte of clipping flags per gate; the backward pass recomputes the rest.
// Sigmoid and tanh act on codes: PyTorch's own values for all codes are a small table.
//
// Compiled with -ffp-contract=off: products and sums round as in PyTorch's separate operators, on every machine.

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#ifndef KESTREL_SGEMM
#include <ATen/ATen.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <limits>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#endif
#include "instruction_set.h"

#define ALWAYS_INLINE __attribute__((always_inline))
#define INLINE static inline ALWAYS_INLINE

namespace {

enum Range { A1, A3, A4, A5, A6, A7, A8, A9, A10, A11, A12, A13, A14, RANGES };
enum Table { FORGET, KEEP, CANDIDATE, OUT, CELL, TABLES };

constexpr int64_t LINE = 16;        // floats of a cache line, and of the widest register
constexpr float SATURATED = -1.0f;  // entry of a slope table where the value is clipped

}  // namespace

// Mirrors kestrel.nn.native.Problem. All tensors are contiguous float32.
struct Problem {
  int64_t blocks, batch, steps, input, hidden, chunk;
  int64_t slices, last_slices;          // of the batch: of each block, and of the last one
  int64_t inp_bits, mvm_bits, nm_bits;  // 0 = analog
  int64_t keep;                         // whether a backward pass will follow
  double noise;                         // standard deviation of the weight noise
  uint64_t seed;
  const float *x;                   // [B, T, I]
  const float *w_ih, *w_hh;         // forward weights [N, I, 4H], [N, H, 4H]
  const float *b_ih, *b_hh;         // forward biases [N, 4H]
  const float *back_ih, *back_hh;   // weights that the gradient sees
  const float *ranges;              // [13, N]
  const float *tables;              // [5, N, 2^nm, 2] quantised value and derivative of each activation
  const float *adc;                 // [2, N, 3, 4H] factor, offset and bow of each converter; null = ideal
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

// A clipping quantiser of given bits over +-range: codes -(half - 1)..half - 1, levels code * step.
struct Levels {
  float range, half, bound, step;
  float scale;  // half / range
  float sure;   // a value this near to a level (in steps) has the same level by multiplication with scale as by division
  Levels(float range_, int64_t bits)
      : range(range_), half(bits ? float(int64_t(1) << (bits - 1)) : 0), bound(bits ? 1 - 1 / half : 0),
        step(bits ? range / half : 0), scale(half / range) {
    int exponent;
    sure = std::frexp(range, &exponent) == 0.5f ? 1.0f : 0.5f - half * 0x1p-22f;
  }
};

// Quantised value of an activation and its derivative, SATURATED where the range clips the value.
struct Activation {
  float value, slope;
};

struct Cell {
  const Activation *table[TABLES];
  Levels a3, a4, a5, a6, a7, a8, a9, a10, a11, a11_inp, a14;
};

INLINE uint64_t mix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}
// ---- element-wise loops, for every instruction set -------------------------------------------------------------------

template <class Code> struct CodeLoops {  // one kind of code
  using Gates = void (*)(const float *raw1, const float *raw2, int64_t rows, int64_t width, const Levels &q12,
                         const Levels &q13, const Levels &q14, Code *code, uint8_t *flags);
  using Cells = void (*)(const Code *code, int64_t rows, int64_t hidden, const Cell &cell, const Code *c_old,
                         Code *c_new, float *h, float *h_inp, int64_t h_inp_stride, uint8_t *flags, float *spare);
  using Back = void (*)(const Code *code, const uint8_t *gate_flags, int64_t rows, int64_t hidden, const Cell &cell,
                        const Code *c_old, const Code *c_new, const uint8_t *flags, const float *dh, const float *dc,
                        float *dc_old, float *d1, float *d2, float *spare, double *sums);
  Gates gates, gates_analog;  // with and without a quantiser of crossbar outputs
  Cells cells, cells_analog;  // with and without a quantiser of crossbar inputs
  Back back;
};

struct Loops {
  CodeLoops<uint8_t> bytes;
  CodeLoops<uint16_t> shorts;
  CodeLoops<float> analog;
  using Input = int64_t (*)(const float *x, int64_t stride, int64_t rows, int64_t width, const Levels &q, float *to,
                            int64_t to_stride);
  Input input_quantised, input_analog;
  void (*add_normal)(const float *from, float *to, int64_t pairs, uint32_t key0, uint32_t key1, float deviation);
  float (*dot)(const float *a, const float *b, int64_t count);

  template <class Code> const CodeLoops<Code> &of() const {
    if constexpr (sizeof(Code) == 1)
      return bytes;
    else if constexpr (sizeof(Code) == 2)
      return shorts;
    else
      return analog;
  }
};

#define KESTREL_VECTOR 128
namespace baseline {
constexpr int LANES = 4;
#include "quant_lstm_loops.inc"
}  // namespace baseline
#undef KESTREL_VECTOR

#ifdef KESTREL_X86
#pragma GCC push_options
#pragma GCC target("avx2")
#define KESTREL_VECTOR 256
namespace avx2 {
constexpr int LANES = 8;
#include "quant_lstm_loops.inc"
}  // namespace avx2
#undef KESTREL_VECTOR
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#define KESTREL_VECTOR 512
namespace avx512 {
constexpr int LANES = 16;
#include "quant_lstm_loops.inc"
}  // namespace avx512
#undef KESTREL_VECTOR
#pragma GCC pop_options
#endif

const Loops &loops() {
  static const Loops &chosen = KESTREL_LOOPS;
  return chosen;
}

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

// oneDNN's kernels need no packing of small matrices; not every processor has them.
bool has_small_products() {
#if defined(CPUBLAS_BRGEMM_F32F32F32) && !defined(KESTREL_PORTABLE)
  static const bool works = [] {
    try {
      std::vector<float> a(16 * 16, 1.0f), c(16 * 16, 0.0f);
      at::native::cpublas::brgemm(16, 16, 16, 16, 16, 16, false, a.data(), a.data(), c.data(), false);
      return c[0] == 16.0f && c[255] == 16.0f;
    } catch (const std::exception &) {
      return false;
    }
  }();
  return works;
#else
  return false;
#endif
}

// Row-major C [m, n] = A B.
void small_product(int64_t m, int64_t n, int64_t k, const float *a, int64_t a_stride, const float *b, int64_t b_stride,
                   float *c, int64_t c_stride) {
#if defined(CPUBLAS_BRGEMM_F32F32F32) && !defined(KESTREL_PORTABLE)
  if (has_small_products()) {
    at::native::cpublas::brgemm(m, n, k, a_stride, b_stride, c_stride, false, a, b, c, false);
    return;
  }
#endif
  product(false, false, m, n, k, a, a_stride, b, b_stride, 0, c, c_stride);
}

INLINE void turn_4x4(const float *from, int64_t from_stride, float *to, int64_t to_stride) {
#ifdef KESTREL_X86
  __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + from_stride), c = _mm_loadu_ps(from + 2 * from_stride),
         d = _mm_loadu_ps(from + 3 * from_stride);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(to, a);
  _mm_storeu_ps(to + to_stride, b);
  _mm_storeu_ps(to + 2 * to_stride, c);
  _mm_storeu_ps(to + 3 * to_stride, d);
#else
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 4; j++) to[j * to_stride + i] = from[i * from_stride + j];
#endif
}

// Row-major C [m, n] (+)= A^T B with A [k, m], m no more than a_stride, whose rows are whole cache lines. `turned` takes
// a_stride k floats.
void outer_product(int64_t m, int64_t n, int64_t k, const float *a, int64_t a_stride, const float *b, int64_t b_stride,
                   bool add, float *c, int64_t c_stride, float *turned) {
#if defined(CPUBLAS_BRGEMM_F32F32F32) && !defined(KESTREL_PORTABLE)
  if (has_small_products()) {
    const int64_t stride = padded(k);
    for (int64_t from = 0; from < k; from += LINE)
      for (int64_t column = 0; column < m; column += LINE) {
        const float *tile = a + from * a_stride + column;
        float *to = turned + column * stride + from;
        if (k - from >= LINE)
          for (int64_t i = 0; i < LINE; i += 4)
            for (int64_t j = 0; j < LINE; j += 4) turn_4x4(tile + i * a_stride + j, a_stride, to + j * stride + i, stride);
        else
          for (int64_t j = 0; j < LINE; j++)
            for (int64_t i = 0; i < k - from; i++) to[j * stride + i] = tile[i * a_stride + j];
      }
    at::native::cpublas::brgemm(m, n, k, stride, b_stride, c_stride, add, turned, b, c, false);
    return;
  }
#endif
  product(true, false, m, n, k, a, a_stride, b, b_stride, add ? 1.0f : 0.0f, c, c_stride);
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
  int64_t block, start, rows;
};

int64_t slices_of(const Problem &p, int64_t block) { return block + 1 < p.blocks ? p.slices : p.last_slices; }

int64_t tasks_of(const Problem &p) { return (p.blocks - 1) * p.slices + p.last_slices; }

Slice slice_of(const Problem &p, int64_t task) {
  const int64_t block = std::min(task / p.slices, p.blocks - 1), part = task - block * p.slices;
  const int64_t slices = slices_of(p, block), start = p.batch * part / slices;
  return {block, start, p.batch * (part + 1) / slices - start};
}

// Sizes of a task. Blocks narrower than a vector are computed with additional units whose weights are zero.
struct Sizes {
  int64_t width, gates, x_stride, h_stride;  // units; 4 units; columns of crossbar inputs
  explicit Sizes(const Problem &p)
      : width(std::max(p.hidden, LINE)), gates(4 * width),
        x_stride(padded(p.input + 1)), h_stride(padded(width + 1)) {}
};

// What a task keeps for its backward pass; without one, two steps take turns.
int64_t slot(const Problem &p, int64_t step) { return p.keep ? step : step % 2; }

template <class Code> struct Kept {
  float *x, *h;         // crossbar inputs [T, rows, x_stride], [T, rows, h_stride] with a column of ones for the bias
  Code *code;           // gates [T, rows, 4H]
  uint8_t *gate_flags;  // [T, rows, 4H]
  Code *c;              // [T + 1, rows, H], c[0] = 0
  uint8_t *cell_flags;  // [T, rows, H]
  int64_t *outside;     // clipped inputs of each step
  Kept(const Problem &p, int64_t slice_rows, Arena &arena) {
    const Sizes size(p);
    const int64_t rows = (p.keep ? p.steps + 1 : 2) * slice_rows;
    x = arena.take<float>(rows * size.x_stride);
    h = arena.take<float>(rows * size.h_stride);
    code = arena.take<Code>(rows * size.gates);
    gate_flags = arena.take<uint8_t>(rows * size.gates);
    c = arena.take<Code>(rows * size.width);
    cell_flags = arena.take<uint8_t>(rows * size.width);
    outside = arena.take<int64_t>(p.keep ? p.steps : 2);
  }
};

struct ForwardScratch {
  float *raw1, *raw2, *h, *spare;  // crossbar outputs [rows, 4H]; h [rows, H]
  float *w_ih, *w_hh, *noisy;      // weights with the bias as last row
  float *wide_ih, *wide_hh;        // the same for widened blocks
  float *values;                   // some rows of values
  ForwardScratch(const Problem &p, int64_t rows, Arena &arena) {
    const Sizes size(p);
    const bool wide = size.width != p.hidden;
    raw1 = arena.take<float>(rows * size.gates);
    raw2 = arena.take<float>(rows * size.gates);
    h = arena.take<float>(rows * size.width);
    spare = arena.take<float>(rows * size.width);
    w_ih = arena.take<float>((p.input + 1) * 4 * p.hidden);
    w_hh = arena.take<float>((p.hidden + 1) * 4 * p.hidden);
    noisy = arena.take<float>(p.noise > 0 ? (std::max(p.input, p.hidden) + 1) * 4 * p.hidden : 0);
    wide_ih = arena.take<float>(wide ? (p.input + 1) * size.gates : 0);
    wide_hh = arena.take<float>(wide ? (size.width + 1) * size.gates : 0);
    values = arena.take<float>(5 * size.width);
  }
};

struct BackwardScratch {
  float *d_ih, *d_hh;           // gradients of weights and (last row) bias
  double *sums;                 // gradients of ranges
  float *d1, *d2;               // gradients of crossbar outputs [chunk, rows, 4H]
  float *dh, *dc, *dc_old;      // [rows, H]
  float *dx, *w_ih, *w_hh;      // [chunk, rows, I]; weights [I, 4H]; weights transposed [4H, H]
  float *values;                // some rows of values
  float *turned;                // transposed crossbar inputs
  BackwardScratch(const Problem &p, int64_t rows, Arena &arena) {
    const Sizes size(p);
    d_ih = arena.take<float>((p.input + 1) * size.gates);
    d_hh = arena.take<float>((size.width + 1) * size.gates);
    sums = arena.take<double>(RANGES);
    d1 = arena.take<float>(p.chunk * rows * size.gates);
    d2 = arena.take<float>(p.chunk * rows * size.gates);
    dh = arena.take<float>(rows * size.width);
    dc = arena.take<float>(rows * size.width);
    dc_old = arena.take<float>(rows * size.width);
    dx = arena.take<float>(p.chunk * rows * p.input);
    w_ih = arena.take<float>(p.input * size.gates);
    w_hh = arena.take<float>(size.gates * size.width);
    values = arena.take<float>(10 * size.width);
    turned = arena.take<float>(padded(p.chunk * rows) * std::max(size.x_stride, size.h_stride));
  }
};

// Where the part of each task begins in a buffer; the last entry is the size of all.
template <class Part> std::vector<int64_t> places_of(const Problem &p) {
  std::vector<int64_t> places{0};
  for (int64_t task = 0; task < tasks_of(p); task++) {
    Arena arena{nullptr};
    const Part part(p, slice_of(p, task).rows, arena);
    places.push_back(places.back() + arena.used);
  }
  return places;
}

// Copies rows of four gates between widths (`from_width` and `to_width` units); the rest of wider rows becomes zero.
void copy_gates(const float *from, int64_t from_width, float *to, int64_t to_width, int64_t rows) {
  const int64_t units = std::min(from_width, to_width);
  for (int64_t i = 0; i < 4 * rows; i++, from += from_width, to += to_width) {
    std::copy_n(from, units, to);
    std::fill(to + units, to + to_width, 0.0f);
  }
}

// ---- passes ----------------------------------------------------------------------------------------------------------

float range_of(const Problem &p, int64_t block, Range range) { return p.ranges[range * p.blocks + block]; }

Cell cell_of(const Problem &p, int64_t block) {
  auto levels = [&](Range range, int64_t bits) { return Levels(range_of(p, block, range), bits); };
  const int64_t nm = p.nm_bits, entries = nm ? int64_t(1) << nm : 0;
  Cell cell{{}, levels(A3, nm), levels(A4, nm), levels(A5, nm), levels(A6, nm), levels(A7, nm), levels(A8, nm),
            levels(A9, nm), levels(A10, nm), levels(A11, nm), levels(A11, p.inp_bits), levels(A14, nm)};
  for (int table = 0; table < TABLES; table++)
    cell.table[table] = reinterpret_cast<const Activation *>(p.tables) + (table * p.blocks + block) * entries;
  return cell;
}

void add_noise(const Problem &p, int64_t block, int64_t step, int64_t product, const float *from, float *to) {
  const int64_t count = ((product ? p.hidden : p.input) + 1) * 4 * p.hidden;
  const uint64_t key = mix64(p.seed ^ mix64(uint64_t((block * p.steps + step) * 2 + product)));
  loops().add_normal(from, to, count / 2, uint32_t(key), uint32_t(key >> 32), float(p.noise));
}

// The weights of a time step as the product takes them: with fresh noise, and widened where the block is narrow.
const float *weights_of(const Problem &p, int64_t block, int64_t step, int64_t product, const float *weights,
                        float *noisy, float *wide) {
  const Sizes size(p);
  const int64_t rows = product ? p.hidden : p.input;
  if (p.noise > 0) {
    add_noise(p, block, step, product, weights, noisy);
    weights = noisy;
  }
  if (size.width == p.hidden || (p.noise <= 0 && step > 0)) return size.width == p.hidden ? weights : wide;
  const int64_t wide_rows = product ? size.width : p.input;
  std::fill_n(wide, wide_rows * size.gates, 0.0f);
  copy_gates(weights, p.hidden, wide, size.width, rows);
  copy_gates(weights + rows * 4 * p.hidden, p.hidden, wide + wide_rows * size.gates, size.width, 1);
  return wide;
}

// The curve of imperfect converters, for the crossbar outputs of product 0 (input) or 1 (recurrent):
// v factor + offset - min(|v|, range)^2 bow.
void bend(const Problem &p, int64_t block, int64_t product, float range, int64_t rows, float *raw) {
  const int64_t width = Sizes(p).width, hidden = p.hidden;
  const float *curve = p.adc + (product * p.blocks + block) * 12 * hidden;
  for (int64_t row = 0; row < rows; row++)
    for (int64_t gate = 0; gate < 4; gate++, raw += width) {
      const float *factor = curve + gate * hidden, *offset = factor + 4 * hidden, *bow = offset + 4 * hidden;
#pragma omp simd
      for (int64_t unit = 0; unit < hidden; unit++) {
        const float v = raw[unit], inside = std::fabs(v) > range ? range : v;
        raw[unit] = (v * factor[unit] + offset[unit]) - inside * inside * bow[unit];
      }
    }
}

bool any_nan(const float *from, int64_t count) {
  int found = 0;
#pragma omp simd reduction(| : found)
  for (int64_t i = 0; i < count; i++) found |= from[i] != from[i];
  return found != 0;
}

// Returns whether an input, a weight or a range is not a number: codes could not carry it on.
template <class Code> bool forward_task(const Problem &p, const Slice &s, char *saved, char *scratch) {
  Arena kept_arena{saved}, scratch_arena{scratch};
  const Kept<Code> kept(p, s.rows, kept_arena);
  const ForwardScratch work(p, s.rows, scratch_arena);
  const auto [width, gates, x_stride, h_stride] = Sizes(p);
  const int64_t hidden = p.hidden, rows = s.rows;
  const Cell cell = cell_of(p, s.block);
  const Levels q1(range_of(p, s.block, A1), p.inp_bits), q12(range_of(p, s.block, A12), p.mvm_bits),
      q13(range_of(p, s.block, A13), p.mvm_bits);
  const auto input_loop = p.inp_bits ? loops().input_quantised : loops().input_analog;
  const CodeLoops<Code> &code_loops = loops().of<Code>();
  const auto gate_loop = p.mvm_bits ? code_loops.gates : code_loops.gates_analog;
  const auto cell_loop = p.inp_bits ? code_loops.cells : code_loops.cells_analog;

  std::copy_n(p.w_ih + s.block * p.input * 4 * hidden, p.input * 4 * hidden, work.w_ih);
  std::copy_n(p.b_ih + s.block * 4 * hidden, 4 * hidden, work.w_ih + p.input * 4 * hidden);
  std::copy_n(p.w_hh + s.block * hidden * 4 * hidden, hidden * 4 * hidden, work.w_hh);
  std::copy_n(p.b_hh + s.block * 4 * hidden, 4 * hidden, work.w_hh + hidden * 4 * hidden);
  std::fill_n(kept.c, rows * width, Code(cell.a9.half));  // the code of zero
  std::fill_n(kept.h, rows * h_stride, 0.0f);

  bool bad = any_nan(work.w_ih, (p.input + 1) * 4 * hidden) || any_nan(work.w_hh, (hidden + 1) * 4 * hidden) ||
             any_nan(p.ranges, RANGES * p.blocks);
  for (int64_t step = 0; step < p.steps; step++) {
    const int64_t now = slot(p, step) * rows, next = slot(p, step + 1) * rows;
    const bool last = step + 1 == p.steps;
    float *x_now = kept.x + now * x_stride, *h_now = kept.h + now * h_stride;
    const int64_t outside = input_loop(p.x + (s.start * p.steps + step) * p.input, p.steps * p.input, rows, p.input, q1,
                                       x_now, x_stride);
    kept.outside[slot(p, step)] = outside;
    bad |= outside < 0;
    for (int64_t row = 0; row < rows; row++) h_now[row * h_stride + width] = 1.0f;
    const float *w_ih = weights_of(p, s.block, step, 0, work.w_ih, work.noisy, work.wide_ih);
    small_product(rows, gates, p.input + 1, x_now, x_stride, w_ih, gates, work.raw1, gates);
    const float *w_hh = weights_of(p, s.block, step, 1, work.w_hh, work.noisy, work.wide_hh);
    if (step > 0)
      small_product(rows, gates, width + 1, h_now, h_stride, w_hh, gates, work.raw2, gates);
    else  // h = 0: the bias alone
      for (int64_t row = 0; row < rows; row++) std::copy_n(w_hh + width * gates, gates, work.raw2 + row * gates);
    if (p.adc) {
      bend(p, s.block, 0, q12.range, rows, work.raw1);
      bend(p, s.block, 1, q13.range, rows, work.raw2);
    }
    gate_loop(work.raw1, work.raw2, rows, gates, q12, q13, cell.a14, kept.code + now * gates,
              kept.gate_flags + now * gates);
    cell_loop(kept.code + now * gates, rows, width, cell, kept.c + now * width, kept.c + next * width, work.h,
              last ? work.spare : kept.h + next * h_stride, last ? width : h_stride, kept.cell_flags + now * width,
              work.values);
  }
  float *h = p.h + (s.block * p.batch + s.start) * hidden;
  for (int64_t row = 0; row < rows; row++) std::copy_n(work.h + row * width, hidden, h + row * hidden);
  return bad;
}

// Range a1 (and x itself where wanted) from the gradients of the input product in the steps `first`..`end`, whose inputs
// were clipped `outside` times.
void input_gradient(const Problem &p, const Slice &s, const BackwardScratch &work, int64_t first, int64_t end,
                    int64_t outside) {
  const int64_t gates = Sizes(p).gates;
  const float limit = range_of(p, s.block, A1);
  if (!outside && !p.d_x) return;
  // A single entry costs a dot product; a matrix product runs about eight times faster per entry.
  const bool whole = p.d_x || outside * 8 > (end - first) * s.rows * p.input;
  if (whole)
    product(false, true, (end - first) * s.rows, p.input, gates, work.d1, gates, work.w_ih, gates, 0, work.dx, p.input);
  double sum = 0;
  for (int64_t step = first; step < end; step++) {
    for (int64_t row = 0; row < s.rows; row++) {
      const int64_t at = (step - first) * s.rows + row;
      const float *x = p.x + ((s.start + row) * p.steps + step) * p.input;
      float *to = p.d_x ? p.d_x + ((s.block * p.batch + s.start + row) * p.steps + step) * p.input : nullptr;
      for (int64_t i = 0; i < p.input; i++) {
        const bool out = std::fabs(x[i]) > limit;
        if (to) to[i] = out ? 0.0f : work.dx[at * p.input + i];
        if (!out) continue;
        const float grad = whole ? work.dx[at * p.input + i] : loops().dot(work.d1 + at * gates, work.w_ih + i * gates, gates);
        sum += x[i] > 0 ? grad : -grad;
      }
    }
  }
  work.sums[A1] += sum;
}

template <class Code> void backward_task(const Problem &p, const Slice &s, char *saved, char *scratch) {
  Arena kept_arena{saved}, scratch_arena{scratch};
  const Kept<Code> kept(p, s.rows, kept_arena);
  BackwardScratch work(p, s.rows, scratch_arena);
  const auto [width, gates, x_stride, h_stride] = Sizes(p);
  const int64_t hidden = p.hidden, rows = s.rows;
  const Cell cell = cell_of(p, s.block);
  const auto back_loop = loops().of<Code>().back;

  copy_gates(p.back_ih + s.block * p.input * 4 * hidden, hidden, work.w_ih, width, p.input);
  std::fill_n(work.w_hh, gates * width, 0.0f);
  for (int64_t from = 0; from < hidden; from++)
    for (int64_t gate = 0; gate < 4; gate++)
      for (int64_t unit = 0; unit < hidden; unit++)
        work.w_hh[(gate * width + unit) * width + from] =
            p.back_hh[((s.block * hidden + from) * 4 + gate) * hidden + unit];
  const float *grad = p.grad_h + (s.block * p.batch + s.start) * hidden;
  std::fill_n(work.dh, rows * width, 0.0f);
  for (int64_t row = 0; row < rows; row++) std::copy_n(grad + row * hidden, hidden, work.dh + row * width);
  std::fill_n(work.dc, rows * width, 0.0f);
  std::fill_n(work.sums, int(RANGES), 0.0);

  for (int64_t end = p.steps; end > 0; end -= std::min(p.chunk, end)) {
    const int64_t first = std::max<int64_t>(0, end - p.chunk);
    for (int64_t step = end - 1; step >= first; step--) {
      float *d1 = work.d1 + (step - first) * rows * gates, *d2 = work.d2 + (step - first) * rows * gates;
      const int64_t now = step * rows, next = now + rows;
      back_loop(kept.code + now * gates, kept.gate_flags + now * gates, rows, width, cell, kept.c + now * width,
                kept.c + next * width, kept.cell_flags + now * width, work.dh, work.dc, work.dc_old, d1, d2, work.values,
                work.sums);
      std::swap(work.dc, work.dc_old);
      if (step > 0)  // h as crossbar input never leaves its range, so the gradient passes both quantisers
        small_product(rows, width, gates, d2, gates, work.w_hh, width, work.dh, width);
    }
    const bool add = end != p.steps;
    const int64_t many = (end - first) * rows;
    outer_product(p.input + 1, gates, many, kept.x + first * rows * x_stride, x_stride, work.d1, gates, add, work.d_ih,
                  gates, work.turned);
    outer_product(width + 1, gates, many, kept.h + first * rows * h_stride, h_stride, work.d2, gates, add, work.d_hh,
                  gates, work.turned);
    int64_t outside = 0;
    for (int64_t step = first; step < end; step++) outside += kept.outside[step];
    input_gradient(p, s, work, first, end, outside);
  }
}

// Adds the slices of a block in their order.
void gather(const Problem &p, int64_t block, char *scratch, const std::vector<int64_t> &places) {
  const Sizes size(p);
  const int64_t gates = 4 * p.hidden;
  for (int64_t part = 0; part < slices_of(p, block); part++) {
    const int64_t task = block * p.slices + part;
    Arena arena{scratch + places[task]};
    const BackwardScratch work(p, slice_of(p, task).rows, arena);
    auto put = [&](float *to, const float *from, int64_t rows) {
      for (int64_t i = 0; i < 4 * rows; i++, to += p.hidden, from += size.width) {
        if (part == 0)
          std::copy_n(from, p.hidden, to);
        else
          for (int64_t unit = 0; unit < p.hidden; unit++) to[unit] += from[unit];
      }
    };
    put(p.d_ih + block * p.input * gates, work.d_ih, p.input);
    put(p.db_ih + block * gates, work.d_ih + p.input * size.gates, 1);
    put(p.d_hh + block * p.hidden * gates, work.d_hh, p.hidden);
    put(p.db_hh + block * gates, work.d_hh + size.width * size.gates, 1);
    for (int k = 0; k < RANGES; k++) {
      double &to = p.d_ranges[k * p.blocks + block];
      to = (part == 0 ? 0.0 : to) + work.sums[k];
    }
  }
}

// Threads take the tasks from one queue, so that a thread whose core is busy elsewhere takes fewer of them.
template <class Run> void run_tasks(const Problem &p, Run run) {
  const int64_t tasks = tasks_of(p);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(tasks, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    const SingleThreadedProducts guard;
    for (int64_t task; (task = next++) < tasks;) run(task, slice_of(p, task));
  });
}

template <class Code> void forward(const Problem &p) {
  const auto kept = places_of<Kept<Code>>(p), work = places_of<ForwardScratch>(p);
  run_tasks(p, [&](int64_t task, const Slice &s) {
    const bool bad = forward_task<Code>(p, s, static_cast<char *>(p.saved) + kept[task],
                                        static_cast<char *>(p.scratch) + work[task]);
    if (bad)
      std::fill_n(p.h + (s.block * p.batch + s.start) * p.hidden, s.rows * p.hidden,
                  std::numeric_limits<float>::quiet_NaN());
  });
}

template <class Code> void backward(const Problem &p) {
  const auto kept = places_of<Kept<Code>>(p), work = places_of<BackwardScratch>(p);
  run_tasks(p, [&](int64_t task, const Slice &s) {
    backward_task<Code>(p, s, static_cast<char *>(p.saved) + kept[task], static_cast<char *>(p.scratch) + work[task]);
  });
  at::parallel_for(0, p.blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++) gather(p, block, static_cast<char *>(p.scratch), work);
  });
}

template <class Code> int64_t saved_bytes(const Problem &p) { return places_of<Kept<Code>>(p).back(); }

}  // namespace

#define DISPATCH(CALL)                                                                                                \
  (p->nm_bits == 0 ? CALL<float>(*p) : p->nm_bits <= 8 ? CALL<uint8_t>(*p) : CALL<uint16_t>(*p))

extern "C" {

int64_t kestrel_saved_bytes(const Problem *p) { return DISPATCH(saved_bytes); }

int64_t kestrel_scratch_bytes(const Problem *p) {
  return std::max(places_of<ForwardScratch>(*p).back(), places_of<BackwardScratch>(*p).back());
}

void kestrel_forward(const Problem *p) { DISPATCH(forward); }

void kestrel_backward(const Problem *p) { DISPATCH(backward); }

// The noise that a forward pass adds at a step to product 0 (input) or 1 (recurrent): [rows + 1, 4H], bias row last.
void kestrel_noise(const Problem *p, int64_t block, int64_t step, int64_t product, float *to) {
  std::fill_n(to, ((product ? p->hidden : p->input) + 1) * 4 * p->hidden, 0.0f);
  add_noise(*p, block, step, product, to, to);
}
}
