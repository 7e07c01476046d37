/// @file simt_host.cpp
/// @brief The emulator: rules of memory, meeting points of threads, scheduling.
#include <algorithm>
#include <cstdlib>
#include <limits>
#include <numeric>

#include "common/simt.h"
#include "host/fiber.h"

namespace modalign::simt {

Emulator emulator;

namespace {
bool same(const std::source_location& a, const std::source_location& b) {
    return a.line() == b.line() && a.column() == b.column() && (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}
std::string text(const std::source_location& where) {
    const char* slash = std::strrchr(where.file_name(), '/');
    return std::string(slash ? slash + 1 : where.file_name()) + ":" + std::to_string(where.line());
}
}  // namespace

// ================================================================================================================ reports
Report::Report(std::string kind_, std::string kernel_, const unsigned (&block_)[3], int thread_, std::string address_, const std::string& message)
    : std::runtime_error(kind_ + " in " + kernel_ + ", block (" + std::to_string(block_[0]) + ", " + std::to_string(block_[1]) + ", " +
                         std::to_string(block_[2]) + "), thread " + std::to_string(thread_) + ": " + message),
      kind(std::move(kind_)),
      kernel(std::move(kernel_)),
      block{block_[0], block_[1], block_[2]},
      thread(thread_),
      address(std::move(address_)) {}

void Emulator::fail(const char* kind, const std::string& address, const std::string& message, int thread) const {
    throw Report(kind, record_.plan.key, block_, thread, address, message);
}

void Emulator::fail_uninitialised(const Allocation& array, std::size_t granule) const {
    const std::string address = array.address(granule << array.granule_shift);
    fail(array.is_shared ? "uninitialised_shared" : "uninitialised_global", address, "reads " + address + ", which nobody has written");
}

void Emulator::fail_copying(const Allocation& array, std::size_t granule, const Shadow& s) const {
    const std::string address = array.address(granule << array.granule_shift);
    fail("copy_not_waited", address,
         "reads " + address + " while the copy that thread " + std::to_string(s.write_thread) + " started has not been waited for");
}

void Emulator::fail_race(const Allocation& array, std::size_t granule, const char* does, const char* did, std::uint32_t other_block,
                         std::uint16_t other_thread) const {
    const std::string address = array.address(granule << array.granule_shift);
    std::string other = other_block == Shadow::kManyBlocks ? "several blocks"
                        : other_thread == Shadow::kMany    ? "several threads"
                                                           : "thread " + std::to_string(other_thread);
    if (other_block != block_number_ && other_block != Shadow::kManyBlocks) {
        const std::uint32_t linear = other_block - first_block_, x = record_.plan.grid[0], y = record_.plan.grid[1];
        other += " of block (" + std::to_string(linear % x) + ", " + std::to_string(linear / x % y) + ", " + std::to_string(linear / x / y) + ")";
    }
    fail(array.is_shared ? "race_shared" : "race_global", address,
         std::string(does) + " " + address + ", which " + other + " " + did + " with no barrier between");
}

void Emulator::fail_outside_shared(int byte_offset, int count, int element_bytes, std::int64_t first, int elements) const {
    fail("out_of_bounds_shared", "shared byte " + std::to_string(byte_offset + first * element_bytes),
         "element " + std::to_string(first < 0 ? first : first + elements - 1) + " of an array of " + std::to_string(count) +
             " elements at shared byte " + std::to_string(byte_offset));
}

// ============================================================================================================== mutations
std::map<std::string, Mutation>& Mutation::all() {
    static std::map<std::string, Mutation> mutations;
    return mutations;
}

Mutation& Mutation::place(const char* name) {
    Mutation& mutation = all()[name];
    mutation.exists = true;
    return mutation;
}

bool Mutation::exists_anywhere(const std::string& name) { return all()[name].exists; }

// ================================================================================================================= memory
std::string Allocation::address(std::size_t offset) const {
    if (is_shared) return "shared byte " + std::to_string(offset);
    return name + " element " + std::to_string(offset / static_cast<std::size_t>(element_bytes));
}

Allocation& DeviceMemory::allocate(std::string name, std::size_t bytes, int element_bytes, std::size_t offset_bytes) {
    Allocation& array = arrays_.emplace_back();
    array.name = std::move(name);
    array.storage.reset(new (kArrayAlignment) std::byte[offset_bytes + bytes]);
    array.data = array.storage.get() + offset_bytes;
    array.bytes = bytes;
    array.element_bytes = element_bytes;
    while (array.granule_shift < 2 && (2 << array.granule_shift) <= element_bytes) ++array.granule_shift;
    std::memset(array.data, 0xff, bytes);   // NaN in every floating type
    array.shadow.resize(array.granules());
    return array;
}

void DeviceMemory::written_by_host(Allocation& array) {
    for (Shadow& s : array.shadow) s.state = Shadow::ready;
}

Allocation* DeviceMemory::find(const void* address) {
    const auto* at = static_cast<const std::byte*>(address);
    for (Allocation& array : arrays_)
        if (at >= array.data && at < array.data + array.bytes) return &array;
    for (Allocation& array : arrays_)
        if (at == array.data + array.bytes) return &array;
    return nullptr;
}

// ---------------------------------------------------------------------------------------------------------- access rules
void Emulator::read(Allocation& array, std::size_t offset, std::size_t bytes, void* value) {
    access(array, offset, bytes);
    note_read(array, offset, bytes, this_thread());
    if (!array.is_shared) record_.global_bytes_read += bytes;
    std::memcpy(value, array.data + offset, bytes);
}

void Emulator::write(Allocation& array, std::size_t offset, std::size_t bytes, const void* value) {
    access(array, offset, bytes);
    note_write(array, offset, bytes, Shadow::ready);
    if (!array.is_shared) record_.global_bytes_written += bytes;
    std::memcpy(array.data + offset, value, bytes);
}

/// What every access does first: perhaps lets others go ahead, and looks at the alignment.
void Emulator::access(const Allocation& array, std::size_t offset, std::size_t alignment) {
    if (--until_yield_ == 0) {
        draw_next_yield();
        thread_->fiber->suspend();
    }
    check_alignment(array, offset, alignment);
}

void Emulator::check_alignment(const Allocation& array, std::size_t offset, std::size_t alignment) const {
    const std::size_t beyond = (array.is_shared ? offset : reinterpret_cast<std::uintptr_t>(array.data) + offset) % alignment;
    if (beyond != 0)
        fail("misaligned", array.address(offset),
             "an access of " + std::to_string(alignment) + " bytes to " + array.address(offset) + ", which lies " + std::to_string(beyond) +
                 " bytes past a multiple of that");
}

void Emulator::check_shared_array(int byte_offset, int count, int element_bytes) const {
    const std::int64_t end = byte_offset + std::int64_t{count} * element_bytes;
    const std::string address = "shared byte " + std::to_string(byte_offset);
    if (byte_offset < 0 || count < 0 || end > std::int64_t{record_.plan.shared_bytes})
        fail("out_of_bounds_shared", address,
             "an array from " + address + " to " + std::to_string(end) + ", but the launch gives " + std::to_string(record_.plan.shared_bytes) +
                 " bytes");
    if (byte_offset % element_bytes != 0)
        fail("misaligned", address, "an array of " + std::to_string(element_bytes) + "-byte elements at " + address);
}

std::size_t Emulator::offset_in(const Allocation* array, const void* pointer, std::int64_t shift_bytes, std::size_t bytes) const {
    if (array == nullptr) fail("out_of_bounds_global", "", pointer == nullptr ? "a null pointer" : "a pointer that belongs to no array");
    const std::int64_t first = (static_cast<const std::byte*>(pointer) - array->data) + shift_bytes, size = array->element_bytes;
    const std::int64_t last = first + static_cast<std::int64_t>(bytes) - 1;
    if (first < 0 || last >= static_cast<std::int64_t>(array->bytes)) {
        const std::string address = array->name + " element " + std::to_string(first < 0 ? (first - size + 1) / size : last / size);
        fail("out_of_bounds_global", address, address + " of " + std::to_string(static_cast<std::int64_t>(array->bytes) / size));
    }
    return static_cast<std::size_t>(first);
}

/// Whether the granule's last write comes before what `thread` of this warp does now; kMany stands for all of its lanes.
bool Emulator::follows_write(const Shadow& s, std::uint16_t thread) const {
    if (s.write_block < first_block_) return true;
    if (s.write_block != block_number_) return false;
    return s.write_epoch != epoch_ || s.write_thread == thread ||
           (s.write_thread / kWarpSize == thread_->index / kWarpSize && s.write_warp_epoch != warp_->epoch);
}

/// Whether reads of this block leave the granule open to a race with a write by this thread.
bool Emulator::read_races(const Shadow& s) const {
    if (s.read_epoch != epoch_) return false;
    if (s.read_warp == Shadow::kMany || s.read_warp != thread_->index / kWarpSize) return true;
    return s.read_warp_epoch == warp_->epoch && s.read_thread != thread_->index;
}

void Emulator::note_read(Allocation& array, std::size_t offset, std::size_t bytes, std::uint16_t reader) {
    for (std::size_t g = offset >> array.granule_shift, last = (offset + bytes - 1) >> array.granule_shift; g <= last; ++g) {
        Shadow& s = array.shadow[g];
        if (s.state == Shadow::uninitialised) fail_uninitialised(array, g);
        if (!follows_write(s, reader))
            fail_race(array, g, "reads", s.state == Shadow::copying ? "is copying to" : "wrote", s.write_block, s.write_thread);
        if (s.state == Shadow::copying) fail_copying(array, g, s);
        stamp_read(s, reader);
    }
}

void Emulator::note_write(Allocation& array, std::size_t offset, std::size_t bytes, Shadow::State state) {
    for (std::size_t g = offset >> array.granule_shift, last = (offset + bytes - 1) >> array.granule_shift; g <= last; ++g) {
        Shadow& s = array.shadow[g];
        if (s.state == Shadow::copying) fail_race(array, g, "writes", "is copying to", s.write_block, s.write_thread);
        if (s.state == Shadow::ready && !follows_write(s, this_thread())) fail_race(array, g, "writes", "wrote", s.write_block, s.write_thread);
        if (s.read_block == Shadow::kManyBlocks ? s.read_epoch == first_block_
                                                : s.read_block >= first_block_ && (s.read_block != block_number_ || read_races(s)))
            fail_race(array, g, "writes", "read", s.read_block, s.read_thread);
        stamp_write(s, state);
    }
}

void Emulator::stamp_write(Shadow& s, Shadow::State state) const {
    s.write_block = block_number_;
    s.write_epoch = epoch_;
    s.write_warp_epoch = warp_->epoch;
    s.write_thread = this_thread();
    s.state = state;
}

void Emulator::stamp_read(Shadow& s, std::uint16_t thread) const {
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

// ------------------------------------------------------------------------------------------------------ asynchronous copy
void Emulator::copy_async(std::size_t target, Allocation* source, const void* pointer, std::int64_t shift_bytes, int bytes, int valid_bytes) {
    if (valid_bytes < 0 || valid_bytes > bytes)
        fail("out_of_bounds_global", "", "an asynchronous copy of " + std::to_string(valid_bytes) + " of " + std::to_string(bytes) + " bytes");
    access(shared_, target, bytes);
    note_write(shared_, target, bytes, Shadow::copying);
    std::size_t from = 0;
    if (valid_bytes > 0) {
        from = offset_in(source, pointer, shift_bytes, valid_bytes);
        check_alignment(*source, from, bytes);
        note_read(*source, from, valid_bytes, this_thread());
        record_.global_bytes_read += valid_bytes;
    }
    thread_->copies.push_back({target, source, from, bytes, valid_bytes});
}

void Emulator::copy_async_commit() { thread_->groups.push_back(thread_->copies.size()); }

void Emulator::copy_async_wait(int pending) {
    Thread& self = *thread_;
    const int finished = static_cast<int>(self.groups.size()) - pending;
    if (finished <= 0) return;
    for (const std::size_t end = self.groups[finished - 1]; self.landed < end; ++self.landed) {
        const Copy& copy = self.copies[self.landed];
        for (std::size_t g = copy.target >> shared_.granule_shift; g <= (copy.target + copy.bytes - 1) >> shared_.granule_shift; ++g)
            stamp_write(shared_.shadow[g], Shadow::ready);
        std::memset(shared_.data + copy.target, 0, copy.bytes);
        if (copy.valid_bytes == 0) continue;
        note_read(*copy.source, copy.source_offset, copy.valid_bytes, this_thread());   // the source had to stay as it was all the while
        std::memcpy(shared_.data + copy.target, copy.source->data + copy.source_offset, copy.valid_bytes);
    }
    self.groups.erase(self.groups.begin(), self.groups.begin() + finished);
}

// ========================================================================================================= meeting points
void Emulator::barrier(const std::source_location& where) {
    Thread& self = *thread_;
    if (waiting_at_barrier_ == 0) barrier_location_ = where;
    if (!same(barrier_location_, where))
        fail("divergent_barrier", "", "waits at " + text(where) + " while another thread waits at " + text(barrier_location_));
    self.where = where;
    self.state = Thread::at_barrier;
    if (++waiting_at_barrier_ < static_cast<int>(record_.plan.threads)) return self.fiber->suspend();
    waiting_at_barrier_ = 0;
    ++epoch_;
    ++record_.barriers;
    for (Thread& thread : threads_) thread.state = Thread::ready;
}

const char* Emulator::name(Collective kind) {
    constexpr const char* kNames[] = {"none", "warp_barrier", "shuffle", "ballot", "load_matrix", "mma"};
    return kNames[static_cast<int>(kind)];
}

template <class Brought, class Complete>
void Emulator::collective(Collective kind, const std::source_location& where, Brought& brought, Complete complete) {
    Thread& self = *thread_;
    Warp& warp = *warp_;
    if (warp.arrived == 0) {
        warp.kind = kind;
        warp.where = where;
    }
    if (warp.kind != kind || !same(warp.where, where))
        fail(kind == Collective::warp_barrier || warp.kind == Collective::warp_barrier ? "divergent_barrier" : "shuffle_mask", "",
             std::string(name(kind)) + " at " + text(where) + " while other lanes of the warp are in " + name(warp.kind) + " at " + text(warp.where));
    warp.brought[self.index % kWarpSize] = &brought;
    self.where = where;
    self.state = Thread::in_collective;
    if (++warp.arrived < kWarpSize) return self.fiber->suspend();
    warp.arrived = 0;
    Brought* lanes[kWarpSize];
    for (int l = 0; l < kWarpSize; ++l) lanes[l] = static_cast<Brought*>(warp.brought[l]);
    complete(lanes);
    const int first = self.index / kWarpSize * kWarpSize;
    for (int l = 0; l < kWarpSize; ++l) threads_[first + l].state = Thread::ready;
}

void Emulator::warp_barrier(const std::source_location& where) {
    struct Nothing {} nothing;
    collective(Collective::warp_barrier, where, nothing, [this](Nothing* const (&)[kWarpSize]) {
        ++warp_->epoch;
        ++record_.warp_barriers;
    });
}

std::uint64_t Emulator::shuffle(std::uint64_t bits, int source_lane, const std::source_location& where) {
    struct Shuffled {
        std::uint64_t given;
        int source_lane;
        std::uint64_t received;
    } mine{bits, source_lane, 0};
    collective(Collective::shuffle, where, mine, [this](Shuffled* const (&lanes)[kWarpSize]) {
        for (Shuffled* to : lanes) to->received = lanes[to->source_lane]->given;
        ++record_.shuffles;
    });
    return mine.received;
}

std::uint32_t Emulator::ballot(bool predicate, const std::source_location& where) {
    struct Vote {
        bool given;
        std::uint32_t received;
    } mine{predicate, 0};
    collective(Collective::ballot, where, mine, [this](Vote* const (&lanes)[kWarpSize]) {
        std::uint32_t votes = 0;
        for (int l = 0; l < kWarpSize; ++l) votes |= std::uint32_t(lanes[l]->given) << l;
        for (Vote* vote : lanes) vote->received = votes;
        ++record_.shuffles;
    });
    return mine.received;
}

void Emulator::load_matrix_x4(std::uint32_t (&r)[4], std::size_t address, bool transposed, const std::source_location& where) {
    struct MatrixRow {
        std::size_t address;
        std::uint32_t* received;
    } mine{address, r};
    collective(Collective::load_matrix, where, mine, [this, transposed](MatrixRow* const (&lanes)[kWarpSize]) {
        constexpr std::size_t kRowBytes = 16;
        std::uint16_t matrix[4][8][8];
        Thread* const caller = thread_;
        for (int l = 0; l < kWarpSize; ++l) {
            thread_ = &threads_[caller->index / kWarpSize * kWarpSize + l];   // whose address it is
            check_alignment(shared_, lanes[l]->address, kRowBytes);
            // The data goes to other lanes, so even what lane l wrote itself must be ordered by a barrier.
            note_read(shared_, lanes[l]->address, kRowBytes, Shadow::kMany);
            std::memcpy(matrix[l / 8][l % 8], shared_.data + lanes[l]->address, kRowBytes);
        }
        thread_ = caller;
        for (int l = 0; l < kWarpSize; ++l)
            for (int m = 0; m < 4; ++m) {
                const int outer = l / 4, inner = 2 * (l % 4);
                const std::uint16_t low = transposed ? matrix[m][inner][outer] : matrix[m][outer][inner];
                const std::uint16_t high = transposed ? matrix[m][inner + 1][outer] : matrix[m][outer][inner + 1];
                lanes[l]->received[m] = std::uint32_t(low) | std::uint32_t(high) << 16;
            }
    });
}

template <class T>
void Emulator::mma_16816(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], const std::source_location& where) {
    struct Fragments {
        float* d;
        const std::uint32_t* a;
        const std::uint32_t* b;
    } mine{d, a, b};
    collective(Collective::mma, where, mine, [this](Fragments* const (&lanes)[kWarpSize]) {
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
        ++record_.matrix_products;
    });
}
template void Emulator::mma_16816<bf16>(float (&)[4], const std::uint32_t (&)[4], const std::uint32_t (&)[2], const std::source_location&);
template void Emulator::mma_16816<f16>(float (&)[4], const std::uint32_t (&)[4], const std::uint32_t (&)[2], const std::source_location&);

// ============================================================================================================= scheduling
std::uint64_t Emulator::random() {   // splitmix64
    std::uint64_t z = (random_state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

template <class T>
void Emulator::arrange(std::vector<T>& items, Order order) {
    if (order == Order::random)
        for (std::size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[static_cast<std::size_t>(random() % i)]);
}

void Emulator::draw_next_yield() {
    const double uniform = (static_cast<double>(random() >> 11) + 0.5) * 0x1p-53;
    if (yield_probability_ <= 0.0) until_yield_ = std::numeric_limits<std::int64_t>::max();
    else if (yield_probability_ >= 1.0) until_yield_ = 1;
    else until_yield_ = 1 + static_cast<std::int64_t>(std::log(uniform) / std::log1p(-yield_probability_));
}

LaunchRecord Emulator::run(const LaunchPlan& plan, const Options& options, const void* kernel, void (*body)(const void*)) {
    const auto demand = [&plan](bool holds, const char* what) {
        if (!holds) throw std::invalid_argument(std::string(plan.key) + ": " + what);
    };
    const std::uint64_t blocks = std::uint64_t{plan.grid[0]} * plan.grid[1] * plan.grid[2];
    demand(plan.threads > 0 && plan.threads <= 1024 && plan.threads % kWarpSize == 0, "a block must have 1 … 32 whole warps");
    demand(plan.grid[0] <= 0x7fffffffu && plan.grid[1] <= 65535 && plan.grid[2] <= 65535, "the grid must fit 2147483647 × 65535 × 65535 blocks");
    demand(plan.shared_bytes <= 227 * 1024, "shared memory of a block must be at most 227 KiB");
    demand(blocks < 0x7fffffffu, "the grid is too large to emulate");
    DeviceMemory* memory = DeviceMemory::active();
    if (memory == nullptr) throw std::logic_error(std::string(plan.key) + ": launched without device memory");

    record_ = LaunchRecord{};
    record_.plan = plan;
    kernel_ = kernel;
    body_ = body;
    random_state_ = options.seed;
    yield_probability_ = options.yield_probability;
    draw_next_yield();
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

void Emulator::prepare(const LaunchPlan& plan) {
    while (fibers_.size() < plan.threads) fibers_.push_back(std::make_unique<Fiber>(static_cast<int>(fibers_.size())));
    threads_.resize(plan.threads);
    for (unsigned i = 0; i < plan.threads; ++i) {
        threads_[i].index = static_cast<int>(i);
        threads_[i].fiber = fibers_[i].get();
    }
    warps_.resize(plan.threads / kWarpSize);
    shared_.bytes = plan.shared_bytes;
    shared_.storage.reset(new (kArrayAlignment) std::byte[plan.shared_bytes]);
    shared_.data = shared_.storage.get();
}

void Emulator::run_block(std::uint32_t linear, Order order) {
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
void Emulator::fail_stuck() const {
    const auto elsewhere = [](const Thread& thread) {
        if (thread.state == Thread::finished) return std::string("has left the kernel");
        return std::string(thread.state == Thread::at_barrier ? "waits in barrier at " : "waits in a warp operation at ") + text(thread.where);
    };
    for (const Thread& thread : threads_) {
        if (thread.state != Thread::in_collective) continue;
        const Warp& warp = warps_[thread.index / kWarpSize];
        for (int i = thread.index / kWarpSize * kWarpSize; i < (thread.index / kWarpSize + 1) * kWarpSize; ++i)
            if (threads_[i].state != Thread::in_collective)
                fail(warp.kind == Collective::warp_barrier ? "divergent_barrier" : "shuffle_mask", "",
                     std::string("waits in ") + name(warp.kind) + " at " + text(warp.where) + " while thread " + std::to_string(i) + " of its warp " +
                         elsewhere(threads_[i]),
                     thread.index);
    }
    for (const Thread& thread : threads_)
        for (const Thread& other : threads_)
            if (thread.state == Thread::at_barrier && other.state != Thread::at_barrier)
                fail("divergent_barrier", "",
                     "waits in barrier at " + text(thread.where) + " while thread " + std::to_string(other.index) + " " + elsewhere(other),
                     thread.index);
    throw std::logic_error("the emulator is stuck without a reason");
}

/// Where every fiber begins.
void Emulator::enter() {
    Thread& thread = *emulator.thread_;
    thread.fiber->entered();
    try {
        emulator.body_(emulator.kernel_);
    } catch (...) {
        emulator.failure_ = std::current_exception();
    }
    thread.state = Thread::finished;
    thread.fiber->suspend(true);
    std::abort();   // a finished fiber is never resumed
}

Emulator::Emulator() {
    shared_.name = "shared";
    shared_.is_shared = true;
    shared_.element_bytes = 2;
    shared_.granule_shift = 1;
}
Emulator::~Emulator() = default;

}  // namespace modalign::simt
