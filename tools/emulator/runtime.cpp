// The emulator: runs the threads of a block as fibers of one host thread, in an order drawn from a seed.
//
// A thread runs until it meets others (a barrier, a shuffle, a matrix product). The last lane of a warp to arrive computes the result for all. What
// runs next is random: per block either one warp goes as far as it can before another has its turn, or warps take turns of random length; the lanes
// of a warp go in a random order either way. In most blocks one warp is slow: where one of its threads gives up its turn, it or the whole warp may be passed
// over for long, unless nobody else can go on. So a missing barrier, which the hardware forgives most of the time, gives wrong results under some seed.
// An asynchronous copy poisons its destination when it is issued and lands when its thread waits for it (under even seeds always, under odd ones
// half of them at once). Threads that meet in different places, or wait for one that has ended, are an error that names the places.
#include <stdarg.h>
#include <stdio.h>

#include <algorithm>

#include "machine.h"
#if REGISTER_SWITCH
#include "switch.h"
#endif

namespace emulator {

const char* const kNames[kKinds] = {"sync_cta", "sync_warp", "shuffle_xor", "shuffle", "shuffle_up", "any_lane", "vote",
                                    "load_matrix", "load_matrix_transposed", "mma_s8s8", "mma_u8s8", "mma_half", "barrier_wait",
                                    "sync_threads", "arrive_threads", "any_thread", "keep_registers", "take_registers", "wgmma_s8", "wgmma_e4m3",
                                    "wgmma_fence", "wgmma_commit", "wgmma_wait for a product"};

__thread Block* block;

Warp& warp_of(const Fiber& f) { return block->machine->warps[f.api.thread >> 5]; }
const char* base_name(const char* path) {
  const char* slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

// ---- fibers ------------------------------------------------------------------------------------------------------------------------------------

void leave(void** fake_stack, const void* bottom, size_t size) {
#if SANITIZED
  __sanitizer_start_switch_fiber(fake_stack, bottom, size);
#else
  (void)fake_stack, (void)bottom, (void)size;
#endif
}
void arrive(void* fake_stack, const void** from_bottom, size_t* from_size) {
#if SANITIZED
  __sanitizer_finish_switch_fiber(fake_stack, from_bottom, from_size);
#else
  (void)fake_stack, (void)from_bottom, (void)from_size;
#endif
}

void to_fiber(Fiber& from, Fiber& to) {
  current = &to.api;
  leave(&from.fake_stack, to.stack + kPage, kStack - kPage);
#if REGISTER_SWITCH
  switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
  arrive(from.fake_stack, nullptr, nullptr);
}

// From the host's stack into the block; returns when the block is done or has failed.
void enter(Fiber& to) {
  current = &to.api;
  leave(&block->host_fake_stack, to.stack + kPage, kStack - kPage);
#if REGISTER_SWITCH
  switch_stack(&block->host_stack_pointer, to.stack_pointer);
#else
  swapcontext(&block->host_context, &to.context);
#endif
  arrive(block->host_fake_stack, nullptr, nullptr);
}

[[noreturn]] void to_host() {
  Fiber& from = self();
  leave(nullptr, block->host_stack, block->host_stack_size);
#if REGISTER_SWITCH
  switch_stack(&from.stack_pointer, block->host_stack_pointer);
#else
  swapcontext(&from.context, &block->host_context);
#endif
  abort();
}

// ---- errors ------------------------------------------------------------------------------------------------------------------------------------

// "threads 0-31, 40 in shuffle_xor at prepass.cuh:12", one line per place.
void describe(char*& end, char* limit) {
  std::vector<Fiber>& fibers = block->machine->fibers;
  const int n = block->launch->threads;
  std::vector<bool> told(n);
  for (int i = 0; i < n; i++) {
    if (told[i]) continue;
    auto same = [&](int j) {
      const Fiber &a = fibers[i], &b = fibers[j];
      return a.state == b.state && (a.state == kEnded || (a.kind == b.kind && a.site.line == b.site.line && a.site.file == b.site.file));
    };
    end += std::max(0, snprintf(end, limit - end, "\n  threads"));
    for (int j = i; j < n && limit - end > 200; j++) {
      if (told[j] || !same(j)) continue;
      int last = j;
      while (last + 1 < n && same(last + 1)) last++;
      for (int k = j; k <= last; k++) told[k] = true;
      end += last > j ? snprintf(end, limit - end, " %d-%d", j, last) : snprintf(end, limit - end, " %d", j);
      j = last;
    }
    if (limit - end <= 200) return;
    const Fiber& f = fibers[i];
    if (f.state == kEnded)
      end += snprintf(end, limit - end, " have ended");
    else if (!f.site.file)
      end += snprintf(end, limit - end, " run and have not waited yet");
    else
      end += snprintf(end, limit - end, " %s %s at %s:%d", f.state == kWaiting ? "wait in" : "run, last seen in", kNames[f.kind],
                      base_name(f.site.file), f.site.line);
  }
}

void write_error(const char* format, va_list arguments) {
  char *end = block->error, *limit = block->error + sizeof block->error;
  end += snprintf(end, limit - end, "%s, block %ld", block->launch->kernel->name, (long)block->id);
  if (current) end += snprintf(end, limit - end, ", thread %d", current->thread);
  end += snprintf(end, limit - end, ": ");
  end += std::min<int>(1000, vsnprintf(end, 1000, format, arguments));
  describe(end, limit);
}

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  write_error(format, arguments);
  va_end(arguments);
  to_host();
}

void escape(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  write_error(format, arguments);
  va_end(arguments);
  siglongjmp(block->escape, 1);
}

// ---- scheduling --------------------------------------------------------------------------------------------------------------------------------

uint32_t permuted(uint32_t lanes, uint32_t order) {
  if (order & 1) lanes = (lanes & 0x55555555u) << 1 | (lanes >> 1 & 0x55555555u);
  if (order & 2) lanes = (lanes & 0x33333333u) << 2 | (lanes >> 2 & 0x33333333u);
  if (order & 4) lanes = (lanes & 0x0f0f0f0fu) << 4 | (lanes >> 4 & 0x0f0f0f0fu);
  if (order & 8) lanes = (lanes & 0x00ff00ffu) << 8 | (lanes >> 8 & 0x00ff00ffu);
  if (order & 16) lanes = lanes << 16 | lanes >> 16;
  return lanes;
}

int random_warp(uint32_t ready) {
  for (int skip = draw() % __builtin_popcount(ready); skip; skip--) ready &= ready - 1;
  return __builtin_ctz(ready);
}

// Which warp is slow: often the first, which is the one that does something else than the others where any does.
int slow_warp() {
  if (draw() % 4 == 0) return -1;
  return draw() % 2 ? 0 : draw() % (block->launch->threads / 32);
}

// A thread of the slow warp that gives up its turn may stand still from here on, alone or with the whole warp.
void stand_still(const Fiber& me) {
  if (block->still || draw() % 2) return;
  block->still = draw() % 2 ? ~0u : 1u << (me.api.thread & 31);
  block->still_until = block->turn + (1 << draw() % kLongestStill);
}

// The lanes of a warp that may have the next turn.
uint32_t moving_lanes(int warp) {
  const uint32_t ready = block->machine->warps[warp].ready;
  return warp == block->slow ? ready & ~block->still : ready;
}

// The warps that have such lanes.
uint32_t moving_warps() {
  if (!block->still) return block->ready_warps;
  if (block->turn >= block->still_until) block->still = 0;
  return moving_lanes(block->slow) ? block->ready_warps : block->ready_warps & ~(1u << block->slow);
}

void yield(Fiber& me, int warp, bool turn_over) {
  if (block->async) async_turn();
  block->turn++;
  if (turn_over && warp == block->slow) stand_still(me);
  uint32_t moving = moving_warps();
  if (turn_over || !(moving >> warp & 1)) {
    for (; !moving; moving = moving_warps()) {
      // Where copies land as late as they may, they wait for those who stand still too.
      if (block->async && !(block->late && block->ready_warps) && async_stuck()) continue;
      if (block->ready_warps) {
        block->still = 0;
        continue;
      }
      char barriers[900] = "";
      if (block->async) async_describe(barriers, sizeof barriers);
      fail("no thread can go on%s", barriers);
    }
    warp = random_warp(moving);
    if (block->slice) block->machine->warps[warp].slice = 1 + draw() % block->slice;
  }
  Warp& w = block->machine->warps[warp];
  int lane = __builtin_ctz(permuted(moving_lanes(warp), w.order)) ^ w.order;
  w.ready &= ~(1u << lane);
  if (!w.ready) block->ready_warps &= ~(1u << warp);
  Fiber& to = block->machine->fibers[warp * 32 + lane];
  if (&to != &me) to_fiber(me, to);
}

void make_ready(int warp, uint32_t lanes) {
  Warp& w = block->machine->warps[warp];
  w.ready |= lanes;
  if (w.ready) block->ready_warps |= 1u << warp;
  for (; lanes; lanes &= lanes - 1) block->machine->fibers[warp * 32 + __builtin_ctz(lanes)].state = kRunning;
}

void wait(Fiber& me, Kind kind, Site at) {
  me.kind = kind;
  me.site = at;
  me.state = kWaiting;
}

void check_shared(uint32_t shared, Site at) {
  if (shared % 16) fail("shared address %u is not aligned to 16 bytes at %s:%d", shared, base_name(at.file), at.line);
  if ((int64_t)shared + 16 > block->launch->shared)
    fail("shared address %u lies past the end of shared memory (%ld bytes) at %s:%d", shared, (long)block->launch->shared, base_name(at.file),
         at.line);
}

void land(const Copy& c) { memcpy(block->shared + c.shared, c.global, 16); }

// ---- a thread, a block ---------------------------------------------------------------------------------------------------------------

void end_thread() {
  Fiber& me = self();
  Warp& w = warp_of(me);
  int lane = me.api.thread & 31, warp = me.api.thread >> 5;
  me.state = kEnded;
  if (w.waiting) fail("ended while lanes of its warp wait for it");
  if (block->arrived) fail("ended while other threads wait in sync_cta");
  if (block->async) async_thread_ends();
  w.ended |= 1u << lane;
  if (++block->ended == block->launch->threads) {
    if (block->async) async_block_ends();
    to_host();
  }
  yield(me, warp, false);
  abort();
}

void first_step() {
  if (block->host_stack)
    arrive(nullptr, nullptr, nullptr);
  else
    arrive(nullptr, &block->host_stack, &block->host_stack_size);
  block->launch->kernel->thread(block->launch->params);
  end_thread();
}

#if !REGISTER_SWITCH
void first_step_of_context() { first_step(); }
#endif

void prepare(Fiber& f, int thread, Warp& w, size_t used) {
  f.api = {thread, w.operands[thread & 31], w.results[thread & 31]};
  f.state = kRunning;
  f.kind = kSyncBlock;
  f.site = {};
  f.fake_stack = nullptr;
  f.copies = f.group = f.first_group = f.products = f.let_go = 0;
  f.fenced = false;
#if SANITIZED
  __asan_unpoison_memory_region(f.stack + kStack - used, used);  // frames that a thread left behind
#else
  (void)used;
#endif
  // Stacks that start at the same place in a page would share few cache lines.
  char* top = f.stack + kStack - thread * 192 % kPage;
#if REGISTER_SWITCH
  f.stack_pointer = place_to_start(top, first_step);
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack + kPage;
  f.context.uc_stack.ss_size = top - f.stack - kPage;
  f.context.uc_link = nullptr;
  makecontext(&f.context, first_step_of_context, 0);
#endif
}

void run_block(Launch& launch, Machine& machine, int64_t id) {
  Block b{};
  b.launch = &launch;
  b.machine = &machine;
  b.id = id;
  b.random = launch.seed * 0x2545f4914f6cdd1dull + id * 0x9e3779b97f4a7c15ull;
  size_t size = launch.shared, slack = -size & 127;
#if SANITIZED
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, size ? size : 1)) abort();
  b.shared = static_cast<char*>(memory);
  if (!size) __asan_poison_memory_region(memory, 1);
  (void)slack;
#else
  char *first = machine.shared_pages + kGuard, *end = first + kSharedPages;
  b.shared = end - size - slack;
  char* start = first + (kSharedPages - size - slack) / kPage * kPage;
  memset(start, kRedzone, b.shared - start);
  memset(b.shared + size, kRedzone, slack);
#endif
  memset(b.shared, kPoison, size);
  block = &b;
  current = nullptr;
  const int slices[] = {0, 0, 1, 4, 32};
  b.slice = slices[draw() % 5];
  b.slow = slow_warp();
  b.late = launch.seed % 2 == 0;
  const size_t used = machine.left_midway ? kStack - kPage : 16 << 10;
  for (int warp = 0; warp < launch.threads / 32; warp++) {
    Warp& w = machine.warps[warp];
    w = {};
    w.order = draw() & 31;
    w.slice = 1;
    w.ready = ~0u;
    b.ready_warps |= 1u << warp;
    for (int lane = 0; lane < 32; lane++) prepare(machine.fibers[warp * 32 + lane], warp * 32 + lane, w, used);
  }
  if (!sigsetjmp(b.escape, 1)) {
    int warp = random_warp(b.ready_warps);
    Warp& w = machine.warps[warp];
    w.ready &= ~1u;
    enter(machine.fibers[warp * 32]);
#if !SANITIZED
    if (!b.error[0]) {
      current = nullptr;
      for (char* p = start; p < end; p++) {
        bool ours = p >= b.shared && p < b.shared + size;
        if (ours || (unsigned char)*p == kRedzone) continue;
        snprintf(b.error, sizeof b.error, "%s, block %ld: wrote outside shared memory (%ld bytes), at offset %ld", launch.kernel->name, (long)id,
                 (long)size, (long)(p - b.shared));
        break;
      }
    }
#endif
  }
  block = nullptr;
  current = nullptr;
#if SANITIZED
  free(memory);
#endif
  machine.left_midway = b.error[0] != 0;
  if (b.error[0]) {
    std::lock_guard<std::mutex> lock(launch.mutex);
    if (launch.error.empty()) launch.error = b.error;
    launch.failed = true;
  }
}

__thread Thread* current;

// ---- what prim.cuh calls -----------------------------------------------------------------------------------------------------------------------

int64_t cta_id() { return block->id; }
int64_t grid_size() { return block->launch->grid; }
char* shared_memory() { return block->shared; }
uint32_t shared_address(const void* pointer) {
  int64_t offset = static_cast<const char*>(pointer) - block->shared;
  if (offset < 0 || offset > block->launch->shared)
    fail("shared_address of a pointer %ld bytes from shared memory (%ld bytes)", (long)offset, (long)block->launch->shared);
  return offset;
}

void refuse(const char* rule, double value, Site at) { fail("%s, got %.9g at %s:%d", rule, value, base_name(at.file), at.line); }

void sync_cta(Site at) {
  Fiber& me = self();
  Warp& w = warp_of(me);
  wait(me, kSyncBlock, at);
  if (w.waiting) fail("in sync_cta while lanes of its warp wait for it elsewhere");
  if (block->ended) fail("in sync_cta, which threads that have ended cannot reach");
  if (block->arrived && (block->barrier_site.line != at.line || block->barrier_site.file != at.file))
    fail("in another sync_cta than the threads before it");
  block->barrier_site = at;
  w.at_barrier |= 1u << (me.api.thread & 31);
  int warp = me.api.thread >> 5, warps = block->launch->threads >> 5;
  if (++block->arrived == block->launch->threads) {
    block->arrived = 0;
    for (int i = 0; i < warps; i++) {
      block->machine->warps[i].at_barrier = 0;
      block->machine->warps[i].order = draw() & 31;
      make_ready(i, ~0u);
    }
    return yield(me, warp, true);
  }
  yield(me, warp, false);
}

void collective(Kind kind, Site at) {
  Fiber& me = self();
  Warp& w = warp_of(me);
  int warp = me.api.thread >> 5;
  uint32_t lane = me.api.thread & 31;
  wait(me, kind, at);
  if (w.ended) fail("in %s, which lanes of its warp that have ended cannot reach", kNames[kind]);
  if (w.at_barrier) fail("in %s while lanes of its warp wait in sync_cta", kNames[kind]);
  if (w.waiting && (w.kind != kind || w.site.line != at.line || w.site.file != at.file)) fail("lanes of one warp in different places");
  if (kind >= kShuffleXor && kind <= kShuffleUp && w.operands[lane][1] > 31u)
    fail("%s with lane, mask or delta %d at %s:%d", kNames[kind], (int)w.operands[lane][1], base_name(at.file), at.line);
  if (kind == kLoadMatrix || kind == kLoadMatrixTransposed) check_shared(w.operands[lane][0], at);
  w.kind = kind;
  w.site = at;
  w.waiting |= 1u << lane;
  if (w.waiting != ~0u) return yield(me, warp, false);
  complete(w, kind);
  w.waiting = 0;
  w.order = draw() & 31;
  me.state = kRunning;
  make_ready(warp, ~(1u << lane));
  if (block->slice && --w.slice <= 0) {
    make_ready(warp, 1u << lane);
    yield(me, warp, true);
  }
}

void copy_async(uint32_t shared, const void* global, Site at) {
  Fiber& me = self();
  check_shared(shared, at);
  if (reinterpret_cast<uintptr_t>(global) % 16)
    fail("copy_async_16 from address %p, which is not aligned to 16 bytes, at %s:%d", global, base_name(at.file), at.line);
  memset(block->shared + shared, kPoison, 16);
  Copy c{shared, me.group, global};
  if (!block->late && draw() & 1) return land(c);
  if (me.copies == kMaxCopies) fail("more than %d copies of one thread under way", kMaxCopies);
  me.copy[me.copies++] = c;
}

void copy_async_commit() { self().group++; }

void copy_async_wait(int pending) {
  Fiber& me = self();
  int landed = 0;
  while (landed < me.copies && me.copy[landed].group < me.group - pending) land(me.copy[landed++]);
  me.copies -= landed;
  memmove(me.copy, me.copy + landed, me.copies * sizeof(Copy));
}

}  // namespace emulator
