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

// Numbers of one row as the kernel reads them: `kParts` words a line, and a scale, or for int4 a scale and the
// start of its sum for every run.
struct Rows {
  int64_t rows, inputs, lines;
  int tiles;
  std::vector<int64_t> places;  // of each row in x and y: rows of zeros, which padding is, are left out
  std::unique_ptr<uint32_t[]> words;
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

// The largest |x| of [first, last), or NaN when one of them is not finite.
template <class X>
float largest(const X* x, int64_t first, int64_t last) {
  Floats tops = {}, probes = {};
  int64_t i = first;
  for (; i + kLanes <= last; i += kLanes) {
    Floats value = numbers(x + i);
    tops = max(tops, (Floats)((Words)value & 0x7fffffffu));
    probes += value * splat(0.f);  // NaN once a number is not finite
  }
  float top = largest(tops), probe = sum(probes);
  for (; i < last; i++) {
    top = std::max(top, std::fabs(number(x, i)));
    probe += number(x, i) * 0;
  }
  return top + probe;
}

// Puts round(x * 127 / top) of [first, last) into `to`, and the factor that undoes it into `scale`.
template <class X>
void quantize(const X* x, int64_t first, int64_t last, int8_t* to, float* scale) {
  const float top = largest(x, first, last), inverse = 127.f / top;
  *scale = top / 127.f;  // NaN for a row that isn't finite: so is its result
  if (!(top > 0) || !std::isfinite(inverse)) {
    std::fill(to + first, to + std::max(first, last), int8_t(0));
    return;
  }
  const float nearest = 12582912.f;  // 1.5 * 2^23: what is added to it is rounded to an integer, ties to even
  int64_t i = first;
  for (; i + kLanes <= last; i += kLanes) {
    Ints rounded = (Ints)(numbers(x + i) * splat(inverse) + splat(nearest)) & 0xff;
    store(to + i, __builtin_convertvector(rounded, SmallBytes));
  }
  for (; i < last; i++) to[i] = int8_t(std::lrintf(number(x, i) * inverse));
}

// What a sum of (nibble - 8) * x starts with, as the bits of a lane of RunSum.
inline uint32_t start_of(const int8_t* x, int run) {
  int all = 0, odd = 0;
  for (int i = 0; i < run; i++) all += x[i];
  if (sizeof(RunSum{}[0]) == 4) return uint32_t(-8 * all);
  for (int i = 2; i < run; i += 4) odd += x[i] + x[i + 1];  // shorts: the pairs that are added to the high ones
  return uint32_t(uint16_t(-8 * (all - odd))) | uint32_t(uint16_t(-8 * odd)) << 16;
}

template <class F, class X>
void pack_row(Rows& rows, const X* x, int64_t row, int tile) {
  const int64_t first = rows.first(tile), m = row - first, size = rows.size(tile);
  uint32_t* to = rows.words.get() + first * rows.lines * F::kParts + m;
  const int64_t inputs = rows.inputs;
  if constexpr (std::is_same_v<F, Int8> || is_int4<F>) {
    thread_local std::vector<int8_t> bytes;
    bytes.assign(rows.lines * F::kNumbers, 0);
    if constexpr (std::is_same_v<F, Int8>) {
      quantize(x, 0, inputs, bytes.data(), &rows.scales[row]);
      for (int64_t line = 0; line < rows.lines; line++) {
        const int8_t* b = bytes.data() + 4 * line;
        if constexpr (F::kParts == 2) {
          to[(2 * line) * size] = uint16_t(int16_t(b[0])) | uint32_t(uint16_t(int16_t(b[2]))) << 16;
          to[(2 * line + 1) * size] = uint16_t(int16_t(b[1])) | uint32_t(uint16_t(int16_t(b[3]))) << 16;
        } else {
          static_assert(F::kOffset == 0 || F::kOffset == 128);
          uint32_t word;
          std::memcpy(&word, b, 4);
          to[line * size] = word ^ F::kOffset * 0x01010101u;
        }
      }
    } else {
      const int64_t runs = rows.lines * F::kNumbers / F::kRun;
      for (int64_t run = 0; run < runs; run++) {
        int64_t begin = run * F::kRun, at = first * runs + run * size + m;
        quantize(x, begin, std::min(inputs, begin + F::kRun), bytes.data(), &rows.scales[at]);
        rows.starts[at] = start_of(bytes.data() + begin, F::kRun);
      }
      for (int64_t i = 0; i < 2 * rows.lines; i++) std::memcpy(to + i * size, bytes.data() + 4 * i, 4);
    }
  } else if constexpr (F::kParts == F::kNumbers) {
    for (int64_t k = 0; k < rows.lines * F::kNumbers; k++) to[k * size] = k < inputs ? bits(number(x, k)) : 0;
  } else {
    static_assert(F::kNumbers == 2);
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
Rows pack(const X* x, std::vector<int64_t> places, int64_t inputs, int64_t lines) {
  const int64_t count = int64_t(places.size());
  Rows rows{count, inputs, lines, int((count + kRows - 1) / kRows), std::move(places), nullptr, nullptr, nullptr};
  rows.words.reset(new uint32_t[count * lines * F::kParts]);
  if constexpr (std::is_same_v<F, Int8>) rows.scales.reset(new float[count]);
  if constexpr (is_int4<F>) {
    rows.scales.reset(new float[count * lines * F::kNumbers / F::kRun]);
    rows.starts.reset(new uint32_t[count * lines * F::kNumbers / F::kRun]);
  }
  auto task = [&](int64_t tile) {
    for (int64_t row = rows.first(int(tile)); row < rows.first(int(tile) + 1); row++)
      pack_row<F>(rows, x + rows.places[row] * inputs, row, int(tile));
  };
  if (count * inputs < 1 << 13)
    for (int tile = 0; tile < rows.tiles; tile++) task(tile);
  else
    Pool::get().run(rows.tiles, task);
  return rows;
}

}  // namespace isthmus
