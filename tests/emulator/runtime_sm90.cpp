// The emulator's sm_90: barriers in shared memory, bulk copies, hardware barriers by number, and products of warpgroups.
//
// Bulk copies and products are under way from their issue until the barrier's phase ends or wgmma_wait lets go. Under even seeds they happen as late
// as they may, when no thread can go on. Under odd ones each may happen at any change of threads, early or late by a rate drawn per block, and a
// product at the latest in the first wait. Until then the destination holds poison, which also shows whether anyone wrote to an accumulator since.
// Copies and products see shared memory through a view of their own, which plain writes reach when a product or a copy follows a fence_async.
#include <stdio.h>

#include <algorithm>
#include <deque>
#include <list>

#include "machine.h"
#include "runtime_sm90.h"

namespace emulator {

constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int kNamedBarriers = 16;
constexpr int kMostBytes = (1 << 20) - 1;  // that a barrier can wait for

namespace {

struct Barrier {
  uint32_t address;
  int count, missing;  // arrivals of a phase
  int64_t bytes;       // that the phase still waits for; below 0 where copies were faster than barrier_arrive_expect
  uint32_t phase;
  int owner;  // the thread that initialised it
  bool published;
  Site site;
  std::vector<int> waiting;
};

struct BulkCopy {
  uint32_t shared;
  int bytes;
  const void* global;
  Barrier* barrier;
  Site site;
};

struct NamedBarrier {
  int threads, arrived;  // 0 arrived: nobody uses it
  bool votes, value;
  uint32_t lanes[kMaxThreads / 32];
  std::vector<int> waiting;
};

struct Accumulator {
  Kind kind;
  int n, products;  // still under way
  char* c[kGroup];
  std::vector<uint32_t> value;  // (64, n)
};

struct Operation {
  Product product;
  int group;
  Site site;
  Accumulator* accumulator;
  const uint32_t* registers[kGroup];
  uint32_t a[kGroup][4];
};

struct Request {
  Product product;
  int count;  // of registers
};

struct Warpgroup {
  int arrived;
  Kind kind;
  Site site;
  const Request* request[kGroup];
  uint32_t lanes[4];  // of its warps, that have come
  int registers;
  int last_group;  // of the products
  Site last_site;
  std::vector<int> waiting;  // threads, in wgmma_wait
  std::deque<Operation> queue;
  std::list<Accumulator> accumulators;
};

// What a thread has named and what it has asked for.
struct Sums {
  const char* c;
  int bytes;
  int group;
  Site site;
};
struct Registers {
  std::vector<Named> fenced;  // since the last wgmma_wait
  std::vector<Sums> sums;     // of products that it has not let go of
};

}  // namespace

struct Async {
  int rate;  // something under way ends at every how manieth change of threads
  bool fenced;
  std::vector<char> view;  // shared memory as the copy engine and the products see it
  std::deque<Barrier> barriers;
  std::vector<BulkCopy> copies;
  NamedBarrier named[kNamedBarriers];
  Warpgroup groups[kMaxThreads / kGroup];
  Registers registers[kMaxThreads];
};

namespace {

#define AT base_name(at.file), at.line

Async& async() {
  if (block->async) return *block->async;
  Machine& m = *block->machine;
  delete m.async;  // what a block that failed has left goes with it
  block->async = m.async = new Async{};
  Async& s = *m.async;
  const int rates[] = {1, 4, 32};
  s.rate = rates[draw() % 3];
  s.view.assign(block->launch->shared, kPoison);
  int threads = block->launch->threads;
  for (Warpgroup& g : s.groups) {
    g.registers = std::min(255, 65536 / threads) / 8 * 8;
    g.last_group = -1;
  }
  return s;
}

void wake(int thread) { make_ready(thread >> 5, 1u << (thread & 31)); }

// Lets others go first.
void rest(Fiber& me) {
  wake(me.api.thread);
  yield(me, me.api.thread >> 5, true);
}

void see_plain_writes(Async& s) {
  if (s.fenced) memcpy(s.view.data(), block->shared, s.view.size());
  s.fenced = false;
}

// ---- barriers and bulk copies ------------------------------------------------------------------------------------------------------------------

uint64_t signature(uint32_t address) { return 0xb077ab1eba771e55ull * (2 * address + 1); }

void check_memory(const Barrier& b) {
  uint64_t there, expected = signature(b.address);
  memcpy(&there, block->shared + b.address, 8);
  if (there != expected) fail("the barrier %u of %s:%d was overwritten", b.address, base_name(b.site.file), b.site.line);
}

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

void land(Async& s, size_t i) {
  BulkCopy c = s.copies[i];
  s.copies.erase(s.copies.begin() + i);
  memcpy(block->shared + c.shared, c.global, c.bytes);
  memcpy(s.view.data() + c.shared, c.global, c.bytes);
  c.barrier->bytes -= c.bytes;
  end_phase(*c.barrier);
}

// ---- matrix products ---------------------------------------------------------------------------------------------------------------------------

// 16 bytes of a matrix in shared memory: chunk 0 or 1 of the 32 bytes of a row.
const char* chunk_of(const Operation& op, uint64_t descriptor, int row, int chunk) {
  uint32_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  int pitch = descriptor >> 62 == 1 ? 128 : 64;
  uint32_t address = start + row / 8 * stride + row % 8 * pitch + 16 * chunk;
  address ^= (address >> 7 & (pitch / 16 - 1)) << 4;
  if (address + 16 > block->launch->shared)
    fail("the product of %s:%d reads past the end of shared memory (%ld bytes)", base_name(op.site.file), op.site.line, (long)block->launch->shared);
  return block->async->view.data() + address;
}

struct Table {
  float value[256];
  explicit Table(bool e4m3) {
    for (int i = 0; i < 256; i++) value[i] = e4m3 ? e4m3_to_float(i) : (int8_t)i;
  }
};

bool over(const Warpgroup& g, const Fiber& f) { return g.queue.empty() || g.queue.front().group >= f.let_go; }

void end_waits(Warpgroup& g) {
  auto goes_on = [&](int thread) {
    if (!over(g, block->machine->fibers[thread])) return false;
    wake(thread);
    return true;
  };
  g.waiting.erase(std::remove_if(g.waiting.begin(), g.waiting.end(), goes_on), g.waiting.end());
}

// The oldest product of the warpgroup.
void execute(Warpgroup& g) {
  static const Table tables[2] = {Table(false), Table(true)};
  Async& s = *block->async;
  see_plain_writes(s);
  const Operation& op = g.queue.front();
  const bool floats = op.product.kind == kWgmmaE4m3;
  const float* decode = tables[floats].value;
  const int n = op.product.n;
  uint8_t a[64][32];
  union {
    float element[32 * 256];
    Eight vector[32 * 32];
  } b;
  if (floats)
    for (int i = 0; i < kGroup; i++) {
      if (memcmp(op.a[i], op.registers[i], 16))
        fail("the left operand of the product of %s:%d was changed while it was under way", base_name(op.site.file), op.site.line);
      int row = i / 32 * 16 + i % 32 / 4, k = i % 4 * 4;
      for (int r = 0; r < 4; r++) memcpy(a[row + r % 2 * 8] + k + r / 2 * 16, op.a[i] + r, 4);
    }
  else
    for (int i = 0; i < 128; i++) memcpy(a[i / 2] + i % 2 * 16, chunk_of(op, op.product.a, i / 2, i % 2), 16);
  for (int i = 0; i < 2 * n; i++) {
    const char* from = chunk_of(op, op.product.b, i / 2, i % 2);
    for (int k = 0; k < 16; k++) b.element[(i % 2 * 16 + k) * n + i / 2] = decode[(uint8_t)from[k]];
  }
  Accumulator& c = *op.accumulator;
  if (!op.product.accumulate) std::fill(c.value.begin(), c.value.end(), 0);
  // In fp32 for integers too: the sums of one product stay below 2 ** 24, where fp32 is exact.
  for (int m = 0; m < 64; m += 8) {
    float x[8][32];
    for (int i = 0; i < 8; i++)
      for (int k = 0; k < 32; k++) x[i][k] = decode[a[m + i][k]];
    for (int j = 0; j < n / 8; j++) {
      union {
        Eight row[8];
        float sum[8][8];
      } y = {};
      for (int k = 0; k < 32; k++)
        for (int i = 0; i < 8; i++) y.row[i] += x[i][k] * b.vector[k * (n / 8) + j];
      for (int i = 0; i < 8; i++) {
        uint32_t* to = &c.value[(m + i) * n + 8 * j];
        for (int e = 0; e < 8; e++) to[e] = floats ? as_bits(as_float(to[e]) + y.sum[i][e]) : to[e] + (uint32_t)(int)y.sum[i][e];
      }
    }
  }
  Site site = op.site;
  g.queue.pop_front();
  end_waits(g);
  if (--c.products) return;
  std::vector<char> poison(2 * n, kPoison);
  for (int i = 0; i < kGroup; i++) {
    if (memcmp(c.c[i], poison.data(), poison.size()))
      fail("the accumulator of the product of %s:%d was touched while it was under way", base_name(site.file), site.line);
    int row = i / 32 * 16 + i % 32 / 4, column = i % 4 * 2;
    for (int j = 0; j < n / 8; j++)
      for (int h = 0; h < 2; h++) memcpy(c.c[i] + 16 * j + 8 * h, &c.value[(row + 8 * h) * n + 8 * j + column], 8);
  }
  for (auto i = g.accumulators.begin(); i != g.accumulators.end(); i++)
    if (&*i == &c) {
      g.accumulators.erase(i);
      break;
    }
}

Accumulator& accumulator_of(Warpgroup& g, const Product& product, Site at) {
  const int words = product.n / 2;
  for (Accumulator& x : g.accumulators) {
    bool same = x.kind == product.kind && x.n == product.n, overlap = false;
    for (int i = 0; i < kGroup; i++) {
      const char* c = static_cast<const char*>(g.request[i]->product.c);
      same = same && c == x.c[i];
      overlap = overlap || (c < x.c[i] + 2 * x.n && x.c[i] < c + 4 * words);
    }
    if (same) return x;
    if (overlap) fail("the product at %s:%d writes where one of another kind or width that is under way writes", AT);
  }
  g.accumulators.emplace_back();
  Accumulator& x = g.accumulators.back();
  x.kind = product.kind;
  x.n = product.n;
  x.products = 0;
  x.value.resize(64 * x.n);
  for (int i = 0; i < kGroup; i++) {
    x.c[i] = static_cast<char*>(g.request[i]->product.c);
    int row = i / 32 * 16 + i % 32 / 4, column = i % 4 * 2;
    for (int j = 0; j < x.n / 8; j++)
      for (int h = 0; h < 2; h++) memcpy(&x.value[(row + 8 * h) * x.n + 8 * j + column], x.c[i] + 16 * j + 8 * h, 8);
    memset(x.c[i], kPoison, 4 * words);
  }
  return x;
}

void issue(Warpgroup& g, Fiber& me, Site at) {
  const Product& product = g.request[0]->product;
  Accumulator& accumulator = accumulator_of(g, product, at);
  accumulator.products++;
  g.queue.emplace_back();
  Operation& op = g.queue.back();
  op.product = product;
  op.group = g.last_group = me.products;
  op.site = g.last_site = at;
  op.accumulator = &accumulator;
  if (product.kind != kWgmmaE4m3) return;
  for (int i = 0; i < kGroup; i++) {
    op.registers[i] = g.request[i]->product.registers;
    memcpy(op.a[i], op.registers[i], 16);
  }
}

bool holds(const Named& named, const void* start, int bytes) {
  const char *first = static_cast<const char*>(named.start), *from = static_cast<const char*>(start);
  return first <= from && from + bytes <= first + named.bytes;
}

bool overlap(const char* a, int a_bytes, const char* b, int b_bytes) { return a < b + b_bytes && b < a + a_bytes; }

void check_fenced(const Registers& r, const void* start, int bytes, Site at) {
  for (const Named& named : r.fenced)
    if (holds(named, start, bytes)) return;
  fail("wgmma_fence before the product at %s:%d does not name all of its registers", AT);
}

// What a wait lets go of must be named there, unless a later product adds to it; what it does not let go of must not.
void check_named(Registers& r, int let_go, const Named* named, int count) {
  for (const Sums& x : r.sums) {
    bool found = false, goes_on = false;
    for (int i = 0; i < count; i++) {
      found = found || holds(named[i], x.c, x.bytes);
      if (x.group >= let_go && overlap(static_cast<const char*>(named[i].start), named[i].bytes, x.c, x.bytes))
        fail("wgmma_wait names the sums of the product of %s:%d, which it does not let go of", base_name(x.site.file), x.site.line);
    }
    for (const Sums& y : r.sums) goes_on = goes_on || (y.group >= let_go && overlap(x.c, x.bytes, y.c, y.bytes));
    if (!found && !goes_on)
      fail("wgmma_wait lets go of the product of %s:%d and does not name its sums", base_name(x.site.file), x.site.line);
  }
  r.sums.erase(std::remove_if(r.sums.begin(), r.sums.end(), [&](const Sums& x) { return x.group < let_go; }), r.sums.end());
  r.fenced.clear();
}

// Waits until the warpgroup's threads have come; what they ask must be the same. True for the last one, who does it and then lets the others go on.
bool meet(Fiber& me, Kind kind, const Request& request, Site at) {
  Warpgroup& g = async().groups[me.api.thread / kGroup];
  const int index = me.api.thread % kGroup, first = me.api.thread - index;
  if (first + kGroup > block->launch->threads) fail("a warpgroup of less than 128 threads at %s:%d", AT);
  wait(me, kind, at);
  if (g.arrived) {
    int other = 0;
    while (!g.request[other]) other++;
    const Fiber& they = block->machine->fibers[first + other];
    const Product &x = g.request[other]->product, &y = request.product;
    if (g.kind != kind || g.site.line != at.line || g.site.file != at.file) fail("threads of one warpgroup in different places");
    if (x.n != y.n || x.a != y.a || x.b != y.b || x.accumulate != y.accumulate)
      fail("threads of one warpgroup ask for different products at %s:%d", AT);
    if (they.products != me.products || they.let_go != me.let_go)
      fail("threads of one warpgroup have committed or waited for different products before %s:%d", AT);
  }
  g.kind = kind;
  g.site = at;
  g.request[index] = &request;
  if (++g.arrived == kGroup) return true;
  yield(me, me.api.thread >> 5, false);
  return false;
}

void part(Fiber& me) {
  Warpgroup& g = async().groups[me.api.thread / kGroup];
  g.arrived = 0;
  for (const Request*& request : g.request) request = nullptr;
  int warp = me.api.thread / kGroup * 4;
  for (int i = 0; i < 4; i++) {
    block->machine->warps[warp + i].order = draw() & 31;
    make_ready(warp + i, ~0u);
  }
  yield(me, me.api.thread >> 5, true);
}

// A bulk copy or the oldest product of a warpgroup that `may` happen; false: there is none.
template <class May>
bool one_ends(Async& s, May may) {
  Warpgroup* busy[kMaxThreads / kGroup];
  size_t groups = 0;
  for (Warpgroup& g : s.groups)
    if (may(g)) busy[groups++] = &g;
  if (groups + s.copies.size() == 0) return false;
  size_t which = draw() % (groups + s.copies.size());
  // Late is late: of the blocks whose copies wait for everybody else, some hold all copies back behind the products, some the products.
  if (block->late && groups && !s.copies.empty()) which = s.rate == 1 ? draw() % groups : s.rate == 4 ? groups + draw() % s.copies.size() : which;
  if (which < groups)
    execute(*busy[which]);
  else
    land(s, which - groups);
  return true;
}

}  // namespace

// ---- what runtime.cpp calls --------------------------------------------------------------------------------------------------------------------

void async_turn() {
  Async& s = *block->async;
  if (block->late || draw() % s.rate) return;
  one_ends(s, [](const Warpgroup& g) { return !g.queue.empty(); });
}

bool async_stuck() {
  Async& s = *block->async;
  return one_ends(s, [](const Warpgroup& g) { return !g.waiting.empty(); });
}

void async_thread_ends() {
  Fiber& me = self();
  const Warpgroup& g = block->async->groups[me.api.thread / kGroup];
  if (g.last_group >= me.let_go) fail("ended without waiting for the product of %s:%d", base_name(g.last_site.file), g.last_site.line);
}

void async_block_ends() {
  Async& s = *block->async;
  for (const BulkCopy& c : s.copies)
    fail("the bulk copy of %s:%d to %u is still under way at the end", base_name(c.site.file), c.site.line, c.shared);
  for (const Barrier& b : s.barriers) {
    check_memory(b);
    if (b.bytes)
      fail("the barrier %u of %s:%d expects %ld bytes more than were copied", b.address, base_name(b.site.file), b.site.line, (long)b.bytes);
  }
  for (int i = 0; i < kNamedBarriers; i++)
    if (s.named[i].arrived) fail("%d threads have come to hardware barrier %d, of %d, in vain", s.named[i].arrived, i, s.named[i].threads);
  const int threads = block->launch->threads;
  int registers = 0;
  for (int i = 0; i < threads / kGroup; i++) registers += s.groups[i].registers * kGroup;
  const int had = std::min(255, 65536 / threads) / 8 * 8 * threads;
  if (threads % kGroup == 0 && registers > had) fail("the warpgroups have taken %d registers of the block's %d", registers, had);
}

void async_describe(char* text, size_t size) {
  char *end = text, *limit = text + size;
  for (const Barrier& b : block->async->barriers)
    if (!b.waiting.empty() && limit - end > 120)
      end += snprintf(end, limit - end, "\n  barrier %u of %s:%d, in phase %u: %d arrivals and %ld bytes are missing", b.address,
                      base_name(b.site.file), b.site.line, b.phase, b.missing, (long)b.bytes);
  for (int i = 0; i < kNamedBarriers; i++)
    if (const NamedBarrier& b = block->async->named[i]; b.arrived && limit - end > 120)
      end += snprintf(end, limit - end, "\n  hardware barrier %d: %d of %d threads are there", i, b.arrived, b.threads);
}

// ---- what prim_sm90.cuh calls ------------------------------------------------------------------------------------------------------------------

void barrier_init(uint32_t address, int arrivals, Site at) {
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
  Barrier& b = find(address, at);
  if (!b.missing) fail("barrier %u at %s:%d: more arrivals than the phase's %d", address, AT, b.count);
  if (bytes < 0 || b.bytes + bytes > kMostBytes) fail("barrier %u at %s:%d cannot expect %d bytes", address, AT, bytes);
  b.bytes += bytes;
  b.missing--;
  end_phase(b);
  if (draw() % 4 == 0) rest(self());
}

void barrier_wait(uint32_t address, int parity, Site at) {
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
  see_plain_writes(s);
  memset(block->shared + shared, kPoison, bytes);
  memset(s.view.data() + shared, kPoison, bytes);
  s.copies.push_back({shared, bytes, global, &b, at});
}

void fence_async() { async().fenced = true; }

bool meet_threads(Kind kind, int id, int threads, bool value, Site at) {
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

void set_registers(Kind kind, int count, Site at) {
  Fiber& me = self();
  if (count % 8 || count < 24 || count > 256) fail("%d registers at %s:%d: they are multiples of 8 from 24 to 256", count, AT);
  Request request{};
  request.product.n = count;
  if (!meet(me, kind, request, at)) return;
  Warpgroup& g = async().groups[me.api.thread / kGroup];
  if (kind == kKeepRegisters ? count > g.registers : count < g.registers)
    fail("%s registers at %s:%d: the threads have %d, not %d or %s", kind == kKeepRegisters ? "keeps" : "takes", AT, g.registers, count,
         kind == kKeepRegisters ? "more" : "less");
  g.registers = count;
  part(me);
}

void wgmma_fence(const Named* named, int count) {
  Fiber& me = self();
  me.fenced = true;
  std::vector<Named>& fenced = async().registers[me.api.thread].fenced;
  fenced.insert(fenced.end(), named, named + count);
}

void wgmma_commit() { self().products++; }

void wgmma_wait(int pending, const Named* named, int count) {
  Fiber& me = self();
  me.fenced = false;
  me.let_go = std::max(me.let_go, me.products - pending);
  if (!block->async) return;
  check_named(block->async->registers[me.api.thread], me.let_go, named, count);
  Warpgroup& g = block->async->groups[me.api.thread / kGroup];
  if (over(g, me)) return;
  if (block->late) {
    wait(me, kWgmmaWait, g.queue.front().site);
    g.waiting.push_back(me.api.thread);
    return yield(me, me.api.thread >> 5, false);
  }
  if (draw() & 1) rest(me);
  while (!over(g, me)) execute(g);
}

void multiply(const Product& product, Site at) {
  Fiber& me = self();
  if (!me.fenced) fail("no wgmma_fence between the last wgmma_wait and the product at %s:%d", AT);
  Registers& registers = async().registers[me.api.thread];
  const int bytes = 2 * product.n;
  check_fenced(registers, product.c, bytes, at);
  if (product.kind == kWgmmaE4m3) check_fenced(registers, product.registers, 16, at);
  registers.sums.push_back({static_cast<char*>(product.c), bytes, me.products, at});
  for (uint64_t descriptor : {product.kind == kWgmmaS8 ? product.a : product.b, product.b})
    if (descriptor >> 62 < 1 || descriptor >> 62 > 2 || descriptor >> 49 & 7)
      fail("the product at %s:%d has a descriptor that is not of rows of 64 or 128 swizzled bytes", AT);
  Request request{product, 0};
  if (!meet(me, product.kind, request, at)) return;
  issue(async().groups[me.api.thread / kGroup], me, at);
  part(me);
}

}  // namespace emulator
