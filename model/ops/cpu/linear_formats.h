// How a line of weights is decoded and multiplied, one struct a kind: a line is 16 columns of 4 bytes, that is `kNumbers`
// numbers along the inputs of each, and `kParts` words of x meet it.
#pragma once
#include "simd.h"

namespace isthmus {

constexpr int kPanel = 16;  // columns
constexpr int kLine = 64;   // bytes
constexpr int kVectors = kPanel / kLanes;

struct Float32 {
  using Sum = Floats;
  static constexpr int kNumbers = 1, kParts = 1;
  static Floats part(const uint8_t* w, int) { return load<Floats>(w); }
  static Sum add(Sum sum, uint32_t x, Floats w) { return fma((Floats)splat(x), w, sum); }
};

struct Bfloat16 {
  using Sum = Floats;
  static constexpr int kNumbers = 2, kParts = 2;
  static Floats part(const uint8_t* w, int p) {
    return (Floats)(p == 0 ? load<Words>(w) << 16 : load<Words>(w) & 0xffff0000u);
  }
  static Sum add(Sum sum, uint32_t x, Floats w) { return fma((Floats)splat(x), w, sum); }
};

#if defined(__AVX512BF16__)
struct Bfloat16Pairs {  // x is bfloat16 as well
  using Sum = Floats;
  static constexpr int kNumbers = 2, kParts = 1;
  static Words part(const uint8_t* w, int) { return load<Words>(w); }
  static Sum add(Sum sum, uint32_t x, Words w) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)splat(x), (__m512bh)w);
  }
};
#else
using Bfloat16Pairs = Bfloat16;
#endif

// int8 numbers of x: as unsigned bytes 128 too large where the machine multiplies unsigned by signed (kOffset), as bytes,
// or as pairs of shorts.
struct Int8 {
  using Sum = Ints;
  static constexpr int kNumbers = 4;
#if defined(__AVX512VNNI__)
  static constexpr int kParts = 1, kOffset = 128;
  static Words part(const uint8_t* w, int) { return load<Words>(w); }
  static Sum add(Sum sum, uint32_t x, Words w) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)splat(x), (__m512i)w);
  }
#elif defined(__AVX2__)
  static constexpr int kParts = 2, kOffset = 0;
  static Words part(const uint8_t* w, int p) {  // bytes 0 and 2 of each word, or 1 and 3, as shorts
    Shorts pair = load<Shorts>(w);
    return (Words)((p == 0 ? pair << 8 : pair) >> 8);
  }
  static Sum add(Sum sum, uint32_t x, Words w) {
#if defined(__AVX512BW__)
    return sum + (Ints)_mm512_madd_epi16((__m512i)splat(x), (__m512i)w);
#else
    return sum + (Ints)_mm256_madd_epi16((__m256i)splat(x), (__m256i)w);
#endif
  }
#else
  static constexpr int kParts = 1, kOffset = 0;
  static Words part(const uint8_t* w, int) { return load<Words>(w); }
  static Sum add(Sum sum, uint32_t x, Words w) {
#if defined(__ARM_FEATURE_DOTPROD)
    return (Ints)vdotq_s32((int32x4_t)sum, (int8x16_t)w, (int8x16_t)splat(x));
#else
    Words xs = splat(x);
    for (int shift = 0; shift < 32; shift += 8) sum += ((Ints)(w << (24 - shift)) >> 24) * ((Ints)(xs << (24 - shift)) >> 24);
    return sum;
#endif
  }
#endif
};

// int4: bytes of x against nibbles.

// Four products a 32-bit lane, or two a 16-bit lane, which holds what a run of 64 comes to: at most 32 * 8 * 127.
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
using RunSum = Shorts;
inline RunSum add_nibbles(RunSum sum, uint32_t x, Words w) {
#if defined(__AVX512BW__)
  return sum + (Shorts)_mm512_maddubs_epi16((__m512i)w, (__m512i)splat(x));
#else
  return sum + (Shorts)_mm256_maddubs_epi16((__m256i)w, (__m256i)splat(x));
#endif
}
inline Ints total(RunSum sum) {
#if defined(__AVX512BW__)
  return (Ints)_mm512_madd_epi16((__m512i)sum, _mm512_set1_epi16(1));
#else
  return (Ints)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1));
#endif
}
#else
using RunSum = Ints;
inline RunSum add_nibbles(RunSum sum, uint32_t x, Words w) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)splat(x));
#elif defined(__ARM_FEATURE_DOTPROD)
  return (Ints)vdotq_s32((int32x4_t)sum, (int8x16_t)w, (int8x16_t)splat(x));
#else
  Words xs = splat(x);
  for (int shift = 0; shift < 32; shift += 8) sum += (Ints)(w >> shift & 0xff) * ((Ints)(xs << (24 - shift)) >> 24);
  return sum;
#endif
}
inline Ints total(RunSum sum) { return sum; }
#endif

// Numbers of x are bytes, with one scale for kRun of them along k. A weight is a nibble, 8 too large, which is made up for
// by starting each sum with -8 times the sum of x.
template <int Run>
struct Int4 {
  static constexpr int kNumbers = 8, kParts = 2, kRun = Run;
};
template <class F>
constexpr bool is_int4 = false;
template <int Run>
constexpr bool is_int4<Int4<Run>> = true;

}  // namespace isthmus
