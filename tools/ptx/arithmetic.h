// The arithmetic of PTX on registers' bits, where C++ has no operator of the same meaning. Every function is pure.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

namespace ptx {

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;

constexpr u32 kNan = 0x7fffffffu;  // the one NaN that arithmetic gives

inline float as_float(u32 bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline u32 as_bits(float x) {
  u32 bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline u32 result(float x) { return x != x ? kNan : as_bits(x); }

inline s16 as_signed(u16 x) { return (s16)x; }
inline s32 as_signed(u32 x) { return (s32)x; }
inline s64 as_signed(u64 x) { return (s64)x; }

// ---- fp32 -----------------------------------------------------------------------------------------------------------------------------------------

// A NaN loses against a number, and -0 is less than +0.
inline u32 max_f32(u32 a, u32 b) {
  float x = as_float(a), y = as_float(b);
  if (x != x) return y != y ? kNan : b;
  if (y != y) return a;
  if (x == y) return a >> 31 ? b : a;
  return x > y ? a : b;
}
inline u32 min_f32(u32 a, u32 b) {
  float x = as_float(a), y = as_float(b);
  if (x != x) return y != y ? kNan : b;
  if (y != y) return a;
  if (x == y) return a >> 31 ? a : b;
  return x < y ? a : b;
}

inline bool ordered(float x, float y) { return x == x && y == y; }

// NaN gives 0, what is out of range the nearest integer that is not.
inline u32 s32_of_float(float whole) {
  if (whole != whole) return 0;
  if (whole >= 0x1p31f) return 0x7fffffffu;
  if (whole < -0x1p31f) return 0x80000000u;
  return (u32)(s32)whole;
}

// ---- narrow floats --------------------------------------------------------------------------------------------------------------------------------

inline u32 float_of_half(u16 bits) {
  _Float16 x;
  memcpy(&x, &bits, 2);
  return result((float)x);
}
inline u16 half_of_float(u32 a) {
  float x = as_float(a);
  _Float16 rounded = (_Float16)x;
  u16 bits;
  memcpy(&bits, &rounded, 2);
  return x != x ? 0x7fff : bits;
}
inline u16 bfloat_of_float(u32 a) {
  float x = as_float(a);
  return x != x ? 0x7fff : (u16)((a + 0x7fff + (a >> 16 & 1)) >> 16);
}

inline float float_of_e4m3(u8 bits) {
  int exponent = bits >> 3 & 15, fraction = bits & 7;
  if (exponent == 15 && fraction == 7) return as_float(kNan);
  float magnitude = exponent ? ldexpf(1 + fraction / 8.0f, exponent - 7) : ldexpf(fraction / 8.0f, -6);
  return bits & 0x80 ? -magnitude : magnitude;
}

// To the nearest, ties to even; beyond the largest, 448, the largest.
inline u8 e4m3_of_float(u32 a) {
  float x = as_float(a);
  if (x != x) return 0x7f;
  u8 sign = a >> 31 ? 0x80 : 0;
  double magnitude = fabs((double)x);
  if (magnitude >= 448) return sign | 0x7e;
  int exponent = -6;
  if (magnitude > 0x1p-6) {
    frexp(magnitude, &exponent);
    exponent -= 1;
  }
  double steps = nearbyint(ldexp(magnitude, 3 - exponent));  // of the last place: 8 to 16, below the normal numbers 0 to 8
  if (steps == 16) {
    steps = 8;
    exponent += 1;
  }
  return steps < 8 ? sign | (u8)steps : sign | (u8)((exponent + 7) << 3 | ((int)steps - 8));
}

// ---- bits and bytes -------------------------------------------------------------------------------------------------------------------------------

inline u8 saturated_s8(u32 a) {
  s32 x = as_signed(a);
  return (u8)(x < -128 ? -128 : x > 127 ? 127 : x);
}
// b in the lowest byte, a in the next; the halves of c move up.
inline u32 pack_s8(u32 a, u32 b, u32 c) { return (u32)saturated_s8(b) | (u32)saturated_s8(a) << 8 | c << 16; }

// A nibble of the selector names a byte of (b, a), or with its highest bit eight times that byte's sign.
inline u32 permuted_bytes(u32 a, u32 b, u32 selector) {
  u64 bytes = (u64)b << 32 | a;
  u32 out = 0;
  for (int i = 0; i < 4; i++) {
    u32 nibble = selector >> 4 * i & 15;
    u8 byte = (u8)(bytes >> 8 * (nibble & 7));
    if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
    out |= (u32)byte << 8 * i;
  }
  return out;
}

// The lowest `length` bits of a in place of those of b from `start` on.
inline u32 inserted_bits(u32 a, u32 b, u32 start, u32 length) {
  start &= 255, length &= 255;
  for (u32 i = 0; i < length && start + i < 32; i++) b = (b & ~(1u << (start + i))) | (a >> i & 1) << (start + i);
  return b;
}

// Shifts by the width or more give what shifting one by one would.
inline u32 shifted_left(u32 a, u32 n) { return n > 31 ? 0 : a << n; }
inline u64 shifted_left(u64 a, u32 n) { return n > 63 ? 0 : a << n; }
inline u32 shifted_right(u32 a, u32 n) { return n > 31 ? 0 : a >> n; }
inline u64 shifted_right(u64 a, u32 n) { return n > 63 ? 0 : a >> n; }
inline u32 shifted_right(s32 a, u32 n) { return (u32)(a >> (n > 31 ? 31 : n)); }
inline u64 shifted_right(s64 a, u32 n) { return (u64)(a >> (n > 63 ? 63 : n)); }

template <class T>
inline T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
inline T larger(T a, T b) {
  return a < b ? b : a;
}

}  // namespace ptx
