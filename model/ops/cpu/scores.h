// Queries times the keys of a chunk: numbers of either type in float32, lanes along the width, whose sums are taken in
// the end; or pairs of bfloat16 where the machine multiplies them, against keys that are turned, so that lanes are keys.
#pragma once
#include <cstdint>
#include <type_traits>

#include "linear_formats.h"
#include "pages.h"
#include "simd.h"

namespace isthmus {

constexpr int kKeys = 4;  // at a time, so that the sums of lanes are taken together

// Whether queries X meet keys C in pairs.
template <class X, class C>
#if defined(__AVX512BF16__)
constexpr bool kPairs = std::is_same_v<X, uint16_t> && std::is_same_v<C, uint16_t>;
#else
constexpr bool kPairs = false;
#endif

typedef float Quad __attribute__((vector_size(16)));

// The lane sums of four vectors.
inline Quad sums(const Floats (&a)[kKeys]) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  auto half = [](Floats x) {
    return _mm256_add_ps(_mm512_castps512_ps256((__m512)x),
                         _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)x), 1)));
  };
  __m256 b[kKeys] = {half(a[0]), half(a[1]), half(a[2]), half(a[3])};
#elif defined(__AVX2__) && defined(__FMA__)
  __m256 b[kKeys] = {(__m256)a[0], (__m256)a[1], (__m256)a[2], (__m256)a[3]};
#endif
#if defined(__AVX2__) && defined(__FMA__)
  __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(b[0], b[1]), _mm256_hadd_ps(b[2], b[3]));
  return (Quad)_mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
#else
  return Quad{sum(a[0]), sum(a[1]), sum(a[2]), sum(a[3])};
#endif
}

// scores[i][key] = q[i] · keys[key], for N queries and all keys of the chunk up to `count`. K: of the keys, as in simd.h.
template <int N, class K>
void score(const float* q, const void* const* keys, int64_t width, int count, float* scores) {
  for (int key = 0; key < count; key += kKeys) {
    Floats products[N][kKeys] = {};
    for (int64_t d = 0; d < width; d += kLanes) {
      Floats k[kKeys];
#pragma GCC unroll 4
      for (int j = 0; j < kKeys; j++) k[j] = numbers((const K*)keys[key + j] + d);
#pragma GCC unroll 4
      for (int i = 0; i < N; i++) {
        Floats x = load<Floats>(q + i * width + d);
#pragma GCC unroll 4
        for (int j = 0; j < kKeys; j++) products[i][j] = fma(x, k[j], products[i][j]);
      }
    }
    for (int i = 0; i < N; i++) store(scores + i * kChunk + key, sums(products[i]));
  }
}

// A square of kLanes vectors turned: the blocks beside its diagonal change places, smallest first.
inline void transpose(Words (&square)[kLanes]) {
  const Words lane = (Words)lane_numbers();
#pragma GCC unroll 4
  for (int half = 1; half < kLanes; half *= 2) {
    const Words first = (lane & half) ? lane - half + kLanes : lane, second = (lane & half) ? lane + kLanes : lane + half;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++)
      if (!(i & half)) {
        Words a = square[i], b = square[i + half];
        square[i] = __builtin_shuffle(a, b, first), square[i + half] = __builtin_shuffle(a, b, second);
      }
  }
}

// turned[word][key] = keys[key][word] of a chunk, for words of 4 bytes whose number is a multiple of kLanes.
inline void turn(const void* const* keys, int64_t words, float* turned) {
  for (int first = 0; first < kChunk; first += kLanes)
    for (int64_t word = 0; word < words; word += kLanes) {
      Words square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++) square[i] = load<Words>((const float*)keys[first + i] + word);
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++) store(turned + (word + i) * kChunk + first, square[i]);
    }
}

// As `score`, for pairs of bfloat16: q [N, words], keys turned [words, kChunk].
template <int N>
void score_pairs(const float* q, const float* keys, int64_t words, float* scores) {
  constexpr int kVectors = kChunk / kLanes;
  Floats sums[N][kVectors] = {};
  for (int64_t word = 0; word < words; word++, keys += kChunk)
#pragma GCC unroll 4
    for (int i = 0; i < N; i++)
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; j++)
        sums[i][j] = Bfloat16Pairs::add(sums[i][j], load<uint32_t>(q + i * words + word), load<Words>(keys + j * kLanes));
  for (int i = 0; i < N; i++)
    for (int j = 0; j < kVectors; j++) store(scores + i * kChunk + j * kLanes, sums[i][j]);
}

}  // namespace isthmus
