// The instruction sets that the kernels are compiled for, and the one in use.
#pragma once

namespace jv5 {

enum class Level { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// Whether this processor runs the variants of a level.
bool is_supported(Level level);

// The level in use: the highest supported one, unless set_level chose another.
Level current_level();

// For tests and comparisons; `level` must be supported. Applies to the whole process.
void set_level(Level level);

Level highest_level();

}  // namespace jv5

#if defined(__x86_64__)
#define JV5_X86 1
#define JV5_TARGET_AVX2 __attribute__((target("avx2,fma")))
#define JV5_TARGET_AVX512 __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")))
#else
#define JV5_X86 0
#endif
