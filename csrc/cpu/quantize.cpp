// Quantisation of float32 rows to bytes, bit for bit as Sentence Transformers' quantize_embeddings:
//   int8    code = clip(floor((x - min) / step), 0, 255)
//           step = (max - min) / 255, or 1 where that is 0
//   binary  bit = x > 0, eight columns a byte, the first in the top bit

#include <cstring>
#include <new>
#include <vector>

#include "dispatch.h"
#include "kernels.h"
#include "memory.h"
#include "parallel.h"
#include "quantize_rows.h"

#if JV5_X86
#include <immintrin.h>
#endif

namespace jv5 {
namespace {

namespace baseline {
constexpr int64_t kBitsPerStep = 8;

#if JV5_X86
inline uint8_t* store_bits(const float* x, uint8_t* out, uint8_t flip) {
    // Loaded back to front: movmskps puts the first lane into bit 0.
    const __m128 zero = _mm_setzero_ps();
    const __m128 high = _mm_loadu_ps(x);
    const __m128 low = _mm_loadu_ps(x + 4);
    const __m128 high_reversed = _mm_shuffle_ps(high, high, _MM_SHUFFLE(0, 1, 2, 3));
    const __m128 low_reversed = _mm_shuffle_ps(low, low, _MM_SHUFFLE(0, 1, 2, 3));
    const int bits = _mm_movemask_ps(_mm_cmpgt_ps(high_reversed, zero)) << 4 |
                     _mm_movemask_ps(_mm_cmpgt_ps(low_reversed, zero));
    *out = static_cast<uint8_t>(bits) ^ flip;
    return out + 1;
}
#else
inline uint8_t* store_bits(const float* x, uint8_t* out, uint8_t flip) {
    uint8_t bits = 0;
    for (int i = 0; i < 8; ++i) bits |= static_cast<uint8_t>((x[i] > 0.0f) << (7 - i));
    *out = bits ^ flip;
    return out + 1;
}
#endif

#define JV5_TARGET
#include "quantize_variant.h"
#undef JV5_TARGET
}  // namespace baseline

#if JV5_X86
namespace avx2 {
constexpr int64_t kBitsPerStep = 32;

// A mask of eight columns, all ones where x > 0.
JV5_TARGET_AVX2 inline __m256i positive(const float* x) {
    const __m256 mask = _mm256_cmp_ps(_mm256_loadu_ps(x), _mm256_setzero_ps(), _CMP_GT_OQ);
    return _mm256_castps_si256(mask);
}

JV5_TARGET_AVX2 inline uint8_t* store_bits(const float* x, uint8_t* out, uint8_t flip) {
    // Packing works inside 128-bit halves: afterwards the dword i of the low half holds columns
    // 8i..8i+3 and that of the high half 8i+4..8i+7.
    const __m256i first = _mm256_packs_epi32(positive(x), positive(x + 8));
    const __m256i second = _mm256_packs_epi32(positive(x + 16), positive(x + 24));
    const __m256i bytes = _mm256_packs_epi16(first, second);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i columns = _mm256_permutevar8x32_epi32(bytes, order);
    const __m256i reversal =
        _mm256_setr_epi8(7, 6, 5, 4, 3, 2, 1, 0, 15, 14, 13, 12, 11, 10, 9, 8,  //
                         7, 6, 5, 4, 3, 2, 1, 0, 15, 14, 13, 12, 11, 10, 9, 8);
    const auto bits =
        static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_shuffle_epi8(columns, reversal)));
    const uint32_t flipped = bits ^ (flip * 0x01010101u);
    std::memcpy(out, &flipped, sizeof flipped);
    return out + sizeof flipped;
}

#define JV5_TARGET JV5_TARGET_AVX2
#include "quantize_variant.h"
#undef JV5_TARGET
}  // namespace avx2

namespace avx512 {
constexpr int64_t kBitsPerStep = 64;

JV5_TARGET_AVX512 inline uint64_t positive(const float* x) {
    return _mm512_cmp_ps_mask(_mm512_loadu_ps(x), _mm512_setzero_ps(), _CMP_GT_OQ);
}

JV5_TARGET_AVX512 inline uint8_t* store_bits(const float* x, uint8_t* out, uint8_t flip) {
    uint64_t bits =
        positive(x) | positive(x + 16) << 16 | positive(x + 32) << 32 | positive(x + 48) << 48;
    // The compare puts the first column into bit 0: reverse the bits of every byte.
    bits = (bits >> 1 & 0x5555555555555555u) | (bits & 0x5555555555555555u) << 1;
    bits = (bits >> 2 & 0x3333333333333333u) | (bits & 0x3333333333333333u) << 2;
    bits = (bits >> 4 & 0x0f0f0f0f0f0f0f0fu) | (bits & 0x0f0f0f0f0f0f0f0fu) << 4;
    bits ^= flip * 0x0101010101010101u;
    std::memcpy(out, &bits, sizeof bits);
    return out + sizeof bits;
}

#define JV5_TARGET JV5_TARGET_AVX512
#include "quantize_variant.h"
#undef JV5_TARGET
}  // namespace avx512
#endif

}  // namespace

const QuantizeKernels& quantize_kernels() {
#if JV5_X86
    if (current_level() == Level::kAvx512) return avx512::kQuantizeKernels;
    if (current_level() == Level::kAvx2) return avx2::kQuantizeKernels;
#endif
    return baseline::kQuantizeKernels;
}

std::vector<float> steps_of_ranges(const float* ranges, int64_t dim) {
    std::vector<float> steps(static_cast<size_t>(dim));
    for (int64_t c = 0; c < dim; ++c) {
        const float step = (ranges[dim + c] - ranges[c]) / 255.0f;
        steps[c] = step == 0.0f ? 1.0f : step;
    }
    return steps;
}

Status jv5_quantize_int8_float32(const float* x, const float* ranges, uint8_t* out, int64_t rows,
                                 int64_t dim, int64_t stride, uint8_t flip, int num_threads) try {
    const std::vector<float> steps = steps_of_ranges(ranges, dim);
    const QuantizeKernels& kernels = quantize_kernels();
    advise_large_pages(out, rows * dim);
    parallel_for(rows, dim, num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            kernels.codes_of_row(x + row * stride, ranges, steps.data(), out + row * dim, dim,
                                 flip);
        }
    });
    return Status::kOk;
} catch (const std::bad_alloc&) {
    return Status::kOutOfMemory;
}

void jv5_quantize_binary_float32(const float* x, uint8_t* out, int64_t rows, int64_t dim,
                                 int64_t stride, uint8_t flip, int num_threads) {
    const QuantizeKernels& kernels = quantize_kernels();
    const int64_t bytes = (dim + 7) / 8;
    advise_large_pages(out, rows * bytes);
    parallel_for(rows, dim, num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            kernels.bits_of_row(x + row * stride, out + row * bytes, dim, flip);
        }
    });
}

}  // namespace jv5
