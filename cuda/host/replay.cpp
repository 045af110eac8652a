// Replays a recorded list of calls.
#include "record.h"

struct RecordedCall {
  void (*function)(const uint64_t* slots);
  const uint64_t* slots;
};

RWKV_API void rwkvmpi_replay(const RecordedCall* calls, int64_t count) {
  for (int64_t i = 0; i < count; i++) calls[i].function(calls[i].slots);
}
