/// @file simt_host.h
/// @brief The emulator behind common/simt.h: runs a kernel on the CPU, one fiber per CUDA thread, and reports what a GPU would leave undefined.
///
/// Blocks run one after another in a chosen order; the threads of a block are resumed in a chosen order, each until it waits (barrier, collective) or is made to
/// yield at random. Everything is drawn from one seed, so a run can be repeated exactly. Whether two accesses race does not depend on the interleaving that
/// happened: every granule of shared and global memory remembers who wrote and who read it, and at which *epoch*. `barrier()` begins a new epoch of the block,
/// `warp_barrier()` a new epoch of the warp, and only these order accesses of different threads:
///
///     ordered(earlier, now)  =  same thread,  or  same block and an older block epoch,  or  same warp and an older warp epoch
///
/// Because barriers take the whole block and the whole warp, this is the happens-before relation exactly, without vector clocks. Accesses of different blocks of
/// one launch are never ordered; accesses of an earlier launch always are. The first broken rule ends the run with a Report.
///
/// Limits: two 1-byte writes into one 2-byte granule of a 2-byte array would be taken for a race (shared arrays of 1-byte elements are refused); blocks that wait
/// for each other through memory never finish on a GPU whose blocks are not all resident, and here neither: such kernels are outside the subset.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <limits>
#include <map>
#include <memory>
#include <new>
#include <numeric>
#include <set>
#include <source_location>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../common/simt.h"
#include "fiber.h"

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
inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline double fused_multiply_add(double a, double b, double c) { return std::fma(a, b, c); }
inline float absolute(float x) { return std::fabs(x); }
inline double absolute(double x) { return std::fabs(x); }

// ================================================================================================================ reports
/// A rule of the device broken by a kernel; ends the run.
struct Report : std::runtime_error {
    Report(std::string kind_, std::string kernel_, unsigned x, unsigned y, unsigned z, int thread_, std::string address_, const std::string& message)
        : std::runtime_error(kind_ + " in " + kernel_ + ", block (" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + "), thread " + std::to_string(thread_) + ": " + message),
          kind(std::move(kind_)), kernel(std::move(kernel_)), block{x, y, z}, thread(thread_), address(std::move(address_)) {}
    std::string kind;      ///< race_shared, race_global, out_of_bounds_shared, out_of_bounds_global, uninitialised_shared, uninitialised_global, misaligned, divergent_barrier, shuffle_mask,
                           ///< copy_not_waited, unwritten_output
    std::string kernel;    ///< key of the launch
    unsigned block[3];
    int thread;
    std::string address;   ///< "shared byte 64" or "volume element 17"; empty for synchronisation
};

// ============================================================================================================== mutations
/// A place where a kernel can be broken on purpose; see common/simt.h.
class Mutation {
public:
    /// Called by the macro, once per place.
    static Mutation& place(const char* name) {
        Mutation& mutation = all()[name];
        mutation.exists = true;
        return mutation;
    }
    static bool exists_anywhere(const std::string& name) { return all()[name].exists; }
    static std::map<std::string, Mutation>& all() {
        static std::map<std::string, Mutation> mutations;
        return mutations;
    }
    bool visit() {
        visited = true;
        return active;
    }
    bool exists = false;    ///< some code has this place (and has been run)
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
    // The reads that a write of this block could still race with: one thread, several of one warp, or several warps of one block epoch; or several blocks of a launch.
    std::uint32_t read_block = 0;
    std::uint32_t read_epoch = 0;        // with kManyBlocks: the first block of the launch
    std::uint32_t read_warp_epoch = 0;
    std::uint16_t write_thread = 0;
    std::uint16_t read_thread = 0;
    std::uint16_t read_warp = 0;
    State state = uninitialised;
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
    std::unique_ptr<std::byte[]> storage;

    std::size_t granules() const { return (bytes + (std::size_t{1} << granule_shift) - 1) >> granule_shift; }
    std::string address(std::size_t offset) const {
        if (is_shared) return "shared byte " + std::to_string(offset);
        return name + " element " + std::to_string(offset / static_cast<std::size_t>(element_bytes));
    }
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
    Allocation& allocate(std::string name, std::size_t bytes, int element_bytes, std::size_t offset_bytes = 0) {
        constexpr std::size_t kAlignment = 256;
        Allocation& array = arrays_.emplace_back();
        array.name = std::move(name);
        array.storage.reset(new std::byte[kAlignment + offset_bytes + bytes]);
        const auto start = reinterpret_cast<std::uintptr_t>(array.storage.get());
        array.data = array.storage.get() + ((start + kAlignment - 1) / kAlignment * kAlignment - start) + offset_bytes;
        array.bytes = bytes;
        array.element_bytes = element_bytes;
        while (array.granule_shift < 2 && (2 << array.granule_shift) <= element_bytes) ++array.granule_shift;
        std::memset(array.data, 0xff, bytes);   // NaN in every floating type
        array.shadow.resize(array.granules());
        return array;
    }

    /// Filled by the host before the first launch.
    static void written_by_host(Allocation& array) {
        for (Shadow& s : array.shadow) s.state = Shadow::ready;
    }

    /// The array that an address lies in; one past the end counts only where no array begins.
    Allocation* find(const void* address) {
        const auto* at = static_cast<const std::byte*>(address);
        for (Allocation& array : arrays_)
            if (at >= array.data && at < array.data + array.bytes) return &array;
        for (Allocation& array : arrays_)
            if (at == array.data + array.bytes) return &array;
        return nullptr;
    }

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
    std::uint64_t barriers = 0;        ///< block barriers completed
    std::uint64_t warp_barriers = 0;
    std::uint64_t shuffles = 0;        ///< warp shuffles and ballots
    std::uint64_t matrix_products = 0; ///< warp-wide mma
    std::uint64_t global_bytes_read = 0;
    std::uint64_t global_bytes_written = 0;
    std::set<std::string> mutations;   ///< places passed
};

/// What lanes of a warp do together. Lanes that meet in different operations are reported.
enum class Collective : std::uint8_t { none, warp_barrier, shuffle, ballot, load_matrix, mma };

class Emulator {
public:
    static Emulator& instance() {
        static Emulator emulator;
        return emulator;
    }

    template <class Kernel>
    LaunchRecord run(const Kernel& kernel, const LaunchPlan& plan, const Options& options) {
        if (plan.threads != unsigned(Kernel::kThreads)) throw std::logic_error(std::string(plan.key) + ": the plan's block size is not the kernel's kThreads");
        return run(plan, options, &kernel, [](const void* self) { (*static_cast<const Kernel*>(self))(); });
    }

    // ------------------------------------------------------------------------------------------ called by the running thread
    const LaunchPlan& plan() const { return record_.plan; }
    int thread_index() const { return thread_->index; }
    unsigned block_index(int axis) const { return block_[axis]; }
    Allocation& shared_memory() { return shared_; }

    void read(Allocation& array, std::size_t offset, std::size_t bytes, void* value) {
        access(array, offset, bytes);
        note_read(array, offset, bytes);
        if (!array.is_shared) record_.global_bytes_read += bytes;
        std::memcpy(value, array.data + offset, bytes);
    }
    void write(Allocation& array, std::size_t offset, std::size_t bytes, const void* value) {
        access(array, offset, bytes);
        note_write(array, offset, bytes, Shadow::ready);
        if (!array.is_shared) record_.global_bytes_written += bytes;
        std::memcpy(array.data + offset, value, bytes);
    }

    void barrier(const std::source_location& where) {
        Thread& self = *thread_;
        if (waiting_at_barrier_ == 0) barrier_location_ = where;
        if (!same(barrier_location_, where)) fail("divergent_barrier", "", "waits at " + text(where) + " while another thread waits at " + text(barrier_location_));
        self.where = where;
        self.state = Thread::at_barrier;
        if (++waiting_at_barrier_ == static_cast<int>(record_.plan.threads)) {
            waiting_at_barrier_ = 0;
            ++epoch_;
            ++record_.barriers;
            for (Thread& thread : threads_) thread.state = Thread::ready;
            return;
        }
        self.fiber->suspend();
    }

    /// Joins the other lanes of the warp; the last one to arrive calls `complete` on what all lanes brought (each lane's `brought` stays alive on its stack).
    template <class Brought>
    void collective(Collective kind, const std::source_location& where, Brought& brought, void (*complete)(Emulator&, Brought* const (&)[kWarpSize])) {
        Thread& self = *thread_;
        Warp& warp = *warp_;
        if (warp.arrived == 0) {
            warp.kind = kind;
            warp.where = where;
        }
        if (warp.kind != kind || !same(warp.where, where))
            fail(kind == Collective::warp_barrier || warp.kind == Collective::warp_barrier ? "divergent_barrier" : "shuffle_mask", "", std::string(name(kind)) + " at " + text(where) + " while other lanes of the warp are in " + name(warp.kind) + " at " + text(warp.where));
        warp.brought[self.index % kWarpSize] = &brought;
        self.where = where;
        self.state = Thread::in_collective;
        if (++warp.arrived == kWarpSize) {
            warp.arrived = 0;
            Brought* all[kWarpSize];
            for (int i = 0; i < kWarpSize; ++i) all[i] = static_cast<Brought*>(warp.brought[i]);
            complete(*this, all);
            const int first = self.index / kWarpSize * kWarpSize;
            for (int i = first; i < first + kWarpSize; ++i) threads_[i].state = Thread::ready;
            return;
        }
        self.fiber->suspend();
    }
    void next_warp_epoch() { ++warp_->epoch; }
    LaunchRecord& record() { return record_; }

    void copy_async(std::size_t target, Allocation* source, std::size_t source_offset, int bytes, int valid_bytes) {
        access(shared_, target, bytes);
        note_write(shared_, target, bytes, Shadow::copying);
        if (valid_bytes > 0) {
            access(*source, source_offset, bytes);
            note_read(*source, source_offset, valid_bytes);
            record_.global_bytes_read += valid_bytes;
        }
        thread_->copies.push_back({target, source, source_offset, bytes, valid_bytes});
    }
    void copy_async_commit() { thread_->groups.push_back(thread_->copies.size()); }
    void copy_async_wait(int pending) {
        Thread& self = *thread_;
        const int finished = static_cast<int>(self.groups.size()) - pending;
        if (finished <= 0) return;
        const std::size_t landed = self.groups[finished - 1];
        for (std::size_t i = self.landed; i < landed; ++i) {
            const Copy& copy = self.copies[i];
            if (copy.valid_bytes > 0) note_read(*copy.source, copy.source_offset, copy.valid_bytes);   // the source had to stay as it was all the while
            for (std::size_t g = copy.target >> shared_.granule_shift; g <= (copy.target + copy.bytes - 1) >> shared_.granule_shift; ++g) stamp_write(shared_.shadow[g], Shadow::ready);
            if (copy.valid_bytes > 0) std::memcpy(shared_.data + copy.target, copy.source->data + copy.source_offset, copy.valid_bytes);
            std::memset(shared_.data + copy.target + copy.valid_bytes, 0, copy.bytes - copy.valid_bytes);
        }
        self.landed = std::max(self.landed, landed);
        self.groups.erase(self.groups.begin(), self.groups.begin() + finished);
    }

    [[noreturn]] void fail(const char* kind, const std::string& address, const std::string& message) const { fail(kind, address, message, thread_->index); }
    [[noreturn]] void fail(const char* kind, const std::string& address, const std::string& message, int thread) const {
        throw Report(kind, record_.plan.key, block_[0], block_[1], block_[2], thread, address, message);
    }
    static std::string text(const std::source_location& where) {
        const char* slash = std::strrchr(where.file_name(), '/');
        return std::string(slash ? slash + 1 : where.file_name()) + ":" + std::to_string(where.line());
    }

    /// One lane's row of a warp-wide read (ldmatrix). The data goes to other lanes, so even what this lane wrote itself must be ordered by a barrier.
    void read_for_warp(int lane, std::size_t offset, std::size_t bytes, void* value) {
        Thread* caller = thread_;
        thread_ = &threads_[caller->index / kWarpSize * kWarpSize + lane];
        check_alignment(shared_, offset, bytes);
        note_read(shared_, offset, bytes, Shadow::kMany);
        std::memcpy(value, shared_.data + offset, bytes);
        thread_ = caller;
    }

private:
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

    Emulator() {
        shared_.name = "shared";
        shared_.is_shared = true;
        shared_.element_bytes = 2;
        shared_.granule_shift = 1;
    }

    static bool same(const std::source_location& a, const std::source_location& b) {
        return a.line() == b.line() && a.column() == b.column() && (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
    }
    static const char* name(Collective kind) {
        constexpr const char* kNames[] = {"none", "warp_barrier", "shuffle", "ballot", "load_matrix", "mma"};
        return kNames[static_cast<int>(kind)];
    }

    // ------------------------------------------------------------------------------------------------------------ randomness
    std::uint64_t random() {   // splitmix64
        std::uint64_t z = (random_state_ += 0x9e3779b97f4a7c15u);
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        return z ^ z >> 31;
    }
    template <class T>
    void arrange(std::vector<T>& items, Order order) {   // items come in ascending order or as this function left them
        if (order != Order::random) return;
        for (std::size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[static_cast<std::size_t>(random() % i)]);
    }
    void draw_next_yield(double probability) {
        constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max();
        if (probability <= 0.0) {
            until_yield_ = kNever;
            return;
        }
        const double uniform = (static_cast<double>(random() >> 11) + 0.5) * 0x1p-53;
        until_yield_ = probability >= 1.0 ? 1 : 1 + static_cast<std::int64_t>(std::log(uniform) / std::log1p(-probability));
    }

    // ---------------------------------------------------------------------------------------------------------- access rules
    void check_alignment(const Allocation& array, std::size_t offset, std::size_t alignment) const {
        const std::size_t address = array.is_shared ? offset : reinterpret_cast<std::uintptr_t>(array.data) + offset;
        if (address % alignment != 0)
            fail("misaligned", array.address(offset), "access of " + std::to_string(alignment) + " bytes to " + array.address(offset) + ", which lies " + std::to_string(address % alignment) + " bytes past a multiple of that");
    }
    void access(const Allocation& array, std::size_t offset, std::size_t alignment) {
        if (--until_yield_ == 0) {
            draw_next_yield(yield_probability_);
            thread_->fiber->suspend();
        }
        check_alignment(array, offset, alignment);
    }

    /// Whether the granule's last write comes before what `thread` of this warp does now; kMany stands for all of its lanes.
    bool follows_write(const Shadow& s, std::uint16_t thread) const {
        if (s.write_block < first_block_) return true;
        if (s.write_block != block_number_) return false;
        return s.write_epoch != epoch_ || s.write_thread == thread || (s.write_thread / kWarpSize == thread_->index / kWarpSize && s.write_warp_epoch != warp_->epoch);
    }

    void note_read(Allocation& array, std::size_t offset, std::size_t bytes) { note_read(array, offset, bytes, static_cast<std::uint16_t>(thread_->index)); }
    void note_read(Allocation& array, std::size_t offset, std::size_t bytes, std::uint16_t reader) {
        for (std::size_t g = offset >> array.granule_shift, last = (offset + bytes - 1) >> array.granule_shift; g <= last; ++g) {
            Shadow& s = array.shadow[g];
            if (s.state == Shadow::uninitialised) fail_uninitialised(array, g);
            if (!follows_write(s, reader)) fail_race(array, g, "reads", s.state == Shadow::copying ? "is copying to" : "wrote", s.write_block, s.write_thread);
            if (s.state == Shadow::copying) fail_copying(array, g, s);
            stamp_read(s, reader);
        }
    }
    void note_write(Allocation& array, std::size_t offset, std::size_t bytes, Shadow::State state) {
        for (std::size_t g = offset >> array.granule_shift, last = (offset + bytes - 1) >> array.granule_shift; g <= last; ++g) {
            Shadow& s = array.shadow[g];
            if (s.state == Shadow::copying) fail_race(array, g, "writes", "is copying to", s.write_block, s.write_thread);
            if (s.state == Shadow::ready && !follows_write(s, static_cast<std::uint16_t>(thread_->index)))
                fail_race(array, g, "writes", "wrote", s.write_block, s.write_thread);
            if (s.read_block == Shadow::kManyBlocks ? s.read_epoch == first_block_ : s.read_block >= first_block_ && (s.read_block != block_number_ || read_races(s)))
                fail_race(array, g, "writes", "read", s.read_block, s.read_thread);
            stamp_write(s, state);
        }
    }
    bool read_races(const Shadow& s) const {
        if (s.read_epoch != epoch_) return false;
        if (s.read_warp == Shadow::kMany || s.read_warp != thread_->index / kWarpSize) return true;
        return s.read_warp_epoch == warp_->epoch && s.read_thread != thread_->index;
    }
    void stamp_write(Shadow& s, Shadow::State state) const {
        s.write_block = block_number_;
        s.write_epoch = epoch_;
        s.write_warp_epoch = warp_->epoch;
        s.write_thread = static_cast<std::uint16_t>(thread_->index);
        s.state = state;
    }
    void stamp_read(Shadow& s, std::uint16_t thread) const {
        const auto warp = static_cast<std::uint16_t>(thread_->index / kWarpSize);
        if (s.read_block != block_number_) {
            if (s.read_block == Shadow::kManyBlocks ? s.read_epoch == first_block_ : s.read_block >= first_block_) {
                s.read_block = Shadow::kManyBlocks;
                s.read_epoch = first_block_;
                return;
            }
        } else if (s.read_epoch == epoch_) {
            if (s.read_warp == Shadow::kMany) return;
            if (s.read_warp != warp) {
                s.read_warp = Shadow::kMany;
            } else if (s.read_warp_epoch != warp_->epoch) {
                s.read_warp_epoch = warp_->epoch;
                s.read_thread = thread;
            } else if (s.read_thread != thread) {
                s.read_thread = Shadow::kMany;
            }
            return;
        }
        s.read_block = block_number_;
        s.read_epoch = epoch_;
        s.read_warp_epoch = warp_->epoch;
        s.read_thread = thread;
        s.read_warp = warp;
    }

    [[noreturn]] void fail_uninitialised(const Allocation& array, std::size_t granule) const {
        const std::string address = array.address(granule << array.granule_shift);
        fail(array.is_shared ? "uninitialised_shared" : "uninitialised_global", address, "reads " + address + ", which nobody has written");
    }
    [[noreturn]] void fail_copying(const Allocation& array, std::size_t granule, const Shadow& s) const {
        const std::string address = array.address(granule << array.granule_shift);
        fail("copy_not_waited", address, "reads " + address + " while the copy that thread " + std::to_string(s.write_thread) + " started has not been waited for");
    }
    [[noreturn]] void fail_race(const Allocation& array, std::size_t granule, const char* does, const char* did, std::uint32_t other_block, std::uint16_t other_thread) const {
        const std::string address = array.address(granule << array.granule_shift);
        std::string other = other_block == Shadow::kManyBlocks ? "several blocks" : other_thread == Shadow::kMany ? "several threads" : "thread " + std::to_string(other_thread);
        if (other_block != block_number_ && other_block != Shadow::kManyBlocks) {
            const std::uint32_t linear = other_block - first_block_, x = record_.plan.grid[0], y = record_.plan.grid[1];
            other += " of block (" + std::to_string(linear % x) + ", " + std::to_string(linear / x % y) + ", " + std::to_string(linear / x / y) + ")";
        }
        fail(array.is_shared ? "race_shared" : "race_global", address, std::string(does) + " " + address + ", which " + other + " " + did + " with no barrier between");
    }

    // ------------------------------------------------------------------------------------------------------------ scheduling
    LaunchRecord run(const LaunchPlan& plan, const Options& options, const void* kernel, void (*body)(const void*)) {
        check(plan);
        DeviceMemory* memory = DeviceMemory::active();
        if (memory == nullptr) throw std::logic_error("a kernel was launched without device memory");
        record_ = LaunchRecord{};
        record_.plan = plan;
        kernel_ = kernel;
        body_ = body;
        random_state_ = options.seed;
        yield_probability_ = options.yield_probability;
        draw_next_yield(yield_probability_);
        const std::uint64_t blocks = std::uint64_t{plan.grid[0]} * plan.grid[1] * plan.grid[2];
        first_block_ = memory->next_block;
        memory->next_block += static_cast<std::uint32_t>(blocks);
        for (auto& [name, mutation] : Mutation::all()) mutation.visited = mutation.active = false;
        if (!options.mutation.empty() && options.mutated_kernel == plan.key) Mutation::all()[options.mutation].active = true;
        std::exception_ptr failure;
        try {
            prepare(plan);
            std::vector<std::uint32_t> order(blocks);
            std::iota(order.begin(), order.end(), 0u);
            if (options.block_order == Order::reverse) std::reverse(order.begin(), order.end());
            arrange(order, options.block_order);
            for (const std::uint32_t linear : order) run_block(linear, options.thread_order);
        } catch (...) {
            failure = std::current_exception();
        }
        thread_ = nullptr;
        for (auto& [name, mutation] : Mutation::all()) {
            if (mutation.visited) record_.mutations.insert(name);
            mutation.active = false;
        }
        passed_[plan.key].insert(record_.mutations.begin(), record_.mutations.end());
        if (failure) std::rethrow_exception(failure);
        return record_;
    }

    static void check(const LaunchPlan& plan) {
        const auto demand = [&](bool holds, const char* what) {
            if (!holds) throw std::invalid_argument(std::string(plan.key) + ": " + what);
        };
        demand(plan.threads > 0 && plan.threads <= 1024 && plan.threads % kWarpSize == 0, "a block must have 1 … 32 whole warps");
        demand(plan.grid[0] <= 0x7fffffffu && plan.grid[1] <= 65535 && plan.grid[2] <= 65535, "the grid must fit 2147483647 × 65535 × 65535 blocks");
        demand(plan.shared_bytes <= 227 * 1024, "shared memory of a block must be at most 227 KiB");
        demand(std::uint64_t{plan.grid[0]} * plan.grid[1] * plan.grid[2] < 0x7fffffffu, "the grid is too large to emulate");
    }

    void prepare(const LaunchPlan& plan) {
        while (fibers_.size() < plan.threads) fibers_.push_back(std::make_unique<Fiber>(static_cast<int>(fibers_.size())));
        threads_.resize(plan.threads);
        for (unsigned i = 0; i < plan.threads; ++i) {
            threads_[i].index = static_cast<int>(i);
            threads_[i].fiber = fibers_[i].get();
        }
        warps_.resize(plan.threads / kWarpSize);
        shared_.bytes = plan.shared_bytes;
        shared_.storage.reset(new std::byte[plan.shared_bytes + 1]);
        shared_.data = shared_.storage.get();
    }

    void run_block(std::uint32_t linear, Order order) {
        const LaunchPlan& plan = record_.plan;
        block_[0] = linear % plan.grid[0];
        block_[1] = linear / plan.grid[0] % plan.grid[1];
        block_[2] = linear / plan.grid[0] / plan.grid[1];
        block_number_ = first_block_ + linear;
        epoch_ = 0;
        waiting_at_barrier_ = 0;
        std::memset(shared_.data, 0xff, shared_.bytes);
        shared_.shadow.assign(shared_.granules(), Shadow{});
        for (Warp& warp : warps_) warp = Warp{};
        for (Thread& thread : threads_) {
            thread.state = Thread::ready;
            thread.copies.clear();
            thread.groups.clear();
            thread.landed = 0;
            thread.fiber->reset(&Emulator::enter);
        }
        std::vector<int> turns(threads_.size());
        std::iota(turns.begin(), turns.end(), 0);
        if (order == Order::reverse) std::reverse(turns.begin(), turns.end());
        for (std::size_t alive = threads_.size(); alive > 0;) {
            bool any = false;
            arrange(turns, order);
            for (const int turn : turns) {
                Thread& thread = threads_[turn];
                if (thread.state != Thread::ready) continue;
                any = true;
                thread_ = &thread;
                warp_ = &warps_[turn / kWarpSize];
                thread.fiber->resume();
                if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
                alive -= thread.state == Thread::finished;
            }
            if (!any) fail_stuck();
        }
    }

    /// Nobody can go on: somebody waits for threads that wait elsewhere or have left.
    [[noreturn]] void fail_stuck() const {
        const auto elsewhere = [this](const Thread& thread) {
            if (thread.state == Thread::finished) return std::string("has left the kernel");
            return std::string(thread.state == Thread::at_barrier ? "waits in barrier at " : "waits in a warp operation at ") + text(thread.where);
        };
        for (const Thread& thread : threads_) {
            if (thread.state != Thread::in_collective) continue;
            const Warp& warp = warps_[thread.index / kWarpSize];
            for (int i = thread.index / kWarpSize * kWarpSize; i < (thread.index / kWarpSize + 1) * kWarpSize; ++i)
                if (threads_[i].state != Thread::in_collective)
                    fail(warp.kind == Collective::warp_barrier ? "divergent_barrier" : "shuffle_mask", "",
                         std::string("waits in ") + name(warp.kind) + " at " + text(warp.where) + " while thread " + std::to_string(i) + " of its warp " + elsewhere(threads_[i]), thread.index);
        }
        for (const Thread& thread : threads_)
            for (const Thread& other : threads_)
                if (thread.state == Thread::at_barrier && other.state != Thread::at_barrier)
                    fail("divergent_barrier", "", "waits in barrier at " + text(thread.where) + " while thread " + std::to_string(other.index) + " " + elsewhere(other), thread.index);
        throw std::logic_error("the emulator is stuck without a reason");
    }

    static void enter() {
        Emulator& self = instance();
        Thread& thread = *self.thread_;
        thread.fiber->entered();
        try {
            self.body_(self.kernel_);
        } catch (...) {
            self.failure_ = std::current_exception();
        }
        thread.state = Thread::finished;
        thread.fiber->suspend(true);
        std::abort();   // a finished fiber is never resumed
    }

public:
    /// Mutation places that launches of this key have passed so far.
    const std::map<std::string, std::set<std::string>>& passed_mutations() const { return passed_; }

private:
    Thread* thread_ = nullptr;
    Warp* warp_ = nullptr;
    std::uint32_t epoch_ = 0;
    std::uint32_t block_number_ = 0;
    std::uint32_t first_block_ = 0;
    std::int64_t until_yield_ = 0;
    unsigned block_[3] = {};
    Allocation shared_;
    std::vector<Thread> threads_;
    std::vector<Warp> warps_;
    int waiting_at_barrier_ = 0;
    std::source_location barrier_location_;
    LaunchRecord record_;
    const void* kernel_ = nullptr;
    void (*body_)(const void*) = nullptr;
    std::exception_ptr failure_;
    std::uint64_t random_state_ = 0;
    double yield_probability_ = 0.0;
    std::vector<std::unique_ptr<Fiber>> fibers_;
    std::map<std::string, std::set<std::string>> passed_;
};

// ================================================================================================================ indices
inline int thread_index() { return Emulator::instance().thread_index(); }
inline int lane() { return thread_index() % kWarpSize; }
inline int warp() { return thread_index() / kWarpSize; }
inline unsigned block_index_x() { return Emulator::instance().block_index(0); }
inline unsigned block_index_y() { return Emulator::instance().block_index(1); }
inline unsigned block_index_z() { return Emulator::instance().block_index(2); }
inline unsigned grid_size_x() { return Emulator::instance().plan().grid[0]; }
inline unsigned grid_size_y() { return Emulator::instance().plan().grid[1]; }
inline unsigned grid_size_z() { return Emulator::instance().plan().grid[2]; }

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
        if (first < 0 || first + elements > count_)
            Emulator::instance().fail("out_of_bounds_shared", "shared byte " + std::to_string(byte_offset_ + first * static_cast<std::int64_t>(sizeof(T))),
                                      "element " + std::to_string(first < 0 ? first : first + elements - 1) + " of an array of " + std::to_string(count_) + " elements at shared byte " + std::to_string(byte_offset_));
        return static_cast<std::size_t>(byte_offset_ + first * static_cast<std::int64_t>(sizeof(T)));
    }
    T load(std::int64_t i) const {
        T value;
        Emulator& emulator = Emulator::instance();
        emulator.read(emulator.shared_memory(), address(i, 1), sizeof(T), &value);
        return value;
    }
    void store(std::int64_t i, T value) const {
        Emulator& emulator = Emulator::instance();
        emulator.write(emulator.shared_memory(), address(i, 1), sizeof(T), &value);
    }

private:
    int byte_offset_;
    int count_;
    std::int64_t shift_ = 0;
};

template <class T>
Shared<T> shared(int byte_offset, int count) {
    const Emulator& emulator = Emulator::instance();
    const std::int64_t end = byte_offset + static_cast<std::int64_t>(count) * static_cast<std::int64_t>(sizeof(T));
    if (byte_offset < 0 || count < 0 || end > std::int64_t{emulator.plan().shared_bytes})
        emulator.fail("out_of_bounds_shared", "shared byte " + std::to_string(byte_offset),
                      "an array from shared byte " + std::to_string(byte_offset) + " to " + std::to_string(end) + ", but the launch gives " + std::to_string(emulator.plan().shared_bytes) + " bytes");
    if (byte_offset % static_cast<int>(alignof(T)) != 0)
        emulator.fail("misaligned", "shared byte " + std::to_string(byte_offset), "an array of " + std::to_string(sizeof(T)) + "-byte elements at shared byte " + std::to_string(byte_offset));
    return Shared<T>(byte_offset, count);
}

template <class T>
class Global {
    using Value = std::remove_const_t<T>;

public:
    Global(T* pointer) : pointer_(pointer), array_(DeviceMemory::active() ? DeviceMemory::active()->find(pointer) : nullptr) {}
    template <class U>
        requires std::is_same_v<const U, T>
    Global(Global<U> other) : pointer_(other.pointer()), array_(other.array()) {}

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
    Allocation* array() const { return array_; }

    /// Byte offset, within the array that the view was made for, of `bytes` bytes from element i on, which must lie inside the array.
    std::size_t offset(std::int64_t i, std::size_t bytes) const {
        if (array_ == nullptr)
            Emulator::instance().fail("out_of_bounds_global", "", pointer_ == nullptr ? "element " + std::to_string(shift_ + i) + " of a null pointer" : "a pointer that belongs to no array");
        const std::int64_t first = (reinterpret_cast<const std::byte*>(pointer_) - array_->data) + (shift_ + i) * static_cast<std::int64_t>(sizeof(T));
        if (first < 0 || first + static_cast<std::int64_t>(bytes) > static_cast<std::int64_t>(array_->bytes)) {
            const std::int64_t outside = first < 0 ? first : first + static_cast<std::int64_t>(bytes) - 1, size = array_->element_bytes;
            const std::string address = array_->name + " element " + std::to_string(outside < 0 ? (outside - size + 1) / size : outside / size);
            Emulator::instance().fail("out_of_bounds_global", address, address + " of " + std::to_string(array_->bytes / array_->element_bytes));
        }
        return static_cast<std::size_t>(first);
    }
    Value load(std::int64_t i) const {
        Value value;
        Emulator::instance().read(checked(), offset(i, sizeof(T)), sizeof(T), &value);
        return value;
    }
    void store(std::int64_t i, T value) const { Emulator::instance().write(checked(), offset(i, sizeof(T)), sizeof(T), &value); }

private:
    Allocation& checked() const { return *array_; }
    T* pointer_;
    Allocation* array_;
    std::int64_t shift_ = 0;
};

template <int N, class T>
Pack<T, N> load_pack(Shared<T> view, int i) {
    Pack<T, N> pack;
    Emulator& emulator = Emulator::instance();
    emulator.read(emulator.shared_memory(), view.address(i, N), sizeof(pack), &pack);
    return pack;
}
template <int N, class T>
Pack<std::remove_const_t<T>, N> load_pack(Global<T> view, std::int64_t i) {
    Pack<std::remove_const_t<T>, N> pack;
    const std::size_t offset = view.offset(i, sizeof(pack));
    Emulator::instance().read(*view.array(), offset, sizeof(pack), &pack);
    return pack;
}
template <class T, int N>
void store_pack(Shared<T> view, int i, const Pack<T, N>& pack) {
    Emulator& emulator = Emulator::instance();
    emulator.write(emulator.shared_memory(), view.address(i, N), sizeof(pack), &pack);
}
template <class T, int N>
void store_pack(Global<T> view, std::int64_t i, const Pack<T, N>& pack) {
    const std::size_t offset = view.offset(i, sizeof(pack));
    Emulator::instance().write(*view.array(), offset, sizeof(pack), &pack);
}

// ======================================================================================================== synchronisation
inline void barrier(std::source_location where = std::source_location::current()) { Emulator::instance().barrier(where); }

inline void warp_barrier(std::source_location where = std::source_location::current()) {
    struct Nothing {} nothing;
    Emulator::instance().collective<Nothing>(Collective::warp_barrier, where, nothing, [](Emulator& emulator, Nothing* const (&)[kWarpSize]) {
        emulator.next_warp_epoch();
        ++emulator.record().warp_barriers;
    });
}

/// Visibility alone orders nothing between threads that do not also meet.
inline void fence() {}

namespace detail {
template <class T>
struct Shuffled {
    T given;
    int source;   // lane
    T received;
};
template <class T>
T shuffle_from(T value, int source, const std::source_location& where) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    Shuffled<T> mine{value, source, value};
    Emulator::instance().collective<Shuffled<T>>(Collective::shuffle, where, mine, [](Emulator& emulator, Shuffled<T>* const (&lanes)[kWarpSize]) {
        for (Shuffled<T>* to : lanes) to->received = lanes[to->source]->given;
        ++emulator.record().shuffles;
    });
    return mine.received;
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
    struct Vote {
        bool given;
        std::uint32_t received;
    } mine{predicate, 0};
    Emulator::instance().collective<Vote>(Collective::ballot, where, mine, [](Emulator& emulator, Vote* const (&lanes)[kWarpSize]) {
        std::uint32_t votes = 0;
        for (int i = 0; i < kWarpSize; ++i) votes |= std::uint32_t(lanes[i]->given) << i;
        for (Vote* vote : lanes) vote->received = votes;
        ++emulator.record().shuffles;
    });
    return mine.received;
}

// ====================================================================================================== asynchronous copy
namespace detail {
template <int Bytes, class T>
void copy_async(Shared<T> target, int target_index, Global<const T> source, std::int64_t source_index, int valid_bytes) {
    if (valid_bytes < 0 || valid_bytes > Bytes) Emulator::instance().fail("out_of_bounds_global", "", "an asynchronous copy of " + std::to_string(valid_bytes) + " of " + std::to_string(Bytes) + " bytes");
    const std::size_t from = valid_bytes > 0 ? source.offset(source_index, static_cast<std::size_t>(valid_bytes)) : 0;
    Emulator::instance().copy_async(target.address(target_index, Bytes / static_cast<int>(sizeof(T))), source.array(), from, Bytes, valid_bytes);
}
}  // namespace detail

template <class T>
void copy_async_16(Shared<T> target, int target_index, Global<const std::type_identity_t<T>> source, std::int64_t source_index, int valid_bytes = 16) {
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
inline void copy_async_commit() { Emulator::instance().copy_async_commit(); }
template <int Pending>
void copy_async_wait() {
    Emulator::instance().copy_async_wait(Pending);
}

// ============================================================================================================ tensor core
namespace detail {
struct MatrixRow {
    std::size_t address;
    std::uint32_t* received;
};
template <bool Transposed, class T>
void load_matrix_x4(std::uint32_t (&r)[4], Shared<T> view, int row_start, const std::source_location& where) {
    static_assert(sizeof(T) == 2, "ldmatrix moves 16-bit elements");
    MatrixRow mine{view.address(row_start, 8), r};
    Emulator::instance().collective<MatrixRow>(Collective::load_matrix, where, mine, [](Emulator& emulator, MatrixRow* const (&lanes)[kWarpSize]) {
        std::uint16_t matrix[4][8][8];
        for (int l = 0; l < kWarpSize; ++l) emulator.read_for_warp(l, lanes[l]->address, 16, matrix[l / 8][l % 8]);
        for (int l = 0; l < kWarpSize; ++l)
            for (int m = 0; m < 4; ++m) {
                const int outer = l / 4, inner = 2 * (l % 4);
                const std::uint16_t low = Transposed ? matrix[m][inner][outer] : matrix[m][outer][inner];
                const std::uint16_t high = Transposed ? matrix[m][inner + 1][outer] : matrix[m][outer][inner + 1];
                lanes[l]->received[m] = std::uint32_t(low) | std::uint32_t(high) << 16;
            }
    });
}

struct Fragments {
    float* d;
    const std::uint32_t* a;
    const std::uint32_t* b;
};
template <class T>
void mma_16816(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], const std::source_location& where) {
    Fragments mine{d, a, b};
    Emulator::instance().collective<Fragments>(Collective::mma, where, mine, [](Emulator& emulator, Fragments* const (&lanes)[kWarpSize]) {
        float left[16][16], right[16][8];   // a[row][k], b[k][column]
        for (int l = 0; l < kWarpSize; ++l) {
            const int group = l / 4, pair = 2 * (l % 4);
            for (int r = 0; r < 4; ++r) {
                const int row = group + 8 * (r % 2), k = pair + 8 * (r / 2);
                left[row][k] = to_float(unpack_low<T>(lanes[l]->a[r]));
                left[row][k + 1] = to_float(unpack_high<T>(lanes[l]->a[r]));
            }
            for (int r = 0; r < 2; ++r) {
                right[pair + 8 * r][group] = to_float(unpack_low<T>(lanes[l]->b[r]));
                right[pair + 8 * r + 1][group] = to_float(unpack_high<T>(lanes[l]->b[r]));
            }
        }
        for (int row = 0; row < 16; ++row) {
            float sum[8] = {};   // products of 16-bit operands are exact in fp32; their sum is rounded at each step
            for (int k = 0; k < 16; ++k)
                for (int column = 0; column < 8; ++column) sum[column] += left[row][k] * right[k][column];
            for (int column = 0; column < 8; ++column) lanes[row % 8 * 4 + column / 2]->d[row / 8 * 2 + column % 2] += sum[column];
        }
        ++emulator.record().matrix_products;
    });
}
}  // namespace detail

template <class T>
void load_matrix_x4(std::uint32_t (&r)[4], Shared<T> view, int row_start, std::source_location where = std::source_location::current()) {
    detail::load_matrix_x4<false>(r, view, row_start, where);
}
template <class T>
void load_matrix_x4_transposed(std::uint32_t (&r)[4], Shared<T> view, int row_start, std::source_location where = std::source_location::current()) {
    detail::load_matrix_x4<true>(r, view, row_start, where);
}
inline void mma_16816(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], bf16, std::source_location where = std::source_location::current()) {
    detail::mma_16816<bf16>(d, a, b, where);
}
inline void mma_16816(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], f16, std::source_location where = std::source_location::current()) {
    detail::mma_16816<f16>(d, a, b, where);
}

}  // namespace modalign::simt
