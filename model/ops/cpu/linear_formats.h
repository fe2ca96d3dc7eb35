// How weights are decoded and multiplied, one struct a kind: a line is 16 columns of 4 bytes, and kRun numbers along the
// inputs of each take kLines lines.
#pragma once
#include <type_traits>

#include "simd.h"

namespace isthmus {

constexpr int kPanel = 16;  // columns
constexpr int kLine = 64;   // bytes
constexpr int kVectors = kPanel / kLanes;

struct Float32 {
  using Sum = Floats;
  static constexpr int kRun = 1, kParts = 1, kLines = 1;
  static Floats part(const uint8_t* w, int) { return load<Floats>(w); }
  static Sum add(Sum sum, uint32_t x, Floats w) { return fma((Floats)splat(x), w, sum); }
};

struct Bfloat16 {
  using Sum = Floats;
  static constexpr int kRun = 2, kParts = 2, kLines = 1;
  static Floats part(const uint8_t* w, int p) {
    return (Floats)(p == 0 ? load<Words>(w) << 16 : load<Words>(w) & 0xffff0000u);
  }
  static Sum add(Sum sum, uint32_t x, Floats w) { return fma((Floats)splat(x), w, sum); }
};

#if defined(__AVX512BF16__)
struct Bfloat16Pairs {  // x is bfloat16 as well
  using Sum = Floats;
  static constexpr int kRun = 2, kParts = 1, kLines = 1;
  static Words part(const uint8_t* w, int) { return load<Words>(w); }
  static Sum add(Sum sum, uint32_t x, Words w) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)splat(x), (__m512bh)w);
  }
};
#else
using Bfloat16Pairs = Bfloat16;
#endif

// Integers, unsigned by half their range. A run of 32 along the inputs takes `Bits` lines: of 8 bits, 8 lines of bytes; of
// fewer, 4 lines of nibbles, the one of input k beside that of k + 4, and Bits - 4 lines of what they have above. Numbers of
// x are signed bytes, with one scale for kRun of them; that a weight is kOffset too large is made up for by starting each
// sum with -kOffset times the sum of x.
template <int Bits, int Run>
struct Integers {
  static_assert((Bits == 4 || Bits == 5 || Bits == 6 || Bits == 8) && (Run == 32 || Run == 64));
  static constexpr int kBits = Bits, kRun = Run, kLines = Bits * Run / 32;
#if defined(__ARM_FEATURE_DOTPROD)
  static constexpr int kOffset = Bits == 8 ? 0 : 1 << (Bits - 1);
#else
  static constexpr int kOffset = 1 << (Bits - 1);
#endif
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
  // Two products a 16-bit lane hold what a run of 64 nibbles comes to: at most 32 * 8 * 127. Bytes are multiplied as shorts.
  static constexpr int kParts = Bits == 8 ? 2 : 1;
  using Sum = std::conditional_t<Bits == 4, Shorts, Ints>;
#else
  static constexpr int kParts = 1;  // words of x for four numbers
  using Sum = Ints;
#endif

  // The four numbers of each column that word `q` of a run of 32 holds. w: the run's lines of some columns.
  static Words part(const uint8_t* w, int q) {
    if constexpr (Bits == 8) return load<Words>(w + q * kLine) ^ (kOffset ? 0u : 0x80808080u);
    Words line = load<Words>(w + q / 2 * kLine);
    Words low = (q % 2 == 0 ? line : line >> 4) & 0x0f0f0f0fu;
    if constexpr (Bits == 4) return low;
    if constexpr (Bits == 5) {
      Words high = load<Words>(w + 4 * kLine);
      return low | ((q < 4 ? high << (4 - q) : high >> (q - 4)) & 0x10101010u);
    }
    Words high = load<Words>(w + (4 + q / 4) * kLine);
    return low | ((q % 4 < 2 ? high << (4 - q % 4 * 2) : high >> (q % 4 * 2 - 4)) & 0x30303030u);
  }

  // x: kParts words.
  static Sum add(Sum sum, const uint32_t* x, int step, Words w) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)splat(x[0]));
#elif defined(__AVX2__)
    if constexpr (Bits == 8) {
      sum += madd(splat(x[0]), w & 0x00ff00ffu);
      return sum + madd(splat(x[step]), (w >> 8) & 0x00ff00ffu);
    } else if constexpr (Bits == 4) {
      return sum + maddubs(w, splat(x[0]));
    } else {
      return sum + madd((Words)maddubs(w, splat(x[0])), splat(0x00010001u));
    }
#elif defined(__ARM_FEATURE_DOTPROD)
    return (Ints)vdotq_s32((int32x4_t)sum, (int8x16_t)w, (int8x16_t)splat(x[0]));
#else
    Words xs = splat(x[0]);
    for (int shift = 0; shift < 32; shift += 8) sum += (Ints)(w >> shift & 0xff) * ((Ints)(xs << (24 - shift)) >> 24);
    return sum;
#endif
  }

  static Ints total(Sum sum) {
    if constexpr (sizeof(sum[0]) == 4) return sum;
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
    else return madd((Words)sum, splat(0x00010001u));
#endif
  }
};
template <class F>
constexpr bool is_integers = false;
template <int Bits, int Run>
constexpr bool is_integers<Integers<Bits, Run>> = true;

}  // namespace isthmus
