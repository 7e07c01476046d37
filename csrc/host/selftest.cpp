/// @file selftest.cpp
/// @brief Tiny correct kernels, each with places where it can be broken: what tests/test_emulator.py plants and expects to be reported.
///
/// The name of a mutation says what goes wrong; the kind of report it must raise stands in the test.
#include "host/registry.h"

namespace modalign::host {
namespace {

using namespace modalign::simt;

// --------------------------------------------------------------------------------------------------------------- block level
/// y[b, t] = x[b, (t + rounds) % kThreads], one step per round, through shared memory.
struct RotateKernel {
    static constexpr int kThreads = 64;
    const float* x;   // [blocks, kThreads]
    float* y;         // [blocks, kThreads]
    int rounds;

    void operator()() const {
        const Global<const float> source(x);
        const Global<float> target(y);
        const Shared<float> ring = shared<float>(0, kThreads);
        const int t = thread_index();
        const std::int64_t base = std::int64_t(block_index_x()) * kThreads;
        if (!MODALIGN_MUTATION("leave one word unwritten") || t != 5) ring[t] = source[base + t];
        barrier();
        for (int round = 0; round < rounds; ++round) {
            const int next = MODALIGN_MUTATION("read past the array") ? t + 1 : (t + 1) % kThreads;
            const float value = ring[next];
            if (!MODALIGN_MUTATION("drop the barrier before the write")) barrier();
            ring[MODALIGN_MUTATION("write past the array") ? t + 1 : t] = value;
            if (MODALIGN_MUTATION("one thread leaves early") && t == 37) return;
            if (MODALIGN_MUTATION("one warp takes another barrier") && warp() == 1) barrier();
            else if (!MODALIGN_MUTATION("drop the barrier after the write")) barrier();
        }
        const float result = ring[t];
        if (MODALIGN_MUTATION("leave one output unwritten") && t == 3) return;
        target[base + t + (MODALIGN_MUTATION("store past the end") ? 1 : 0)] =
            result + (MODALIGN_MUTATION("load before the start") ? source[base + t - 1] : 0.0f);
    }
};

void run_rotate(Run& run) {
    const std::vector<std::int64_t> shape = run.shape("x");
    const int rounds = static_cast<int>(run.integer("rounds"));
    const unsigned shared_bytes =
        run.has("shared_bytes") ? static_cast<unsigned>(run.integer("shared_bytes")) : RotateKernel::kThreads * sizeof(float);
    run.launch(RotateKernel{run.input<float>("x"), run.output<float>("y", shape), rounds},
               {{static_cast<unsigned>(shape[0]), 1, 1}, RotateKernel::kThreads, shared_bytes, "selftest_rotate"});
}
const Registration kRotate({.key = "selftest_rotate", .family = "selftest", .run = run_rotate, .threads = RotateKernel::kThreads, .tags = {}});

// ---------------------------------------------------------------------------------------------------------------- warp level
/// Per warp: sum[w] = sum of its 32 numbers, neighbour[i] = the number one lane on (ring), positive[i] = x > 0, votes[w] = those as bits.
template <class T>
struct WarpKernel {
    static constexpr int kThreads = 64;
    const T* x;             // [kThreads]
    T* sum;                 // [2]
    T* neighbour;           // [kThreads]
    bool* positive;         // [kThreads]
    std::uint32_t* votes;   // [2]

    void operator()() const {
        const Global<const T> source(x);
        const Shared<T> words = shared<T>(0, kThreads);
        const int t = thread_index();
        const T mine = source[t];
        words[t] = mine;
        if (!MODALIGN_MUTATION("drop the warp barrier")) warp_barrier();
        const int other = MODALIGN_MUTATION("read another warp's word") ? (t + kWarpSize) % kThreads : warp() * kWarpSize + (lane() + 1) % kWarpSize;
        const T next = words[other];
        if (!MODALIGN_MUTATION("drop the warp barrier before reuse")) warp_barrier();
        words[t] = next;
        global(neighbour)[t] = words[t];
        if (!MODALIGN_MUTATION("one lane skips the warp barrier") || lane() != 9) warp_barrier();

        if (MODALIGN_MUTATION("one lane leaves before the shuffle") && lane() == 3) return;
        T total = mine;
        for (int step = kWarpSize / 2; step > 0; step /= 2) {
            if (MODALIGN_MUTATION("one lane skips a shuffle") && step == 4 && lane() == 30) continue;
            if (MODALIGN_MUTATION("half the lanes shuffle elsewhere") && lane() < 16) total += shuffle_xor(total, step);
            else total += shuffle_xor(total, MODALIGN_MUTATION("wrong lane in the shuffle") && step == 2 ? 1 : step);
        }
        if (MODALIGN_MUTATION("every lane stores the sum") || lane() == 0) global(sum)[warp()] = total;
        const bool is_positive = mine > T(0);
        global(positive)[t] = is_positive;
        const std::uint32_t bits = MODALIGN_MUTATION("half a warp votes") && lane() < 16 ? 0u : warp_ballot(is_positive);
        if (lane() == 0) global(votes)[warp()] = bits;
    }
};

template <class T>
void run_warp(Run& run) {
    using Kernel = WarpKernel<T>;
    const Kernel kernel{run.input<T>("x"), run.output<T>("sum", {2}), run.output<T>("neighbour", {Kernel::kThreads}),
                        run.output<bool>("positive", {Kernel::kThreads}), run.output<std::uint32_t>("votes", {2})};
    run.launch(kernel, {{1, 1, 1}, Kernel::kThreads, Kernel::kThreads * sizeof(T), run.key().c_str()});
}
const Registration kWarpFloat({.key = "selftest_warp_f32", .family = "selftest", .run = run_warp<float>, .threads = 64, .tags = {}});
const Registration kWarpDouble({.key = "selftest_warp_f64", .family = "selftest", .run = run_warp<double>, .threads = 64, .tags = {}});

// ---------------------------------------------------------------------------------------------------------------- grid level
/// First launch: partial[b] = sum of the block's numbers, through global memory. Second launch: total = sum of partial.
struct PartialSumKernel {
    static constexpr int kThreads = 32;
    const float* x;   // [blocks, kThreads]
    float* scratch;   // [blocks, kThreads]
    float* partial;   // [blocks]
    int blocks;

    void operator()() const {
        const Global<const float> source(x);
        const Global<float> own(scratch), sums(partial);
        const int t = thread_index();
        const auto b = static_cast<std::int64_t>(block_index_x());
        const std::int64_t base = b * kThreads;
        own[base + (MODALIGN_MUTATION("two threads write one element") && t == 7 ? 6 : t)] = source[base + t];
        if (!MODALIGN_MUTATION("drop the barrier between global accesses")) barrier();
        if (t != 0) return;
        float sum = 0.0f;
        for (int i = 0; i < kThreads; ++i) sum += own[base + i];
        if (MODALIGN_MUTATION("read another block's element") && b > 0) sum += own[base - 1];
        sums[MODALIGN_MUTATION("two blocks write one element") ? 0 : b] = sum;
    }
};
struct TotalSumKernel {
    static constexpr int kThreads = 32;
    const float* partial;   // [blocks]
    float* total;           // [1]
    int blocks;

    void operator()() const {
        const Global<const float> sums(partial);
        float sum = 0.0f;
        for (int i = lane(); i < blocks; i += kWarpSize) sum += sums[i];
        for (int step = kWarpSize / 2; step > 0; step /= 2) sum += shuffle_down(sum, step);
        if (lane() == 0) global(total)[0] = sum;
    }
};

void run_sum(Run& run) {
    const std::int64_t blocks = run.shape("x")[0];
    float* partial = run.workspace<float>("partial", blocks);
    float* total = run.output<float>("total", {1});
    const PartialSumKernel first{run.input<float>("x"), run.workspace<float>("scratch", blocks * PartialSumKernel::kThreads), partial,
                                 static_cast<int>(blocks)};
    // Without the first launch the second one reads words that nobody wrote.
    if (!run.has("skip_first") || !run.flag("skip_first"))
        run.launch(first, {{static_cast<unsigned>(blocks), 1, 1}, PartialSumKernel::kThreads, 0, "selftest_partial_sum"});
    run.launch(TotalSumKernel{partial, total, static_cast<int>(blocks)}, {{1, 1, 1}, TotalSumKernel::kThreads, 0, "selftest_total_sum"});
}
const Registration kPartialSum({.key = "selftest_partial_sum", .family = "selftest", .run = run_sum, .threads = 32, .tags = {}});
const Registration kTotalSum({.key = "selftest_total_sum", .family = "selftest", .run = run_sum, .threads = 32, .tags = {}});

// --------------------------------------------------------------------------------------------------------- asynchronous copy
/// y[i] = x[n - 1 - i] inside each tile of 128, two tiles in flight; the last tile may be ragged (n is a multiple of 4).
struct PipelineKernel {
    static constexpr int kThreads = 32;
    static constexpr int kTile = 4 * kThreads;
    const float* x;   // [n]
    float* y;         // [n]
    int n;

    void load(int tile, Shared<float> buffer) const {
        const int i = tile * kTile + 4 * thread_index();
        const int valid = MODALIGN_MUTATION("copy past the end") ? 16 : 4 * minimum(4, maximum(0, n - i));
        copy_async_16(buffer, 4 * thread_index(), global(x), MODALIGN_MUTATION("copy from an odd address") && valid == 16 ? i + 1 : i, valid);
        if (!MODALIGN_MUTATION("drop the commit")) copy_async_commit();
    }
    void operator()() const {
        const Global<float> target(y);
        const int tiles = ceil_divide(n, kTile);
        const Shared<float> buffers = shared<float>(0, 2 * kTile);
        load(0, buffers);
        for (int tile = 0; tile < tiles; ++tile) {
            const Shared<float> now = buffers.at(tile % 2 * kTile);
            load(tile + 1, buffers.at((tile + 1) % 2 * kTile));   // past the last tile this only fills zeros
            if (MODALIGN_MUTATION("wait for one group too few")) copy_async_wait<2>();
            else if (!MODALIGN_MUTATION("drop the wait")) copy_async_wait<1>();
            if (!MODALIGN_MUTATION("drop the barrier after the wait")) barrier();
            const int size = minimum(kTile, n - tile * kTile);
            for (int i = thread_index(); i < size; i += kThreads) target[tile * kTile + i] = now[size - 1 - i];
            if (!MODALIGN_MUTATION("drop the barrier before the next copy")) barrier();
        }
        copy_async_wait<0>();
    }
};

void run_pipeline(Run& run) {
    const std::int64_t n = run.shape("x")[0];
    run.launch(PipelineKernel{run.input<float>("x"), run.output<float>("y", {n}), static_cast<int>(n)},
               {{1, 1, 1}, PipelineKernel::kThreads, 2 * PipelineKernel::kTile * sizeof(float), "selftest_pipeline"});
}
const Registration kPipeline({.key = "selftest_pipeline", .family = "selftest", .run = run_pipeline, .threads = 32, .tags = {}});

// ------------------------------------------------------------------------------------------------------------- wide accesses
/// y = x, four floats at a time, through shared memory.
struct WideKernel {
    static constexpr int kThreads = 32;
    const float* x;   // [128]
    float* y;         // [128]

    void operator()() const {
        const Shared<float> words = shared<float>(0, 4 * kThreads + 4);
        const int i = 4 * thread_index();
        const Pack<float, 4> four = load_pack<4>(global(x), i + (MODALIGN_MUTATION("wide load from an odd element") && i < 8 ? 1 : 0));
        store_pack(words, i + (MODALIGN_MUTATION("wide store to an odd element") ? 2 : 0), four);
        if (MODALIGN_MUTATION("wide load past the array") && i == 124) load_pack<4>(words, i + 8);
        store_pack(global(y), i, load_pack<4>(words, i));
    }
};

void run_wide(Run& run) {
    run.launch(WideKernel{run.input<float>("x"), run.output<float>("y", {128})}, {{1, 1, 1}, 32, (4 * 32 + 4) * sizeof(float), "selftest_wide"});
}
const Registration kWide({.key = "selftest_wide", .family = "selftest", .run = run_wide, .threads = 32, .tags = {}});

// --------------------------------------------------------------------------------------------------------------- tensor core
/// registers[l, m] = what lane l gets of the four 8×8 matrices that lie one after the other in x.
template <bool Transposed>
struct LoadMatrixKernel {
    static constexpr int kThreads = 32;
    const f16* x;               // [4, 8, 8]
    std::uint32_t* registers;   // [32, 4]

    void operator()() const {
        const Shared<f16> matrices = shared<f16>(0, 256);
        store_pack(matrices, 8 * lane(), load_pack<8>(global(x), 8 * lane()));
        if (!MODALIGN_MUTATION("drop the warp barrier")) warp_barrier();
        std::uint32_t r[4];
        const int row = 8 * lane() + (MODALIGN_MUTATION("row at an odd element") ? lane() / 31 * -4 : 0);
        if constexpr (Transposed) load_matrix_x4_transposed(r, matrices, row);
        else load_matrix_x4(r, matrices, row);
        for (int m = 0; m < 4; ++m) global(registers)[4 * lane() + m] = r[m];
    }
};

template <bool Transposed>
void run_load_matrix(Run& run) {
    run.launch(LoadMatrixKernel<Transposed>{run.input<f16>("x"), run.output<std::uint32_t>("registers", {32, 4})},
               {{1, 1, 1}, 32, 512, run.key().c_str()});
}
const Registration kLoadMatrix({.key = "selftest_load_matrix", .family = "selftest", .run = run_load_matrix<false>, .threads = 32, .tags = {}});
const Registration kLoadMatrixTransposed(
    {.key = "selftest_load_matrix_transposed", .family = "selftest", .run = run_load_matrix<true>, .threads = 32, .tags = {}});

/// d[m, n] = sum over k of a[m, k] b: a 16×16 tile per warp, b given as [N, K], or as [K, N] through the transposing load.
template <class T, bool Transposed>
struct MatmulKernel {
    static constexpr int kThreads = 32;
    const T* a;   // [M, K]
    const T* b;   // [N, K] or [K, N]
    float* d;     // [M, N]
    int N, K;

    void operator()() const {
        const Global<const T> left(a), right(b);
        const Global<float> result(d);
        const Shared<T> a_tile = shared<T>(0, 256), b_tile = shared<T>(512, 256);   // both 16×16
        const std::int64_t row = std::int64_t(block_index_y()) * 16, column = std::int64_t(block_index_x()) * 16;
        const int tile_row = lane() / 2, tile_half = lane() % 2 * 8;
        // Of a 16×16 tile the four 8×8 matrices in the order of a's registers: rows 0–7 and 8–15 of the left half, then of the right half.
        const int by_register = lane() % 16 * 16 + lane() / 16 * 8;
        // The same with the halves first: registers 0, 1 are then one 8-wide operand b, registers 2, 3 the other.
        const int by_column = (lane() % 8 + lane() / 16 * 8) * 16 + lane() / 8 % 2 * 8;
        float sum[2][4] = {};
        for (int k = 0; k < K; k += 16) {
            store_pack(a_tile, tile_row * 16 + tile_half, load_pack<8>(left, (row + tile_row) * K + k + tile_half));
            store_pack(
                b_tile, tile_row * 16 + tile_half,
                load_pack<8>(right, Transposed ? (k + tile_row) * std::int64_t(N) + column + tile_half : (column + tile_row) * K + k + tile_half));
            warp_barrier();
            std::uint32_t ra[4], rb[4];
            load_matrix_x4(ra, a_tile, MODALIGN_MUTATION("matrices of a in the wrong order") ? by_column : by_register);
            if (Transposed && !MODALIGN_MUTATION("drop the transposition")) load_matrix_x4_transposed(rb, b_tile, by_register);
            else load_matrix_x4(rb, b_tile, by_column);
            if (!MODALIGN_MUTATION("drop the barrier before the next tile")) warp_barrier();
            if (MODALIGN_MUTATION("one lane skips the product") && lane() == 17) continue;
            const std::uint32_t b0[2] = {rb[0], rb[1]}, b1[2] = {rb[2], rb[MODALIGN_MUTATION("wrong register of b") ? 1 : 3]};
            mma_16816(sum[0], ra, b0, T{});
            mma_16816(sum[1], ra, b1, T{});
        }
        const int group = lane() / 4, pair = 2 * (lane() % 4);
        for (int half = 0; half < 2; ++half)
            for (int i = 0; i < 4; ++i) {
                const int out_row = MODALIGN_MUTATION("rows of the result exchanged") ? group + 8 * (1 - i / 2) : group + 8 * (i / 2);
                result[(row + out_row) * N + column + 8 * half + pair + i % 2] = sum[half][i];
            }
    }
};

template <class T, bool Transposed>
void run_matmul(Run& run) {
    const std::int64_t M = run.shape("a")[0], K = run.shape("a")[1], N = run.shape("b")[Transposed ? 1 : 0];
    const MatmulKernel<T, Transposed> kernel{run.input<T>("a"), run.input<T>("b"), run.output<float>("d", {M, N}), static_cast<int>(N),
                                             static_cast<int>(K)};
    run.launch(kernel, {{static_cast<unsigned>(N / 16), static_cast<unsigned>(M / 16), 1}, 32, 1024, run.key().c_str()});
}
const Registration kMatmulBf16({.key = "selftest_matmul_bf16", .family = "selftest", .run = run_matmul<bf16, false>, .threads = 32, .tags = {}});
const Registration kMatmulF16({.key = "selftest_matmul_f16", .family = "selftest", .run = run_matmul<f16, false>, .threads = 32, .tags = {}});
const Registration kMatmulTransposedBf16(
    {.key = "selftest_matmul_transposed_bf16", .family = "selftest", .run = run_matmul<bf16, true>, .threads = 32, .tags = {}});
const Registration kMatmulTransposedF16(
    {.key = "selftest_matmul_transposed_f16", .family = "selftest", .run = run_matmul<f16, true>, .threads = 32, .tags = {}});

// --------------------------------------------------------------------------------------------------------- random programs
/// Each thread obeys its column of a table of commands: for comparing the reports with a brute-force happens-before over whole programs.
struct ProgramKernel {
    static constexpr int kThreads = 64;
    enum Command { nothing, read_shared, write_shared, read_global, write_global, copy_to_shared, wait_for_warp, wait_for_block };
    const std::int32_t* commands;   // [steps, blocks, kThreads]
    const std::int32_t* words;      // [steps, blocks, kThreads], each in 0 … word_count - 1
    float* memory;                  // [word_count], written before
    int steps;
    int word_count;

    void operator()() const {
        const Shared<float> local = shared<float>(0, word_count);
        for (int i = thread_index(); i < word_count; i += kThreads) local[i] = 0.0f;
        barrier();
        for (int step = 0; step < steps; ++step) {
            const std::int64_t i = (std::int64_t(step) * grid_size_x() + block_index_x()) * kThreads + thread_index();
            const int word = global(words)[i];
            switch (global(commands)[i]) {
                case read_shared: (void)float(local[word]); break;
                case write_shared: local[word] = 1.0f; break;
                case read_global: (void)float(global(memory)[word]); break;
                case write_global: global(memory)[word] = 1.0f; break;
                case copy_to_shared:
                    copy_async_4(local, word, global(memory), word);
                    copy_async_commit();
                    copy_async_wait<0>();
                    break;
                case wait_for_warp: warp_barrier(); break;
                case wait_for_block: barrier(); break;
                default: break;
            }
        }
    }
};
struct FillKernel {
    static constexpr int kThreads = 32;
    float* memory;
    int word_count;
    void operator()() const {
        for (int i = thread_index(); i < word_count; i += kThreads) global(memory)[i] = 0.0f;
    }
};

void run_program(Run& run) {
    const std::vector<std::int64_t> shape = run.shape("commands");
    const int word_count = static_cast<int>(run.integer("word_count"));
    float* memory = run.output<float>("memory", {word_count});
    run.launch(FillKernel{memory, word_count}, {{1, 1, 1}, FillKernel::kThreads, 0, "selftest_fill"});
    const ProgramKernel kernel{run.input<std::int32_t>("commands"), run.input<std::int32_t>("words"), memory, static_cast<int>(shape[0]), word_count};
    run.launch(kernel, {{static_cast<unsigned>(shape[1]), 1, 1}, ProgramKernel::kThreads, static_cast<unsigned>(word_count) * 4, "selftest_program"});
}
const Registration kFill({.key = "selftest_fill", .family = "selftest", .run = run_program, .threads = 32, .tags = {}});
const Registration kProgram({.key = "selftest_program", .family = "selftest", .run = run_program, .threads = 64, .tags = {}});

// ------------------------------------------------------------------------------------------------------------------- numbers
/// narrow = x rounded to T; wide = the 16-bit numbers `bits` in float; packed and unpacked again in pairs on the way.
template <class T>
struct ConvertKernel {
    static constexpr int kThreads = 128;
    const float* x;   // [n], n even
    const T* bits;    // [n]
    T* narrow;        // [n]
    float* wide;      // [n]
    std::int64_t n;

    void operator()() const {
        const std::int64_t i = 2 * (std::int64_t(block_index_x()) * kThreads + thread_index());
        if (i >= n) return;
        const Global<const float> source(x);
        const std::uint32_t two = pack_two(from_float<T>(source[i]), from_float<T>(source[i + 1]));
        global(narrow)[i] = unpack_low<T>(two);
        global(narrow)[i + 1] = unpack_high<T>(two);
        for (int j = 0; j < 2; ++j) global(wide)[i + j] = to_float(global(bits)[i + j]);
    }
};

template <class T>
void run_convert(Run& run) {
    const std::int64_t n = run.shape("x")[0];
    const ConvertKernel<T> kernel{run.input<float>("x"), run.input<T>("bits"), run.output<T>("narrow", {n}), run.output<float>("wide", {n}), n};
    run.launch(kernel, {{static_cast<unsigned>(ceil_divide<std::int64_t>(n, 256)), 1, 1}, 128, 0, run.key().c_str()});
}
const Registration kConvertBf16({.key = "selftest_convert_bf16", .family = "selftest", .run = run_convert<bf16>, .threads = 128, .tags = {}});
const Registration kConvertF16({.key = "selftest_convert_f16", .family = "selftest", .run = run_convert<f16>, .threads = 128, .tags = {}});

/// results[i] = minimum, maximum, square root, its reciprocal, exponential, x y + z, |x|, log z and log(1 + z) of the i-th triple.
template <class T>
struct MathKernel {
    static constexpr int kThreads = 32;
    const T* x;   // [n, 3]
    T* results;   // [n, 9]
    int n;

    void operator()() const {
        for (int i = thread_index(); i < n; i += kThreads) {
            const Global<const T> in = global(x).at(3 * i);
            const Global<T> out = global(results).at(10 * i);
            out[0] = minimum(in[0], in[1]);
            out[1] = maximum(in[0], in[1]);
            out[2] = square_root(in[2]);
            out[3] = reciprocal_square_root(in[2]);
            out[4] = exponential(in[0]);
            out[5] = fused_multiply_add(in[0], in[1], in[2]);
            out[6] = absolute(in[0]);
            out[7] = logarithm(in[2]);
            out[8] = logarithm_1p(in[2]);
            out[9] = exponential_minus_1(in[0]);
        }
    }
};

template <class T>
void run_math(Run& run) {
    const std::int64_t n = run.shape("x")[0];
    run.launch(MathKernel<T>{run.input<T>("x"), run.output<T>("results", {n, 10}), static_cast<int>(n)}, {{1, 1, 1}, 32, 0, run.key().c_str()});
}
const Registration kMathFloat({.key = "selftest_math_f32", .family = "selftest", .run = run_math<float>, .threads = 32, .tags = {}});
const Registration kMathDouble({.key = "selftest_math_f64", .family = "selftest", .run = run_math<double>, .threads = 32, .tags = {}});

}  // namespace
}  // namespace modalign::host
