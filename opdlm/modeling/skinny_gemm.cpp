// outputs[n][o] = sum over i of inputs[n][i] * weight[o][i], for few rows n: every weight is read from memory once.
//
// A row's result does not depend on the other rows: each sum runs over i in the same order, in LANES partial sums.
// Compiled by opdlm/modeling/skinny_gemm.py at first use, for the processor at hand.

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__FMA__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

using Floats = float __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
using Words = uint32_t __attribute__((vector_size(4 * LANES)));
using Halves = uint16_t __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

static inline Floats load(const float* at) { return *reinterpret_cast<const Floats*>(at); }

// bfloat16 is the upper half of float32.
static inline Floats load(const uint16_t* at) {
    const Words words = __builtin_convertvector(*reinterpret_cast<const Halves*>(at), Words) << 16;
    Floats found;
    std::memcpy(&found, &words, sizeof found);
    return found;
}

// sum + a * b with one rounding, whatever the compiler makes of the code around it.
static inline Floats multiply_add(Floats a, Floats b, Floats sum) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, sum);
#elif defined(__FMA__)
    return _mm256_fmadd_ps(a, b, sum);
#else
    for (int lane = 0; lane < LANES; ++lane) sum[lane] = std::fma(a[lane], b[lane], sum[lane]);
    return sum;
#endif
}

// The last numbers of a row, and zeros.
template <typename Number>
static inline Floats load_rest(const Number* at, long count) {
    Number padded[LANES] = {};
    std::memcpy(padded, at, count * sizeof(Number));
    return load(padded);
}

template <int O, int N, typename Weight>
static inline void tile(const float* inputs, const Weight* weight, float* outputs, long num_in, long num_out) {
    Floats sums[O][N] = {};
    const auto add = [&](auto read, long i) {
        Floats weights[O];
        for (int o = 0; o < O; ++o) weights[o] = read(weight + o * num_in + i);
        for (int n = 0; n < N; ++n) {
            const Floats input = read(inputs + n * num_in + i);
            for (int o = 0; o < O; ++o) sums[o][n] = multiply_add(weights[o], input, sums[o][n]);
        }
    };
    const long rest = num_in % LANES, whole = num_in - rest;
    for (long i = 0; i < whole; i += LANES) add([](auto at) { return load(at); }, i);
    if (rest) add([rest](auto at) { return load_rest(at, rest); }, whole);
    for (int o = 0; o < O; ++o)
        for (int n = 0; n < N; ++n) {
            float sum = 0;
            for (int lane = 0; lane < LANES; ++lane) sum += sums[o][n][lane];
            outputs[n * num_out + o] = sum;
        }
}

// All input rows for O rows of the weight, at most N at once.
template <int O, int N, typename Weight>
static inline void rows(
    const float* inputs, const Weight* weight, float* outputs, long num_rows, long num_in, long num_out) {
    if (num_rows >= N) {
        tile<O, N>(inputs, weight, outputs, num_in, num_out);
        rows<O, N>(inputs + N * num_in, weight, outputs + N * num_out, num_rows - N, num_in, num_out);
    } else if constexpr (N > 1) {
        rows<O, N - 1>(inputs, weight, outputs, num_rows, num_in, num_out);
    }
}

// In tiles of O rows of the weight and at most N inputs.
template <int O, int N, typename Weight>
static void tiles(
    const float* inputs, const Weight* weight, float* outputs, long num_rows, long num_in, long num_out,
    int num_threads) {
    const long num_tiles = num_out / O;
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (long t = 0; t < num_tiles; ++t)
        rows<O, N>(inputs, weight + t * O * num_in, outputs + t * O, num_rows, num_in, num_out);
    for (long o = num_tiles * O; o < num_out; ++o)
        rows<1, N>(inputs, weight + o * num_in, outputs + o, num_rows, num_in, num_out);
}

// 4 x 3 sums and 4 weights fill the 16 vector registers of AVX2.
extern "C" void product_float32(
    const float* inputs, const float* weight, float* outputs, long num_rows, long num_in, long num_out, int threads) {
    tiles<4, 3>(inputs, weight, outputs, num_rows, num_in, num_out, threads);
}

// A weight is converted once per tile, so tiles have more inputs where there are more.
extern "C" void product_bfloat16(
    const float* inputs, const uint16_t* weight, float* outputs, long num_rows, long num_in, long num_out,
    int threads) {
    const auto product = num_rows < 4 ? tiles<4, 3, uint16_t> : tiles<2, 4, uint16_t>;
    product(inputs, weight, outputs, num_rows, num_in, num_out, threads);
}
