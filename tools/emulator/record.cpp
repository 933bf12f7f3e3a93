// The emulator's notes: one list for a launch, which all its blocks write to.
#include "record.h"

#include "machine.h"

namespace emulator {

namespace {

std::atomic<bool> wanted{false};
std::mutex mutex;
std::vector<Record> records;

}  // namespace

void record(Event event, uint32_t where, int amount, uint32_t other) {
  if (!wanted.load(std::memory_order_relaxed)) return;
  std::lock_guard<std::mutex> lock(mutex);
  records.push_back({block->id, current->thread, event, where, amount, other});
}

}  // namespace emulator

// Begins a list, or ends it and hands it out: how many records, and where they lie until the next list begins.
extern "C" __attribute__((visibility("default"))) int64_t emulator_record(int on, const emulator::Record** found) {
  using namespace emulator;
  if (on) records.clear();
  wanted = on != 0;
  *found = records.data();
  return (int64_t)records.size();
}
