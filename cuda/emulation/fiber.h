// Fibers: a CUDA thread has a stack of its own and runs until it waits. On x86-64 a switch is a dozen instructions;
// elsewhere ucontext does it.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

#include "sanitizer.h"
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {

constexpr size_t STACK_BYTES = RACES || ADDRESSES ? 256 << 10 : 64 << 10;
// An odd number of cache lines more, or the hot lines of all stacks would fall into the same sets of the cache.
constexpr size_t STACK_STRIDE = STACK_BYTES + 33 * 64;

// Memory from the system, which gives it page by page as it is touched. Fresh memory carries no memory of accesses
// for ThreadSanitizer either.
class Pages {
 public:
  explicit Pages(size_t bytes) : bytes_(bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    memory_ = static_cast<unsigned char*>(memory);
  }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  ~Pages() { munmap(memory_, bytes_); }
  unsigned char* data() const { return memory_; }
  size_t bytes() const { return bytes_; }

 private:
  unsigned char* memory_;
  size_t bytes_;
};

// Stacks for the threads of a block, kept for later launches: touching fresh pages costs more than a small kernel.
class Stacks {
 public:
  explicit Stacks(size_t count) : bytes_(count * STACK_STRIDE) {
    if (!RACES) {
      const std::lock_guard lock(mutex());
      for (auto& each : unused())
        if (each->bytes() >= bytes_) {
          pages_.swap(each);
          each.swap(unused().back());
          unused().pop_back();
          return;
        }
    }
    pages_ = std::make_unique<Pages>(bytes_);
  }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks() {
    if (RACES) return;
    const std::lock_guard lock(mutex());
    unused().push_back(std::move(pages_));
  }
  unsigned char* data() const { return pages_->data(); }

 private:
  static std::mutex& mutex() {
    static std::mutex one;
    return one;
  }
  static std::vector<std::unique_ptr<Pages>>& unused() {
    static std::vector<std::unique_ptr<Pages>> all;
    return all;
  }
  size_t bytes_;
  std::unique_ptr<Pages> pages_;
};

#if defined(__x86_64__)
// Keeps the registers that a function must keep on the stack left, and takes those of the stack entered. noipa: the
// compiler must not conclude from the body that memory and the other registers stay as they are.
inline __attribute__((naked, noipa, no_sanitize_thread)) void switch_stacks(void** /*left*/, void* /*entered*/) {
  asm("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
      "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret");
}

struct Context {
  void* stack_pointer = nullptr;

  EMULATION_UNTRACKED void prepare(unsigned char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + STACK_BYTES) & ~uintptr_t(63));
    *--top = nullptr;  // entry's return address, never used
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer = top;
  }
  EMULATION_UNTRACKED void leave_for(Context& other) { switch_stacks(&stack_pointer, other.stack_pointer); }
};
#else
struct Context {
  ucontext_t context;

  EMULATION_UNTRACKED void prepare(unsigned char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack, context.uc_stack.ss_size = STACK_BYTES, context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  EMULATION_UNTRACKED void leave_for(Context& other) { swapcontext(&context, &other.context); }
};
#endif

}  // namespace emulation
