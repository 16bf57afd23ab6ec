// The inner loops of pooling and normalising for one instruction set. No include guard: pool.cpp
// includes this once a level, inside a namespace, with JV5_TARGET (attributes) and JV5_LANES
// (floats a vector) defined. Vectors are the GCC and Clang extension, so one source serves all.

using Vector = float __attribute__((vector_size(4 * JV5_LANES), aligned(4), may_alias));

constexpr int64_t kLanes = JV5_LANES;

// Four sums side by side, so that their chains of additions overlap.
JV5_TARGET static float sum_of_squares(const float* x, int64_t n) {
    Vector sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
        for (int part = 0; part < 4; ++part) {
            const Vector v = *reinterpret_cast<const Vector*>(x + i + part * kLanes);
            sums[part] += v * v;
        }
    }
    const Vector total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    float sum = 0.0f;
    for (int64_t lane = 0; lane < kLanes; ++lane) sum += total[lane];
    for (; i < n; ++i) sum += x[i] * x[i];
    return sum;
}

// sum[c] += Σ_r x[r, c] · scale[r] over four rows
JV5_TARGET static void add_four_rows(const float* x, int64_t stride, const float* scale, float* sum,
                                     int64_t width) {
    const float* rows[4] = {x, x + stride, x + 2 * stride, x + 3 * stride};
    int64_t c = 0;
    for (; c + kLanes <= width; c += kLanes) {
        Vector v[4];
        for (int r = 0; r < 4; ++r) {
            v[r] = *reinterpret_cast<const Vector*>(rows[r] + c) * scale[r];
        }
        Vector& target = *reinterpret_cast<Vector*>(sum + c);
        target = target + ((v[0] + v[1]) + (v[2] + v[3]));
    }
    for (; c < width; ++c) {
        sum[c] += (rows[0][c] * scale[0] + rows[1][c] * scale[1]) +
                  (rows[2][c] * scale[2] + rows[3][c] * scale[3]);
    }
}

JV5_TARGET static void add_row(const float* x, float scale, float* sum, int64_t width) {
    for (int64_t c = 0; c < width; ++c) sum[c] += x[c] * scale;
}

// total[c] += sum[c], in double
JV5_TARGET static void add_to_double(const float* sum, double* total, int64_t width) {
    for (int64_t c = 0; c < width; ++c) total[c] += static_cast<double>(sum[c]);
}

// out[c] = x[c] · scale · weight[c]
JV5_TARGET static void scale_row(const float* x, float scale, const float* weight, float* out,
                                 int64_t width) {
    for (int64_t c = 0; c < width; ++c) out[c] = x[c] * scale * weight[c];
}

JV5_TARGET static void divide_row(float* x, float divisor, int64_t width) {
    for (int64_t c = 0; c < width; ++c) x[c] /= divisor;
}

JV5_TARGET static bool is_finite_row(const float* x, int64_t width) {
    int32_t bad = 0;
    for (int64_t c = 0; c < width; ++c) {
        int32_t bits;
        std::memcpy(&bits, x + c, sizeof bits);
        bad |= (bits & 0x7fffffff) >= 0x7f800000;
    }
    return bad == 0;
}

constexpr RowKernels kRowKernels{sum_of_squares, add_four_rows, add_row,      add_to_double,
                                 scale_row,      divide_row,    is_finite_row};
