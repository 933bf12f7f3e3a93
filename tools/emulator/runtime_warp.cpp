// The emulator: what the last lane of a warp computes for all where the 32 of them meet.
#include "machine.h"

namespace emulator {

float e4m3_to_float(uint8_t a) {
  uint32_t magnitude = (uint32_t)(a & 0x7f) << 20;
  float y = (a & 0x7f) == 0x7f ? as_float(0x7fc00000u) : as_float(magnitude) * 0x1p120f;
  return as_float(as_bits(y) | (uint32_t)(a & 0x80) << 24);
}

namespace {

// a (16 x K, rows) times b (8 x K, rows), decoded. In fp32 for all formats: the integer sums stay below 2 ** 24, where fp32 is exact.
template <class Element, int kK, class DecodeA, class DecodeB>
void multiply(const Warp& w, float (&sum)[16][8], DecodeA decode_a, DecodeB decode_b) {
  constexpr int kEach = 4 / sizeof(Element);
  Element a[16 * kK], b[kK * 8];
  float x[16 * kK];
  union {
    float element[kK * 8];
    Eight row[kK];
  } y;
  for (int lane = 0; lane < 32; lane++) {
    const uint32_t* in = w.operands[lane];
    int g = lane >> 2, k = kEach * (lane & 3);
    memcpy(a + g * kK + k, in, 4);
    memcpy(a + (g + 8) * kK + k, in + 1, 4);
    memcpy(a + g * kK + k + kK / 2, in + 2, 4);
    memcpy(a + (g + 8) * kK + k + kK / 2, in + 3, 4);
    for (int i = 0; i < kEach; i++) {
      b[(k + i) * 8 + g] = (Element)(in[4] >> 8 * sizeof(Element) * i);
      b[(k + kK / 2 + i) * 8 + g] = (Element)(in[5] >> 8 * sizeof(Element) * i);
    }
  }
  for (int i = 0; i < 16 * kK; i++) x[i] = decode_a(a[i]);
  for (int i = 0; i < kK * 8; i++) y.element[i] = decode_b(b[i]);
  for (int m = 0; m < 16; m += 4) {
    Eight rows[4] = {};
    for (int k = 0; k < kK; k++)
      for (int i = 0; i < 4; i++) rows[i] += x[(m + i) * kK + k] * y.row[k];
    memcpy(sum[m], rows, sizeof rows);
  }
}

float from_signed(uint8_t a) { return (int8_t)a; }
float from_unsigned(uint8_t a) { return a; }

template <class Add>
void accumulate(Warp& w, const float (&sum)[16][8], Add add) {
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++) w.results[lane][i] = add(w.operands[lane][6 + i], sum[(lane >> 2) + 8 * (i >> 1)][2 * (lane & 3) + (i & 1)]);
}

uint32_t add_int(uint32_t c, float sum) { return c + (uint32_t)(int)sum; }
uint32_t add_float(uint32_t c, float sum) { return as_bits(as_float(c) + sum); }

void load_matrices(Warp& w, bool transposed) {
  for (int m = 0; m < 4; m++) {
    uint16_t rows[8][8];
    for (int r = 0; r < 8; r++) memcpy(rows[r], block->shared + w.operands[8 * m + r][0], 16);
    for (int lane = 0; lane < 32; lane++) {
      int i = lane >> 2, j = 2 * (lane & 3);
      w.results[lane][m] = transposed ? rows[j][i] | (uint32_t)rows[j + 1][i] << 16 : rows[i][j] | (uint32_t)rows[i][j + 1] << 16;
    }
  }
}

}  // namespace

void complete(Warp& w, Kind kind) {
  float sum[16][8];
  switch (kind) {
    case kShuffleXor:
      for (int lane = 0; lane < 32; lane++) w.results[lane][0] = w.operands[lane ^ w.operands[lane][1]][0];
      return;
    case kShuffle:
      for (int lane = 0; lane < 32; lane++) w.results[lane][0] = w.operands[w.operands[lane][1]][0];
      return;
    case kShuffleUp:
      for (int lane = 0; lane < 32; lane++) {
        int from = lane - (int)w.operands[lane][1];
        w.results[lane][0] = w.operands[from < 0 ? lane : from][0];
      }
      return;
    case kAnyLane:
    case kVote: {
      uint32_t votes = 0;
      for (int lane = 0; lane < 32; lane++) votes |= w.operands[lane][0] << lane;
      for (int lane = 0; lane < 32; lane++) w.results[lane][0] = votes;
      return;
    }
    case kLoadMatrix:
    case kLoadMatrixTransposed: return load_matrices(w, kind == kLoadMatrixTransposed);
    case kMmaS8S8:
      multiply<uint8_t, 32>(w, sum, [](uint8_t x) { return from_signed(x); }, [](uint8_t x) { return from_signed(x); });
      return accumulate(w, sum, add_int);
    case kMmaU8S8:
      multiply<uint8_t, 32>(w, sum, [](uint8_t x) { return from_unsigned(x); }, [](uint8_t x) { return from_signed(x); });
      return accumulate(w, sum, add_int);
    case kMmaHalf:
      multiply<uint16_t, 16>(w, sum, [](uint16_t x) { return half_to_float(x); }, [](uint16_t x) { return half_to_float(x); });
      return accumulate(w, sum, add_float);
    case kWgmmaS8:
    case kWgmmaE4m3: return issue(&w - block->machine->warps.data());
    default: return;
  }
}

}  // namespace emulator
