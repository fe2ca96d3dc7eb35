// The rows of x as the kernel reads them: in tiles, word by word, rounded to int8 where the weights are integers.
#pragma once
#include <algorithm>
#include <cmath>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "linear_formats.h"
#include "pool.h"
#include "simd.h"

namespace isthmus {

constexpr int kRows = kLanes == 16 ? 12 : 6;  // of a tile, at most: half as many as there are registers for sums

// Numbers of rows as the kernel reads them: `words` words a row, and against integers a scale and the start of the sum for
// every one of its runs.
struct Rows {
  int64_t rows, inputs, lines, width, runs;
  int tiles;
  std::vector<int64_t> places;  // of each row in x and y: rows of zeros, which padding is, are left out
  std::unique_ptr<uint32_t[]> words;  // `width` a row
  std::unique_ptr<float[]> scales;
  std::unique_ptr<uint32_t[]> starts;

  int64_t first(int tile) const { return rows * tile / tiles; }
  int size(int tile) const { return int(first(tile + 1) - first(tile)); }
};

inline uint32_t bits(float x) {
  uint32_t word;
  std::memcpy(&word, &x, 4);
  return word;
}
inline uint32_t bits(uint16_t x) { return x; }

// The largest |x| of a run, or NaN when one of its numbers is not finite.
template <int N>
float largest(const Floats (&x)[N]) {
  Ints tops = {};  // as bits, which are in the order of the numbers they stand for
#pragma GCC unroll 16
  for (int i = 0; i < N; i++) tops = max(tops, (Ints)((Words)x[i] & 0x7fffffffu));
  const int top = over_lanes(tops, [](Ints a, Ints b) { return max(a, b); });
  return top < 0x7f800000 ? from_bits(uint32_t(top)) : NAN;
}

// Each number of a run turns into a sum of all, with signs: the run times a Hadamard matrix, so that a single large one
// doesn't take the scale from the others. Weights that are kept so too make the products what they were (as QuaRot does with
// whole rows: Ashkboos et al. 2024, arXiv 2404.00456).
template <int N>
void rotate(Floats (&x)[N]) {
  const Ints lane = lane_numbers();
#pragma GCC unroll 4
  for (int half = 1; half < kLanes; half *= 2) {
    const Words signs = (Words)((lane & half) != 0) & 0x80000000u;
#pragma GCC unroll 16
    for (int i = 0; i < N; i++) x[i] = __builtin_shuffle(x[i], lane ^ half) + (Floats)((Words)x[i] ^ signs);
  }
#pragma GCC unroll 5
  for (int half = 1; half < N; half *= 2)
#pragma GCC unroll 16
    for (int i = 0; i < N; i++)
      if (!(i & half)) {
        const Floats a = x[i], b = x[i + half];
        x[i] = a + b, x[i + half] = a - b;
      }
}

// A run's numbers from `begin`, and zeros from `end` on.
template <class X, int N>
void read(const X* x, int64_t begin, int64_t end, Floats (&to)[N]) {
  if (begin + N * kLanes <= end) {
#pragma GCC unroll 16
    for (int i = 0; i < N; i++) to[i] = numbers(x + begin + i * kLanes);
  } else {
    alignas(64) float padded[N * kLanes] = {};
    for (int64_t i = begin; i < end; i++) padded[i - begin] = number(x, i);
    for (int i = 0; i < N; i++) to[i] = load<Floats>(padded + i * kLanes);
  }
}

// Puts round(x * 127 / top) of a run into `to`, and the factor that undoes it into `scale`. Returns the sum of what it put.
template <int N>
int quantize(const Floats (&x)[N], int8_t* to, float* scale) {
  const float top = largest(x), inverse = 127.f / top;
  *scale = top / 127.f;  // NaN for a row that isn't finite: so is its result
  if (!(top > 0) || !std::isfinite(inverse)) {
    std::fill(to, to + N * kLanes, int8_t(0));
    return 0;
  }
  const float nearest = 12582912.f;  // 1.5 * 2^23: what is added to it is rounded to an integer, ties to even
  Ints sums = {};
#pragma GCC unroll 16
  for (int i = 0; i < N; i++) {
    const Ints rounded = (Ints)(x[i] * splat(inverse) + splat(nearest)) - (Ints)splat(nearest);
    store(to + i * kLanes, to_bytes(rounded));
    sums += rounded;
  }
  return over_lanes(sums, [](Ints a, Ints b) { return a + b; });
}

// What a sum of (weight - offset) * x starts with, as the bits of a lane of the sum. all: the sum of x.
template <class F>
uint32_t start_of(const int8_t* x, int all) {
  if (sizeof(typename F::Sum{}[0]) == 4) return uint32_t(-F::kOffset * all);
  int odd = 0;
  for (int i = 2; i < F::kRun; i += 4) odd += x[i] + x[i + 1];  // shorts: the pairs that are added to the high ones
  return uint32_t(uint16_t(-8 * (all - odd))) | uint32_t(uint16_t(-8 * odd)) << 16;
}

template <class F, class X>
void pack_integers(Rows& rows, const X* x, int64_t row, int tile, bool rotated) {
  constexpr int kRun = F::kRun;
  const int64_t first = rows.first(tile), m = row - first, size = rows.size(tile);
  uint32_t* to = rows.words.get() + first * rows.width + m;
  for (int64_t run = 0; run < rows.runs; run++) {
    const int64_t at = first * rows.runs + run * size + m;
    Floats numbers_of_run[kRun / kLanes];
    alignas(64) int8_t bytes[kRun];
    read(x, run * kRun, rows.inputs, numbers_of_run);
    if (rotated) rotate(numbers_of_run);
    rows.starts[at] = start_of<F>(bytes, quantize(numbers_of_run, bytes, &rows.scales[at]));
#pragma GCC unroll 4
    for (int i = 0; i < kRun; i += 4) {
      const int8_t* b = bytes + i;
      if constexpr (F::kParts == 2) {
        *to = uint16_t(int16_t(b[0])) | uint32_t(uint16_t(int16_t(b[2]))) << 16, to += size;
        *to = uint16_t(int16_t(b[1])) | uint32_t(uint16_t(int16_t(b[3]))) << 16, to += size;
      } else {
        std::memcpy(to, b, 4), to += size;
      }
    }
  }
}

template <class F, class X>
void pack_floats(Rows& rows, const X* x, int64_t row, int tile) {
  const int64_t first = rows.first(tile), m = row - first, size = rows.size(tile), inputs = rows.inputs;
  uint32_t* to = rows.words.get() + first * rows.width + m;
  if constexpr (F::kParts == F::kRun) {
    for (int64_t k = 0; k < rows.width; k++) to[k * size] = k < inputs ? bits(number(x, k)) : 0;
  } else {
    static_assert(F::kRun == 2);
    auto half = [](X number) -> uint32_t {
      if constexpr (std::is_same_v<X, uint16_t>) return number;
      else return to_bf16(number);
    };
    for (int64_t line = 0; line < inputs / 2; line++) to[line * size] = half(x[2 * line]) | half(x[2 * line + 1]) << 16;
    if (inputs % 2) to[inputs / 2 * size] = half(x[inputs - 1]);
  }
}

template <class X>
bool is_zero(const X* x, int64_t size) {
  uint32_t any = 0;
  for (int64_t i = 0; i < size && !any; i += 256)
    for (int64_t j = i; j < std::min(size, i + 256); j++) any |= bits(x[j]);
  return any == 0;
}

template <class F, class X>
Rows pack(const X* x, std::vector<int64_t> places, int64_t inputs, int64_t lines, bool rotated) {
  const int64_t count = int64_t(places.size());
  Rows rows{count, inputs, lines};
  rows.tiles = int((count + kRows - 1) / kRows), rows.places = std::move(places);
  if constexpr (is_integers<F>) {
    rows.runs = lines / F::kLines, rows.width = rows.runs * F::kRun / 4 * F::kParts;
    rows.scales.reset(new float[count * rows.runs]);
    rows.starts.reset(new uint32_t[count * rows.runs]);
  } else {
    rows.width = lines * F::kParts;
  }
  rows.words.reset(new uint32_t[count * rows.width]);
  auto task = [&](int64_t tile) {
    for (int64_t row = rows.first(int(tile)); row < rows.first(int(tile) + 1); row++) {
      const X* from = x + rows.places[row] * inputs;
      if constexpr (is_integers<F>)
        pack_integers<F>(rows, from, row, int(tile), rotated);
      else
        pack_floats<F>(rows, from, row, int(tile));
    }
  };
  if (count * inputs < 1 << 13)
    for (int tile = 0; tile < rows.tiles; tile++) task(tile);
  else
    Pool::get().run(rows.tiles, task);
  return rows;
}

}  // namespace isthmus
