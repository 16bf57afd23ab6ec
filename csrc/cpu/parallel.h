// A loop over independent items on several threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace jv5 {

// Elements below which another thread costs more than it saves: starting one takes about 20 us.
constexpr int64_t kMinElementsPerThread = 1 << 16;

// Calls body(begin, end) on ranges that cover 0..count. Which thread takes which range is left
// open, so an item's result must not depend on it. `body` must not throw.
template <typename Body>
void parallel_for(int64_t count, int64_t elements_per_item, int num_threads, const Body& body) {
    const int64_t useful = count * elements_per_item / kMinElementsPerThread;
    const int64_t threads = std::min<int64_t>({num_threads, useful, count});
    if (threads <= 1) {
        if (count > 0) body(int64_t{0}, count);
        return;
    }
    // Four ranges a thread: one that is held up leaves its share to the others.
    const int64_t grain = (count + 4 * threads - 1) / (4 * threads);
    std::atomic<int64_t> next{0};
    const auto work = [&] {
        for (int64_t begin; (begin = next.fetch_add(grain)) < count;) {
            body(begin, std::min(begin + grain, count));
        }
    };
    std::vector<std::thread> helpers;
    helpers.reserve(static_cast<size_t>(threads - 1));
    try {
        for (int64_t i = 1; i < threads; ++i) helpers.emplace_back(work);
    } catch (const std::system_error&) {
        // No more threads to be had: those that started, and this one, do all the work.
    }
    work();
    for (auto& helper : helpers) helper.join();
}

}  // namespace jv5
