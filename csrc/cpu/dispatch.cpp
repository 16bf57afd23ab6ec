#include "dispatch.h"

#include <atomic>

namespace jv5 {

bool is_supported(Level level) {
    if (level == Level::kBaseline) return true;
#if JV5_X86
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (level == Level::kAvx2) return has_avx2;
    return has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
    return false;
#endif
}

Level highest_level() {
    if (is_supported(Level::kAvx512)) return Level::kAvx512;
    if (is_supported(Level::kAvx2)) return Level::kAvx2;
    return Level::kBaseline;
}

namespace {

std::atomic<Level>& level_in_use() {
    static std::atomic<Level> level{highest_level()};
    return level;
}

}  // namespace

Level current_level() { return level_in_use().load(std::memory_order_relaxed); }

void set_level(Level level) { level_in_use().store(level, std::memory_order_relaxed); }

}  // namespace jv5
