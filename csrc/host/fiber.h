/// @file fiber.h
/// @brief Fibers of one OS thread: the scheduler switches to a fiber, the fiber switches back.
///
/// On x86-64 a switch is a dozen instructions; the portable way, swapcontext (two system calls), is compiled everywhere and can be chosen, so that it
/// is tested where the fast one exists. AddressSanitizer is told about every switch.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define MODALIGN_ADDRESS_SANITIZER
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MODALIGN_ADDRESS_SANITIZER
#endif
#endif
#if defined(MODALIGN_ADDRESS_SANITIZER)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace modalign::simt {

#if defined(__x86_64__)
inline constexpr bool kHasFastSwitch = true;

/// Saves the callee-saved registers and the stack pointer of the caller, and takes up those saved at `to`.
__attribute__((naked, noinline)) inline void switch_stack(void** /*from*/, void* /*to*/) {
    asm volatile(
        "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
        "movq %rsp, (%rdi)\n"
        "movq %rsi, %rsp\n"
        "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
        "ret\n");
}
#else
inline constexpr bool kHasFastSwitch = false;
inline void switch_stack(void**, void*) {}
#endif

class Fiber {
public:
    using Entry = void (*)();   // never returns
    static inline bool fast_switch = kHasFastSwitch;   ///< not to be changed while a fiber is suspended

    explicit Fiber(int colour) {
        const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
        mapped_bytes_ = kStackBytes + page;
        mapped_ = static_cast<std::byte*>(mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        if (mapped_ == MAP_FAILED) throw std::bad_alloc();
        mprotect(mapped_, page, PROT_NONE);   // overflowing a fiber's stack is a fault, not a corruption of its neighbour
        // Stacks lie a power of two apart; without a shift of their tops all threads of a block would share a few cache sets.
        bottom_ = mapped_ + page;
        bytes_ = kStackBytes - static_cast<std::size_t>(colour % 64) * 192;
    }
    ~Fiber() { munmap(mapped_, mapped_bytes_); }
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

    /// Forgets whatever ran here; the next resume() calls `entry`.
    void reset(Entry entry) {
#if defined(MODALIGN_ADDRESS_SANITIZER)
        __asan_unpoison_memory_region(bottom_, kStackBytes);   // frames of an abandoned run
        fake_stack_ = nullptr;
#endif
        if (fast_switch) {
            auto top = reinterpret_cast<std::uintptr_t>(bottom_ + bytes_) & ~std::uintptr_t{15};
            auto* stack = reinterpret_cast<void**>(top);
            *--stack = nullptr;                               // a return address for `entry`, which keeps the stack aligned as after a call
            *--stack = reinterpret_cast<void*>(entry);
            for (int i = 0; i < kSavedRegisters; ++i) *--stack = nullptr;
            stack_pointer_ = stack;
        } else {
            getcontext(&context_);
            context_.uc_stack.ss_sp = bottom_;
            context_.uc_stack.ss_size = bytes_;
            context_.uc_link = nullptr;
            makecontext(&context_, entry, 0);
        }
    }

    /// Called on the scheduler's stack: runs the fiber until it suspends.
    void resume() {
#if defined(MODALIGN_ADDRESS_SANITIZER)
        __sanitizer_start_switch_fiber(&caller_fake_stack_, bottom_, bytes_);
#endif
        if (fast_switch) switch_stack(&caller_stack_pointer_, stack_pointer_);
        else swapcontext(&caller_context_, &context_);
#if defined(MODALIGN_ADDRESS_SANITIZER)
        __sanitizer_finish_switch_fiber(caller_fake_stack_, nullptr, nullptr);
#endif
    }

    /// Called first thing in `entry`.
    void entered() {
#if defined(MODALIGN_ADDRESS_SANITIZER)
        __sanitizer_finish_switch_fiber(nullptr, &caller_bottom_, &caller_bytes_);
#endif
    }

    /// Called on the fiber's stack: back to the scheduler; `last` when the fiber will not be resumed.
    void suspend([[maybe_unused]] bool last = false) {
#if defined(MODALIGN_ADDRESS_SANITIZER)
        __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack_, caller_bottom_, caller_bytes_);
#endif
        if (fast_switch) switch_stack(&stack_pointer_, caller_stack_pointer_);
        else swapcontext(&context_, &caller_context_);
#if defined(MODALIGN_ADDRESS_SANITIZER)
        __sanitizer_finish_switch_fiber(fake_stack_, &caller_bottom_, &caller_bytes_);
#endif
    }

private:
    static constexpr std::size_t kStackBytes = 256 * 1024;
    static constexpr int kSavedRegisters = 6;

    std::byte* mapped_;
    std::size_t mapped_bytes_;
    std::byte* bottom_;
    std::size_t bytes_;
    void* stack_pointer_ = nullptr;
    void* caller_stack_pointer_ = nullptr;
    ucontext_t context_;
    ucontext_t caller_context_;
#if defined(MODALIGN_ADDRESS_SANITIZER)
    void* fake_stack_ = nullptr;
    void* caller_fake_stack_ = nullptr;
    const void* caller_bottom_ = nullptr;
    std::size_t caller_bytes_ = 0;
#endif
};

}  // namespace modalign::simt
