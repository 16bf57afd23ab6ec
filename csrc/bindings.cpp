// The Python module jv5kernels._C. Tensors arrive as addresses and sizes, so no torch header is
// needed and no torch release can break the module; the operators in Python have checked them.
// Every kernel releases the GIL and returns a status: 0, or the reason in kernels.h.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/kernels.h"

namespace py = pybind11;
using namespace jv5;

namespace {

struct NamedLevel {
    const char* name;
    Level level;
};
constexpr NamedLevel kLevels[] = {
    {"baseline", Level::kBaseline}, {"avx2", Level::kAvx2}, {"avx512", Level::kAvx512}};

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

std::string dispatch_level() {
    for (const auto& [name, level] : kLevels) {
        if (level == current_level()) return name;
    }
    return "unknown";
}

std::vector<std::string> dispatch_levels() {
    std::vector<std::string> names;
    for (const auto& [name, level] : kLevels) {
        if (is_supported(level)) names.push_back(name);
    }
    return names;
}

void set_dispatch_level(const std::string& wanted) {
    for (const auto& [name, level] : kLevels) {
        if (wanted == name and is_supported(level)) return set_level(level);
    }
    throw py::value_error("dispatch level '" + wanted +
                          "' is unknown or not supported by this CPU");
}

// Packed tokens whose rows are pooled over `ranges`: (rows + 1,) offsets, or (rows, 2) spans.
Tokens tokens_of(uintptr_t hidden, int64_t total_tokens, int64_t width, int64_t stride,
                 uintptr_t ranges, int64_t rows, int64_t range_stride) {
    const auto* starts = pointer<const int32_t>(ranges);
    return {pointer<const float>(hidden),
            starts,
            starts + 1,
            range_stride,
            total_tokens,
            rows,
            width,
            stride};
}

int pool_float32(uintptr_t hidden, int64_t total_tokens, int64_t width, int64_t stride,
                 uintptr_t ranges, int64_t rows, int64_t range_stride, int pooling, uintptr_t out,
                 int num_threads) {
    const Tokens tokens =
        tokens_of(hidden, total_tokens, width, stride, ranges, rows, range_stride);
    return static_cast<int>(
        jv5_pool_float32(tokens, static_cast<Pooling>(pooling), pointer<float>(out), num_threads));
}

int embed_output_float32(uintptr_t hidden, int64_t total_tokens, int64_t width, int64_t stride,
                         uintptr_t ranges, int64_t rows, int64_t range_stride, int pooling,
                         uintptr_t weight, float eps, int64_t dim, bool normalize, int stored,
                         uintptr_t value_ranges, uint8_t flip, uintptr_t out, uintptr_t flags,
                         int num_threads) {
    const Tokens tokens =
        tokens_of(hidden, total_tokens, width, stride, ranges, rows, range_stride);
    const EmbedOptions options{static_cast<Pooling>(pooling),
                               pointer<const float>(weight),
                               eps,
                               dim,
                               normalize,
                               static_cast<Stored>(stored),
                               pointer<const float>(value_ranges),
                               flip};
    return static_cast<int>(jv5_embed_output_float32(tokens, options, pointer<void>(out),
                                                     pointer<uint8_t>(flags), num_threads));
}

int quantize_int8_float32(uintptr_t x, uintptr_t ranges, uintptr_t out, int64_t rows, int64_t dim,
                          int64_t stride, uint8_t flip, int num_threads) {
    return static_cast<int>(
        jv5_quantize_int8_float32(pointer<const float>(x), pointer<const float>(ranges),
                                  pointer<uint8_t>(out), rows, dim, stride, flip, num_threads));
}

int quantize_binary_float32(uintptr_t x, uintptr_t out, int64_t rows, int64_t dim, int64_t stride,
                            uint8_t flip, int num_threads) {
    jv5_quantize_binary_float32(pointer<const float>(x), pointer<uint8_t>(out), rows, dim, stride,
                                flip, num_threads);
    return static_cast<int>(Status::kOk);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "C++ kernels of jv5kernels for the CPU; call them through jv5kernels.ops.";
    module.def("dispatch_level", &dispatch_level);
    module.def("dispatch_levels", &dispatch_levels);
    module.def("set_dispatch_level", &set_dispatch_level);
    using Release = py::call_guard<py::gil_scoped_release>;
    module.def("pool_float32", &pool_float32, Release());
    module.def("embed_output_float32", &embed_output_float32, Release());
    module.def("quantize_int8_float32", &quantize_int8_float32, Release());
    module.def("quantize_binary_float32", &quantize_binary_float32, Release());
}
