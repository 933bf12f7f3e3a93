// What a launch notes of its barriers, where it is asked to (Library.launch of emulator.py, `record`).
#pragma once
#include <stdint.h>

namespace emulator {

enum Event : int32_t { kInits, kArrives, kWaits, kCopies, kMeets, kMeetsAlone, kVotes };

// One operation of one thread.
struct Record {
  int64_t block;
  int32_t thread;
  Event event;
  uint32_t where;  // the barrier's address or number; of a copy its destination
  int32_t amount;  // arrivals, bytes, the parity, or threads
  uint32_t other;  // of a copy its barrier, of a vote the thread's own
};

// Notes what the running thread does; threads of one block come in their order.
void record(Event event, uint32_t where, int amount, uint32_t other = 0);

}  // namespace emulator
