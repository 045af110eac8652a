// A block of CUDA threads on one host thread. The threads are fibers; each runs until it waits for others, in an order
// that the tests vary. Whoever completes a barrier or a warp operation goes on, so nothing but the kernel's own
// synchronisation orders the threads.
#pragma once
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

#include "fiber.h"
#include "types.h"

// The kernel's view of where it is. Not zero at first, which keeps them apart from shared arrays: see types.h.
constinit inline thread_local uint3 threadIdx{1, 1, 1}, blockIdx{1, 1, 1};
constinit inline thread_local dim3 blockDim{1, 1, 1}, gridDim{1, 1, 1};
constexpr int warpSize = 32;

namespace emulation {

constexpr unsigned WARP = 32, BARRIERS = 16, MOST_THREADS = 1024;

enum class Status : uint8_t { READY, AT_BARRIER, AT_MEETING, DONE };
enum class Operation : uint8_t { SYNC, ARRIVE, SHUFFLE, VOTE, REDUCE, MATCH, MMA, LDMATRIX };

// Lanes of one warp that carry out an operation together.
struct Meeting {
  static constexpr size_t MOST_BYTES = 48;
  Meeting* next = nullptr;
  bool open = false;
  Operation operation = Operation::SYNC;
  unsigned mask = 0, arrived = 0;
  int staying = 0;                     // lanes that have not yet read their results
  void (*finish)(Meeting&) = nullptr;  // run once, when all lanes are there
  alignas(16) unsigned char given[WARP][MOST_BYTES];
  alignas(16) unsigned char result[WARP][16];
};

struct Warp {
  unsigned threads = 0, exited = 0;  // lanes
  Meeting* meetings = nullptr;       // as many as were ever needed at once

  Warp() = default;
  Warp(const Warp&) = delete;
  Warp& operator=(const Warp&) = delete;
  ~Warp() {
    while (meetings != nullptr) delete std::exchange(meetings, meetings->next);
  }
};

// A named barrier; its phases succeed each other.
struct Barrier {
  unsigned arrived = 0, needed = 0, phase = 0;
  bool whole_block = false;                       // __syncthreads: it also opens for threads that have exited
  unsigned lanes[WARP] = {}, waiting[WARP] = {};  // per warp
  char keys[4] = {};                              // what ThreadSanitizer orders by, one for each of four phases in turn
};

struct Copy {
  void* to;
  const void* from;  // null: zeros
};

struct Thread {
  Context context;
  unsigned number = 0, barrier = 0;
  const Meeting* meeting = nullptr;
  void* race_fiber = nullptr;
  std::vector<Copy> copies;    // cp.async in flight, oldest first
  std::vector<size_t> groups;  // where each committed group of them ends
};

struct Block {
  const char* kernel = "";
  void (*body)(const void*) = nullptr;
  const void* arguments = nullptr;
  unsigned threads = 0, exited = 0;
  Thread* thread = nullptr;
  Status* status = nullptr;
  Warp warps[WARP];
  Barrier barriers[BARRIERS];
  Context scheduler;
  void* race_scheduler = nullptr;
  char race_start = 0, race_end = 0, race_fence = 0;  // addresses that ThreadSanitizer orders by
  char* race_grid = nullptr;                          // the same one for all blocks of a launch
  Thread* current = nullptr;
  unsigned char* dynamic_shared = nullptr;
};

// The block that this host thread runs. (Not null at first for the same reason as threadIdx.)
inline Block no_block;
constinit inline thread_local Block* block = &no_block;

// 0: threads and blocks in ascending order, 1: descending, else shuffled anew in every round.
inline std::atomic<unsigned>& order() {
  static std::atomic<unsigned> value = [] {
    const char* text = std::getenv("RWKVMPI_EMULATION_ORDER");
    return text == nullptr ? 0u : unsigned(std::strtoul(text, nullptr, 10));
  }();
  return value;
}

class Shuffle {
 public:
  explicit Shuffle(unsigned seed) : state_(seed * 2654435761u + 1) {}
  EMULATION_UNTRACKED void operator()(unsigned* items, unsigned count) {
    for (unsigned i = count; i > 1; --i) {
      state_ = state_ * 1664525u + 1013904223u;
      const unsigned j = unsigned((uint64_t(state_) * i) >> 32), kept = items[i - 1];
      items[i - 1] = items[j], items[j] = kept;
    }
  }

 private:
  unsigned state_;
};

EMULATION_UNTRACKED inline unsigned lane() { return block->current->number % WARP; }
EMULATION_UNTRACKED inline Warp& warp() { return block->warps[block->current->number / WARP]; }

[[noreturn, gnu::format(printf, 1, 2)]] EMULATION_UNTRACKED inline void fail(const char* format, ...) {
  const uint3 at = blockIdx;
  std::fprintf(stderr, "CUDA emulation: kernel %s, block (%u,%u,%u)", block->kernel, at.x, at.y, at.z);
  if (block->current != nullptr) std::fprintf(stderr, ", thread %u", block->current->number);
  std::fprintf(stderr, ": ");
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n");
  std::abort();
}

// Gives the processor to the scheduler until this thread is ready again.
EMULATION_UNTRACKED inline void wait(Status status) {
  Thread& self = *block->current;
  block->status[self.number] = status;
  race_switch(block->race_scheduler);
  self.context.leave_for(block->scheduler);
}

EMULATION_UNTRACKED inline void resume(unsigned number) {
  Thread& next = block->thread[number];
  block->current = &next;
  const unsigned row = number / blockDim.x;
  threadIdx = {number % blockDim.x, row % blockDim.y, row / blockDim.y};
  race_switch(next.race_fiber);
  block->scheduler.leave_for(next.context);
  block->current = nullptr;
}

EMULATION_UNTRACKED inline void wake(unsigned warp, unsigned lanes) {
  for (unsigned i = 0; i < WARP; ++i)
    if (lanes >> i & 1) block->status[warp * WARP + i] = Status::READY;
}

// Ends the phase of a barrier if all its threads have come.
EMULATION_UNTRACKED inline bool open_if_full(unsigned id) {
  Barrier& barrier = block->barriers[id];
  if (barrier.arrived == 0 || (!barrier.whole_block && barrier.arrived < barrier.needed)) return false;
  for (unsigned w = 0; barrier.whole_block && w * WARP < block->threads; ++w)
    if ((barrier.lanes[w] | block->warps[w].exited) != block->warps[w].threads) return false;
  for (unsigned w = 0; w * WARP < block->threads; ++w) {
    const unsigned there = barrier.lanes[w] | block->warps[w].exited;
    if (barrier.lanes[w] != 0 && there != block->warps[w].threads)
      fail("barrier %u opens with only the lanes %08x of warp %u", id, barrier.lanes[w], w);
    wake(w, barrier.waiting[w]);
    barrier.lanes[w] = barrier.waiting[w] = 0;
  }
  barrier.arrived = 0;
  barrier.whole_block = false;
  ++barrier.phase;
  return true;
}

// Completes a meeting if all its lanes have come or exited.
EMULATION_UNTRACKED inline bool complete_if_full(unsigned number, Meeting& meeting) {
  Warp& warp = block->warps[number];
  const unsigned wanted = meeting.mask & warp.threads & ~warp.exited;
  if (meeting.arrived == 0 || (meeting.arrived & wanted) != wanted) return false;
  meeting.open = false;
  meeting.staying = __builtin_popcount(meeting.arrived);
  if (meeting.finish != nullptr) meeting.finish(meeting);
  for (unsigned i = 0; i < WARP; ++i)
    if ((meeting.arrived >> i & 1) && block->status[number * WARP + i] == Status::AT_MEETING)
      block->status[number * WARP + i] = Status::READY;
  return true;
}

// What a fiber runs: the kernel, then the news that one thread less will come to the barriers.
EMULATION_UNTRACKED inline void fiber_entry() {
  Block& own = *block;
  race_acquire(&own.race_start);
  own.body(own.arguments);
  if (!own.current->copies.empty()) fail("it exits with cp.async in flight that nothing waits for");
  race_release(&own.race_end);
  const unsigned number = own.current->number, w = number / WARP;
  ++own.exited;
  own.warps[w].exited |= 1u << number % WARP;
  own.status[number] = Status::DONE;  // before it wakes anyone
  if (own.barriers[0].whole_block) open_if_full(0);
  for (Meeting* meeting = own.warps[w].meetings; meeting != nullptr; meeting = meeting->next)
    if (meeting->open) complete_if_full(w, *meeting);
  wait(Status::DONE);
  std::abort();
}

[[noreturn]] EMULATION_UNTRACKED inline void report_deadlock() {
  const uint3 at = blockIdx;
  std::fprintf(stderr, "CUDA emulation: deadlock in kernel %s, block (%u,%u,%u)\n", block->kernel, at.x, at.y, at.z);
  for (unsigned i = 0, shown = 0; i < block->threads && shown < 16; ++shown) {
    const Thread& first = block->thread[i];
    unsigned end = i + 1;
    while (end < block->threads && block->status[end] == block->status[i] &&
           block->thread[end].barrier == first.barrier && block->thread[end].meeting == first.meeting)
      ++end;
    std::fprintf(stderr, "  threads %u to %u ", i, end - 1);
    if (block->status[i] == Status::DONE) {
      std::fprintf(stderr, "have exited\n");
    } else if (block->status[i] == Status::AT_BARRIER) {
      const Barrier& barrier = block->barriers[first.barrier];
      std::fprintf(stderr, "wait at barrier %u (%u of %u have come)\n", first.barrier, barrier.arrived, barrier.needed);
    } else {
      std::fprintf(stderr, "wait in a warp operation (mask %08x, lanes %08x have come)\n", first.meeting->mask,
                   first.meeting->arrived);
    }
    i = end;
  }
  std::abort();
}

// Runs the threads until all have exited.
EMULATION_UNTRACKED inline void run_threads(unsigned* numbers) {
  const unsigned order_now = order();
  Shuffle shuffle(order_now + 7919 * blockIdx.x);
  for (unsigned i = 0; i < block->threads; ++i) numbers[i] = order_now == 1 ? block->threads - 1 - i : i;
  while (block->exited < block->threads) {
    if (order_now > 1) shuffle(numbers, block->threads);
    bool ran = false;
    for (unsigned i = 0; i < block->threads; ++i)
      if (block->status[numbers[i]] == Status::READY) resume(numbers[i]), ran = true;
    if (!ran) report_deadlock();
  }
}

}  // namespace emulation
