// The inner loops of quantisation for one instruction set. No include guard: quantize.cpp includes
// this once a level, inside a namespace, with JV5_TARGET, kBitsPerStep and store_bits defined.

JV5_TARGET static void codes_of_row(const float* x, const float* start, const float* step,
                                    uint8_t* out, int64_t dim, uint8_t flip) {
    for (int64_t c = 0; c < dim; ++c) {
        float code = (x[c] - start[c]) / step[c];
        // floor and clip as one clip and a truncation; NaN fails both comparisons and becomes 0.
        code = code > 0.0f ? code : 0.0f;
        code = code < 255.0f ? code : 255.0f;
        out[c] = static_cast<uint8_t>(static_cast<int32_t>(code)) ^ flip;
    }
}

JV5_TARGET static void bits_of_row(const float* x, uint8_t* out, int64_t dim, uint8_t flip) {
    int64_t c = 0;
    for (; c + kBitsPerStep <= dim; c += kBitsPerStep) {
        out = store_bits(x + c, out, flip);
    }
    for (; c < dim; c += 8) {
        uint8_t bits = 0;
        for (int64_t i = 0; i < 8 and c + i < dim; ++i) {
            bits |= static_cast<uint8_t>((x[c + i] > 0.0f) << (7 - i));
        }
        *out++ = bits ^ flip;
    }
}

constexpr QuantizeKernels kQuantizeKernels{codes_of_row, bits_of_row};
