// Which of the loops compiled for several instruction sets to take.

#pragma once

#include <cstdlib>
#include <string>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(KESTREL_PORTABLE)
#define KESTREL_X86
#include <immintrin.h>
#endif

enum class InstructionSet { BASELINE, AVX2, AVX512 };

// The widest instruction set that the processor has, or a narrower one that KESTREL_ISA names (avx2, baseline).
static inline InstructionSet instruction_set() {
#ifdef KESTREL_X86
  const char *name = std::getenv("KESTREL_ISA");
  const std::string wanted = name ? name : "";
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && wanted != "avx2" && wanted != "baseline") return InstructionSet::AVX512;
  if (has_avx2 && wanted != "baseline") return InstructionSet::AVX2;
#endif
  return InstructionSet::BASELINE;
}

// LOOPS of the namespace for that instruction set.
#ifdef KESTREL_X86
#define KESTREL_LOOPS                                                                                                 \
  (instruction_set() == InstructionSet::AVX512 ? avx512::LOOPS                                                       \
   : instruction_set() == InstructionSet::AVX2 ? avx2::LOOPS                                                         \
                                               : baseline::LOOPS)
#else
#define KESTREL_LOOPS baseline::LOOPS
#endif
