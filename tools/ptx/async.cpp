// Asynchronous copies, mbarriers, the rules between the generic and the asynchronous proxy, wgmma, and registers that warps hand over.
//
// Bytes that a copy will write are NaN from its issue until it lands. A thread's accesses through the generic proxy are kept in mind until it fences:
// before that neither a wgmma may read what it wrote nor a bulk copy write over what it read or wrote. Every warp of a warpgroup issues its quarter
// of a wgmma by itself, for the instruction does not synchronise the four; what was read of shared memory must still be there at the wait.
#include <algorithm>

#include "runtime.h"

namespace ptx {

// ---- the generic proxy ----------------------------------------------------------------------------------------------------------------------------

namespace {

bool overlap(u32 a, u32 a_bytes, u32 b, u32 b_bytes) { return a < b + b_bytes && b < a + a_bytes; }

void remember(std::vector<SharedBytes>& list, u32 offset, u32 bytes) {
  for (const SharedBytes& known : list)
    if (known.at == offset && known.bytes == bytes) return;
  list.push_back({offset, bytes});
}

void check_generic(Fiber& me, u32 offset, u32 bytes, int line) {
  for (const BulkCopy& copy : me.home->bulk)
    if (overlap(offset, bytes, copy.to, copy.bytes))
      complain(line, "access to offset %u while the bulk copy of line %d writes there", offset, copy.line);
  for (u32 i = offset; i < offset + bytes; i++)
    if (me.home->writer[i] == kMbarrierByte) return complain(line, "access to the bytes of the mbarrier at offset %u", i / 8 * 8);
}

}  // namespace

void note_read(Fiber& me, u32 offset, u32 bytes, int line) {
  check_generic(me, offset, bytes, line);
  remember(me.reads, offset, bytes);
}

void note_write(Fiber& me, u32 offset, u32 bytes, int line) {
  check_generic(me, offset, bytes, line);
  remember(me.writes, offset, bytes);
  std::fill_n(&me.home->writer[offset], bytes, (u16)(me.thread + 1));
}

void fence_mbarrier_init(Thread& me) {
  for (auto& [address, m] : fiber(me).home->mbarriers)
    if (m.initialiser == me.thread + 1) m.initialiser = 0;
}

void fence_proxy_async(Thread& thread) {
  tick(thread);
  Fiber& me = fiber(thread);
  for (const SharedBytes& written : me.writes)
    for (u32 i = written.at; i < written.at + written.bytes; i++)
      if (me.home->writer[i] == me.thread + 1) me.home->writer[i] = 0;
  me.reads.clear();
  me.writes.clear();
  fence_mbarrier_init(me);
}

// ---- mbarriers ------------------------------------------------------------------------------------------------------------------------------------

namespace {

Mbarrier& mbarrier_at(Thread& me, u64 address, int line) {
  auto& all = fiber(me).home->mbarriers;
  auto found = in_shared(address, 8) ? all.find((u32)address) : all.end();
  if (found == all.end()) refuse(me, line, "there is no mbarrier at offset %ld", (long)(address - kSharedBase));
  return found->second;
}

void complete_if_due(Mbarrier& m) {
  if (m.pending || m.bytes) return;
  m.phase++;
  m.pending = m.count;
}

}  // namespace

bool mbarrier_passed(Block& block, u32 address, u32 parity) { return (block.mbarriers[address].phase & 1) != parity; }

void mbarrier_init(Thread& me, u64 address, u32 count, int line) {
  tick(me);
  Block& block = *fiber(me).home;
  if (address & 7 || !in_shared(address, 8)) refuse(me, line, "an mbarrier at offset %ld is outside or misaligned", (long)(address - kSharedBase));
  if (count == 0 || count > kMostPending) refuse(me, line, "an mbarrier cannot count %u arrivals", count);
  if (block.mbarriers.count((u32)address)) refuse(me, line, "the mbarrier at offset %u is initialised twice", offset_of(address));
  block.mbarriers[(u32)address] = {count, count, 0, 0, me.thread + 1};
  std::fill_n(&block.writer[offset_of(address)], 8, kMbarrierByte);
}

void mbarrier_arrive(Thread& me, u64 address, u32 expected_bytes, int line) {
  tick(me);
  Mbarrier& m = mbarrier_at(me, address, line);
  m.bytes += expected_bytes;
  if (m.bytes > kMostPending) refuse(me, line, "the mbarrier at offset %u cannot expect %ld bytes", offset_of(address), (long)m.bytes);
  if (m.pending == 0) refuse(me, line, "more arrivals at the mbarrier at offset %u than the %u that it counts", offset_of(address), m.count);
  m.pending--;
  complete_if_due(m);
}

bool mbarrier_try_wait(Thread& thread, u64 address, u32 parity, int line) {
  Fiber& me = fiber(thread);
  me.line = line;
  if (parity > 1) refuse(me, line, "parity %u", parity);
  mbarrier_at(me, address, line);
  if (mbarrier_passed(*me.home, address, parity)) {
    tick(me);
    return true;
  }
  if (request->schedule.preempt && draw(4) == 0) {  // it may give up, after a time that the device chooses
    suspend(me);
    return false;
  }
  me.state = kAtMbarrier;
  me.mbarrier = address;
  me.parity = parity;
  suspend(me);
  return true;
}

// ---- copies ---------------------------------------------------------------------------------------------------------------------------------------

namespace {

void land(Block& block, size_t which) {
  BulkCopy copy = block.bulk[which];
  block.bulk.erase(block.bulk.begin() + which);
  memcpy(block.shared + copy.to, reinterpret_cast<const char*>(copy.from), copy.bytes);
  Mbarrier& m = block.mbarriers[copy.mbarrier];
  m.bytes -= copy.bytes;
  if (m.bytes < -(s64)kMostPending) complain(copy.line, "more bytes than an mbarrier can count");
  complete_if_due(m);
}

// That nobody has unfenced accesses to where a bulk copy will write.
void check_target(const Block& block, const BulkCopy& copy) {
  for (const BulkCopy& other : block.bulk)
    if (overlap(copy.to, copy.bytes, other.to, other.bytes)) complain(copy.line, "the bulk copy of line %d is still writing there", other.line);
  for (u32 i = copy.to; i < copy.to + copy.bytes; i++) {
    u16 writer = block.writer[i];
    if (writer == kMbarrierByte) return complain(copy.line, "the bulk copy writes over the mbarrier at offset %u", i / 8 * 8);
    if (writer)
      return complain(copy.line, "the bulk copy writes over offset %u, which thread %u wrote without a proxy fence since", i, writer - 1u);
  }
  for (const Fiber& reader : block.fibers)
    for (const SharedBytes& read : reader.reads)
      if (overlap(copy.to, copy.bytes, read.at, read.bytes))
        return complain(copy.line, "the bulk copy writes over offset %u, which thread %u read without a proxy fence since", read.at, reader.thread);
}

}  // namespace

void land_some(Block& block) {
  if (!block.bulk.empty()) land(block, draw(block.bulk.size()));
}

void bulk_copy(Thread& me, u64 to, u64 from, u32 bytes, u64 mbarrier, int line) {
  tick(me);
  Block& block = *fiber(me).home;
  if ((to | from | bytes) & 15 || bytes == 0)
    refuse(me, line, "a bulk copy of %u bytes from %#lx to %#lx is misaligned", bytes, (long)from, (long)to);
  if (!in_shared(to, bytes)) refuse(me, line, "a bulk copy of %u bytes to offset %ld is outside of shared memory", bytes, (long)(to - kSharedBase));
  if (!in_tensor(from, bytes)) refuse(me, line, "a bulk copy of %u bytes from %#lx is outside of every tensor", bytes, (long)from);
  if (mbarrier_at(me, mbarrier, line).initialiser) refuse(me, line, "the mbarrier was initialised without a fence since");
  BulkCopy copy{offset_of(to), bytes, (u32)mbarrier, from, line};
  check_target(block, copy);
  block.bulk.push_back(copy);
  if (request->schedule.copies == kAtOnce)
    land(block, block.bulk.size() - 1);
  else
    memset(block.shared + copy.to, 0xff, bytes);
}

namespace {

void land(Fiber& me, const AsyncCopy& copy) { memcpy(me.home->shared + copy.to, reinterpret_cast<const char*>(copy.from), copy.bytes); }

}  // namespace

void copy_async(Thread& thread, u64 to, u64 from, u32 bytes, int line) {
  Fiber& me = fiber(thread);
  global(me, from, bytes, line);
  char* target = shared_to_write(me, to, bytes, line);
  AsyncCopy copy{offset_of(to), bytes, from};
  s32 copies = request->schedule.copies;
  if (copies == kAtOnce || (copies == kAtRandom && draw(2))) return land(me, copy);
  memset(target, 0xff, bytes);
  me.copies.push_back(copy);
}

void copy_async_commit(Thread& thread) {
  Fiber& me = fiber(thread);
  me.copy_groups.push_back(std::move(me.copies));
  me.copies.clear();
}

void copy_async_wait(Thread& thread, u32 pending) {
  Fiber& me = fiber(thread);
  for (; me.copy_groups.size() > pending; me.copy_groups.pop_front())
    for (const AsyncCopy& copy : me.copy_groups.front()) land(me, copy);
}

// ---- wgmma ----------------------------------------------------------------------------------------------------------------------------------------

namespace {

constexpr int kDepth = 32;  // bytes of K that an instruction takes

// A matrix descriptor, K-major.
struct Descriptor {
  u32 start, leading, stride, base, swizzle, reserved;
  explicit Descriptor(u64 bits)
      : start((bits & 0x3fff) << 4),
        leading(bits >> 16 & 0x3fff),
        stride((bits >> 32 & 0x3fff) << 4),
        base(bits >> 49 & 7),
        swizzle(bits >> 62),
        reserved((bits >> 14 & 3) | (bits >> 30 & 3) << 2 | (bits >> 46 & 7) << 4 | (u32)(bits >> 52 & 0x3ff) << 7) {}
};

// Rows of 128, 64 or 32 bytes, whose 16-byte chunks change places by a pattern of eight rows.
u32 row_bytes(const Descriptor& d) { return 256u >> d.swizzle; }

// The sentence for what is wrong with it, or null. The pattern starts at multiples of its own size, for the base offset is 0; only inside a row may
// the start be further on. The leading dimension has no meaning here and is set to 1.
const char* fault(const Descriptor& d) {
  if (d.reserved) return "reserved bits are set";
  if (d.swizzle == 0) return "no swizzle is not known here";
  if (d.base) return "a base offset is not known here";
  if (d.leading != 1) return "the leading dimension of a swizzled matrix is not 1";
  u32 pattern = 8 * row_bytes(d);
  if (d.start % pattern >= row_bytes(d)) return "its start is not in the first row of the pattern";
  if (d.start % row_bytes(d) + kDepth > row_bytes(d)) return "it goes beyond its rows";
  if (d.stride % pattern) return "its stride breaks the pattern";
  return nullptr;
}

u32 chunk_address(const Descriptor& d, u32 row, u32 chunk) {
  u32 linear = d.start + row / 8 * d.stride + row % 8 * row_bytes(d) + 16 * chunk;
  return linear ^ (linear >> 7 & ((1u << (4 - d.swizzle)) - 1)) << 4;
}

u64 hash_of(const Block& block, const std::vector<u32>& chunks) {
  u64 hash = 1469598103934665603ull;
  for (u32 at : chunks)
    for (int half = 0; half < 2; half++) hash = (hash ^ load<u64>(block.shared + at + 8 * half)) * 1099511628211ull;
  return hash;
}

bool readable_chunk(const Block& block, u32 address, int line) {
  if (!in_shared(address, 16)) return complain(line, "wgmma reads offset %d, outside of shared memory", (int)offset_of(address)), false;
  u32 at = offset_of(address);
  for (u32 i = at; i < at + 16; i++) {
    if (block.writer[i] == kMbarrierByte) return complain(line, "wgmma reads the mbarrier at offset %u", i / 8 * 8), false;
    if (block.writer[i])
      return complain(line, "wgmma reads offset %u, which thread %u wrote without a proxy fence since", i, block.writer[i] - 1u), false;
  }
  for (const BulkCopy& copy : block.bulk)
    if (overlap(at, 16, copy.to, copy.bytes))
      return complain(line, "wgmma reads offset %u while the bulk copy of line %d writes there", at, copy.line), false;
  return true;
}

// Rows of 32 bytes; false after an error.
bool read_matrix(const Block& block, u64 bits, u32 first_row, u32 rows, Product& product, u8* to) {
  Descriptor d(bits);
  if (const char* why = fault(d)) return complain(product.line, "descriptor %#lx: %s", (unsigned long)bits, why), false;
  for (u32 row = 0; row < rows; row++)
    for (u32 chunk = 0; chunk < 2; chunk++) {
      u32 address = chunk_address(d, first_row + row, chunk);
      if (!readable_chunk(block, address, product.line)) return false;
      memcpy(to + kDepth * row + 16 * chunk, block.shared + offset_of(address), 16);
      product.chunks.push_back(offset_of(address));
    }
  return true;
}

constexpr int kMostColumns = 256;
struct S8 {
  typedef s32 Sum;
  static s32 value(u8 code) { return (s8)code; }
  static u32 plus(u32 c, s32 sum) { return c + (u32)sum; }
};
struct E4m3 {
  typedef double Sum;
  static double value(u8 code) { return float_of_e4m3(code); }
  static u32 plus(u32 c, double sum) { return result((float)(as_float(c) + sum)); }
};

template <class Type>
std::vector<typename Type::Sum> all_values() {
  std::vector<typename Type::Sum> values(256);
  for (int code = 0; code < 256; code++) values[code] = Type::value((u8)code);
  return values;
}

// The 16 rows of one warp: a (16 x 32), b (columns x 32); a lane's accumulators are `skip` words into `in`.
template <class Type>
void multiply(Fiber* lanes, const u8* a, const u8* b, u32 columns, bool accumulate, int skip) {
  static typename Type::Sum transposed[kDepth][kMostColumns], sums[kMostColumns];
  static const std::vector<typename Type::Sum> values = all_values<Type>();
  for (u32 n = 0; n < columns; n++)
    for (int k = 0; k < kDepth; k++) transposed[k][n] = values[b[kDepth * n + k]];
  for (int row = 0; row < 16; row++) {
    std::fill_n(sums, columns, 0);
    for (int k = 0; k < kDepth; k++) {
      typename Type::Sum factor = values[a[kDepth * row + k]];
      for (u32 n = 0; n < columns; n++) sums[n] += factor * transposed[k][n];
    }
    for (int quad = 0; quad < 4; quad++) {
      Fiber& lane = lanes[row % 8 * 4 + quad];
      for (u32 j = 0; j < columns / 8; j++)
        for (int e = 0; e < 2; e++) {
          u32 word = 4 * j + 2 * (row / 8) + e;
          lane.out[word] = Type::plus(accumulate ? lane.in[skip + word] : 0, sums[8 * j + 2 * quad + e]);
        }
    }
  }
}

// A of the registers: as the first operand of mma.
void read_registers(const Fiber* lanes, u8* a) {
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++)
      for (int e = 0; e < 4; e++) a[kDepth * ((lane >> 2) + 8 * (i & 1)) + 4 * (lane & 3) + e + 16 * (i >> 1)] = (u8)(lanes[lane].in[i] >> 8 * e);
}

// settings: columns, whether to accumulate, the descriptors of A (S8 only) and B, each its lower half first.
void wgmma(Block& block, Warp& warp, Kind kind) {
  static u8 a[16 * kDepth], b[kMostColumns * kDepth];
  Fiber* lanes = warp.lanes;
  const u32* settings = lanes[0].settings;
  Product product{lanes[0].line, 0, {}};
  for (int lane = 1; lane < 32; lane++)
    if (memcmp(lanes[lane].settings, settings, 6 * sizeof *settings)) return complain(product.line, "operands of wgmma differ among the lanes");
  if (!warp.fenced) return complain(product.line, "wgmma without wgmma.fence since the last wait");
  u32 columns = settings[0];
  u64 descriptor_a = settings[2] | (u64)settings[3] << 32, descriptor_b = settings[4] | (u64)settings[5] << 32;
  if (kind == kWgmmaS8 && !read_matrix(block, descriptor_a, warp.index % 4 * 16, 16, product, a)) return;
  if (kind == kWgmmaE4m3) read_registers(lanes, a);
  if (!read_matrix(block, descriptor_b, 0, columns, product, b)) return;
  if (kind == kWgmmaS8)
    multiply<S8>(lanes, a, b, columns, settings[1], 0);
  else
    multiply<E4m3>(lanes, a, b, columns, settings[1], 4);
  product.hash = hash_of(block, product.chunks);
  warp.issued.push_back((u64)product.line << 40 ^ descriptor_a * 3 ^ descriptor_b * 7 ^ settings[1]);
  warp.open.push_back(std::move(product));
}

void wait_for_products(Block& block, Warp& warp, u32 pending) {
  for (; warp.groups.size() > pending; warp.groups.pop_front())
    for (const Product& product : warp.groups.front())
      if (hash_of(block, product.chunks) != product.hash) complain(product.line, "an operand of wgmma changed in shared memory before its wait");
  if (warp.groups.empty() && warp.open.empty()) warp.fenced = false;
}

// ---- registers ------------------------------------------------------------------------------------------------------------------------------------

void change_registers(Block& block, Warp& warp, Kind kind) {
  u32 count = warp.lanes[0].settings[0];
  int line = warp.lanes[0].line;
  warp.issued.push_back((u64)line << 40 ^ count);
  if (count % 8 || count < 24 || count > 256) return complain(line, "setmaxnreg %u is not a multiple of 8 from 24 to 256", count);
  if (kind == kRegistersDown) {
    if (count > warp.registers) return complain(line, "setmaxnreg.dec from %u to %u registers", warp.registers, count);
    block.free_registers += 32 * (warp.registers - count);
    warp.registers = count;
  } else {
    if (count < warp.registers) return complain(line, "setmaxnreg.inc from %u to %u registers", warp.registers, count);
    for (int lane = 0; lane < 32; lane++) warp.lanes[lane].state = kForRegisters;
  }
  wake_for_registers(block);
}

}  // namespace

void wake_for_registers(Block& block) {
  for (Warp& warp : block.warps) {
    if (warp.lanes[0].state != kForRegisters) continue;
    u32 count = warp.lanes[0].settings[0], needed = 32 * (count - warp.registers);
    if (needed > block.free_registers) continue;
    block.free_registers -= needed;
    warp.registers = count;
    for (int lane = 0; lane < 32; lane++) warp.lanes[lane].state = kReady;
  }
}

void run_async_collective(Block& block, Warp& warp) {
  Fiber& first = warp.lanes[0];
  switch (first.kind) {
    case kWgmmaS8:
    case kWgmmaE4m3: return wgmma(block, warp, first.kind);
    case kWgmmaFence: warp.fenced = true; return;
    case kWgmmaCommit:
      warp.groups.push_back(std::move(warp.open));
      warp.open.clear();
      return;
    case kWgmmaWait: return wait_for_products(block, warp, first.settings[0]);
    default: return change_registers(block, warp, first.kind);
  }
}

void check_block_end(Block& block) {
  for (Warp& warp : block.warps) {
    if (warp.issued != block.warps[warp.index / 4 * 4].issued) complain(0, "warps of a warpgroup issued different wgmma or setmaxnreg instructions");
    if (!warp.open.empty()) complain(warp.open[0].line, "a wgmma without wgmma.commit_group at the end");
    for (const auto& group : warp.groups)
      if (!group.empty()) complain(group[0].line, "a wgmma was not waited for at the end");
  }
  for (u32 id = 0; id < kBarriers; id++)
    if (u32 arrived = block.barriers[id].arrived) complain(0, "%u threads have come to barrier %u in vain", arrived, id);
  for (const BulkCopy& copy : block.bulk) complain(copy.line, "the bulk copy is under way at the end");
  for (const auto& [address, m] : block.mbarriers)
    if (m.bytes) complain(0, "the mbarrier at offset %u expects %ld bytes more at the end", offset_of(address), (long)m.bytes);
}

}  // namespace ptx
