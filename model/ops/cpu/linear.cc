// y[row, n] = sum over k of x[row, k] * w[k, n], for weights laid out by model/ops/cpu/linear.py: panels of 16 columns, each
// a sequence of lines of 64 bytes, 4 bytes a column: 1 float32, 2 bfloat16, 4 int8 or 8 int4 along k.
//
// A row is multiplied in one order of k by one accumulator a column, however many rows there are and however they are
// tiled, so its result depends on that row alone.
//
// The tiling follows Goto and van de Geijn 2008 (doi 10.1145/1356052.1356053): rows packed in tiles of up to kRows, the
// panels that a thread works on kept in its L2 while every tile passes over them.
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "pool.h"
#include "simd.h"
#include "xla/ffi/api/ffi.h"

namespace isthmus {
namespace {

namespace ffi = xla::ffi;

constexpr int kPanel = 16;
constexpr int kLine = 64;
constexpr int kVectors = kPanel / kLanes;
constexpr int kRows = 6;
constexpr int64_t kPanelBytes = 192 << 10;  // of weights that one thread keeps in L2

// Numbers of one row as the kernel reads them: `kParts` words a line, and a scale, or for int4 a scale and the
// start of its sum for every run.
struct Rows {
  int64_t rows, inputs, lines;
  int tiles;
  std::unique_ptr<uint32_t[]> words;
  std::unique_ptr<float[]> scales;
  std::unique_ptr<uint32_t[]> starts;

  int64_t first(int tile) const { return rows * tile / tiles; }
  int size(int tile) const { return int(first(tile + 1) - first(tile)); }
};

// ---- formats: how a line is decoded and multiplied. kParts words of x meet one line.

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

// ---- the kernel: `MR` rows by `NB` panels

// Keeps additions to a sum in the order they are written: moved apart, their operands don't fit into registers.
template <class V>
inline void pin(V& sum) {
#if defined(__x86_64__)
  asm("" : "+x"(sum));
#endif
}

template <class F, int MR, int NB>
inline void multiply(const uint32_t* x, const uint8_t* w, int64_t panel_bytes, int64_t lines,
                     typename F::Sum (&sums)[MR][NB * kVectors]) {
  for (int64_t line = 0; line < lines; line++, w += kLine, x += F::kParts * MR) {
    if constexpr (MR <= 2)
      for (int b = 0; b < NB; b++) __builtin_prefetch(w + b * panel_bytes + 1024);
#pragma GCC unroll 4
    for (int p = 0; p < F::kParts; p++) {
      decltype(F::part(w, 0)) parts[NB * kVectors];
#pragma GCC unroll 16
      for (int j = 0; j < NB * kVectors; j++)
        parts[j] = F::part(w + j / kVectors * panel_bytes + j % kVectors * (4 * kLanes), p);
#pragma GCC unroll 16
      for (int m = 0; m < MR; m++)
#pragma GCC unroll 16
        for (int j = 0; j < NB * kVectors; j++) {
          sums[m][j] = F::add(sums[m][j], x[p * MR + m], parts[j]);
          if constexpr (std::is_same_v<F, Int8>) pin(sums[m][j]);
        }
    }
  }
}

struct Out {
  float* y;
  int64_t outputs;

  // Writes `value` to kLanes columns from `column` of a row, as far as there are columns.
  void put(int64_t row, int64_t column, Floats value) const {
    float* to = y + row * outputs + column;
    if (column + kLanes <= outputs)
      store(to, value);
    else
      for (int i = 0; column + i < outputs; i++) to[i] = value[i];
  }
};

struct Weights {
  const uint8_t* lines;
  const void* scales = nullptr;  // int8: float32[padded outputs]; int4: bfloat16[groups, padded outputs]
  const int32_t* sums = nullptr;  // int8: int32[padded outputs], of each column
  int64_t padded = 0;             // outputs
  int64_t group = 0;              // of int4, numbers along k
};

template <class F, int MR, int NB>
void tile(const Rows& rows, int index, const Weights& w, int64_t panel, const Out& out) {
  typename F::Sum sums[MR][NB * kVectors] = {};
  const int64_t panel_bytes = rows.lines * kLine, first = rows.first(index);
  multiply<F, MR, NB>(rows.words.get() + first * rows.lines * F::kParts, w.lines + panel * panel_bytes, panel_bytes,
                      rows.lines, sums);
  for (int m = 0; m < MR; m++)
    for (int j = 0; j < NB * kVectors; j++) {
      int64_t column = panel * kPanel + j * kLanes;
      Floats value;
      if constexpr (std::is_same_v<F, Int8>) {
        Ints sum = sums[m][j] - F::kOffset * load<Ints>(w.sums + column);
        value = to_floats(sum) * load<Floats>((const float*)w.scales + column) * splat(rows.scales[first + m]);
      } else {
        value = sums[m][j];
      }
      out.put(first + m, column, value);
    }
}

// ---- int4: bytes of x against nibbles, a run of kRun numbers at a time

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

template <class F, int MR, int NB>
void tile4(const Rows& rows, int index, const Weights& w, int64_t panel, const Out& out) {
  constexpr int kLines = F::kRun / F::kNumbers;
  Floats totals[MR][NB * kVectors] = {};
  const int64_t panel_bytes = rows.lines * kLine, first = rows.first(index), runs = rows.lines / kLines;
  const uint32_t* x = rows.words.get() + first * rows.lines * F::kParts;
  const float* x_scales = rows.scales.get() + first * runs;
  const uint32_t* starts = rows.starts.get() + first * runs;
  const uint8_t* line = w.lines + panel * panel_bytes;
  for (int64_t run = 0; run < runs; run++, x_scales += MR, starts += MR) {
    RunSum sums[MR][NB * kVectors];
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 16
      for (int j = 0; j < NB * kVectors; j++) sums[m][j] = (RunSum)splat(starts[m]);
#pragma GCC unroll 2
    for (int l = 0; l < kLines; l++, line += kLine, x += F::kParts * MR) {
      if constexpr (MR <= 2)
        for (int b = 0; b < NB; b++) __builtin_prefetch(line + b * panel_bytes + 1024);
#pragma GCC unroll 2
      for (int p = 0; p < 2; p++) {
        Words parts[NB * kVectors];
#pragma GCC unroll 16
        for (int j = 0; j < NB * kVectors; j++) {
          Words bytes = load<Words>(line + j / kVectors * panel_bytes + j % kVectors * (4 * kLanes));
          parts[j] = (p == 0 ? bytes : bytes >> 4) & 0x0f0f0f0fu;
        }
#pragma GCC unroll 16
        for (int m = 0; m < MR; m++)
#pragma GCC unroll 16
          for (int j = 0; j < NB * kVectors; j++) {
            sums[m][j] = add_nibbles(sums[m][j], x[p * MR + m], parts[j]);

          }
      }
    }
    const uint16_t* scales = (const uint16_t*)w.scales + run * F::kRun / w.group * w.padded + panel * kPanel;
#pragma GCC unroll 16
    for (int j = 0; j < NB * kVectors; j++) {
      Floats scale = load_bf16(scales + j * kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < MR; m++) {
        totals[m][j] = fma(to_floats(total(sums[m][j])), scale * splat(x_scales[m]), totals[m][j]);
      }
    }
  }
  for (int m = 0; m < MR; m++)
    for (int j = 0; j < NB * kVectors; j++) out.put(first + m, panel * kPanel + j * kLanes, totals[m][j]);
}

// ---- packing rows

inline float number(const float* x, int64_t i) { return x[i]; }
inline float number(const uint16_t* x, int64_t i) { return from_bf16(x[i]); }

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// The largest |x| of [first, last), or NaN when one of them is not finite.
template <class X>
float largest(const X* x, int64_t first, int64_t last) {
  float top = 0, probe = 0;
  for (int64_t i = first; i < last; i++) {
    float value = number(x, i);
    top = std::max(top, std::fabs(value));
    probe += value * 0;  // NaN once a number is not finite
  }
  return top + probe;
}

// Puts round(x * 127 / top) of [first, last) into `to`, and the factor that undoes it into `scale`.
template <class X>
void quantize(const X* x, int64_t first, int64_t last, int8_t* to, float* scale) {
  float top = largest(x, first, last);
  bool usable = top > 0 && std::isfinite(top);
  float inverse = usable ? 127.f / top : 0.f;
  *scale = top / 127.f;  // NaN for a row that isn't finite: so is its result
  if (!std::isfinite(inverse)) inverse = 0;
  for (int64_t i = first; i < last; i++) to[i] = usable ? int8_t(std::lrintf(number(x, i) * inverse)) : int8_t(0);
}

// What a sum of (nibble - 8) * x starts with, as the bits of a lane of RunSum.
inline uint32_t start_of(const int8_t* x, int run) {
  int sums[2] = {0, 0};
  for (int i = 0; i < run; i++) sums[i / 2 % 2] -= 8 * x[i];
  if (sizeof(RunSum{}[0]) == 2) return uint32_t(uint16_t(sums[0])) | uint32_t(uint16_t(sums[1])) << 16;
  return uint32_t(sums[0] + sums[1]);
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
          uint32_t word = 0;
          for (int i = 0; i < 4; i++) word |= uint32_t(uint8_t(b[i] + F::kOffset)) << 8 * i;
          to[line * size] = word;
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
    for (int64_t k = 0; k < rows.lines * F::kNumbers; k++) to[k * size] = k < inputs ? bits_of(number(x, k)) : 0;
  } else {
    static_assert(F::kNumbers == 2);
    for (int64_t line = 0; line < rows.lines; line++) {
      uint32_t low = to_bf16(number(x, 2 * line));
      uint32_t high = 2 * line + 1 < inputs ? to_bf16(number(x, 2 * line + 1)) : 0;
      to[line * size] = low | high << 16;
    }
  }
}

template <class F, class X>
Rows pack(const X* x, int64_t count, int64_t inputs, int64_t lines) {
  Rows rows{count, inputs, lines, int((count + kRows - 1) / kRows), nullptr, nullptr, nullptr};
  rows.words.reset(new uint32_t[count * lines * F::kParts]);
  if constexpr (std::is_same_v<F, Int8>) rows.scales.reset(new float[count]);
  if constexpr (is_int4<F>) {
    rows.scales.reset(new float[count * lines * F::kNumbers / F::kRun]);
    rows.starts.reset(new uint32_t[count * lines * F::kNumbers / F::kRun]);
  }
  auto task = [&](int64_t tile) {
    for (int64_t row = rows.first(int(tile)); row < rows.first(int(tile) + 1); row++)
      pack_row<F>(rows, x + row * inputs, row, int(tile));
  };
  if (count * inputs < 1 << 15)
    for (int tile = 0; tile < rows.tiles; tile++) task(tile);
  else
    Pool::get().run(rows.tiles, task);
  return rows;
}

// ---- dispatch

template <class F, int MR, int NB>
void one(const Rows& rows, int index, const Weights& w, int64_t panel, const Out& out) {
  if constexpr (is_int4<F>)
    tile4<F, MR, NB>(rows, index, w, panel, out);
  else
    tile<F, MR, NB>(rows, index, w, panel, out);
}

// Panels at a time for a tile of `mr` rows: as many sums as registers hold, for enough of them to hide an addition's latency.
constexpr int kRegisters = kLanes == 16 || kLanes == 4 ? 24 : 12;
constexpr int panels_for(int mr) {
  int n = kRegisters / (mr * kVectors);
  return n >= 4 ? 4 : n >= 2 ? 2 : 1;
}

template <class F, int MR>
void all_panels(const Rows& rows, int index, const Weights& w, int64_t first, int64_t last, const Out& out) {
  constexpr int kNB = panels_for(MR);
  for (; first + kNB <= last; first += kNB) one<F, MR, kNB>(rows, index, w, first, out);
  for (; first < last; first++) one<F, MR, 1>(rows, index, w, first, out);
}

template <class F>
void run(const Rows& rows, const Weights& w, const Out& out) {
  const int64_t panels = w.padded / kPanel, panel_bytes = rows.lines * kLine;
  const int threads = Pool::get().threads();
  int64_t chunk = std::clamp<int64_t>(kPanelBytes / panel_bytes, 1, std::max<int64_t>(1, panels / (8 * threads)));
  if (rows.tiles == 1) chunk = (chunk + 3) / 4 * 4;
  Pool::get().run((panels + chunk - 1) / chunk, [&](int64_t i) {
    const int64_t first = i * chunk, last = std::min(panels, first + chunk);
    for (int index = 0; index < rows.tiles; index++) switch (rows.size(index)) {
        case 1: all_panels<F, 1>(rows, index, w, first, last, out); break;
        case 2: all_panels<F, 2>(rows, index, w, first, last, out); break;
        case 3: all_panels<F, 3>(rows, index, w, first, last, out); break;
        case 4: all_panels<F, 4>(rows, index, w, first, last, out); break;
        case 5: all_panels<F, 5>(rows, index, w, first, last, out); break;
        case 6: all_panels<F, 6>(rows, index, w, first, last, out); break;
      }
  });
}

#define REQUIRE(condition, message) \
  if (!(condition)) return ffi::Error::InvalidArgument(message)

template <class F, class Same>
ffi::Error linear(ffi::AnyBuffer x, Weights w, int64_t panels, int64_t lines, int64_t line_bytes,
                  ffi::ResultBuffer<ffi::F32> y) {
  REQUIRE(x.dimensions().size() == 2 && y->dimensions().size() == 2, "linear: x and y must be matrices");
  const int64_t rows = x.dimensions()[0], inputs = x.dimensions()[1], outputs = y->dimensions()[1];
  REQUIRE(y->dimensions()[0] == rows, "linear: x and y must have the same rows");
  REQUIRE(line_bytes == kLine && panels == (outputs + kPanel - 1) / kPanel, "linear: weights have other outputs than y");
  REQUIRE(inputs > (lines - 1) * F::kNumbers * !is_int4<F> && inputs <= lines * F::kNumbers,
          "linear: weights have other inputs than x");
  if (rows == 0 || outputs == 0) return ffi::Error::Success();
  w.padded = panels * kPanel;
  Out out{y->typed_data(), outputs};
  if (x.element_type() == ffi::F32) {
    run<F>(pack<F>(x.typed_data<float>(), rows, inputs, lines), w, out);
  } else if (x.element_type() == ffi::BF16) {
    run<Same>(pack<Same>((const uint16_t*)x.untyped_data(), rows, inputs, lines), w, out);
  } else {
    return ffi::Error::InvalidArgument("linear: x must be float32 or bfloat16");
  }
  return ffi::Error::Success();
}

using Lines = ffi::Buffer<ffi::U8, 3>;
using Floats1 = ffi::Buffer<ffi::F32, 1>;
using Ints1 = ffi::Buffer<ffi::S32, 1>;
using Scales = ffi::Buffer<ffi::BF16, 2>;
using Result = ffi::Buffer<ffi::F32>;

template <class F, class Same>
ffi::Error plain(ffi::AnyBuffer x, Lines lines, ffi::ResultBuffer<ffi::F32> y) {
  auto d = lines.dimensions();
  return linear<F, Same>(x, Weights{lines.typed_data()}, d[0], d[1], d[2], y);
}

ffi::Error int8(ffi::AnyBuffer x, Lines lines, Floats1 scales, Ints1 sums,
                ffi::ResultBuffer<ffi::F32> y) {
  auto d = lines.dimensions();
  REQUIRE(scales.dimensions()[0] == d[0] * kPanel && sums.dimensions()[0] == d[0] * kPanel,
          "linear: int8 weights need a scale and a sum a column");
  return linear<Int8, Int8>(x, Weights{lines.typed_data(), scales.typed_data(), sums.typed_data()}, d[0], d[1], d[2], y);
}

ffi::Error int4(ffi::AnyBuffer x, Lines lines, Scales scales, ffi::ResultBuffer<ffi::F32> y) {
  auto d = lines.dimensions();
  const int64_t groups = scales.dimensions()[0], numbers = d[1] * Int4<32>::kNumbers;
  REQUIRE(groups > 0 && numbers % groups == 0 && numbers / groups % 32 == 0 && scales.dimensions()[1] == d[0] * kPanel,
          "linear: int4 weights need scales [groups, columns] of groups that are multiples of 32");
  Weights w{lines.typed_data(), scales.untyped_data()};
  w.group = numbers / groups;
  if (w.group % 64) return linear<Int4<32>, Int4<32>>(x, w, d[0], d[1], d[2], y);
  return linear<Int4<64>, Int4<64>>(x, w, d[0], d[1], d[2], y);
}

auto arguments() { return ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Arg<Lines>(); }
constexpr auto float32 = plain<Float32, Float32>;
constexpr auto bfloat16 = plain<Bfloat16, Bfloat16Pairs>;

}  // namespace
}  // namespace isthmus

using namespace isthmus;
XLA_FFI_DEFINE_HANDLER_SYMBOL(linear_float32, float32, arguments().Ret<Result>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(linear_bfloat16, bfloat16, arguments().Ret<Result>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(linear_int8, int8, arguments().Arg<Floats1>().Arg<Ints1>().Ret<Result>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(linear_int4, int4, arguments().Arg<Scales>().Ret<Result>());
