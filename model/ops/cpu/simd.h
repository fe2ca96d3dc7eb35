// Vectors of the machine that this is compiled for: AVX-512, AVX2, NEON, or plain C++ that the compiler lowers.
// The order of every sum is fixed here, so a kernel's result doesn't depend on how its loops are tiled.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace isthmus {

#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int kLanes = 16;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// kLanes numbers; `Shorts` and `Bytes` fill as much as 32-bit ones do.
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef int16_t Shorts __attribute__((vector_size(4 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfWords __attribute__((vector_size(2 * kLanes)));
typedef uint8_t SmallBytes __attribute__((vector_size(kLanes)));
typedef int8_t SmallInts __attribute__((vector_size(kLanes)));

inline int64_t round_up(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

template <class V>
inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class V>
inline void store(void* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

inline Floats splat(float x) { return x - Floats{}; }
inline Words splat(uint32_t x) { return x - Words{}; }

inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
  return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  Floats out;
  for (int i = 0; i < kLanes; i++) out[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return out;
#endif
}

inline Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }

inline float from_bits(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline float from_bf16(uint16_t x) { return from_bits(uint32_t(x) << 16); }

// Words of half as many bits, and back. gcc 12 makes five instructions of one.
inline Words widen(HalfWords x) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return (Words)_mm512_cvtepu16_epi32((__m256i)x);
#else
  return __builtin_convertvector(x, Words);
#endif
}
inline HalfWords narrow(Words x) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return (HalfWords)_mm512_cvtepi32_epi16((__m512i)x);
#else
  return __builtin_convertvector(x, HalfWords);
#endif
}

// The lowest byte of each.
inline SmallBytes to_bytes(Ints x) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return (SmallBytes)_mm512_cvtepi32_epi8((__m512i)x);
#else
  return __builtin_convertvector(x, SmallBytes);
#endif
}

// kLanes bfloat16 numbers.
inline Floats load_bf16(const void* from) { return (Floats)(widen(load<HalfWords>(from)) << 16); }

// kLanes float16 numbers, subnormal ones too, whatever the thread does with those of float32.
inline Floats load_f16(const void* from) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return (Floats)_mm512_cvtph_ps((__m256i)load<HalfWords>(from));
#elif defined(__AVX2__) && defined(__F16C__)
  return (Floats)_mm256_cvtph_ps((__m128i)load<HalfWords>(from));
#else
  Words bits = widen(load<HalfWords>(from)), size = bits & 0x7fff;
  Words tiny = (Words)(to_floats((Ints)size) * splat(0x1p-24f)), normal = (size << 13) + (112u << 23);
  return (Floats)((size < 0x400 ? tiny : normal) | (bits & 0x8000) << 16);
#endif
}

#if defined(__AVX2__)
// Products of 16-bit numbers, added in pairs; of unsigned and signed bytes, which must not come to more than 16 bits.
inline Ints madd(Words a, Words b) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#else
  return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
}
inline Shorts maddubs(Words a, Words b) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return (Shorts)_mm512_maddubs_epi16((__m512i)a, (__m512i)b);
#else
  return (Shorts)_mm256_maddubs_epi16((__m256i)a, (__m256i)b);
#endif
}
#endif

// To nearest even; NaN stays NaN.
inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void store_bf16(void* to, Floats x) {
  Words bits = (Words)x, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  Words quiet = (bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded;
  store(to, narrow(quiet));
}

inline Floats max(Floats a, Floats b) { return a > b ? a : b; }
inline Ints max(Ints a, Ints b) { return a > b ? a : b; }

inline Ints lane_numbers() {
  Ints lane;
  for (int i = 0; i < kLanes; i++) lane[i] = i;
  return lane;
}

// Lanes taken together in one fixed order: halves until one is left.
template <class V, class F>
inline auto over_lanes(V x, F both) {
#pragma GCC unroll 4
  for (int half = kLanes / 2; half; half /= 2) x = both(x, __builtin_shuffle(x, lane_numbers() ^ half));
  return x[0];
}
inline float sum(Floats x) {
  return over_lanes(x, [](Floats a, Floats b) { return a + b; });
}
inline float largest(Floats x) {
  return over_lanes(x, [](Floats a, Floats b) { return max(a, b); });
}

// Whether any lane of a comparison is true.
inline bool any(Ints x) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return _mm512_test_epi32_mask((__m512i)x, (__m512i)x);
#elif defined(__AVX2__) && defined(__FMA__)
  return _mm256_movemask_epi8((__m256i)x);
#else
  return over_lanes(x, [](Ints a, Ints b) { return a | b; });
#endif
}

// e^x for x <= 0 within 2 ulp; 0 below -87. The range reduction and polynomial of Cephes' expf.
inline Floats exp(Floats x) {
  Floats lowest = splat(-87.f);
  Ints tiny = x < lowest;
  x = lowest > x ? lowest : x;  // NaN stays NaN
  Floats n = fma(x, splat(1.44269504f), splat(12582912.f)) - splat(12582912.f);  // to the nearest integer
  x = fma(n, splat(-0.693359375f), x);
  x = fma(n, splat(2.12194440e-4f), x);
  Floats y = splat(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    y = fma(y, x, splat(c));
  y = fma(y, x * x, x + splat(1.f));
  Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  return tiny ? Floats{} : y * (Floats)power;
}

// Numbers of an array in float32, and back: float, or uint16_t for bfloat16; vectors of int8_t are only read.
inline float number(const float* x, int64_t i) { return x[i]; }
inline float number(const uint16_t* x, int64_t i) { return from_bf16(x[i]); }
inline Floats numbers(const float* x) { return load<Floats>(x); }
inline Floats numbers(const uint16_t* x) { return load_bf16(x); }
inline Floats numbers(const int8_t* x) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)x)));
#elif defined(__AVX2__) && defined(__FMA__)
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)x)));
#else
  return to_floats(__builtin_convertvector(load<SmallInts>(x), Ints));
#endif
}
inline void put(float* to, int64_t i, float x) { to[i] = x; }
inline void put(uint16_t* to, int64_t i, float x) { to[i] = to_bf16(x); }
inline void put(float* to, Floats x) { store(to, x); }
inline void put(uint16_t* to, Floats x) { store_bf16(to, x); }

}  // namespace isthmus
