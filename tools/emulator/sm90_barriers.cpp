// The emulator's sm_90: barriers in shared memory, the bulk copies that they wait for, and hardware barriers by number.
#include "record.h"
#include "sm90.h"

namespace emulator {

static uint64_t signature(uint32_t address) { return 0xb077ab1eba771e55ull * (2 * address + 1); }

void check_memory(const Barrier& b) {
  uint64_t there, expected = signature(b.address);
  memcpy(&there, block->shared + b.address, 8);
  if (there != expected) fail("the barrier %u of %s:%d was overwritten", b.address, base_name(b.site.file), b.site.line);
}

namespace {

Barrier& find(uint32_t address, Site at) {
  for (Barrier& b : async().barriers)
    if (b.address == address) {
      check_memory(b);
      if (!b.published && b.owner != current->thread)
        fail("barrier %u at %s:%d: thread %d has not published it", address, AT, b.owner);
      return b;
    }
  fail("no barrier was initialised at shared address %u, used at %s:%d", address, AT);
}

void end_phase(Barrier& b) {
  if (b.missing || b.bytes) return;
  b.phase++;
  b.missing = b.count;
  for (int thread : b.waiting) wake(thread);
  b.waiting.clear();
}

}  // namespace

void land(Async& s, size_t i) {
  BulkCopy c = s.copies[i];
  s.copies.erase(s.copies.begin() + i);
  memcpy(block->shared + c.shared, c.global, c.bytes);
  c.barrier->bytes -= c.bytes;
  end_phase(*c.barrier);
}

void barrier_init(uint32_t address, int arrivals, Site at) {
  record(kInits, address, arrivals);
  Async& s = async();
  if (address % 8 || (int64_t)address + 8 > block->launch->shared)
    fail("barrier %u at %s:%d is not aligned to 8 bytes or lies past the end of shared memory", address, AT);
  if (arrivals < 1 || arrivals > kMostBytes) fail("barrier_init with %d arrivals at %s:%d", arrivals, AT);
  for (const Barrier& b : s.barriers)
    if (b.address == address) fail("barrier %u is initialised at %s:%d and was before at %s:%d", address, AT, base_name(b.site.file), b.site.line);
  s.barriers.push_back({address, arrivals, arrivals, 0, 0, current->thread, false, at, {}});
  uint64_t mark = signature(address);
  memcpy(block->shared + address, &mark, 8);
}

void barrier_publish() {
  for (Barrier& b : async().barriers)
    if (b.owner == current->thread) b.published = true;
}

void barrier_arrive(uint32_t address, int bytes, Site at) {
  record(kArrives, address, bytes);
  Barrier& b = find(address, at);
  if (!b.missing) fail("barrier %u at %s:%d: more arrivals than the phase's %d", address, AT, b.count);
  if (bytes < 0 || b.bytes + bytes > kMostBytes) fail("barrier %u at %s:%d cannot expect %d bytes", address, AT, bytes);
  b.bytes += bytes;
  b.missing--;
  end_phase(b);
  if (draw() % 4 == 0) rest(self());
}

void barrier_wait(uint32_t address, int parity, Site at) {
  record(kWaits, address, parity);
  Fiber& me = self();
  Barrier& b = find(address, at);
  if (parity & ~1) fail("barrier_wait for parity %d at %s:%d", parity, AT);
  if (draw() % 8 == 0) rest(me);
  while ((int)(b.phase & 1) == parity) {
    wait(me, kBarrierWait, at);
    b.waiting.push_back(me.api.thread);
    yield(me, me.api.thread >> 5, false);
  }
}

void bulk_copy(uint32_t shared, const void* global, int bytes, uint32_t barrier, Site at) {
  record(kCopies, shared, bytes, barrier);
  Async& s = async();
  Barrier& b = find(barrier, at);
  if (!b.published) fail("barrier %u at %s:%d: a bulk copy before barrier_publish", barrier, AT);
  if (shared % 16 || reinterpret_cast<uintptr_t>(global) % 16 || bytes % 16 || bytes < 16)
    fail("bulk_copy of %d bytes from %p to %u, which are not multiples of 16, at %s:%d", bytes, global, shared, AT);
  if ((int64_t)shared + bytes > block->launch->shared)
    fail("bulk_copy of %d bytes to %u goes past the end of shared memory (%ld bytes) at %s:%d", bytes, shared, (long)block->launch->shared, AT);
  for (const BulkCopy& c : s.copies)
    if (shared < c.shared + c.bytes && c.shared < shared + bytes)
      fail("bulk_copy at %s:%d to where that of %s:%d is still under way", AT, base_name(c.site.file), c.site.line);
  s.copies.push_back({shared, bytes, global, &b, at});
  check_overwritten(s.copies.back());
  memset(block->shared + shared, kPoison, bytes);
  if (draw() % 4 == 0) rest(self());
}

bool meet_threads(Kind kind, int id, int threads, bool value, Site at) {
  record(kind == kAnyThread ? kVotes : kind == kArriveThreads ? kMeetsAlone : kMeets, id, threads, value);
  Fiber& me = self();
  if (id < 1 || id >= kNamedBarriers) fail("hardware barrier %d at %s:%d: they are 1 to 15", id, AT);
  if (threads % 32 || threads < 32 || threads > block->launch->threads)
    fail("hardware barrier %d of %d threads at %s:%d in a block of %d", id, threads, AT, block->launch->threads);
  NamedBarrier& b = async().named[id];
  const int warp = me.api.thread >> 5;
  const uint32_t lane = 1u << (me.api.thread & 31);
  const bool votes = kind == kAnyThread;
  wait(me, kind, at);
  if (!b.arrived) {
    b.threads = threads;
    b.votes = votes;
    b.value = false;
    memset(b.lanes, 0, sizeof b.lanes);
  }
  if (b.threads != threads) fail("hardware barrier %d at %s:%d is for %d threads here and for %d where others wait", id, AT, threads, b.threads);
  if (b.votes != votes) fail("hardware barrier %d at %s:%d: any_thread here or where others wait, but not both", id, AT);
  if (b.lanes[warp] & lane) fail("hardware barrier %d at %s:%d: the thread is there already", id, AT);
  b.lanes[warp] |= lane;
  b.value = b.value || value;
  const bool complete = ++b.arrived == threads;
  if (complete) {
    for (uint32_t lanes : b.lanes)
      if (lanes && ~lanes) fail("hardware barrier %d at %s:%d: only some lanes of a warp have come", id, AT);
    for (int thread : b.waiting) {
      block->machine->warps[thread >> 5].results[thread & 31][0] = b.value;
      wake(thread);
    }
    b.waiting.clear();
    b.arrived = 0;
  }
  if (complete || kind == kArriveThreads) {
    bool result = b.value;
    me.state = kRunning;
    if (draw() % 4 == 0) rest(me);
    return result;
  }
  b.waiting.push_back(me.api.thread);
  yield(me, warp, false);
  return me.api.results[0];
}

}  // namespace emulator
