// The emulator's sm_90: when what is under way comes to its end, and what must be over when a thread or the block ends.
#include "sm90.h"

namespace emulator {

Async& async() {
  if (block->async) return *block->async;
  Machine& m = *block->machine;
  delete m.async;  // what a block that failed has left goes with it
  block->async = m.async = new Async{};
  Async& s = *m.async;
  const int rates[] = {1, 4, 32};
  s.rate = rates[draw() % 3];
  s.unfenced.assign(block->launch->shared, 0);
  s.unfenced_in.assign(block->launch->shared / kWatchedPage + 1, 0);
  for (WarpProducts& w : s.products) w.last_group = -1;
  for (int& held : s.held) held = registers_at_start();
  return s;
}

void wake(int thread) { make_ready(thread >> 5, 1u << (thread & 31)); }

// Lets others go first.
void rest(Fiber& me) {
  wake(me.api.thread);
  yield(me, me.api.thread >> 5, true);
}

// A bulk copy or the oldest product of a warp that `may` happen; false: there is none.
template <class May>
static bool one_ends(Async& s, May may) {
  int busy[kMaxThreads / 32];
  size_t warps = 0;
  for (int i = 0; i < block->launch->threads / 32; i++)
    if (may(s.products[i])) busy[warps++] = i;
  if (warps + s.copies.size() == 0) return false;
  size_t which = draw() % (warps + s.copies.size());
  // Late is late: of the blocks whose copies wait for everybody else, some hold all copies back behind the products, some the products.
  if (block->late && warps && !s.copies.empty()) which = s.rate == 1 ? draw() % warps : s.rate == 4 ? warps + draw() % s.copies.size() : which;
  if (which < warps)
    execute(busy[which]);
  else
    land(s, which - warps);
  return true;
}

// ---- what runtime.cpp calls --------------------------------------------------------------------------------------------------------------------

void async_turn() {
  Async& s = *block->async;
  if (block->late || draw() % s.rate) return;
  one_ends(s, [](const WarpProducts& w) { return !w.queue.empty(); });
}

bool async_stuck() {
  Async& s = *block->async;
  return one_ends(s, [](const WarpProducts& w) { return !w.waiting.empty(); });
}

void async_thread_ends() {
  Fiber& me = self();
  const WarpProducts& w = block->async->products[me.api.thread >> 5];
  if (w.last_group >= me.let_go) fail("ended without waiting for the product of %s:%d", base_name(w.last_site.file), w.last_site.line);
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
  check_steps_at_the_end();
}

void async_describe(char* text, size_t size) {
  const Async& s = *block->async;
  char *end = text, *limit = text + size;
  if (!s.wanting.empty())
    end += snprintf(end, limit - end, "\n  take_registers: %d threads wait, and %d registers are free", (int)s.wanting.size(), s.free);
  for (const Barrier& b : s.barriers)
    if (!b.waiting.empty() && limit - end > 120)
      end += snprintf(end, limit - end, "\n  barrier %u of %s:%d, in phase %u: %d arrivals and %ld bytes are missing", b.address,
                      base_name(b.site.file), b.site.line, b.phase, b.missing, (long)b.bytes);
  for (int i = 0; i < kNamedBarriers; i++)
    if (const NamedBarrier& b = s.named[i]; b.arrived && limit - end > 120)
      end += snprintf(end, limit - end, "\n  hardware barrier %d: %d of %d threads are there", i, b.arrived, b.threads);
}

}  // namespace emulator
