// Which cores the OpenMP threads run on. The threads of a team stay the same from one parallel region to the next as
// long as every region has as many (see parallel.h), so what is set once holds.
#ifdef __linux__
#include <sched.h>
#endif
#include <omp.h>

#include <cstdint>

#include "vec.h"

// Lets thread t of a team of `threads` run on the cores in masks[t * words ... ]: bit c of word w is core 64 * w + c.
// Thread 0 is the calling thread. Gives the number of threads for which it failed: all of them where the operating
// system is not Linux.
RWKV_API int rwkvmpi_set_thread_cores(const uint64_t* masks, int64_t words, int threads) {
  int set = 0;
#ifdef __linux__
#pragma omp parallel num_threads(threads) reduction(+ : set)
  {
    const uint64_t* mask = masks + omp_get_thread_num() * words;
    set += sched_setaffinity(0, (size_t)words * 8, reinterpret_cast<const cpu_set_t*>(mask)) == 0;
  }
#endif
  return threads - set;
}

// The reverse: on which cores each thread may run. `masks` holds zeros; those of a thread that cannot tell stay so.
RWKV_API void rwkvmpi_get_thread_cores(uint64_t* masks, int64_t words, int threads) {
#ifdef __linux__
#pragma omp parallel num_threads(threads)
  sched_getaffinity(0, (size_t)words * 8, reinterpret_cast<cpu_set_t*>(masks + omp_get_thread_num() * words));
#endif
}
