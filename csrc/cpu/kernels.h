// The CPU kernels, as the bindings call them. Pointers and sizes in, a status out.
#pragma once

#include <cstdint>

namespace jv5 {

enum class Status { kOk = 0, kBadOffsets = 1, kOutOfMemory = 2 };

enum class Pooling { kLastToken = 0, kMean = 1, kCls = 2 };

// Packed float32 tokens and the ranges of rows that are pooled.
struct Tokens {
    const float* hidden;    // [total_tokens, width], rows `stride` apart
    const int32_t* starts;  // [rows]
    const int32_t* ends;    // [rows]
    int64_t range_stride;   // elements from one start (or end) to the next
    int64_t total_tokens;
    int64_t rows;
    int64_t width;
    int64_t stride;
};

// What a row of the output holds: floats, a byte a column, or a bit a column.
enum class Stored { kFloats = 0, kCodes = 1, kBits = 2 };

struct EmbedOptions {
    Pooling pooling;
    const float* weight;  // [width] of the final RMSNorm, or null
    float eps;
    int64_t dim;
    bool normalize;
    Stored stored;
    const float* ranges;  // [2, dim] minima and maxima for kCodes, or null
    uint8_t flip;         // what codes and bytes of bits are xored with
};

// out [rows, width]
Status jv5_pool_float32(const Tokens& tokens, Pooling pooling, float* out, int num_threads);

// out [rows, dim] floats or codes, or [rows, ceil(dim / 8)] bytes of bits; flags [rows], 1 where
// a row or its length is not finite before it is quantised
Status jv5_embed_output_float32(const Tokens& tokens, const EmbedOptions& options, void* out,
                                uint8_t* flags, int num_threads);

// x [rows, dim], rows `stride` apart; ranges [2, dim]: minima, maxima; out [rows, dim]: the code,
// its top bit flipped by `flip` = 0x80 for int8
Status jv5_quantize_int8_float32(const float* x, const float* ranges, uint8_t* out, int64_t rows,
                                 int64_t dim, int64_t stride, uint8_t flip, int num_threads);

// out [rows, ceil(dim / 8)]: bit 7 of byte 0 is column 0; bytes xored with `flip`
void jv5_quantize_binary_float32(const float* x, uint8_t* out, int64_t rows, int64_t dim,
                                 int64_t stride, uint8_t flip, int num_threads);

}  // namespace jv5
