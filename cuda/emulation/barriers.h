// __syncthreads, named barriers, __syncwarp and the fences.
#pragma once
#include "block.h"

namespace emulation {

// Leaves a value and waits until all lanes of the mask have come; the caller reads what it needs, then leaves.
template <typename T>
EMULATION_UNTRACKED inline Meeting& meet(unsigned mask, Operation operation, T value,
                                         void (*finish)(Meeting&) = nullptr) {
  static_assert(sizeof(T) <= Meeting::MOST_BYTES);
  Thread& self = *block->current;
  Warp& own = warp();
  const unsigned bit = 1u << lane();
  if ((mask & bit) == 0) fail("a warp operation whose mask %08x lacks the lane itself", mask);
  Meeting *meeting = nullptr, *unused = nullptr;
  for (Meeting* each = own.meetings; each != nullptr; each = each->next) {
    if (each->open && each->mask == mask) meeting = each;
    if (!each->open && each->staying == 0) unused = each;
  }
  if (meeting == nullptr) {
    if (unused == nullptr) {
      unused = new Meeting;
      unused->next = own.meetings;
      own.meetings = unused;
    }
    meeting = unused;
    meeting->open = true, meeting->mask = mask, meeting->arrived = 0;
    meeting->operation = operation, meeting->finish = finish;
  }
  if (meeting->operation != operation || meeting->finish != finish)
    fail("lanes %08x are in another operation of the warp with the same mask %08x", meeting->arrived, mask);
  meeting->arrived |= bit;
  __builtin_memcpy(meeting->given[lane()], &value, sizeof(T));
  if (operation == Operation::SYNC) race_release(meeting);
  self.meeting = meeting;
  if (!complete_if_full(self.number / WARP, *meeting)) wait(Status::AT_MEETING);
  if (operation == Operation::SYNC) race_acquire(meeting);
  return *meeting;
}

EMULATION_UNTRACKED inline void leave(Meeting& meeting) { --meeting.staying; }

EMULATION_UNTRACKED inline void arrive(int id, unsigned threads, bool stays, bool whole_block = false) {
  Thread& self = *block->current;
  const unsigned w = self.number / WARP, bit = 1u << self.number % WARP;
  if (id < 0 || id >= (int)BARRIERS) fail("there is no barrier %d", id);
  if (threads != block->threads && (threads % WARP != 0 || threads == 0 || threads > block->threads))
    fail("barrier %d for %u of %u threads: it takes whole warps", id, threads, block->threads);
  Barrier& barrier = block->barriers[id];
  if (barrier.arrived != 0 && barrier.needed != threads)
    fail("barrier %d for %u threads, where another one came to it for %u", id, threads, barrier.needed);
  if (barrier.lanes[w] & bit) fail("barrier %d: it arrives again before the barrier opens", id);
  barrier.needed = threads;
  barrier.whole_block |= whole_block;
  barrier.lanes[w] |= bit;
  ++barrier.arrived;
  char* key = &barrier.keys[barrier.phase % 4];
  race_release(key);
  if (stays) barrier.waiting[w] |= bit;
  self.barrier = unsigned(id);
  if (!open_if_full(unsigned(id)) && stays) wait(Status::AT_BARRIER);
  block->status[self.number] = Status::READY;
  if (stays) race_acquire(key);
}

}  // namespace emulation

inline void bar_sync(int id, int threads) { emulation::arrive(id, unsigned(threads), true); }
EMULATION_UNTRACKED inline void bar_arrive(int id, int threads) {
  // A warp comes as one: no lane is already at the next arrival while another has not come to this one.
  emulation::leave(emulation::meet(emulation::warp().threads, emulation::Operation::ARRIVE, 0));
  emulation::arrive(id, unsigned(threads), false);
}
EMULATION_UNTRACKED inline void __syncthreads() { emulation::arrive(0, emulation::block->threads, true, true); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulation::leave(emulation::meet(mask, emulation::Operation::SYNC, 0));
}

// Fences order what lies before them with what follows another thread's later fence, as those of CUDA do around an
// atomic operation that both carry out.
EMULATION_UNTRACKED inline void __threadfence() {
  emulation::race_acquire(emulation::block->race_grid);
  emulation::race_release(emulation::block->race_grid);
}
EMULATION_UNTRACKED inline void __threadfence_block() {
  emulation::race_acquire(&emulation::block->race_fence);
  emulation::race_release(&emulation::block->race_fence);
}
