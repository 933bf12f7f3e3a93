// The emulator's sm_90: what the threads of a warpgroup must execute in common, and registers that go from one warpgroup to another.
#include "sm90.h"

namespace emulator {

namespace {

bool same(const Site& a, const Site& b) { return a.line == b.line && a.file == b.file; }

std::string place(const Step& step) {
  if (!step.site.file) return kNames[step.kind];
  return std::string(kNames[step.kind]) + " at " + base_name(step.site.file) + ":" + std::to_string(step.site.line);
}

}  // namespace

void follow(const Step& step) {
  Async& s = async();
  const int thread = current->thread, group = thread / kGroup;
  if ((group + 1) * kGroup > block->launch->threads) fail("a warpgroup of less than 128 threads in %s", place(step).c_str());
  Warpgroup& g = s.groups[group];
  const size_t index = s.registers[thread].step++ - g.passed;
  if (index == g.steps.size()) {
    g.steps.push_back(step);
    g.steps.back().missing = kGroup;
  }
  Step& known = g.steps[index];
  if (known.kind != step.kind || !same(known.site, step.site))
    fail("threads of one warpgroup in different places: %s here, %s before", place(step).c_str(), place(known).c_str());
  const Product &x = known.product, &y = step.product;
  if (x.n != y.n || x.a != y.a || x.b != y.b || x.accumulate != y.accumulate)
    fail("threads of one warpgroup ask for different products in %s", place(step).c_str());
  if (known.number != step.number) fail("threads of one warpgroup give %d and %d to %s", known.number, step.number, place(step).c_str());
  known.missing--;
  for (; !g.steps.empty() && !g.steps.front().missing; g.passed++) g.steps.pop_front();
}

void check_steps_at_the_end() {
  for (const Warpgroup& g : block->async->groups)
    if (!g.steps.empty())
      fail("%d threads of a warpgroup have not come to %s", g.steps.front().missing, place(g.steps.front()).c_str());
}

// What a kernel has that takes as many as its block can have.
int registers_at_start() { return std::min(255, 65536 / block->launch->threads) / 8 * 8; }

// A warp gives what it does not keep to the block's free registers, or waits until it can take there what it lacks.
void set_registers(Kind kind, int count, Site at) {
  Fiber& me = self();
  if (count % 8 || count < 24 || count > 256) fail("%d registers at %s:%d: they are multiples of 8 from 24 to 256", count, AT);
  follow({kind, at, {}, count, 0});
  Async& s = async();
  const int warp = me.api.thread >> 5, before = s.held[warp];
  if (kind == kKeepRegisters ? count > before : count < before)
    fail("%s registers at %s:%d: the threads have %d, not %d or %s", kind == kKeepRegisters ? "keeps" : "takes", AT, before, count,
         kind == kKeepRegisters ? "more" : "less");
  collective(kind, at);
  // The first lane that comes here with enough of them there does it for all.
  while (s.held[warp] != count) {
    const int missing = 32 * (count - s.held[warp]);
    if (missing <= s.free) {
      s.free -= missing;
      s.held[warp] = count;
      if (missing > 0) return;
      for (int thread : s.wanting) wake(thread);
      s.wanting.clear();
    } else {
      wait(me, kind, at);
      s.wanting.push_back(me.api.thread);
      yield(me, warp, false);
    }
  }
}

}  // namespace emulator
