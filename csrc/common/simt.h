/// @file simt.h
/// @brief The CUDA subset that kernels may use: compiled by nvcc it is CUDA, compiled as host C++ it is the emulator.
///
/// A kernel is a plain struct. Its members are its arguments; `kThreads` is its block size; `operator()() const` is what one thread does:
///
///     template <class T>
///     struct ScaleKernel {
///         static constexpr int kThreads = 128;
///         static constexpr int kMinBlocks = 4;                        // optional, the second number of __launch_bounds__
///         const T* x;                                                 // [n]
///         T* y;                                                       // [n]
///         std::int64_t n;
///         MODALIGN_DEVICE void operator()() const {
///             const Global<const T> source = global(x);
///             const Global<T> target = global(y);
///             const std::int64_t i = std::int64_t(block_index_x()) * kThreads + thread_index();
///             if (i < n) target[i] = from_float<T>(2.0f * to_float(source[i]));
///         }
///     };
///
/// A host function `plan(problem)` returns a LaunchPlan. `launch(kernel, plan, stream)` runs it on a GPU (nvcc builds); `emulator.run(kernel, plan,
/// options)` in csrc/host/simt_host.h runs the same struct with the same plan on the CPU, one fiber per thread, and reports races, bad addresses,
/// reads of memory that nobody wrote, divergent barriers and missing lanes. All memory goes through `Shared<T>` and `Global<T>`: raw pointers inside
/// them on the device, checked on the host.
///
/// What ordinary C++ in a kernel must respect so that both compilers read it alike:
///  * `float v = s[i];`, never `auto v = s[i];` (on the host `s[i]` is a reference object that reads again each time);
///  * MODALIGN_UNROLL instead of `#pragma unroll`; MODALIGN_HOST_DEVICE on small constexpr helpers that plans and kernels share;
///  * blocks have whole warps, and collective calls (barriers, shuffles, mma) are reached by all of their threads;
///  * no block waits for another one (the emulator runs blocks one after the other, in any order).
///
/// Seeded mutations. A test that never saw its kernel broken proves little, so kernels mark the places where they could be:
///
///     if (!MODALIGN_MUTATION("drop the barrier after the load")) barrier();
///     const int last = MODALIGN_MUTATION("store one row too many") ? rows + 1 : rows;
///
/// nvcc builds see the literal `false` and no trace of the name. On the host the expression is true only while the emulator runs with exactly this
/// mutation switched on for this kernel (`_host.run(key, arguments, mutation=name)`), and every place that a run passes is remembered:
/// `_host.mutations(key)` lists them. Names are unique within the code that one kernel can reach; code shared by kernels (a tile loop) marks its
/// places once, for all of them.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define MODALIGN_DEVICE __device__ __forceinline__
#define MODALIGN_HOST_DEVICE __host__ __device__ __forceinline__
#define MODALIGN_UNROLL _Pragma("unroll")
#define MODALIGN_NO_UNROLL _Pragma("unroll 1")
#define MODALIGN_MUTATION(name) false
#else
#define MODALIGN_DEVICE inline
#define MODALIGN_HOST_DEVICE inline
#define MODALIGN_UNROLL
#define MODALIGN_NO_UNROLL
#define MODALIGN_MUTATION(name)                                                             \
    ([]() -> bool {                                                                         \
        static ::modalign::simt::Mutation& place = ::modalign::simt::Mutation::place(name); \
        return place.visit();                                                               \
    }())
#endif

namespace modalign::simt {

inline constexpr int kWarpSize = 32;

/// How one kernel instance is launched; a plain value that a host function computes from the problem, for the GPU and the emulator alike.
struct LaunchPlan {
    unsigned grid[3] = {1, 1, 1};   ///< blocks along x, y, z; a zero anywhere launches nothing
    unsigned threads = 0;           ///< threads of a block, equal to the kernel's kThreads
    unsigned shared_bytes = 0;      ///< dynamic shared memory of a block
    const char* key = "";           ///< name of the instance in the kernel catalogue
};

/// N elements that are read or written by one instruction; N * sizeof(T) is 2, 4, 8 or 16 bytes and so is the alignment of the address.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
    static_assert(sizeof(T) * N == 2 || sizeof(T) * N == 4 || sizeof(T) * N == 8 || sizeof(T) * N == 16, "a pack holds 2, 4, 8 or 16 bytes");
    T value[N];
    MODALIGN_HOST_DEVICE T& operator[](int i) { return value[i]; }
    MODALIGN_HOST_DEVICE const T& operator[](int i) const { return value[i]; }
};

template <class T>
MODALIGN_HOST_DEVICE constexpr T ceil_divide(T a, T b) {
    return (a + b - 1) / b;
}

}  // namespace modalign::simt

#if !defined(__CUDACC__)
#include "../host/simt_host.h"
#else

namespace modalign::simt {

using bf16 = __nv_bfloat16;
using f16 = __half;

// ---------------------------------------------------------------------------------------------------------------- numbers
MODALIGN_DEVICE float to_float(float x) { return x; }
MODALIGN_DEVICE float to_float(bf16 x) { return __bfloat162float(x); }
MODALIGN_DEVICE float to_float(f16 x) { return __half2float(x); }

/// Rounds to nearest, ties to even.
template <class T>
MODALIGN_DEVICE T from_float(float x);
template <>
MODALIGN_DEVICE float from_float<float>(float x) { return x; }
template <>
MODALIGN_DEVICE bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <>
MODALIGN_DEVICE f16 from_float<f16>(float x) { return __float2half_rn(x); }

/// Two 16-bit numbers in one register, the first in the low half: the operand form of mma_16816.
MODALIGN_DEVICE std::uint32_t pack_two(bf16 low, bf16 high) {
    return std::uint32_t(__bfloat16_as_ushort(low)) | std::uint32_t(__bfloat16_as_ushort(high)) << 16;
}
MODALIGN_DEVICE std::uint32_t pack_two(f16 low, f16 high) {
    return std::uint32_t(__half_as_ushort(low)) | std::uint32_t(__half_as_ushort(high)) << 16;
}
template <class T>
MODALIGN_DEVICE T unpack_low(std::uint32_t two);
template <class T>
MODALIGN_DEVICE T unpack_high(std::uint32_t two);
template <>
MODALIGN_DEVICE bf16 unpack_low<bf16>(std::uint32_t two) { return __ushort_as_bfloat16(static_cast<unsigned short>(two)); }
template <>
MODALIGN_DEVICE bf16 unpack_high<bf16>(std::uint32_t two) { return __ushort_as_bfloat16(static_cast<unsigned short>(two >> 16)); }
template <>
MODALIGN_DEVICE f16 unpack_low<f16>(std::uint32_t two) { return __ushort_as_half(static_cast<unsigned short>(two)); }
template <>
MODALIGN_DEVICE f16 unpack_high<f16>(std::uint32_t two) { return __ushort_as_half(static_cast<unsigned short>(two >> 16)); }

MODALIGN_DEVICE float square_root(float x) { return __fsqrt_rn(x); }
MODALIGN_DEVICE double square_root(double x) { return __dsqrt_rn(x); }
MODALIGN_DEVICE float reciprocal_square_root(float x) { return __frsqrt_rn(x); }
MODALIGN_DEVICE double reciprocal_square_root(double x) { return 1.0 / __dsqrt_rn(x); }
MODALIGN_DEVICE float exponential(float x) { return expf(x); }
MODALIGN_DEVICE double exponential(double x) { return exp(x); }
MODALIGN_DEVICE float exponential_minus_1(float x) { return expm1f(x); }
MODALIGN_DEVICE double exponential_minus_1(double x) { return expm1(x); }
MODALIGN_DEVICE float logarithm(float x) { return logf(x); }
MODALIGN_DEVICE double logarithm(double x) { return log(x); }
/// log(1 + x), with all digits of a small x.
MODALIGN_DEVICE float logarithm_1p(float x) { return log1pf(x); }
MODALIGN_DEVICE double logarithm_1p(double x) { return log1p(x); }
MODALIGN_DEVICE float hyperbolic_tangent(float x) { return tanhf(x); }
MODALIGN_DEVICE double hyperbolic_tangent(double x) { return tanh(x); }
MODALIGN_DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
MODALIGN_DEVICE double fused_multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }
MODALIGN_DEVICE float absolute(float x) { return fabsf(x); }
MODALIGN_DEVICE double absolute(double x) { return fabs(x); }

// ---------------------------------------------------------------------------------------------------------------- indices
MODALIGN_DEVICE int thread_index() { return int(threadIdx.x); }
MODALIGN_DEVICE int lane() { return int(threadIdx.x) % kWarpSize; }
MODALIGN_DEVICE int warp() { return int(threadIdx.x) / kWarpSize; }
/// x, of which the compiler knows nothing: what follows from it is computed here, and not before a loop and kept in registers through it.
MODALIGN_DEVICE int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}
MODALIGN_DEVICE unsigned block_index_x() { return blockIdx.x; }
MODALIGN_DEVICE unsigned block_index_y() { return blockIdx.y; }
MODALIGN_DEVICE unsigned block_index_z() { return blockIdx.z; }
MODALIGN_DEVICE unsigned grid_size_x() { return gridDim.x; }
MODALIGN_DEVICE unsigned grid_size_y() { return gridDim.y; }
MODALIGN_DEVICE unsigned grid_size_z() { return gridDim.z; }

// ----------------------------------------------------------------------------------------------------------------- memory
/// A view of the block's shared memory; `at(i)` is the view that begins at element i.
template <class T>
class Shared {
public:
    MODALIGN_DEVICE explicit Shared(T* pointer) : pointer_(pointer) {}
    MODALIGN_DEVICE T& operator[](int i) const { return pointer_[i]; }
    MODALIGN_DEVICE Shared at(int i) const { return Shared(pointer_ + i); }
    MODALIGN_DEVICE T* pointer() const { return pointer_; }

private:
    T* pointer_;
};

/// `count` elements of the block's dynamic shared memory, starting at a byte offset that is a multiple of sizeof(T).
template <class T>
MODALIGN_DEVICE Shared<T> shared(int byte_offset, [[maybe_unused]] int count) {
    extern __shared__ __align__(128) unsigned char modalign_shared_bytes[];
    return Shared<T>(reinterpret_cast<T*>(modalign_shared_bytes + byte_offset));
}

/// A view of global memory; T may be const. `at(i)` is the view that begins at element i.
template <class T>
class Global {
public:
    MODALIGN_HOST_DEVICE Global(T* pointer) : pointer_(pointer) {}
    template <class U>
        requires std::is_same_v<const U, T>
    MODALIGN_HOST_DEVICE Global(Global<U> other) : pointer_(other.pointer()) {}
    MODALIGN_DEVICE T& operator[](std::int64_t i) const { return pointer_[i]; }
    MODALIGN_DEVICE Global at(std::int64_t i) const { return Global(pointer_ + i); }
    MODALIGN_HOST_DEVICE T* pointer() const { return pointer_; }

private:
    T* pointer_;
};

namespace detail {
template <int Bytes>
struct Word;
template <>
struct Word<2> { using type = unsigned short; };
template <>
struct Word<4> { using type = unsigned; };
template <>
struct Word<8> { using type = uint2; };
template <>
struct Word<16> { using type = uint4; };

template <int N, class T>
MODALIGN_DEVICE auto load_pack(const T* address) {
    using word = typename Word<int(sizeof(T)) * N>::type;
    Pack<T, N> pack;
    *reinterpret_cast<word*>(&pack) = *reinterpret_cast<const word*>(address);
    return pack;
}
template <class T, int N>
MODALIGN_DEVICE void store_pack(T* address, const Pack<T, N>& pack) {
    using word = typename Word<int(sizeof(T)) * N>::type;
    *reinterpret_cast<word*>(address) = *reinterpret_cast<const word*>(&pack);
}
MODALIGN_DEVICE unsigned shared_address(const void* pointer) { return static_cast<unsigned>(__cvta_generic_to_shared(pointer)); }
}  // namespace detail

/// N elements at once, starting at element i, whose address is aligned to N * sizeof(T).
template <int N, class T>
MODALIGN_DEVICE Pack<T, N> load_pack(Shared<T> view, int i) { return detail::load_pack<N>(static_cast<const T*>(view.pointer() + i)); }
template <int N, class T>
MODALIGN_DEVICE Pack<std::remove_const_t<T>, N> load_pack(Global<T> view, std::int64_t i) {
    return detail::load_pack<N>(static_cast<const std::remove_const_t<T>*>(view.pointer() + i));
}
template <class T, int N>
MODALIGN_DEVICE void store_pack(Shared<T> view, int i, const Pack<T, N>& pack) { detail::store_pack(view.pointer() + i, pack); }
template <class T, int N>
MODALIGN_DEVICE void store_pack(Global<T> view, std::int64_t i, const Pack<T, N>& pack) { detail::store_pack(view.pointer() + i, pack); }

// -------------------------------------------------------------------------------------------------------- synchronisation
/// All threads of the block; orders their shared and global accesses.
MODALIGN_DEVICE void barrier() { __syncthreads(); }
/// All lanes of the warp; orders their shared and global accesses (shuffles, ballots and mma do not).
MODALIGN_DEVICE void warp_barrier() { __syncwarp(); }
/// Makes the thread's earlier global writes visible to the device before its later ones.
MODALIGN_DEVICE void fence() { __threadfence(); }

template <class T>
MODALIGN_DEVICE T shuffle(T value, int source_lane) { return __shfl_sync(0xffffffffu, value, source_lane); }
template <class T>
MODALIGN_DEVICE T shuffle_xor(T value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
template <class T>
MODALIGN_DEVICE T shuffle_down(T value, int delta) { return __shfl_down_sync(0xffffffffu, value, unsigned(delta)); }
MODALIGN_DEVICE std::uint32_t warp_ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }
MODALIGN_DEVICE int population_count(std::uint32_t bits) { return __popc(bits); }

// ------------------------------------------------------------------------------------------------------ asynchronous copy
/// Copies `valid_bytes` (0 … 16) from global to shared memory and zero-fills the rest of the 16 bytes; both addresses are 16-byte aligned. The data
/// may be read after copy_async_wait by the issuing thread, and by others after a barrier that follows it. Nothing is read when valid_bytes is 0.
template <class T>
MODALIGN_DEVICE void copy_async_16(Shared<T> target, int target_index, Global<const std::type_identity_t<T> > source, std::int64_t source_index,
                                   int valid_bytes = 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(detail::shared_address(target.pointer() + target_index)),
                 "l"(source.pointer() + source_index), "r"(valid_bytes)
                 : "memory");
}
template <class T>
MODALIGN_DEVICE void copy_async_8(Shared<T> target, int target_index, Global<const std::type_identity_t<T> > source, std::int64_t source_index,
                                  int valid_bytes = 8) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;\n" ::"r"(detail::shared_address(target.pointer() + target_index)),
                 "l"(source.pointer() + source_index), "r"(valid_bytes)
                 : "memory");
}
template <class T>
MODALIGN_DEVICE void copy_async_4(Shared<T> target, int target_index, Global<const std::type_identity_t<T> > source, std::int64_t source_index,
                                  int valid_bytes = 4) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(detail::shared_address(target.pointer() + target_index)),
                 "l"(source.pointer() + source_index), "r"(valid_bytes)
                 : "memory");
}
/// Closes a group: all copies of this thread since the last commit.
MODALIGN_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
/// Waits until at most the `Pending` latest groups of this thread are still under way.
template <int Pending>
MODALIGN_DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(Pending) : "memory");
}

// ------------------------------------------------------------------------------------------------------------ tensor core
/// Four 8×8 matrices of 16-bit elements. Lane l names the first element of row l % 8 of matrix l / 8 (16-byte aligned);
/// it receives, of each matrix, row l / 4, columns 2 (l % 4) and 2 (l % 4) + 1.
template <class T>
MODALIGN_DEVICE void load_matrix_x4(std::uint32_t (&r)[4], Shared<T> view, int row_start) {
    static_assert(sizeof(T) == 2, "ldmatrix moves 16-bit elements");
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(detail::shared_address(view.pointer() + row_start))
                 : "memory");
}
/// The same with each matrix transposed: lane l receives column l / 4, rows 2 (l % 4) and 2 (l % 4) + 1.
template <class T>
MODALIGN_DEVICE void load_matrix_x4_transposed(std::uint32_t (&r)[4], Shared<T> view, int row_start) {
    static_assert(sizeof(T) == 2, "ldmatrix moves 16-bit elements");
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(detail::shared_address(view.pointer() + row_start))
                 : "memory");
}

/// d[16×8] += a[16×16] b[16×8], accumulated in fp32. With g = lane / 4 and t = lane % 4 the lane holds
///   a: rows g (registers 0, 2) and g + 8 (1, 3), columns 2t, 2t+1 (0, 1) and 2t+8, 2t+9 (2, 3);
///   b: column g, rows 2t, 2t+1 (0) and 2t+8, 2t+9 (1);     d: rows g (0, 1) and g + 8 (2, 3), columns 2t, 2t+1.
MODALIGN_DEVICE void mma_16816(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], bf16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
MODALIGN_DEVICE void mma_16816(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], f16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ----------------------------------------------------------------------------------------------------------------- launch
namespace detail {
template <class Kernel, class = void>
struct MinBlocks { static constexpr int value = 1; };
template <class Kernel>
struct MinBlocks<Kernel, decltype(void(Kernel::kMinBlocks))> { static constexpr int value = Kernel::kMinBlocks; };
}  // namespace detail

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, detail::MinBlocks<Kernel>::value) modalign_kernel(const __grid_constant__ Kernel kernel) {
    kernel();
}

/// Runs one kernel instance on a stream. An empty grid is a success that launches nothing.
template <class Kernel>
cudaError_t launch(const Kernel& kernel, const LaunchPlan& plan, cudaStream_t stream) {
    if (plan.threads != unsigned(Kernel::kThreads)) return cudaErrorInvalidConfiguration;
    if (plan.grid[0] == 0 || plan.grid[1] == 0 || plan.grid[2] == 0) return cudaSuccess;
    constexpr unsigned kSharedWithoutAsking = 48 * 1024;
    if (plan.shared_bytes > kSharedWithoutAsking) {
        const cudaError_t error = cudaFuncSetAttribute(modalign_kernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(plan.shared_bytes));
        if (error != cudaSuccess) return error;
    }
    modalign_kernel<Kernel><<<dim3(plan.grid[0], plan.grid[1], plan.grid[2]), plan.threads, plan.shared_bytes, stream>>>(kernel);
    return cudaGetLastError();
}

}  // namespace modalign::simt
#endif

namespace modalign::simt {

/// A view made from a pointer in the middle of an expression, where `Global<T>(p)[i] = v` would declare an array.
template <class T>
MODALIGN_DEVICE Global<T> global(T* pointer) { return Global<T>(pointer); }

// Minimum and maximum that keep NaN, whichever side it is on.
MODALIGN_DEVICE float minimum(float a, float b) { return a < b || a != a ? a : b; }
MODALIGN_DEVICE double minimum(double a, double b) { return a < b || a != a ? a : b; }
MODALIGN_DEVICE int minimum(int a, int b) { return a < b ? a : b; }
MODALIGN_DEVICE std::int64_t minimum(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
MODALIGN_DEVICE float maximum(float a, float b) { return a > b || a != a ? a : b; }
MODALIGN_DEVICE double maximum(double a, double b) { return a > b || a != a ? a : b; }
MODALIGN_DEVICE int maximum(int a, int b) { return a > b ? a : b; }
MODALIGN_DEVICE std::int64_t maximum(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

}  // namespace modalign::simt
