// The emulator's sm_90: plain accesses to shared memory against those of matrix products and bulk copies, which go another way to it.
//
// Kernels are compiled so that every access calls a function below (g++ -fsanitize=thread, whose library these functions take the place of). What a
// thread wrote is known to products and copies once that thread has called fence_async, and what it read may be copied over from then on.
// load_matrix and copy_async_16 are not watched: nothing that is written for Hopper alone has them.
#include "sm90.h"

namespace emulator {

namespace {

uint16_t name_of(int thread) { return 1 + thread; }

// Sets who has written these bytes and not fenced since (0: nobody), where `from` holds for who had before.
template <class From>
void set_unfenced(Async& s, Accesses::Range range, uint16_t to, From from) {
  for (uint32_t i = range.from; i < range.from + range.bytes; i++) {
    uint16_t& writer = s.unfenced[i];
    if (!from(writer)) continue;
    s.unfenced_in[i / kWatchedPage] += (to != 0) - (writer != 0);
    writer = to;
  }
}

void plain_write(uint32_t from, int bytes) {
  Async& s = async();
  if (current->thread >> 5 == block->slow && draw() % 8 == 0) rest(self());
  const uint16_t me = name_of(current->thread);
  bool known = true;
  for (int i = 0; i < bytes; i++) known = known && s.unfenced[from + i] == me;
  if (known) return;
  s.accesses[current->thread].writes.push_back({from, bytes});
  set_unfenced(s, {from, bytes}, me, [](uint16_t) { return true; });
}

void plain_read(uint32_t from, int bytes) {
  Accesses& mine = async().accesses[current->thread];
  if (mine.reads.empty()) mine.reads.resize(block->launch->shared / 64 + 1);
  for (uint32_t i = from; i < from + bytes; i++) {
    if (!mine.reads[i / 64]) mine.read.push_back(i / 64);
    mine.reads[i / 64] |= 1ull << i % 64;
  }
}

// The part of an access that lies in shared memory; an access past its end is seen otherwise.
template <class Record>
inline void seen(const void* at, size_t bytes, Record record) {
  const size_t from = static_cast<const char*>(at) - block->shared, size = block->launch->shared;
  if (__builtin_expect(from < size, 0)) record((uint32_t)from, (int)std::min(bytes, size - from));
}

[[noreturn]] void fail_unfenced(uint32_t byte, const char* what, Site at) {
  fail("%s of %s:%d meets byte %u of shared memory, which thread %d wrote without a fence_async since", what, AT, byte,
       block->async->unfenced[byte] - 1);
}

}  // namespace

void fence_async() {
  Async& s = async();
  Accesses& mine = s.accesses[current->thread];
  const uint16_t me = name_of(current->thread);
  for (Accesses::Range range : mine.writes) set_unfenced(s, range, 0, [=](uint16_t writer) { return writer == me; });
  mine.writes.clear();
  for (uint32_t word : mine.read) mine.reads[word] = 0;
  mine.read.clear();
}

void check_operand(const Operation& op, uint64_t descriptor, int rows) {
  const Async& s = *block->async;
  const uint32_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  const uint32_t end = std::min<int64_t>(block->launch->shared, start + (rows / 8 - 1) * stride + 8 * (descriptor >> 62 == 1 ? 128 : 64));
  bool none = true;
  for (uint32_t page = start / kWatchedPage; page <= (end - 1) / kWatchedPage; page++) none = none && !s.unfenced_in[page];
  if (none) return;
  for (int i = 0; i < 2 * rows; i++) {
    const uint32_t from = place_in_matrix(op, descriptor, i / 2, i % 2);
    for (uint32_t byte = from; byte < from + 16; byte++)
      if (s.unfenced[byte]) fail_unfenced(byte, "the product", op.site);
  }
}

void check_overwritten(const BulkCopy& copy) {
  const Async& s = *block->async;
  const uint32_t end = copy.shared + copy.bytes;
  for (uint32_t byte = copy.shared; byte < end; byte++)
    if (s.unfenced[byte]) fail_unfenced(byte, "the bulk copy", copy.site);
  for (int thread = 0; thread < block->launch->threads; thread++)
    for (uint32_t word : s.accesses[thread].read)
      for (uint32_t byte = 64 * word; byte < 64 * word + 64; byte++)
        if (byte >= copy.shared && byte < end && s.accesses[thread].reads[word] >> byte % 64 & 1)
          fail("the bulk copy of %s:%d writes over byte %u of shared memory, which thread %d read without a fence_async since",
               base_name(copy.site.file), copy.site.line, byte, thread);
}

}  // namespace emulator

// ---- what g++ makes of every access --------------------------------------------------------------------------------------------------------------

using namespace emulator;

#define WATCHED extern "C" __attribute__((visibility("default")))
#define WATCHED_SIZE(bytes)                                                             \
  WATCHED void __tsan_read##bytes(void* at) { seen(at, bytes, plain_read); }            \
  WATCHED void __tsan_write##bytes(void* at) { seen(at, bytes, plain_write); }          \
  WATCHED void __tsan_unaligned_read##bytes(void* at) { seen(at, bytes, plain_read); }  \
  WATCHED void __tsan_unaligned_write##bytes(void* at) { seen(at, bytes, plain_write); }
WATCHED_SIZE(1)
WATCHED_SIZE(2)
WATCHED_SIZE(4)
WATCHED_SIZE(8)
WATCHED_SIZE(16)
WATCHED void __tsan_read_range(void* at, size_t bytes) { seen(at, bytes, plain_read); }
WATCHED void __tsan_write_range(void* at, size_t bytes) { seen(at, bytes, plain_write); }
WATCHED void __tsan_init() {}
#define WATCHED_ADD(bits, Integer)                                                   \
  WATCHED Integer __tsan_atomic##bits##_fetch_add(Integer* at, Integer value, int) { \
    seen(at, sizeof *at, plain_write);                                               \
    return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);                          \
  }
WATCHED_ADD(32, int32_t)
WATCHED_ADD(64, int64_t)
