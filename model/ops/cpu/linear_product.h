// y[row, n] = sum over k of x[row, k] * w[k, n], for weights laid out by model/ops/cpu/packed.py: panels of 16 columns, each
// a sequence of lines of 64 bytes, 4 bytes a column: 1 float32 or 2 bfloat16 along k, or integers' bits.
//
// A row is multiplied in one order of k by one accumulator a column, however many rows there are and however they are
// tiled, so its result depends on that row alone.
//
// The tiling follows Goto and van de Geijn 2008 (doi 10.1145/1356052.1356053): rows packed in tiles of up to kRows, the
// panels that a thread works on kept in its L2 while every tile passes over them.
#pragma once
#include <algorithm>
#include <type_traits>
#include <vector>

#include "linear_formats.h"
#include "linear_rows.h"
#include "pool.h"
#include "simd.h"

namespace isthmus {

constexpr int64_t kBlockLines = 1024;  // of a panel, that every tile passes over before the next
constexpr int64_t kShare = 12;         // chunks of a product that a thread gets, at least, where there are panels enough
constexpr int64_t kSoon = 32;          // lines from asking for weights to their use
// Of some panels' lines: one thread's L2, 1 MB and more where there is AVX-512, holds these and the next.
constexpr int64_t kBlockBytes = kLanes == 16 ? 256 << 10 : 128 << 10;

// ---- the kernel: `MR` rows by `NB` panels

// Weights that are wanted soon: each line that is multiplied asks for `step` bytes of them in each panel, and after `turn`
// lines goes on `jump` bytes further.
struct Ahead {
  const uint8_t* at;
  int64_t step, turn = 0, jump = 0;

  void advance() { at += --turn ? step : step + jump; }
};

template <class F, int MR, int NB>
inline void multiply(const uint32_t* x, const uint8_t* w, int64_t panel_bytes, int64_t lines, Ahead ahead,
                     typename F::Sum (&sums)[MR][NB * kVectors]) {
  for (int64_t line = 0; line < lines; line++, w += kLine, x += F::kParts * MR, ahead.advance()) {
    for (int b = 0; b < NB; b++) __builtin_prefetch(ahead.at + b * panel_bytes, 0, 2);
#pragma GCC unroll 4
    for (int p = 0; p < F::kParts; p++) {
      decltype(F::part(w, 0)) parts[NB * kVectors];
#pragma GCC unroll 16
      for (int j = 0; j < NB * kVectors; j++)
        parts[j] = F::part(w + j / kVectors * panel_bytes + j % kVectors * (4 * kLanes), p);
#pragma GCC unroll 16
      for (int m = 0; m < MR; m++)
#pragma GCC unroll 16
        for (int j = 0; j < NB * kVectors; j++) sums[m][j] = F::add(sums[m][j], x[p * MR + m], parts[j]);
    }
  }
}

// Where a product goes: float32 or bfloat16[rows, outputs].
struct Out {
  void* y;
  bool bf16;
  int64_t outputs;
  bool adds = false;  // to what is there, which is float32

  // Writes `value` to kLanes columns from `column` of a row, as far as there are columns.
  void put(int64_t row, int64_t column, Floats value) const {
    if (adds) value += read((const float*)y + row * outputs, column);
    bf16 ? put((uint16_t*)y + row * outputs, column, value) : put((float*)y + row * outputs, column, value);
  }

  void clear(int64_t row) const {
    const int64_t bytes = outputs * (bf16 ? 2 : 4);
    std::memset((char*)y + row * bytes, 0, bytes);
  }

 private:
  Floats read(const float* row, int64_t column) const {
    if (column + kLanes <= outputs) return load<Floats>(row + column);
    Floats value = {};
    for (int i = 0; column + i < outputs; i++) value[i] = row[column + i];
    return value;
  }

  template <class Y>
  void put(Y* row, int64_t column, Floats value) const {
    if (column + kLanes <= outputs)
      isthmus::put(row + column, value);
    else
      for (int i = 0; column + i < outputs; i++) isthmus::put(row, column + i, value[i]);
  }
};

struct Weights {
  const uint8_t* lines;
  const uint16_t* scales = nullptr;  // of integers: [panels, groups, 16]
  bool half = false;                 // scales are float16, not bfloat16
  int64_t padded = 0;                // outputs
  int64_t groups = 0, group = 0;     // of integers: runs that share a scale, perhaps fewer in the last
};

// The lines [first_line, last_line) of panels.
struct Block {
  int64_t first_line, last_line;
  int64_t first_panel, last_panel;
  float* sums = nullptr;  // [rows, stride]: each tile's from one block to the next of the same panels, as bits
  int64_t stride = 0;

  float* at(int64_t row, int64_t panel, int j) const {
    return sums + row * stride + (panel - first_panel) * kPanel + j * kLanes;
  }
};

// What a tile's sums were after the lines before the block: zeros before the first.
template <class Sum, int MR, int N>
inline void resume(const Block& block, int64_t first, int64_t panel, Sum (&sums)[MR][N]) {
  for (int m = 0; m < MR; m++)
    for (int j = 0; j < N; j++) sums[m][j] = block.first_line ? load<Sum>(block.at(first + m, panel, j)) : Sum{};
}

// Writes a tile's sums out, or keeps them for the block that follows.
template <int MR, int N>
inline void finish(const Rows& rows, int64_t first, const Block& block, int64_t panel, const Out& out,
                   const Floats (&sums)[MR][N]) {
  for (int m = 0; m < MR; m++)
    for (int j = 0; j < N; j++)
      if (block.last_line == rows.lines)
        out.put(rows.places[first + m], panel * kPanel + j * kLanes, sums[m][j]);
      else
        store(block.at(first + m, panel, j), sums[m][j]);
}

template <class F, int MR, int NB>
void tile(const Rows& rows, int index, const Weights& w, const Block& block, int64_t panel, Ahead ahead, const Out& out) {
  typename F::Sum sums[MR][NB * kVectors];
  const int64_t panel_bytes = rows.lines * kLine, first = rows.first(index);
  resume(block, first, panel, sums);
  multiply<F, MR, NB>(rows.words.get() + first * rows.width + block.first_line * MR * F::kParts,
                      w.lines + panel * panel_bytes + block.first_line * kLine, panel_bytes,
                      block.last_line - block.first_line, ahead, sums);
  finish(rows, first, block, panel, out, sums);
}

// Integers: exact sums over a run, then floats.
template <class F, int MR, int NB>
void tile_integers(const Rows& rows, int index, const Weights& w, const Block& block, int64_t panel, Ahead ahead,
                   const Out& out) {
  constexpr int kWords = F::kRun / 4;
  Floats totals[MR][NB * kVectors];
  const int64_t panel_bytes = rows.lines * kLine, first = rows.first(index);
  const int64_t first_run = block.first_line / F::kLines, last_run = block.last_line / F::kLines;
  resume(block, first, panel, totals);
  const uint32_t* x = rows.words.get() + first * rows.width + first_run * MR * kWords * F::kParts;
  const float* x_scales = rows.scales.get() + first * rows.runs + first_run * MR;
  const uint32_t* starts = rows.starts.get() + first * rows.runs + first_run * MR;
  const uint8_t* line = w.lines + panel * panel_bytes + block.first_line * kLine;
  const int64_t panel_scales = w.groups * kPanel;
  const uint16_t* scales = w.scales + panel * panel_scales + first_run / w.group * kPanel;
  int64_t left = w.group - first_run % w.group;  // runs of the group
  for (int64_t run = first_run; run < last_run; run++, x_scales += MR, starts += MR) {
    typename F::Sum sums[MR][NB * kVectors];
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 16
      for (int j = 0; j < NB * kVectors; j++) sums[m][j] = (typename F::Sum)splat(starts[m]);
#pragma GCC unroll 2
    for (int half = 0; half < F::kRun / 32; half++, line += F::kBits * kLine) {
      for (int l = 0; l < F::kBits; l++, ahead.advance())
        for (int b = 0; b < NB; b++) __builtin_prefetch(ahead.at + b * panel_bytes, 0, 2);
#pragma GCC unroll 8
      for (int q = 0; q < 8; q++, x += MR * F::kParts) {
        Words parts[NB * kVectors];
#pragma GCC unroll 16
        for (int j = 0; j < NB * kVectors; j++)
          parts[j] = F::part(line + j / kVectors * panel_bytes + j % kVectors * (4 * kLanes), q);
#pragma GCC unroll 16
        for (int m = 0; m < MR; m++)
#pragma GCC unroll 16
          for (int j = 0; j < NB * kVectors; j++) sums[m][j] = F::add(sums[m][j], x + m, MR, parts[j]);
      }
    }
#pragma GCC unroll 16
    for (int j = 0; j < NB * kVectors; j++) {
      const uint16_t* at = scales + j / kVectors * panel_scales + j % kVectors * kLanes;
      __builtin_prefetch(at + NB * panel_scales, 0, 2);
      Floats scale = w.half ? load_f16(at) : load_bf16(at);
#pragma GCC unroll 16
      for (int m = 0; m < MR; m++)
        totals[m][j] = fma(to_floats(F::total(sums[m][j])), scale * splat(x_scales[m]), totals[m][j]);
    }
    if (--left == 0) scales += kPanel, left = w.group;
  }
  finish(rows, first, block, panel, out, totals);
}

// ---- dispatch

template <class F, int MR, int NB>
void one(const Rows& rows, int index, const Weights& w, const Block& block, int64_t panel, Ahead ahead, const Out& out) {
  if constexpr (is_integers<F>)
    tile_integers<F, MR, NB>(rows, index, w, block, panel, ahead, out);
  else
    tile<F, MR, NB>(rows, index, w, block, panel, ahead, out);
}

// Panels at a time for a tile of `mr` rows: as many sums as registers hold, for enough of them to hide an addition's latency.
constexpr int kRegisters = kLanes == 16 || kLanes == 4 ? 24 : 12;
constexpr int kPanels = 4;  // at most
template <class F>
constexpr int panels_for(int mr) {
  int n = kRegisters / (mr * kVectors);
  return n >= kPanels ? kPanels : n >= 2 ? 2 : 1;
}

template <class F, int MR>
void all_panels(const Rows& rows, int index, const Weights& w, const Block& block, const uint8_t* next, const Out& out) {
  constexpr int kNB = panels_for<F>(MR);
  const int64_t panel_bytes = rows.lines * kLine, lines = block.last_line - block.first_line;
  auto ahead = [&](int64_t panel) -> Ahead {
    if (rows.tiles == 1)  // a single pass: what these panels need next, and at their end what follows them
      return {w.lines + panel * panel_bytes + kSoon * kLine, kLine, lines - kSoon, (kNB - 1) * panel_bytes};
    return {next + (panel - block.first_panel) * panel_bytes + lines * index * kLine / rows.tiles, kLine / rows.tiles};
  };
  int64_t panel = block.first_panel;
  for (; panel + kNB <= block.last_panel; panel += kNB)
    one<F, MR, kNB>(rows, index, w, block, panel, ahead(panel), out);
  for (; panel < block.last_panel; panel++) one<F, MR, 1>(rows, index, w, block, panel, ahead(panel), out);
}

template <class F, int MR = 1>
void all_panels_of(int size, const Rows& rows, int index, const Weights& w, const Block& block, const uint8_t* next,
                   const Out& out) {
  if (size == MR) return all_panels<F, MR>(rows, index, w, block, next, out);
  if constexpr (MR < kRows) all_panels_of<F, MR + 1>(size, rows, index, w, block, next, out);
}

// next: the lines that are wanted after the block's, of as many panels.
template <class F>
void all_tiles(const Rows& rows, const Weights& w, const Block& block, const uint8_t* next, const Out& out) {
  for (int index = 0; index < rows.tiles; index++)
    all_panels_of<F>(rows.size(index), rows, index, w, block, next, out);
}

// One product: weights and where it goes.
struct Product {
  Weights weights;
  Out out;
  int64_t width = 0, chunks = 0;  // panels of a chunk, which one thread takes, and how many there are
};

// As many panels a chunk as L2 holds and leave every thread its share, in steps of what the smallest tile takes at a time.
template <class F>
void divide(Product& product, const Rows& rows, int64_t depth) {
  const int64_t panels = product.weights.padded / kPanel, step = panels_for<F>(rows.size(0));
  const int64_t most = rows.tiles == 1 ? panels : kBlockBytes / (depth * kLine);
  product.width = std::max(step, std::min(most, panels / (kShare * Pool::get().threads())) / step * step);
  product.chunks = (panels + product.width - 1) / product.width;
}

// Chunks are taken in turns. Says which of `chunks` it is, so that every thread goes through memory of its own in order.
inline int64_t in_order(int64_t chunk, int64_t chunks) {
  const int64_t threads = Pool::get().threads(), thread = chunk % threads;
  return thread * (chunks / threads) + std::min(thread, chunks % threads) + chunk / threads;
}

template <class F>
void part(const Rows& rows, const Product& product, int64_t depth, int64_t chunk) {
  const int64_t panels = product.weights.padded / kPanel, lines = rows.lines, width = product.width;
  thread_local std::vector<float> sums;
  if (depth < lines) sums.resize(std::max<size_t>(sums.size(), rows.rows * width * kPanel));
  const int64_t first = in_order(chunk, product.chunks) * width, last = std::min(panels, first + width);
  for (int64_t line = 0; line < lines; line += depth) {
    const Block block{line, std::min(lines, line + depth), first, last, sums.data(), width * kPanel};
    const bool ends = block.last_line == lines;
    const uint8_t* next = product.weights.lines + ((ends ? last : first) * lines + (ends ? 0 : block.last_line)) * kLine;
    all_tiles<F>(rows, product.weights, block, next, product.out);
  }
}

// Rows and what multiplies them.
struct Work {
  Rows rows;
  std::vector<Product> products;
  int64_t depth = 0, chunks = 0;
};

// The rows of x at some places, none of them zeros.
template <class F, class X>
Work prepare(const X* x, std::vector<int64_t> places, int64_t inputs, int64_t lines, bool rotated,
             std::vector<Product> products) {
  Work work;
  if (places.empty()) return work;
  work.rows = pack<F>(x, std::move(places), inputs, lines, rotated), work.products = std::move(products);
  work.depth = work.rows.tiles == 1 ? lines : std::min(lines, kBlockLines / F::kLines * F::kLines);
  for (Product& p : work.products) divide<F>(p, work.rows, work.depth), work.chunks += p.chunks;
  return work;
}

// The rows [first, last) of x.
template <class F, class X>
Work prepare(const X* x, int64_t first, int64_t last, int64_t inputs, int64_t lines, bool rotated,
             std::vector<Product> products) {
  std::vector<int64_t> places;
  for (int64_t row = first; row < last; row++)
    if (!is_zero(x + row * inputs, inputs))
      places.push_back(row);
    else
      for (const Product& p : products) p.out.clear(row);
  return prepare<F>(x, std::move(places), inputs, lines, rotated, std::move(products));
}

template <class F>
void run(const std::vector<Work>& works) {
  int64_t chunks = 0;
  for (const Work& work : works) chunks += work.chunks;
  Pool::get().run(chunks, [&](int64_t chunk) {
    size_t w = 0, i = 0;
    while (chunk >= works[w].chunks) chunk -= works[w++].chunks;
    const std::vector<Product>& products = works[w].products;
    while (chunk >= products[i].chunks) chunk -= products[i++].chunks;
    part<F>(works[w].rows, products[i], works[w].depth, chunk);
  });
}

}  // namespace isthmus
