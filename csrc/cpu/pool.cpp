// Pooling and the output stage (final RMSNorm, pool, slice, L2, quantise) for float32 on the CPU.
//
// Means are summed in chunks of kChunk tokens that start at the sequence's first token: in float
// inside a chunk, in double over the chunks, always in the same order. Neither the batch nor the
// number of threads changes a bit of a row.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "dispatch.h"
#include "kernels.h"
#include "parallel.h"
#include "quantize_rows.h"

namespace jv5 {
namespace {

constexpr int64_t kChunk = 128;
// Columns whose totals are kept on the stack at a time.
constexpr int64_t kBlock = 256;
// torch.nn.functional.normalize divides by max(‖x‖, this).
constexpr float kNormalizeEps = 1e-12f;

struct RowKernels {
    float (*sum_of_squares)(const float*, int64_t);
    void (*add_four_rows)(const float*, int64_t, const float*, float*, int64_t);
    void (*add_row)(const float*, float, float*, int64_t);
    void (*add_to_double)(const float*, double*, int64_t);
    void (*scale_row)(const float*, float, const float*, float*, int64_t);
    void (*divide_row)(float*, float, int64_t);
    bool (*is_finite_row)(const float*, int64_t);
};

namespace baseline {
#define JV5_TARGET
#define JV5_LANES 4
#include "pool_variant.h"
#undef JV5_TARGET
#undef JV5_LANES
}  // namespace baseline

#if JV5_X86
namespace avx2 {
#define JV5_TARGET JV5_TARGET_AVX2
#define JV5_LANES 8
#include "pool_variant.h"
#undef JV5_TARGET
#undef JV5_LANES
}  // namespace avx2

namespace avx512 {
#define JV5_TARGET JV5_TARGET_AVX512
#define JV5_LANES 16
#include "pool_variant.h"
#undef JV5_TARGET
#undef JV5_LANES
}  // namespace avx512
#endif

const RowKernels& row_kernels() {
#if JV5_X86
    if (current_level() == Level::kAvx512) return avx512::kRowKernels;
    if (current_level() == Level::kAvx2) return avx2::kRowKernels;
#endif
    return baseline::kRowKernels;
}

struct Range {
    int64_t start;
    int64_t end;
};

struct Norm {
    const float* weight;  // [width], or null: no norm
    float eps;
};

float inverse_rms(const RowKernels& kernels, const float* x, int64_t width, float eps) {
    const float mean = kernels.sum_of_squares(x, width) / static_cast<float>(width);
    return 1.0f / std::sqrt(mean + eps);
}

Range range_of(const Tokens& tokens, int64_t row) {
    return {tokens.starts[row * tokens.range_stride], tokens.ends[row * tokens.range_stride]};
}

bool has_valid_ranges(const Tokens& tokens) {
    for (int64_t row = 0; row < tokens.rows; ++row) {
        const auto [start, end] = range_of(tokens, row);
        if (start < 0 or end < start or end > tokens.total_tokens) return false;
    }
    return true;
}

// sum [width] = the chunk's tokens, each divided by its RMS when there is a norm
void sum_chunk(const RowKernels& kernels, const Tokens& tokens, const Norm& norm, Range chunk,
               float* sum) {
    std::fill_n(sum, tokens.width, 0.0f);
    float scale[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    int64_t t = chunk.start;
    for (; t + 4 <= chunk.end; t += 4) {
        const float* x = tokens.hidden + t * tokens.stride;
        for (int r = 0; norm.weight != nullptr and r < 4; ++r) {
            scale[r] = inverse_rms(kernels, x + r * tokens.stride, tokens.width, norm.eps);
        }
        kernels.add_four_rows(x, tokens.stride, scale, sum, tokens.width);
    }
    for (; t < chunk.end; ++t) {
        const float* x = tokens.hidden + t * tokens.stride;
        if (norm.weight != nullptr) scale[0] = inverse_rms(kernels, x, tokens.width, norm.eps);
        kernels.add_row(x, scale[0], sum, tokens.width);
    }
}

struct ChunkTable {
    std::vector<Range> chunks;
    std::vector<int64_t> first;  // [rows + 1], a row's chunks are first[row]..first[row + 1]
};

ChunkTable chunk_table(const Tokens& tokens) {
    ChunkTable table;
    table.first.assign(static_cast<size_t>(tokens.rows) + 1, 0);
    for (int64_t row = 0; row < tokens.rows; ++row) {
        const auto [start, end] = range_of(tokens, row);
        for (int64_t t = start; t < end; t += kChunk) {
            table.chunks.push_back({t, std::min(t + kChunk, end)});
        }
        table.first[row + 1] = static_cast<int64_t>(table.chunks.size());
    }
    return table;
}

// out [width] = the total of a row's chunk sums [chunks, width] / length (· weight)
void mean_row(const RowKernels& kernels, const float* sums, int64_t chunks, int64_t length,
              int64_t width, const float* weight, float* out) {
    for (int64_t c = 0; c < width; c += kBlock) {
        const int64_t columns = std::min(kBlock, width - c);
        double total[kBlock] = {};
        for (int64_t i = 0; i < chunks; ++i) {
            kernels.add_to_double(sums + i * width + c, total, columns);
        }
        for (int64_t k = 0; k < columns; ++k) {
            const double scale = weight != nullptr ? weight[c + k] : 1.0;
            out[c + k] = static_cast<float>(total[k] / static_cast<double>(length) * scale);
        }
    }
}

// out [rows, width] = the mean of each row's range, zeros for an empty one
void mean_rows(const Tokens& tokens, const Norm& norm, float* out, int num_threads) {
    const RowKernels& kernels = row_kernels();
    const int64_t width = tokens.width;
    const ChunkTable table = chunk_table(tokens);
    const int64_t count = static_cast<int64_t>(table.chunks.size());
    std::vector<float> sums(table.chunks.size() * static_cast<size_t>(width));
    parallel_for(count, kChunk * width, num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            sum_chunk(kernels, tokens, norm, table.chunks[i], sums.data() + i * width);
        }
    });
    parallel_for(tokens.rows, 2 * width, num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const Range range = range_of(tokens, row);
            const int64_t first = table.first[row];
            mean_row(kernels, sums.data() + first * width, table.first[row + 1] - first,
                     std::max<int64_t>(1, range.end - range.start), width, norm.weight,
                     out + row * width);
        }
    });
}

// The token [width] that a row stands for, or null for an empty range.
const float* pooled_token(const Tokens& tokens, Pooling pooling, int64_t row) {
    const auto [start, end] = range_of(tokens, row);
    if (start == end) return nullptr;
    return tokens.hidden + (pooling == Pooling::kLastToken ? end - 1 : start) * tokens.stride;
}

// out [dim] = the first columns of a pooled row x [width], or zeros for null
void write_row(const RowKernels& kernels, const float* x, int64_t width, const Norm& norm,
               int64_t dim, float* out) {
    if (x == nullptr) {
        std::fill_n(out, dim, 0.0f);
    } else if (norm.weight != nullptr) {
        const float scale = inverse_rms(kernels, x, width, norm.eps);
        kernels.scale_row(x, scale, norm.weight, out, dim);
    } else {
        std::copy_n(x, dim, out);
    }
}

// Divides x [dim] by its length if asked to; returns whether the row and its length are finite.
bool finish_row(const RowKernels& kernels, bool normalize, float* x, int64_t dim) {
    if (not normalize) return kernels.is_finite_row(x, dim);
    const float length = std::sqrt(kernels.sum_of_squares(x, dim));
    // In this order a NaN stays.
    kernels.divide_row(x, std::max(length, kNormalizeEps), dim);
    return std::isfinite(length);
}

// Writes quantised rows of the output.
struct Quantizer {
    const QuantizeKernels& kernels;
    const EmbedOptions& options;
    std::vector<float> steps;  // [dim] for kCodes

    void store(const float* x, uint8_t* out, int64_t row) const {
        const int64_t dim = options.dim;
        if (options.stored == Stored::kCodes) {
            kernels.codes_of_row(x, options.ranges, steps.data(), out + row * dim, dim,
                                 options.flip);
        } else {
            kernels.bits_of_row(x, out + row * ((dim + 7) / 8), dim, options.flip);
        }
    }
};

}  // namespace

Status jv5_pool_float32(const Tokens& tokens, Pooling pooling, float* out, int num_threads) try {
    if (not has_valid_ranges(tokens)) return Status::kBadOffsets;
    if (pooling == Pooling::kMean) {
        mean_rows(tokens, {nullptr, 0.0f}, out, num_threads);
        return Status::kOk;
    }
    for (int64_t row = 0; row < tokens.rows; ++row) {
        write_row(row_kernels(), pooled_token(tokens, pooling, row), tokens.width, {nullptr, 0.0f},
                  tokens.width, out + row * tokens.width);
    }
    return Status::kOk;
} catch (const std::bad_alloc&) {
    return Status::kOutOfMemory;
}

Status jv5_embed_output_float32(const Tokens& tokens, const EmbedOptions& options, void* out,
                                uint8_t* flags, int num_threads) try {
    if (not has_valid_ranges(tokens)) return Status::kBadOffsets;
    const RowKernels& kernels = row_kernels();
    const bool is_mean = options.pooling == Pooling::kMean;
    const bool is_quantised = options.stored != Stored::kFloats;
    const int64_t width = tokens.width;
    const int64_t dim = options.dim;
    Norm norm{options.weight, options.eps};
    std::vector<float> means;
    if (is_mean) {
        means.resize(static_cast<size_t>(tokens.rows * width));
        mean_rows(tokens, norm, means.data(), num_threads);
        norm.weight = nullptr;
    }
    Quantizer quantizer{quantize_kernels(), options, {}};
    if (options.stored == Stored::kCodes) quantizer.steps = steps_of_ranges(options.ranges, dim);
    std::atomic<bool> is_out_of_memory{false};
    parallel_for(tokens.rows, width, num_threads, [&](int64_t begin, int64_t end) {
        const std::unique_ptr<float[]> scratch(is_quantised ? new (std::nothrow) float[dim]
                                                            : nullptr);
        if (is_quantised and scratch == nullptr) {
            is_out_of_memory = true;
            return;
        }
        for (int64_t row = begin; row < end; ++row) {
            const float* x =
                is_mean ? means.data() + row * width : pooled_token(tokens, options.pooling, row);
            float* target = is_quantised ? scratch.get() : static_cast<float*>(out) + row * dim;
            write_row(kernels, x, width, norm, dim, target);
            flags[row] = not finish_row(kernels, options.normalize, target, dim);
            if (is_quantised) quantizer.store(target, static_cast<uint8_t*>(out), row);
        }
    });
    return is_out_of_memory ? Status::kOutOfMemory : Status::kOk;
} catch (const std::bad_alloc&) {
    return Status::kOutOfMemory;
}

}  // namespace jv5
