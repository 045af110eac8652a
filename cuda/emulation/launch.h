// Launching a kernel: its blocks one after another, each with shared memory full of NaN.
#pragma once
#include <link.h>

#include <cstring>
#include <thread>

#include "block.h"

namespace emulation {

constexpr size_t MOST_SHARED_BYTES = 227 << 10;  // of a block on Hopper
constexpr size_t SHARED_MARGIN = 256;            // behind dynamic shared memory: who writes there is found out

struct Range {
  unsigned char* first;
  size_t bytes;
};

// This host thread's copies of all __shared__ variables of this library: what of its thread-local memory starts as
// zero. (The emulation's own thread-local variables all start as something else.)
inline Range static_shared() {
  Range found{nullptr, 0};
  const auto look = [](dl_phdr_info* module, size_t, void* result) {
    const auto* own = reinterpret_cast<const unsigned char*>(&block);
    auto* memory = static_cast<unsigned char*>(module->dlpi_tls_data);
    for (int i = 0; memory != nullptr && i < module->dlpi_phnum; ++i) {
      const auto& part = module->dlpi_phdr[i];
      if (part.p_type != PT_TLS || own < memory || own >= memory + part.p_memsz) continue;
      *static_cast<Range*>(result) = {memory + part.p_filesz, part.p_memsz - part.p_filesz};
      return 1;
    }
    return 0;
  };
  dl_iterate_phdr(look, &found);
  return found;
}

struct Launch {
  const char* kernel;
  dim3 grid, block;
  size_t shared_bytes;
  void (*body)(const void*);
  const void* arguments;
  char race_grid = 0;
};

// What a host thread needs to run blocks of a launch.
class Runner {
 public:
  explicit Runner(Launch& launch)
      : launch_(launch), threads_(launch.block.x * launch.block.y * launch.block.z), status_(threads_.size()),
        numbers_(threads_.size()), stacks_(threads_.size()), shared_(launch.shared_bytes + SHARED_MARGIN),
        static_shared_(static_shared()) {}

  void run(unsigned index) {
    Block own;
    own.kernel = launch_.kernel, own.body = launch_.body, own.arguments = launch_.arguments;
    own.threads = unsigned(threads_.size()), own.thread = threads_.data(), own.status = status_.data();
    own.dynamic_shared = shared_.data();
    own.race_grid = &launch_.race_grid, own.race_scheduler = race_current();
    const dim3 grid = launch_.grid;
    blockIdx = {index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y};
    gridDim = grid, blockDim = launch_.block;
    std::memset(static_shared_.first, 0xff, static_shared_.bytes);
    std::memset(shared_.data(), 0xff, shared_.bytes());
    forbid(shared_.data() + launch_.shared_bytes, SHARED_MARGIN);
    for (unsigned i = 0; i < own.threads; ++i) {
      own.warps[i / WARP].threads |= 1u << i % WARP;
      status_[i] = Status::READY;
      threads_[i].number = i, threads_[i].barrier = 0, threads_[i].meeting = nullptr;
      threads_[i].race_fiber = race_fiber();
      threads_[i].context.prepare(stacks_.data() + i * STACK_STRIDE, fiber_entry);
    }
    block = &own;
    race_release(&own.race_start);
    run_threads(numbers_.data());
    race_acquire(&own.race_end);
    allow(shared_.data() + launch_.shared_bytes, SHARED_MARGIN);
    for (size_t i = launch_.shared_bytes; i < shared_.bytes(); ++i)
      if (shared_.data()[i] != 0xff) fail("it wrote behind its %zu bytes of shared memory", launch_.shared_bytes);
    block = &no_block;
    for (Thread& thread : threads_) race_destroy(thread.race_fiber);
  }

 private:
  Launch& launch_;
  std::vector<Thread> threads_;
  std::vector<Status> status_;
  std::vector<unsigned> numbers_;
  Stacks stacks_;
  Pages shared_;
  Range static_shared_;
};

// To ThreadSanitizer blocks are as concurrent as they are on a GPU. So that no memory is shared but the kernel's own,
// each has its own host thread, which nothing but the end of the launch orders with the others.
EMULATION_UNTRACKED inline void wait_until(const volatile bool& finished) {
  while (!finished) std::this_thread::yield();
}

inline void run_concurrently(Launch& launch, const std::vector<unsigned>& blocks) {
  struct Finished {
    volatile bool yes = false;
    EMULATION_UNTRACKED void set() { yes = true; }
  };
  std::vector<Finished> finished(blocks.size());
  std::vector<std::thread> threads;
  for (size_t i = 0; i < blocks.size(); ++i) {
    threads.emplace_back([&, i] {
      Runner(launch).run(blocks[i]);
      finished[i].set();
    });
    wait_until(finished[i].yes);
  }
  for (std::thread& thread : threads) thread.join();
}

inline int run(Launch& launch) {
  const dim3 grid = launch.grid, threads = launch.block;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || threads.x == 0 || threads.y == 0 || threads.z == 0 ||
      grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 || threads.x > 1024 || threads.y > 1024 ||
      threads.z > 64 || (uint64_t)threads.x * threads.y * threads.z > MOST_THREADS)
    return cudaErrorInvalidConfiguration;
  if (launch.shared_bytes > MOST_SHARED_BYTES) return cudaErrorInvalidValue;
  std::vector<unsigned> blocks(size_t(grid.x) * grid.y * grid.z);
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = unsigned(order() == 1 ? blocks.size() - 1 - i : i);
  if (order() > 1) Shuffle{order()}(blocks.data(), unsigned(blocks.size()));
  if constexpr (RACES) {
    run_concurrently(launch, blocks);
  } else {
    Runner runner(launch);
    for (const unsigned index : blocks) runner.run(index);
  }
  return cudaSuccess;
}

template <typename... P, typename... A>
int launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 threads, size_t shared_bytes, void* /*stream*/,
           const A&... arguments) {
  const auto call = [&] { kernel(static_cast<P>(arguments)...); };
  const auto body = [](const void* closure) { (*static_cast<const decltype(call)*>(closure))(); };
  Launch own{name, grid, threads, shared_bytes, body, &call};
  return run(own);
}

}  // namespace emulation

#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  emulation::launch(#kernel, kernel, grid, block, shared_bytes, stream __VA_OPT__(, ) __VA_ARGS__)
#define DYNAMIC_SHARED(T, name) T* const name = reinterpret_cast<T*>(emulation::block->dynamic_shared)

struct DeviceGuard {
  const int error = 0;
  explicit DeviceGuard(int) {}
};

// How tests choose the order of threads and blocks; see emulation::order.
extern "C" inline __attribute__((used, visibility("default"))) void rwkvmpi_cuda_emulation_order(unsigned value) {
  emulation::order() = value;
}
