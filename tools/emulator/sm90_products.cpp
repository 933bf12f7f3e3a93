// The emulator's sm_90: matrix products of a warpgroup, their fences and waits.
#include "sm90.h"

namespace emulator {

uint32_t place_in_matrix(const Operation& op, uint64_t descriptor, int row, int chunk) {
  uint32_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  int pitch = descriptor >> 62 == 1 ? 128 : 64;
  uint32_t address = start + row / 8 * stride + row % 8 * pitch + 16 * chunk;
  address ^= (address >> 7 & (pitch / 16 - 1)) << 4;
  if (address + 16 > block->launch->shared)
    fail("the product of %s:%d reads past the end of shared memory (%ld bytes)", base_name(op.site.file), op.site.line, (long)block->launch->shared);
  return address;
}

namespace {

const char* chunk_of(const Operation& op, uint64_t descriptor, int row, int chunk) {
  return block->shared + place_in_matrix(op, descriptor, row, chunk);
}

struct Table {
  float value[256];
  explicit Table(bool e4m3) {
    for (int i = 0; i < 256; i++) value[i] = e4m3 ? e4m3_to_float(i) : (int8_t)i;
  }
};

bool over(const WarpProducts& w, const Fiber& f) { return w.queue.empty() || w.queue.front().group >= f.let_go; }

void end_waits(WarpProducts& w) {
  auto goes_on = [&](int thread) {
    if (!over(w, block->machine->fibers[thread])) return false;
    wake(thread);
    return true;
  };
  w.waiting.erase(std::remove_if(w.waiting.begin(), w.waiting.end(), goes_on), w.waiting.end());
}

// The right operand (32, n), decoded.
const Eight* right_operand(Warpgroup& g, const Operation& op, const float* decode) {
  const int n = op.product.n;
  uint8_t bytes[256][32];
  for (int i = 0; i < 2 * n; i++) memcpy(bytes[i / 2] + i % 2 * 16, chunk_of(op, op.product.b, i / 2, i % 2), 16);
  const bool known = g.kind == op.product.kind && g.bytes.size() == 32u * n && !memcmp(g.bytes.data(), bytes, 32 * n);
  if (known) return g.decoded.data();
  g.kind = op.product.kind;
  g.bytes.assign(bytes[0], bytes[n]);
  g.decoded.resize(32 * n / 8);
  float* to = reinterpret_cast<float*>(g.decoded.data());
  for (int i = 0; i < n; i++)
    for (int k = 0; k < 32; k++) to[k * n + i] = decode[bytes[i][k]];
  return g.decoded.data();
}

// c = c + a b for 16 rows.
void add_product(Accumulator& c, const uint8_t (&a)[16][32], const Eight* b, const float* decode, bool floats) {
  // In fp32 for integers too: the sums of one product stay below 2 ** 24, where fp32 is exact.
  for (int m = 0; m < 16; m += 8) {
    float x[8][32];
    for (int i = 0; i < 8; i++)
      for (int k = 0; k < 32; k++) x[i][k] = decode[a[m + i][k]];
    for (int j = 0; j < c.n / 8; j++) {
      union {
        Eight row[8];
        float sum[8][8];
      } y = {};
      for (int k = 0; k < 32; k++)
        for (int i = 0; i < 8; i++) y.row[i] += x[i][k] * b[k * (c.n / 8) + j];
      for (int i = 0; i < 8; i++) {
        uint32_t* to = &c.value[(m + i) * c.n + 8 * j];
        for (int e = 0; e < 8; e++) to[e] = floats ? as_bits(as_float(to[e]) + y.sum[i][e]) : to[e] + (uint32_t)(int)y.sum[i][e];
      }
    }
  }
}

// Element 8 j + 2 h on, two of them, of a lane's sums: there, and here among 16 rows.
char* place_in_lane(const Accumulator& x, int lane, int j, int h) { return x.c[lane] + 16 * j + 8 * h; }
int place_in_rows(const Accumulator& x, int lane, int j, int h) { return (lane / 4 + 8 * h) * x.n + 8 * j + lane % 4 * 2; }

}  // namespace

void execute(int warp) {
  static const Table tables[2] = {Table(false), Table(true)};
  Async& s = *block->async;
  WarpProducts& w = s.products[warp];
  const Operation& op = w.queue.front();
  const bool floats = op.product.kind == kWgmmaE4m3;
  const float* decode = tables[floats].value;
  const Site site = op.site;
  uint8_t a[16][32];
  if (floats) {
    for (int i = 0; i < 32; i++) {
      if (memcmp(op.a[i], op.registers[i], 16))
        fail("the left operand of the product of %s:%d was changed while it was under way", base_name(site.file), site.line);
      for (int r = 0; r < 4; r++) memcpy(a[i / 4 + r % 2 * 8] + i % 4 * 4 + r / 2 * 16, op.a[i] + r, 4);
    }
  } else {
    check_operand(op, op.product.a, 64);
    for (int i = 0; i < 32; i++) memcpy(a[i / 2] + i % 2 * 16, chunk_of(op, op.product.a, warp % 4 * 16 + i / 2, i % 2), 16);
  }
  check_operand(op, op.product.b, op.product.n);
  Accumulator& c = *op.accumulator;
  if (!op.product.accumulate) std::fill(c.value.begin(), c.value.end(), 0);
  add_product(c, a, right_operand(s.groups[warp / 4], op, decode), decode, floats);
  w.queue.pop_front();
  end_waits(w);
  if (--c.products) return;
  std::vector<char> poison(2 * c.n, kPoison);
  for (int i = 0; i < 32; i++) {
    if (memcmp(c.c[i], poison.data(), poison.size()))
      fail("the accumulator of the product of %s:%d was touched while it was under way", base_name(site.file), site.line);
    for (int j = 0; j < c.n / 8; j++)
      for (int h = 0; h < 2; h++) memcpy(place_in_lane(c, i, j, h), &c.value[place_in_rows(c, i, j, h)], 8);
  }
  w.accumulators.remove_if([&](const Accumulator& x) { return &x == &c; });
}

namespace {

Accumulator& accumulator_of(WarpProducts& w, const Product* const (&products)[32], Site at) {
  const Product& product = *products[0];
  for (Accumulator& x : w.accumulators) {
    bool same = x.kind == product.kind && x.n == product.n, overlap = false;
    for (int i = 0; i < 32; i++) {
      const char* c = static_cast<const char*>(products[i]->c);
      same = same && c == x.c[i];
      overlap = overlap || (c < x.c[i] + 2 * x.n && x.c[i] < c + 2 * product.n);
    }
    if (same) return x;
    if (overlap) fail("the product at %s:%d writes where one of another kind or width that is under way writes", AT);
  }
  w.accumulators.emplace_back();
  Accumulator& x = w.accumulators.back();
  x.kind = product.kind;
  x.n = product.n;
  x.products = 0;
  x.value.resize(16 * x.n);
  for (int i = 0; i < 32; i++) {
    x.c[i] = static_cast<char*>(products[i]->c);
    for (int j = 0; j < x.n / 8; j++)
      for (int h = 0; h < 2; h++) memcpy(&x.value[place_in_rows(x, i, j, h)], place_in_lane(x, i, j, h), 8);
    memset(x.c[i], kPoison, 2 * x.n);
  }
  return x;
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

// The fields of a descriptor as the PTX ISA has them ("matrix-descriptor format" of wgmma).
void check_descriptor(uint64_t descriptor, Site at) {
  auto field = [&](int first, int bits) { return (int)(descriptor >> first & ((1 << bits) - 1)); };
  const int swizzle = field(62, 2), row_bytes = swizzle == 1 ? 128 : 64;
  if (swizzle < 1 || swizzle > 2) fail("the product at %s:%d has a descriptor that is not of rows of 64 or 128 swizzled bytes", AT);
  check_start((uint32_t)field(0, 14) << 4, row_bytes, at);
  if (field(16, 14) != 1) fail("the product at %s:%d has a leading dimension of %d, which must be 1 where rows are swizzled", AT, field(16, 14));
  if (field(32, 14) == 0 || field(32, 14) << 4 & (8 * row_bytes - 1))
    fail("the product at %s:%d has a stride of %d bytes between groups of 8 rows, which must be a multiple of %d", AT, field(32, 14) << 4,
         8 * row_bytes);
  if (field(49, 3)) fail("the product at %s:%d has a base offset of %d, although its matrix starts at a group of 8 rows", AT, field(49, 3));
  if (field(14, 2) | field(30, 2) | field(46, 3) | field(52, 10)) fail("the product at %s:%d has a descriptor with reserved bits that are not 0", AT);
}

}  // namespace

void check_start(uint32_t shared, int row_bytes, Site at) {
  uint32_t inside = shared % (8 * row_bytes);
  if (inside >= (uint32_t)row_bytes || inside % 32) refuse("a matrix starts at 8 rows, or 32, 64 or 96 bytes into the first row", shared, at);
}

void issue(int warp) {
  const Fiber* fibers = &block->machine->fibers[32 * warp];
  const Product* products[32];
  for (int i = 0; i < 32; i++) memcpy(&products[i], fibers[i].api.operands, sizeof products[i]);
  const Product& product = *products[0];
  const Site at = fibers[0].site;
  WarpProducts& w = async().products[warp];
  Accumulator& accumulator = accumulator_of(w, products, at);
  accumulator.products++;
  w.queue.emplace_back();
  Operation& op = w.queue.back();
  op.product = product;
  op.group = w.last_group = fibers[0].products;
  op.site = w.last_site = at;
  op.accumulator = &accumulator;
  check_operand(op, product.b, product.n);
  if (product.kind == kWgmmaS8) return check_operand(op, product.a, 64);
  for (int i = 0; i < 32; i++) {
    op.registers[i] = products[i]->registers;
    memcpy(op.a[i], op.registers[i], 16);
  }
}

void wgmma_fence(const Named* named, int count) {
  Fiber& me = self();
  follow({kWgmmaFence, {}, {}, 0, 0});
  me.fenced = true;
  std::vector<Named>& fenced = async().registers[me.api.thread].fenced;
  fenced.insert(fenced.end(), named, named + count);
}

void wgmma_commit() {
  follow({kWgmmaCommit, {}, {}, 0, 0});
  self().products++;
}

void wgmma_wait(int pending, const Named* named, int count) {
  Fiber& me = self();
  follow({kWgmmaWait, {}, {}, pending, 0});
  me.fenced = false;
  me.let_go = std::max(me.let_go, me.products - pending);
  check_named(block->async->registers[me.api.thread], me.let_go, named, count);
  const int warp = me.api.thread >> 5;
  WarpProducts& w = block->async->products[warp];
  if (over(w, me)) return;
  if (block->late) {
    wait(me, kWgmmaWait, w.queue.front().site);
    w.waiting.push_back(me.api.thread);
    return yield(me, warp, false);
  }
  if (draw() & 1) rest(me);
  while (!over(w, me)) execute(warp);
}

void multiply(const Product& product, Site at) {
  Fiber& me = self();
  if (!me.fenced) fail("no wgmma_fence between the last wgmma_wait and the product at %s:%d", AT);
  Registers& registers = async().registers[me.api.thread];
  const int bytes = 2 * product.n;
  check_fenced(registers, product.c, bytes, at);
  if (product.kind == kWgmmaE4m3) check_fenced(registers, product.registers, 16, at);
  if (product.kind == kWgmmaS8) check_descriptor(product.a, at);
  check_descriptor(product.b, at);
  follow({product.kind, at, product, 0, 0});
  registers.sums.push_back({static_cast<char*>(product.c), bytes, me.products, at});
  const Product* mine = &product;
  memcpy(me.api.operands, &mine, sizeof mine);
  collective(product.kind, at);
}

}  // namespace emulator
