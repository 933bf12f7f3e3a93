// What the 32 lanes of a warp do together: shuffles, votes, matrix loads and mma.
#include "runtime.h"

namespace ptx {

void meet(Thread& thread, Kind kind, int line, const u32* settings, const u32* in, u32* out) {
  Fiber& me = fiber(thread);
  me.kind = kind, me.line = line, me.settings = settings, me.in = in, me.out = out;
  me.state = kInWarp;
  if (++me.warp->waiting == 32) {
    me.warp->waiting = 0;
    run_collective(*me.home, *me.warp);
    if (me.state == kReady && !failed) return;
  }
  suspend(me);
}

void need_all_lanes(Thread& me, u32 mask, int line) {
  if (mask != kAllLanes) refuse(me, line, "lanes %#x are named, only all 32 are known here", mask);
}

namespace {

void shuffle(Fiber* lanes, Kind kind) {
  for (int lane = 0; lane < 32; lane++) {
    u32 shift = lanes[lane].in[1] & 31, clamp = lanes[lane].in[2] & 31, segment = lanes[lane].in[2] >> 8 & 31;
    int last = (lane & segment) | (clamp & ~segment), first = lane & segment, from;
    bool inside;
    if (kind == kShuffleUp) {
      from = lane - (int)shift;
      inside = from >= last;
    } else {
      from = kind == kShuffleDown ? lane + (int)shift : kind == kShuffleButterfly ? lane ^ (int)shift : first | (int)(shift & ~segment);
      inside = from <= last;
    }
    lanes[lane].out[0] = lanes[inside ? from : lane].in[0];
    lanes[lane].out[1] = inside;
  }
}

void vote(Fiber* lanes, Kind kind) {
  u32 votes = 0;
  for (int lane = 0; lane < 32; lane++) votes |= (lanes[lane].in[0] ? 1u : 0u) << lane;
  for (int lane = 0; lane < 32; lane++) lanes[lane].out[0] = kind == kVoteBallot ? votes : kind == kVoteAny ? votes != 0 : votes == kAllLanes;
}

// Lane 8 i + r gives the address of row r of matrix i.
void load_matrices(Block& block, Fiber* lanes, bool transposed) {
  for (int i = 0; i < 4; i++) {
    u16 matrix[8][8];
    for (int r = 0; r < 8; r++) {
      Fiber& lane = lanes[8 * i + r];
      u32 address = lane.in[0];
      if (address & 15) return complain(lane.line, "row %d of matrix %d at %#x is misaligned", r, i, address);
      if (!in_shared(address, 16))
        return complain(lane.line, "row %d of matrix %d at offset %d is outside of shared memory", r, i, (int)offset_of(address));
      if (request->kernel->async_proxy) note_read(lane, offset_of(address), 16, lane.line);
      memcpy(matrix[r], block.shared + offset_of(address), 16);
    }
    for (int lane = 0; lane < 32; lane++) {
      int r = lane >> 2, c = 2 * (lane & 3);
      u16 low = transposed ? matrix[c][r] : matrix[r][c], high = transposed ? matrix[c + 1][r] : matrix[r][c + 1];
      lanes[lane].out[i] = (u32)low | (u32)high << 16;
    }
  }
}

// Element types of the products. Sums of the floating ones are exact up to fp64 and rounded once.
struct Signed {
  typedef s32 Sum;
  static constexpr int kPerWord = 4;
  static s32 value(u32 word, int i) { return (s8)(word >> 8 * i); }
};
struct Unsigned : Signed {
  static s32 value(u32 word, int i) { return (u8)(word >> 8 * i); }
};
struct Half {
  typedef double Sum;
  static constexpr int kPerWord = 2;
  static double value(u32 word, int i) { return as_float(float_of_half((u16)(word >> 16 * i))); }
};

u32 plus(u32 c, s32 sum) { return c + (u32)sum; }
u32 plus(u32 c, double sum) { return result((float)(as_float(c) + sum)); }

// in: four words of A (16 x K), two of B (K x 8), four of C (16 x 8); out: four of D.
template <class A, class B>
void multiply(Fiber* lanes) {
  constexpr int kEach = A::kPerWord, kDepth = 8 * kEach;
  typedef typename A::Sum Sum;
  Sum a[16][kDepth], b[kDepth][8];
  for (int lane = 0; lane < 32; lane++) {
    int group = lane >> 2, k = kEach * (lane & 3);
    const u32* in = lanes[lane].in;
    for (int i = 0; i < kEach; i++) {
      a[group][k + i] = A::value(in[0], i);
      a[group + 8][k + i] = A::value(in[1], i);
      a[group][k + kDepth / 2 + i] = A::value(in[2], i);
      a[group + 8][k + kDepth / 2 + i] = A::value(in[3], i);
      b[k + i][group] = B::value(in[4], i);
      b[k + kDepth / 2 + i][group] = B::value(in[5], i);
    }
  }
  Sum sums[16][8] = {};
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < kDepth; k++)
      for (int column = 0; column < 8; column++) sums[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++) lanes[lane].out[i] = plus(lanes[lane].in[6 + i], sums[(lane >> 2) + 8 * (i >> 1)][2 * (lane & 3) + (i & 1)]);
}

bool needs_one_place(Kind kind) { return kind >= kLoadMatrix; }  // .aligned

}  // namespace

void run_collective(Block& block, Warp& warp) {
  Fiber* lanes = warp.lanes;
  Kind kind = lanes[0].kind;
  for (int lane = 1; lane < 32; lane++)
    if (lanes[lane].kind != kind || (needs_one_place(kind) && lanes[lane].line != lanes[0].line))
      return complain(lanes[lane].line, "lane %d of warp %u meets lane 0, which is at line %d", lane, warp.index, lanes[0].line);
  for (int lane = 0; lane < 32; lane++) lanes[lane].state = kReady;
  switch (kind) {
    case kShuffleButterfly:
    case kShuffleIndex:
    case kShuffleUp:
    case kShuffleDown: return shuffle(lanes, kind);
    case kVoteAny:
    case kVoteAll:
    case kVoteBallot: return vote(lanes, kind);
    case kSyncWarp: return;
    case kLoadMatrix: return load_matrices(block, lanes, false);
    case kLoadMatrixTransposed: return load_matrices(block, lanes, true);
    case kMmaS8S8: return multiply<Signed, Signed>(lanes);
    case kMmaU8S8: return multiply<Unsigned, Signed>(lanes);
    case kMmaF16: return multiply<Half, Half>(lanes);
    default: return run_async_collective(block, warp);
  }
}

}  // namespace ptx
