// The scheduler, memory and errors: every thread of a block is a fiber, and a random adversary chooses which one goes on.
//
// A thread runs until it meets others, or at a memory access where the schedule asks for it. Every random decision comes from the schedule's seed, so
// that a failure can be had again. The first errors are kept as sentences and end the launch; stacks are kept for the next one.
#include "runtime.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

#include <algorithm>

#include "switch.h"

#if !defined(__x86_64__)
#error "fibers are switched by x86-64 instructions"
#endif

namespace ptx {

const Request* request;
bool failed;

namespace {

constexpr size_t kPage = 4096;
constexpr size_t kStack = 256 << 10;  // a kernel's registers are variables; the lowest page is the guard
constexpr int kLookAtTheClock = 1 << 14;
constexpr int kMostComplaints = 8;

u64 random_state;
double deadline;
std::string complaints;
int complaint_count;
void* scheduler_stack_pointer;
Fiber* running;
std::vector<char*> stacks;  // of ended threads
std::vector<std::unique_ptr<Block>> resident;
Range last_tensor;

constexpr u32 kWholeWarp = 32;
// Who stands still, in every block: a warp or one lane of it.
struct Stall {
  u32 turns, warp, lane;  // turns of warps that are left
};
Stall stall;

double now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec + 1e-9 * time.tv_nsec;
}

}  // namespace

u32 draw() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return (u32)(random_state >> 16);
}

// ---- errors ---------------------------------------------------------------------------------------------------------------------------------------

namespace {

void keep_complaint(int line, const char* format, va_list arguments) {
  failed = true;
  if (complaint_count++ >= kMostComplaints) return;
  char text[600], place[100] = "";
  vsnprintf(text, sizeof text, format, arguments);
  if (line && running)
    snprintf(place, sizeof place, "line %d, block %u, thread %u: ", line, running->block, running->thread);
  else if (line)
    snprintf(place, sizeof place, "line %d: ", line);
  complaints += std::string(complaints.empty() ? "" : "\n") + place + text;
}

}  // namespace

void complain(int line, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  keep_complaint(line, format, arguments);
  va_end(arguments);
}

void refuse(Thread& me, int line, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  keep_complaint(line, format, arguments);
  va_end(arguments);
  suspend(fiber(me));
  abort();  // nothing is resumed after an error
}

void trap(Thread& me, int line) { refuse(me, line, "trap"); }

u64 divisor(Thread& me, u64 b, int line) {
  if (b == 0) refuse(me, line, "division by zero");
  return b;
}

// ---- fibers ---------------------------------------------------------------------------------------------------------------------------------------

void suspend(Fiber& me) { switch_stack(&me.stack_pointer, scheduler_stack_pointer); }

namespace {

void resume(Fiber& fiber) {
  running = &fiber;
  switch_stack(&scheduler_stack_pointer, fiber.stack_pointer);
  running = nullptr;
}

void run_thread() {
  Fiber& me = *running;
  request->kernel->run(me);
  if (!me.copies.empty()) complain(me.line, "cp.async without cp.async.commit_group at the end");
  me.state = kEnded;
  suspend(me);
  abort();
}

char* new_stack() {
  if (!stacks.empty()) {
    char* stack = stacks.back();
    stacks.pop_back();
    return stack;
  }
  void* pages = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) abort();
  mprotect(pages, kPage, PROT_NONE);
  return static_cast<char*>(pages);
}

int new_fuel() { return request->schedule.preempt ? 1 + (int)draw(2 * request->schedule.preempt - 1) : kLookAtTheClock; }

void prepare(Fiber& fiber) {
  fiber.stack = new_stack();
  fiber.fuel = new_fuel();
  fiber.stack_pointer = place_to_start(fiber.stack + kStack - 64, run_thread);
}

}  // namespace

void pause(Thread& me) {
  me.fuel = new_fuel();
  if (request->schedule.preempt)
    suspend(fiber(me));
  else if (now() > deadline)
    refuse(me, fiber(me).line, "no end after %g s; it waited here last", request->limit);
}

Block::Block(u32 index) : index(index), live(request->threads), fibers(request->threads), warps(request->threads / 32) {
  size_t room = (request->shared + 2047) / 1024 * 1024;
  shared = static_cast<char*>(aligned_alloc(1024, room));
  memset(shared, 0xff, room);
  writer.assign(request->shared, 0);
  for (u32 i = 0; i < warps.size(); i++) {
    warps[i].index = i;
    warps[i].lanes = &fibers[32 * i];
    warps[i].registers = request->registers;
  }
  for (u32 i = 0; i < fibers.size(); i++) {
    Fiber& f = fibers[i];
    f.thread = i, f.threads = request->threads, f.block = index, f.blocks = request->grid;
    f.home = this, f.warp = &warps[i / 32], f.lane = i % 32;
    f.state = kReady;
    prepare(f);
  }
}

Block::~Block() {
  for (Fiber& f : fibers)
    if (f.stack) stacks.push_back(f.stack);
  free(shared);
}

// ---- memory ---------------------------------------------------------------------------------------------------------------------------------------

bool in_tensor(u64 address, u32 bytes) {
  auto holds = [&](const Range& r) { return address >= r.first && address + bytes <= r.last; };
  if (holds(last_tensor)) return true;
  for (u32 i = 0; i < request->tensor_count; i++)
    if (holds(request->tensors[i])) {
      last_tensor = request->tensors[i];
      return true;
    }
  return false;
}

bool in_shared(u64 address, u32 bytes) { return address >= kSharedBase && address + bytes <= (u64)kSharedBase + request->shared; }

namespace {

void check_alignment(u64 address, u32 bytes, const char* space, int line) {
  if (address & (bytes - 1)) complain(line, "%s access of %u bytes at %#lx is misaligned", space, bytes, (unsigned long)address);
}

char* checked_shared(Thread& me, u64 address, u32 bytes, int line) {
  tick(me);
  check_alignment(address, bytes, "shared", line);
  if (!in_shared(address, bytes))
    refuse(me, line, "shared access of %u bytes at offset %ld is outside of the %u bytes", bytes, (long)(address - kSharedBase), request->shared);
  return fiber(me).home->shared + (address - kSharedBase);
}

}  // namespace

char* global(Thread& me, u64 address, u32 bytes, int line) {
  tick(me);
  check_alignment(address, bytes, "global", line);
  if (!in_tensor(address, bytes)) refuse(me, line, "global access of %u bytes at %#lx is outside of every tensor", bytes, (unsigned long)address);
  return reinterpret_cast<char*>(address);
}

const char* shared_to_read(Thread& me, u64 address, u32 bytes, int line) {
  char* at = checked_shared(me, address, bytes, line);
  if (request->kernel->async_proxy) note_read(fiber(me), address - kSharedBase, bytes, line);
  return at;
}

char* shared_to_write(Thread& me, u64 address, u32 bytes, int line) {
  char* at = checked_shared(me, address, bytes, line);
  if (request->kernel->async_proxy) note_write(fiber(me), address - kSharedBase, bytes, line);
  return at;
}

u64 generic_of_shared(Thread& me, u64 address) { return (u64)fiber(me).home->shared + (address - kSharedBase); }

namespace {

// The shared address of a generic one, or 0.
u64 shared_of_generic(Thread& me, u64 address) {
  u64 base = (u64)fiber(me).home->shared;
  return address >= base && address < base + request->shared ? address - base + kSharedBase : 0;
}

}  // namespace

const char* generic_to_read(Thread& me, u64 address, u32 bytes, int line) {
  u64 shared = shared_of_generic(me, address);
  return shared ? shared_to_read(me, shared, bytes, line) : global(me, address, bytes, line);
}

char* generic_to_write(Thread& me, u64 address, u32 bytes, int line) {
  u64 shared = shared_of_generic(me, address);
  return shared ? shared_to_write(me, shared, bytes, line) : global(me, address, bytes, line);
}

const char* param(Thread& me, u64 offset, u32 bytes, int line) {
  if (offset & (bytes - 1) || offset + bytes > request->params_size || offset + bytes < offset)
    refuse(me, line, "parameter access of %u bytes at offset %ld of %u is outside or misaligned", bytes, (long)offset, request->params_size);
  return reinterpret_cast<const char*>(request->params) + offset;
}

u32 atomic_add(Thread& me, u64 address, u32 value, int line) {
  char* at = global(me, address, 4, line);
  u32 old = load<u32>(at);
  store<u32>(at, old + value);
  return old;
}

// ---- approximations -------------------------------------------------------------------------------------------------------------------------------

namespace {

u32 off_by_some_ulps(float x) {
  u32 bits = result(x), ulps = request->schedule.ulps;
  if (!ulps || !isfinite(x) || x == 0) return bits;
  return bits + draw(2 * ulps + 1) - ulps;
}

}  // namespace

u32 exp2_ftz(u32 a) {
  float x = as_float(a);
  if (x == 0 || fabsf(x) < 0x1p-126f) return as_bits(1.0f);
  float y = (float)exp2((double)x);
  return y < 0x1p-126f ? 0 : off_by_some_ulps(y);
}

u32 log2_approx(u32 a) { return off_by_some_ulps((float)log2((double)as_float(a))); }

u32 rsqrt_approx(u32 a) {
  float x = as_float(a);
  return off_by_some_ulps(x == 0 ? copysignf(INFINITY, x) : (float)(1.0 / sqrt((double)x)));
}

// ---- barriers of the block ------------------------------------------------------------------------------------------------------------------------

namespace {

// Whether the barrier is complete with this arrival; then those that wait go on.
bool arrive(Fiber& me, u32 id, u32 count, bool value, int line) {
  if (id >= kBarriers) refuse(me, line, "there is no barrier %u", id);
  if (count % 32 || count == 0 || count > me.threads) refuse(me, line, "barrier %u for %u threads of %u", id, count, me.threads);
  Barrier& b = me.home->barriers[id];
  if (b.arrived && b.count != count) refuse(me, line, "barrier %u is for %u threads and for %u at the same time", id, b.count, count);
  if (!b.arrived) {
    b.any = false;
    b.lanes.assign(me.home->warps.size(), 0);
  }
  u32& lanes = b.lanes[me.warp->index];
  if (lanes >> me.lane & 1) refuse(me, line, "the thread has come to barrier %u already", id);
  lanes |= 1u << me.lane;
  b.count = count;
  b.any |= value;
  if (++b.arrived < count) return false;
  for (u32 warp = 0; warp < b.lanes.size(); warp++)
    if (b.lanes[warp] && b.lanes[warp] != kAllLanes)
      refuse(me, line, "barrier %u lets go when only lanes %#x of warp %u have come", id, b.lanes[warp], warp);
  for (Fiber* f : b.waiting) {
    f->state = kReady;
    f->barrier_value = b.any;
  }
  b.waiting.clear();
  b.arrived = 0;
  me.barrier_value = b.any;
  return true;
}

// Lanes of one warp that an .aligned barrier finds in different places.
void check_aligned(Fiber& me, int line) {
  for (u32 i = 0; i < 32; i++) {
    const Fiber& other = me.warp->lanes[i];
    if (other.state == kAtBarrier && other.line != line) refuse(me, line, "lane %u of the warp waits at another barrier, line %d", i, other.line);
  }
}

}  // namespace

bool barrier_sync(Thread& thread, u32 id, u32 count, bool aligned, bool value, int line) {
  Fiber& me = fiber(thread);
  me.line = line;
  if (aligned) check_aligned(me, line);
  if (arrive(me, id, count, value, line)) {
    if (request->schedule.preempt && draw(2)) suspend(me);
  } else {
    me.state = kAtBarrier;
    me.barrier = id;
    me.home->barriers[id].waiting.push_back(&me);
    suspend(me);
  }
  return me.barrier_value;
}

void barrier_arrive(Thread& me, u32 id, u32 count, int line) { arrive(fiber(me), id, count, false, line); }

// ---- the scheduler --------------------------------------------------------------------------------------------------------------------------------

namespace {

bool can_go_on(Block& block, Fiber& fiber) {
  if (fiber.state == kAtMbarrier && mbarrier_passed(block, fiber.mbarrier, fiber.parity)) fiber.state = kReady;
  return fiber.state == kReady;
}

// Counts a turn down, or draws anew who it is. Warp 0 and lane 0, which do for the others what one has to do, stand still more often than the rest.
void draw_stall(u32 warps) {
  if (stall.turns--) return;
  stall.turns = draw(request->schedule.stall);
  stall.warp = draw(2) ? 0 : draw(warps);
  u32 kind = draw(3);
  stall.lane = kind == 0 ? kWholeWarp : kind == 1 ? draw(32) : 0;
}

bool stands_still(u32 warp, u32 lane) { return request->schedule.stall && warp == stall.warp && (stall.lane == kWholeWarp || lane == stall.lane); }

// Every lane that can and is not to stand still gets a turn, in a random order, with `all` every one that can; whether any did.
bool run_warp(Block& block, Warp& warp, bool all) {
  if (request->schedule.stall) draw_stall(block.warps.size());
  u32 rotation = draw(32), step = draw(2) ? 1 : 31;
  bool progress = false;
  for (u32 i = 0; i < 32 && !failed; i++) {
    Fiber& fiber = warp.lanes[(rotation + i * step) % 32];
    if ((!all && stands_still(warp.index, fiber.lane)) || !can_go_on(block, fiber)) continue;
    resume(fiber);
    progress = true;
    if (fiber.state == kEnded) {
      block.live--;
      stacks.push_back(fiber.stack);
      fiber.stack = nullptr;
    }
    if (request->schedule.copies == kAtRandom && draw(64) == 0) land_some(block);
  }
  return progress;
}

// Some warps of the block from a random one on, all if need be, and whoever stands still if nobody else can go on; whether anything happened.
bool run_block(Block& block) {
  u32 count = block.warps.size(), first = draw(count), tries = draw(4) ? 1 : count;
  bool progress = false;
  for (u32 i = 0; i < count && (i < tries || !progress) && !failed; i++) progress |= run_warp(block, block.warps[(first + i) % count], false);
  if (request->schedule.stall)
    for (u32 i = 0; i < count && !progress && !failed; i++) progress |= run_warp(block, block.warps[(first + i) % count], true);
  bool early = request->schedule.copies == kAtRandom && draw(4) == 0;
  if (block.bulk.empty() || failed || (progress && !early)) return progress;
  land_some(block);  // as late as it may, where nobody could go on
  return true;
}

std::string standing(const Fiber& fiber) {
  const char* words[] = {"could go on after", "wait for the warp at", "wait at barrier", "wait at mbarrier", "wait for registers at", "have ended"};
  std::string text = words[fiber.state];
  if (fiber.state == kEnded) return text;
  if (fiber.state == kAtBarrier) text += " " + std::to_string(fiber.barrier) + ",";
  if (fiber.state == kAtMbarrier) text += " " + std::to_string(offset_of(fiber.mbarrier)) + " for parity " + std::to_string(fiber.parity) + ",";
  return text + " line " + std::to_string(fiber.line);
}

// Where every warp stands.
void tell_deadlock(const Block& block) {
  std::string text;
  for (const Warp& warp : block.warps) {
    text += "\n  warp " + std::to_string(warp.index) + ":";
    for (u32 first = 0, next; first < 32; first = next) {
      std::string here = standing(warp.lanes[first]);
      for (next = first + 1; next < 32 && standing(warp.lanes[next]) == here;) next++;
      text += (first ? ";" : "") + std::string(" lanes ") + std::to_string(first) + "-" + std::to_string(next - 1) + " " + here;
    }
  }
  complain(0, "deadlock in block %u", block.index);
  complaints += text;
}

void run_all() {
  u32 next = 0;
  while (next < request->grid && resident.size() < (u32)request->schedule.resident) resident.push_back(std::make_unique<Block>(next++));
  for (u32 turn = 1; !resident.empty() && !failed; turn++) {
    u32 chosen = draw(resident.size());
    Block& block = *resident[chosen];
    if (!run_block(block) && !failed) tell_deadlock(block);
    if (turn % 4096 == 0 && now() > deadline) complain(0, "no end after %g s", request->limit);
    if (block.live || failed) continue;
    check_block_end(block);
    resident.erase(resident.begin() + chosen);
    if (next < request->grid) resident.push_back(std::make_unique<Block>(next++));
  }
}

}  // namespace

}  // namespace ptx

#pragma GCC visibility push(default)
// The number of complaints, of which the first are in `error`.
extern "C" int ptx_launch(const ptx::Request* what, char* error, u_int64_t room) {
  using namespace ptx;
  request = what;
  random_state = 88172645463325252ull ^ what->schedule.seed * 0x9e3779b97f4a7c15ull;
  for (int i = 0; i < 8; i++) draw();
  deadline = now() + what->limit;
  failed = false;
  complaints.clear();
  complaint_count = 0;
  last_tensor = {};
  stall = {};
  run_all();
  resident.clear();
  snprintf(error, room, "%s", complaints.c_str());
  return complaint_count;
}
#pragma GCC visibility pop
