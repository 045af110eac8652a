// What the sanitizers must be told when fibers stand for CUDA threads. Without them all of this is nothing.
#pragma once

// For code of the emulation itself: one fiber at a time runs it, so its accesses are none of the kernel's races.
#define EMULATION_UNTRACKED __attribute__((no_sanitize_thread))

#if defined(__SANITIZE_THREAD__)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
}

namespace emulation {
constexpr bool RACES = true;  // this build looks for races
inline void* race_fiber() { return __tsan_create_fiber(0); }
inline void* race_current() { return __tsan_get_current_fiber(); }
inline void race_destroy(void* fiber) { __tsan_destroy_fiber(fiber); }
// 1: the switch itself orders nothing, only the kernel's barriers do.
EMULATION_UNTRACKED inline void race_switch(void* fiber) { __tsan_switch_to_fiber(fiber, 1); }
EMULATION_UNTRACKED inline void race_acquire(void* key) { __tsan_acquire(key); }
EMULATION_UNTRACKED inline void race_release(void* key) { __tsan_release(key); }
}  // namespace emulation
#else
namespace emulation {
constexpr bool RACES = false;
inline void* race_fiber() { return nullptr; }
inline void* race_current() { return nullptr; }
inline void race_destroy(void*) {}
inline void race_switch(void*) {}
inline void race_acquire(void*) {}
inline void race_release(void*) {}
}  // namespace emulation
#endif

#if defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_poison_memory_region(const void volatile*, unsigned long);
extern "C" void __asan_unpoison_memory_region(const void volatile*, unsigned long);

namespace emulation {
constexpr bool ADDRESSES = true;  // this build looks for accesses outside of what they belong to
inline void forbid(const void* first, unsigned long bytes) { __asan_poison_memory_region(first, bytes); }
inline void allow(const void* first, unsigned long bytes) { __asan_unpoison_memory_region(first, bytes); }
}  // namespace emulation
#else
namespace emulation {
constexpr bool ADDRESSES = false;
inline void forbid(const void*, unsigned long) {}
inline void allow(const void*, unsigned long) {}
}  // namespace emulation
#endif
