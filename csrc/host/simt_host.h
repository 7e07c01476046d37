/// @file simt_host.h
/// @brief The emulator behind common/simt.h: runs a kernel on the CPU, one fiber per CUDA thread, and reports what a GPU would leave undefined.
///
/// Blocks run one after another in a chosen order; the threads of a block are resumed in a chosen order, each until it waits (barrier, collective) or
/// is made to yield at random. Everything is drawn from one seed, so a run can be repeated exactly. Whether two accesses race does not depend on the
/// interleaving that happened: every granule of shared and global memory remembers who wrote and who read it, and at which *epoch*. `barrier()`
/// begins a new epoch of the block, `warp_barrier()` a new epoch of the warp, and only these order accesses of different threads:
///
///     ordered(earlier, now)  =  same thread,  or  same block and an older block epoch,  or  same warp and an older warp epoch
///
/// Because barriers take the whole block and the whole warp, this is the happens-before relation exactly, without vector clocks. Accesses of
/// different blocks of one launch are never ordered; accesses of an earlier launch always are. The first broken rule ends the run with a Report.
///
/// Limits: two 1-byte writes into one 2-byte granule of a 2-byte array would be taken for a race (shared arrays of 1-byte elements are refused); a
/// block that waits for another one through memory would wait forever: such kernels are outside the subset.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <new>
#include <set>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if !defined(MODALIGN_DEVICE)
#error "include common/simt.h, which includes this file where there is no nvcc"
#endif

namespace modalign::simt {

// ================================================================================================================ numbers
struct bf16 {
    std::uint16_t bits;
};
struct f16 {
    std::uint16_t bits;
};

namespace detail {
template <class To, class From>
To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}
}  // namespace detail

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return detail::bit_cast<float>(std::uint32_t(x.bits) << 16); }
inline float to_float(f16 x) {
    const std::uint32_t sign = std::uint32_t(x.bits & 0x8000u) << 16;
    const std::uint32_t magnitude = x.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return detail::bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    // Read as float bits the half is 2^-112 times its value; the product is exact and takes subnormals along.
    return detail::bit_cast<float>(sign | detail::bit_cast<std::uint32_t>(detail::bit_cast<float>(magnitude << 13) * 0x1p112f));
}

/// Rounds to nearest, ties to even; NaN becomes the canonical 0x7fff, as on the device.
template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) { return x; }
template <>
inline bf16 from_float<bf16>(float x) {
    if (x != x) return {0x7fff};
    const auto bits = detail::bit_cast<std::uint32_t>(x);
    return {static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
inline f16 from_float<f16>(float x) {
    if (x != x) return {0x7fff};
    const auto bits = detail::bit_cast<std::uint32_t>(x);
    const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000u);
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude >= 0x477ff000u) return {static_cast<std::uint16_t>(sign | 0x7c00u)};   // 65520 and above round to infinity
    if (magnitude < 0x38800000u) {                                                       // below 2^-14: adding 1/2 rounds at the subnormal step 2^-24
        const auto shifted = detail::bit_cast<std::uint32_t>(detail::bit_cast<float>(magnitude) + 0.5f);
        return {static_cast<std::uint16_t>(sign | (shifted - 0x3f000000u))};
    }
    return {static_cast<std::uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13))};
}

inline std::uint32_t pack_two(bf16 low, bf16 high) { return std::uint32_t(low.bits) | std::uint32_t(high.bits) << 16; }
inline std::uint32_t pack_two(f16 low, f16 high) { return std::uint32_t(low.bits) | std::uint32_t(high.bits) << 16; }
template <class T>
T unpack_low(std::uint32_t two) { return {static_cast<std::uint16_t>(two)}; }
template <class T>
T unpack_high(std::uint32_t two) { return {static_cast<std::uint16_t>(two >> 16)}; }

inline float square_root(float x) { return std::sqrt(x); }
inline double square_root(double x) { return std::sqrt(x); }
inline float reciprocal_square_root(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline double reciprocal_square_root(double x) { return 1.0 / std::sqrt(x); }
inline float exponential(float x) { return std::exp(x); }
inline double exponential(double x) { return std::exp(x); }
inline float exponential_minus_1(float x) { return std::expm1(x); }
inline double exponential_minus_1(double x) { return std::expm1(x); }
inline float logarithm(float x) { return std::log(x); }
inline double logarithm(double x) { return std::log(x); }
inline float logarithm_1p(float x) { return std::log1p(x); }
inline double logarithm_1p(double x) { return std::log1p(x); }
inline float hyperbolic_tangent(float x) { return std::tanh(x); }
inline double hyperbolic_tangent(double x) { return std::tanh(x); }
inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline double fused_multiply_add(double a, double b, double c) { return std::fma(a, b, c); }
inline int opaque(int x) { return x; }
inline float absolute(float x) { return std::fabs(x); }
inline double absolute(double x) { return std::fabs(x); }

// ================================================================================================================ reports
/// A rule of the device broken by a kernel; ends the run.
struct Report : std::runtime_error {
    Report(std::string kind, std::string kernel, const unsigned (&block)[3], int thread, std::string address, const std::string& message);
    /// race_shared, race_global, out_of_bounds_shared, out_of_bounds_global, uninitialised_shared, uninitialised_global, unwritten_output, misaligned,
    /// divergent_barrier, shuffle_mask, copy_not_waited
    std::string kind;
    std::string kernel;    ///< key of the launch
    unsigned block[3];
    int thread;
    std::string address;   ///< "shared byte 64" or "volume element 17"; empty for synchronisation
};

// ============================================================================================================== mutations
/// A place where a kernel can be broken on purpose; see common/simt.h.
struct Mutation {
    static Mutation& place(const char* name);   ///< called by the macro, once per place
    static bool exists_anywhere(const std::string& name);
    static std::map<std::string, Mutation>& all();
    bool visit() {
        visited = true;
        return active;
    }
    bool exists = false;    ///< some code that has been run has this place
    bool active = false;    ///< broken in the present launch
    bool visited = false;   ///< passed by the present launch
};

// ================================================================================================================= memory
/// Who touched one granule of memory. Blocks are numbered through all launches of a run; 0 is the host.
struct Shadow {
    enum State : std::uint8_t { uninitialised, ready, copying };
    static constexpr std::uint32_t kManyBlocks = 0xffffffffu;
    static constexpr std::uint16_t kMany = 0xffff;
    // The last write. An earlier one that it does not follow in order has been reported already.
    std::uint32_t write_block = 0;
    std::uint32_t write_epoch = 0;
    std::uint32_t write_warp_epoch = 0;
    // The reads that a write of this block could still race with: one thread, several of one warp, or several warps of one block epoch; or several
    // blocks of a launch.
    std::uint32_t read_block = 0;
    std::uint32_t read_epoch = 0;        // with kManyBlocks: the first block of the launch
    std::uint32_t read_warp_epoch = 0;
    std::uint16_t write_thread = 0;
    std::uint16_t read_thread = 0;
    std::uint16_t read_warp = 0;
    State state = uninitialised;
};

/// Device arrays begin at multiples of this, and end where their storage ends, so that AddressSanitizer sees what goes past the views.
inline constexpr std::align_val_t kArrayAlignment{256};
struct FreeArray {
    void operator()(std::byte* storage) const { ::operator delete[](storage, kArrayAlignment); }
};

/// One array of global memory, or the shared memory of the running block.
struct Allocation {
    std::string name;
    std::byte* data = nullptr;
    std::size_t bytes = 0;
    int element_bytes = 1;
    int granule_shift = 0;   ///< a granule is 2^shift bytes: the element, at most 4 bytes
    bool is_shared = false;
    std::vector<Shadow> shadow;
    std::unique_ptr<std::byte[], FreeArray> storage;

    std::size_t granules() const { return (bytes + (std::size_t{1} << granule_shift) - 1) >> granule_shift; }
    std::string address(std::size_t offset) const;   ///< for reports
};

/// The global memory of one run: named arrays with known bounds.
class DeviceMemory {
public:
    DeviceMemory() : outer_(active_) { active_ = this; }
    ~DeviceMemory() { active_ = outer_; }
    DeviceMemory(const DeviceMemory&) = delete;
    DeviceMemory& operator=(const DeviceMemory&) = delete;
    static DeviceMemory* active() { return active_; }

    /// `offset_bytes` moves the array off its 256-byte boundary, to try kernels on addresses that allow no wide accesses. Contents are uninitialised.
    Allocation& allocate(std::string name, std::size_t bytes, int element_bytes, std::size_t offset_bytes = 0);
    /// Filled by the host before the first launch.
    static void written_by_host(Allocation& array);
    /// The array that an address lies in; one past the end counts only where no array begins.
    Allocation* find(const void* address);

    std::uint32_t next_block = 1;   ///< number of the first block of the next launch

private:
    std::deque<Allocation> arrays_;
    DeviceMemory* outer_;
    static inline DeviceMemory* active_ = nullptr;
};

// =============================================================================================================== emulator
enum class Order { forward, reverse, random };

struct Options {
    std::uint64_t seed = 0;
    Order thread_order = Order::forward;
    Order block_order = Order::forward;
    double yield_probability = 0.0;   ///< at each memory access
    std::string mutated_kernel;       ///< key of the launches that `mutation` applies to
    std::string mutation;             ///< empty: none
};

/// What a launch did; counts are exact and the same for every order and seed.
struct LaunchRecord {
    LaunchPlan plan;
    std::uint64_t barriers = 0;          ///< block barriers completed
    std::uint64_t warp_barriers = 0;
    std::uint64_t shuffles = 0;          ///< warp shuffles and ballots
    std::uint64_t matrix_products = 0;   ///< warp-wide mma
    std::uint64_t global_bytes_read = 0;
    std::uint64_t global_bytes_written = 0;
    std::set<std::string> mutations;     ///< places passed
};

class Fiber;

class Emulator {
public:
    Emulator();
    ~Emulator();
    Emulator(const Emulator&) = delete;
    Emulator& operator=(const Emulator&) = delete;

    template <class Kernel>
    LaunchRecord run(const Kernel& kernel, const LaunchPlan& plan, const Options& options) {
        if (plan.threads != unsigned(Kernel::kThreads))
            throw std::logic_error(std::string(plan.key) + ": the plan's block size is not the kernel's kThreads");
        return run(plan, options, &kernel, [](const void* self) { (*static_cast<const Kernel*>(self))(); });
    }
    /// Mutation places that launches of each key have passed so far.
    const std::map<std::string, std::set<std::string>>& passed_mutations() const { return passed_; }

    // What follows is called by the running thread of a kernel.
    const LaunchPlan& plan() const { return record_.plan; }
    int thread_index() const { return thread_->index; }
    unsigned block_index(int axis) const { return block_[axis]; }

    void read_shared(std::size_t offset, std::size_t bytes, void* value) { read(shared_, offset, bytes, value); }
    void write_shared(std::size_t offset, std::size_t bytes, const void* value) { write(shared_, offset, bytes, value); }
    void read(Allocation& array, std::size_t offset, std::size_t bytes, void* value);
    void write(Allocation& array, std::size_t offset, std::size_t bytes, const void* value);
    void check_shared_array(int byte_offset, int count, int element_bytes) const;
    [[noreturn]] void fail_outside_shared(int byte_offset, int count, int element_bytes, std::int64_t first, int elements) const;
    /// Where `bytes` bytes at `pointer + shift_bytes` lie in the array, which must hold them.
    std::size_t offset_in(const Allocation* array, const void* pointer, std::int64_t shift_bytes, std::size_t bytes) const;

    void barrier(const std::source_location& where);
    void warp_barrier(const std::source_location& where);
    std::uint64_t shuffle(std::uint64_t bits, int source_lane, const std::source_location& where);
    std::uint32_t ballot(bool predicate, const std::source_location& where);

    void copy_async(std::size_t target, Allocation* source, const void* pointer, std::int64_t shift_bytes, int bytes, int valid_bytes);
    void copy_async_commit();
    void copy_async_wait(int pending);

    void load_matrix_x4(std::uint32_t (&r)[4], std::size_t address, bool transposed, const std::source_location& where);
    template <class T>   // bf16 or f16
    void mma_16816(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], const std::source_location& where);

private:
    /// What lanes of a warp do together. Lanes that meet in different operations are reported.
    enum class Collective : std::uint8_t { none, warp_barrier, shuffle, ballot, load_matrix, mma };
    struct Copy {
        std::size_t target;
        Allocation* source;
        std::size_t source_offset;
        int bytes;
        int valid_bytes;
    };
    struct Thread {
        enum State : std::uint8_t { ready, at_barrier, in_collective, finished };
        int index = 0;
        State state = ready;
        std::source_location where;
        Fiber* fiber = nullptr;
        std::vector<Copy> copies;           // of this block, in order
        std::vector<std::size_t> groups;    // for each group that is not waited for: how many copies had been issued when it was committed
        std::size_t landed = 0;             // copies that have landed
    };
    struct Warp {
        std::uint32_t epoch = 0;
        int arrived = 0;
        Collective kind = Collective::none;
        std::source_location where;
        void* brought[kWarpSize] = {};
    };

    static const char* name(Collective kind);
    /// Joins the other lanes of the warp; the last one to arrive calls `complete` on what all lanes brought, each on its own stack.
    template <class Brought, class Complete>
    void collective(Collective kind, const std::source_location& where, Brought& brought, Complete complete);

    std::uint64_t random();
    template <class T>
    void arrange(std::vector<T>& items, Order order);
    void draw_next_yield();

    void access(const Allocation& array, std::size_t offset, std::size_t alignment);
    void check_alignment(const Allocation& array, std::size_t offset, std::size_t alignment) const;
    bool follows_write(const Shadow& s, std::uint16_t thread) const;
    bool read_races(const Shadow& s) const;
    void note_read(Allocation& array, std::size_t offset, std::size_t bytes, std::uint16_t reader);
    void note_write(Allocation& array, std::size_t offset, std::size_t bytes, Shadow::State state);
    void stamp_read(Shadow& s, std::uint16_t thread) const;
    void stamp_write(Shadow& s, Shadow::State state) const;
    std::uint16_t this_thread() const { return static_cast<std::uint16_t>(thread_->index); }

    [[noreturn]] void fail(const char* kind, const std::string& address, const std::string& message) const {
        fail(kind, address, message, thread_->index);
    }
    [[noreturn]] void fail(const char* kind, const std::string& address, const std::string& message, int thread) const;
    [[noreturn]] void fail_uninitialised(const Allocation& array, std::size_t granule) const;
    [[noreturn]] void fail_copying(const Allocation& array, std::size_t granule, const Shadow& s) const;
    [[noreturn]] void fail_race(const Allocation& array, std::size_t granule, const char* does, const char* did, std::uint32_t other_block,
                                std::uint16_t other_thread) const;
    [[noreturn]] void fail_stuck() const;

    LaunchRecord run(const LaunchPlan& plan, const Options& options, const void* kernel, void (*body)(const void*));
    void prepare(const LaunchPlan& plan);
    void run_block(std::uint32_t linear, Order order);
    static void enter();

    // The running thread and its place.
    Thread* thread_ = nullptr;
    Warp* warp_ = nullptr;
    std::uint32_t epoch_ = 0;          // of the block
    std::uint32_t block_number_ = 0;   // counted through all launches of a run
    std::uint32_t first_block_ = 0;    // of the launch
    std::int64_t until_yield_ = 0;     // accesses
    unsigned block_[3] = {};
    // The block.
    Allocation shared_;
    std::vector<Thread> threads_;
    std::vector<Warp> warps_;
    int waiting_at_barrier_ = 0;
    std::source_location barrier_location_;
    // The launch.
    LaunchRecord record_;
    const void* kernel_ = nullptr;
    void (*body_)(const void*) = nullptr;
    std::exception_ptr failure_;
    std::uint64_t random_state_ = 0;
    double yield_probability_ = 0.0;
    // For good.
    std::vector<std::unique_ptr<Fiber>> fibers_;
    std::map<std::string, std::set<std::string>> passed_;
};

extern Emulator emulator;   ///< one: kernels find it without being told

// ================================================================================================================ indices
inline int thread_index() { return emulator.thread_index(); }
inline int lane() { return thread_index() % kWarpSize; }
inline int warp() { return thread_index() / kWarpSize; }
inline unsigned block_index_x() { return emulator.block_index(0); }
inline unsigned block_index_y() { return emulator.block_index(1); }
inline unsigned block_index_z() { return emulator.block_index(2); }
inline unsigned grid_size_x() { return emulator.plan().grid[0]; }
inline unsigned grid_size_y() { return emulator.plan().grid[1]; }
inline unsigned grid_size_z() { return emulator.plan().grid[2]; }

// ================================================================================================================== views
/// An element of memory: reads when converted, writes when assigned to.
template <class T, class View>
class Reference {
public:
    Reference(const View& view, std::int64_t index) : view_(view), index_(index) {}
    Reference(const Reference&) = default;
    operator T() const { return view_.load(index_); }
    Reference& operator=(T value) { return view_.store(index_, value), *this; }
    Reference& operator=(const Reference& other) { return *this = static_cast<T>(other); }
    Reference& operator+=(T value) { return *this = static_cast<T>(static_cast<T>(*this) + value); }
    Reference& operator-=(T value) { return *this = static_cast<T>(static_cast<T>(*this) - value); }
    Reference& operator*=(T value) { return *this = static_cast<T>(static_cast<T>(*this) * value); }

private:
    View view_;
    std::int64_t index_;
};

template <class T>
class Shared {
    static_assert(sizeof(T) >= 2, "shared arrays hold elements of at least 2 bytes");

public:
    Shared(int byte_offset, int count) : byte_offset_(byte_offset), count_(count) {}
    Reference<T, Shared> operator[](int i) const { return {*this, i}; }
    Shared at(int i) const {
        Shared moved = *this;
        moved.shift_ += i;
        return moved;
    }

    /// Byte address of `elements` elements from i on, which must lie inside the array.
    std::size_t address(std::int64_t i, int elements) const {
        const std::int64_t first = shift_ + i;
        if (first < 0 || first + elements > count_) emulator.fail_outside_shared(byte_offset_, count_, sizeof(T), first, elements);
        return static_cast<std::size_t>(byte_offset_ + first * static_cast<std::int64_t>(sizeof(T)));
    }
    T load(std::int64_t i) const {
        T value;
        emulator.read_shared(address(i, 1), sizeof(T), &value);
        return value;
    }
    void store(std::int64_t i, T value) const { emulator.write_shared(address(i, 1), sizeof(T), &value); }

private:
    int byte_offset_;
    int count_;
    std::int64_t shift_ = 0;
};

template <class T>
Shared<T> shared(int byte_offset, int count) {
    emulator.check_shared_array(byte_offset, count, sizeof(T));
    return Shared<T>(byte_offset, count);
}

template <class T>
class Global {
    using Value = std::remove_const_t<T>;

public:
    Global(T* pointer) : pointer_(pointer), array_(DeviceMemory::active() ? DeviceMemory::active()->find(pointer) : nullptr) {}
    template <class U>
        requires std::is_same_v<const U, T>
    Global(Global<U> other) : pointer_(other.bound_pointer()), array_(other.array()), shift_(other.shift()) {}

    decltype(auto) operator[](std::int64_t i) const {
        if constexpr (std::is_const_v<T>) return load(i);
        else return Reference<T, Global>(*this, i);
    }
    Global at(std::int64_t i) const {
        Global moved = *this;
        moved.shift_ += i;
        return moved;
    }
    T* pointer() const { return pointer_ + shift_; }

    T* bound_pointer() const { return pointer_; }
    Allocation* array() const { return array_; }
    std::int64_t shift() const { return shift_; }
    std::int64_t shift_bytes(std::int64_t i) const { return (shift_ + i) * static_cast<std::int64_t>(sizeof(T)); }
    std::size_t offset(std::int64_t i, std::size_t bytes) const { return emulator.offset_in(array_, pointer_, shift_bytes(i), bytes); }
    Value load(std::int64_t i) const {
        Value value;
        const std::size_t at = offset(i, sizeof(T));   // fails before the array is touched, if there is none
        emulator.read(*array_, at, sizeof(T), &value);
        return value;
    }
    void store(std::int64_t i, T value) const {
        const std::size_t at = offset(i, sizeof(T));
        emulator.write(*array_, at, sizeof(T), &value);
    }

private:
    T* pointer_;
    Allocation* array_;        // what the pointer pointed into when the view was made, however far `at` goes from there
    std::int64_t shift_ = 0;
};

template <int N, class T>
Pack<T, N> load_pack(Shared<T> view, int i) {
    Pack<T, N> pack;
    emulator.read_shared(view.address(i, N), sizeof(pack), &pack);
    return pack;
}
template <int N, class T>
Pack<std::remove_const_t<T>, N> load_pack(Global<T> view, std::int64_t i) {
    Pack<std::remove_const_t<T>, N> pack;
    const std::size_t offset = view.offset(i, sizeof(pack));
    emulator.read(*view.array(), offset, sizeof(pack), &pack);
    return pack;
}
template <class T, int N>
void store_pack(Shared<T> view, int i, const Pack<T, N>& pack) {
    emulator.write_shared(view.address(i, N), sizeof(pack), &pack);
}
template <class T, int N>
void store_pack(Global<T> view, std::int64_t i, const Pack<T, N>& pack) {
    const std::size_t offset = view.offset(i, sizeof(pack));
    emulator.write(*view.array(), offset, sizeof(pack), &pack);
}

// ======================================================================================================== synchronisation
// The place of the call is part of what threads must agree on.
inline void barrier(std::source_location where = std::source_location::current()) { emulator.barrier(where); }
inline void warp_barrier(std::source_location where = std::source_location::current()) { emulator.warp_barrier(where); }
/// Visibility alone orders nothing between threads that do not also meet.
inline void fence() {}

namespace detail {
template <class T>
T shuffle_from(T value, int source_lane, const std::source_location& where) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    std::uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = emulator.shuffle(bits, source_lane, where);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}
}  // namespace detail

template <class T>
T shuffle(T value, int source_lane, std::source_location where = std::source_location::current()) {
    return detail::shuffle_from(value, source_lane & (kWarpSize - 1), where);
}
template <class T>
T shuffle_xor(T value, int mask, std::source_location where = std::source_location::current()) {
    return detail::shuffle_from(value, (lane() ^ mask) & (kWarpSize - 1), where);
}
template <class T>
T shuffle_down(T value, int delta, std::source_location where = std::source_location::current()) {
    return detail::shuffle_from(value, lane() + delta < kWarpSize ? lane() + delta : lane(), where);
}
inline std::uint32_t warp_ballot(bool predicate, std::source_location where = std::source_location::current()) {
    return emulator.ballot(predicate, where);
}
inline int population_count(std::uint32_t bits) { return std::popcount(bits); }

// ====================================================================================================== asynchronous copy
namespace detail {
template <int Bytes, class T>
void copy_async(Shared<T> target, int target_index, Global<const T> source, std::int64_t source_index, int valid_bytes) {
    emulator.copy_async(target.address(target_index, Bytes / static_cast<int>(sizeof(T))), source.array(), source.bound_pointer(),
                        source.shift_bytes(source_index), Bytes, valid_bytes);
}
}  // namespace detail

template <class T>
void copy_async_16(Shared<T> target, int target_index, Global<const std::type_identity_t<T>> source, std::int64_t source_index,
                   int valid_bytes = 16) {
    detail::copy_async<16, T>(target, target_index, source, source_index, valid_bytes);
}
template <class T>
void copy_async_8(Shared<T> target, int target_index, Global<const std::type_identity_t<T>> source, std::int64_t source_index, int valid_bytes = 8) {
    detail::copy_async<8, T>(target, target_index, source, source_index, valid_bytes);
}
template <class T>
void copy_async_4(Shared<T> target, int target_index, Global<const std::type_identity_t<T>> source, std::int64_t source_index, int valid_bytes = 4) {
    detail::copy_async<4, T>(target, target_index, source, source_index, valid_bytes);
}
inline void copy_async_commit() { emulator.copy_async_commit(); }
template <int Pending>
void copy_async_wait() {
    emulator.copy_async_wait(Pending);
}

// ============================================================================================================ tensor core
template <class T>
void load_matrix_x4(std::uint32_t (&r)[4], Shared<T> view, int row_start, std::source_location where = std::source_location::current()) {
    static_assert(sizeof(T) == 2, "ldmatrix moves 16-bit elements");
    emulator.load_matrix_x4(r, view.address(row_start, 8), false, where);
}
template <class T>
void load_matrix_x4_transposed(std::uint32_t (&r)[4], Shared<T> view, int row_start, std::source_location where = std::source_location::current()) {
    static_assert(sizeof(T) == 2, "ldmatrix moves 16-bit elements");
    emulator.load_matrix_x4(r, view.address(row_start, 8), true, where);
}
template <class T>
void mma_16816(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], T,
               std::source_location where = std::source_location::current()) {
    static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>, "the operands of mma are bf16 or f16");
    emulator.mma_16816<T>(d, a, b, where);
}

}  // namespace modalign::simt
