// Quantisation of one row, for quantize.cpp and for the output stage in pool.cpp.
#pragma once

#include <cstdint>
#include <vector>

namespace jv5 {

struct QuantizeKernels {
    // x, minima, steps [dim] -> out [dim], each code xored with the last argument
    void (*codes_of_row)(const float*, const float*, const float*, uint8_t*, int64_t, uint8_t);
    // x [dim] -> out [ceil(dim / 8)], each byte xored with the last argument
    void (*bits_of_row)(const float*, uint8_t*, int64_t, uint8_t);
};

// The kernels of the instruction set in use.
const QuantizeKernels& quantize_kernels();

// The width of a code's step in each column, for ranges [2, dim]; may throw std::bad_alloc.
std::vector<float> steps_of_ranges(const float* ranges, int64_t dim);

}  // namespace jv5
