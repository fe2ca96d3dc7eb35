// The paged cache as attention.cc meets it: where a token's key and value lie, and how they are read and written.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "simd.h"

namespace isthmus {

constexpr int kChunk = 32;  // keys, on a grid of absolute positions
constexpr int64_t kScaled = 64;  // numbers of an int8 vector that share a scale

// One layer's arguments. T tokens: `rows` of a sequence each, then blocks of `block` of one sequence each.
struct Step {
  int64_t tokens, rows, block, heads, kv_heads, head_dim;
  int64_t pages, page_size, table_width;
  bool shared;  // keys are values too
  const void* q;
  const void* k;
  const void* v;
  void* cache;    // [pages, page_size, kv_heads * (shared ? 1 : 2), head_dim]
  float* scales;  // of an int8 cache: [pages, page_size, kv_heads * (shared ? 1 : 2), scales_each()]
  void* out;
  const int32_t* tables;
  const int32_t* positions;
  int64_t first;  // page of this layer
  float scale, soft_cap;
  int64_t window;
  const float* sinks;

  int64_t slots() const { return kv_heads * (shared ? 1 : 2); }
  int64_t group() const { return heads / kv_heads; }
  int64_t scales_each() const { return round_up(head_dim, kScaled) / kScaled; }
  int64_t padded() const { return round_up(head_dim, kLanes); }
  int64_t sequences() const { return rows + (block ? (tokens - rows) / block : 0); }
  int64_t first_token(int64_t sequence) const {
    return sequence < rows ? sequence : rows + (sequence - rows) * block;
  }
  int64_t sequence_tokens(int64_t sequence) const { return sequence < rows ? 1 : block; }
  // Where a page of a sequence begins in the cache, in vectors of head_dim; one that isn't there is the null page.
  int64_t page_begin(int64_t sequence, int64_t index) const {
    int64_t page = first + (index < table_width ? int64_t(tables[sequence * table_width + index]) : 0);
    if (page < 0 || page >= pages) page = 0;
    return page * page_size * slots();
  }
  int64_t slot(int64_t sequence, int64_t position, int64_t head) const {
    return page_begin(sequence, position / page_size) + position % page_size * slots() + head;
  }
};

// ---- element types

// Reads numbers, times their scales where they are integers, as what `to` is.
template <class C, class K>
void read(const C* from, int64_t size, const float*, K* to) {
  if constexpr (std::is_same_v<C, K>) {
    std::memcpy(to, from, size * sizeof(C));
  } else {
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) put(to + i, numbers(from + i));
    for (; i < size; i++) put(to, i, number(from, i));
  }
}
inline void read(const int8_t* from, int64_t size, const float* scales, float* to) {
  int64_t i = 0;
  for (; i + kScaled <= size; i += kScaled) {
    const Floats scale = splat(*scales++);
#pragma GCC unroll 16
    for (int64_t j = 0; j < kScaled; j += kLanes) put(to + i + j, numbers(from + i + j) * scale);
  }
  if (i == size) return;
  const float scale = *scales;
  for (; i + kLanes <= size; i += kLanes) put(to + i, numbers(from + i) * splat(scale));
  for (; i < size; i++) to[i] = float(from[i]) * scale;
}
template <class C>
void write(const float* from, int64_t size, C* to) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) put(to + i, load<Floats>(from + i));
  for (; i < size; i++) put(to, i, from[i]);
}

// What attention.py calls the same, in place: x fills whole vectors, with zeros or anything after its `size` numbers.
inline void spread(float* x, int64_t size) {
  const int64_t block = size & -size;
  const Floats scale = splat(1.f / std::sqrt(float(block)));
  const Ints lane = lane_numbers();
  for (int64_t d = 0; d < size; d += kLanes) {
    Floats a = load<Floats>(x + d) * scale;
#pragma GCC unroll 4
    for (int half = 1; half < kLanes; half *= 2) {
      if (half >= block) break;
      Floats b = __builtin_shuffle(a, lane ^ half);
      a = (lane & half) ? b - a : a + b;
    }
    store(x + d, a);
  }
  for (int64_t half = kLanes; half < block; half *= 2)
    for (int64_t first = 0; first < size; first += 2 * half)
      for (int64_t d = first; d < first + half; d += kLanes) {
        Floats a = load<Floats>(x + d), b = load<Floats>(x + d + half);
        store(x + d, a + b), store(x + d + half, a - b);
      }
}

// As integers that share a scale, which isn't finite where they are not.
inline void write_integers(const float* from, int64_t size, int8_t* to, float* scale) {
  float top = 0, probe = 0;
  for (int64_t i = 0; i < size; i++) top = std::max(top, std::fabs(from[i])), probe += from[i] * 0;
  const bool usable = top > 0 && std::isfinite(probe) && std::isfinite(127.f / top);
  *scale = top / 127.f + probe;
  for (int64_t i = 0; i < size; i++) to[i] = usable ? int8_t(std::lrintf(from[i] * (127.f / top))) : int8_t(0);
}

// `from` is spread on the way to integers.
template <class C>
void write_vector(const Step& s, float* from, int64_t slot) {
  C* to = (C*)s.cache + slot * s.head_dim;
  if constexpr (std::is_same_v<C, int8_t>) {
    spread(from, s.head_dim);
    float* scale = s.scales + slot * s.scales_each();
    for (int64_t i = 0; i < s.head_dim; i += kScaled)
      write_integers(from + i, std::min(kScaled, s.head_dim - i), to + i, scale++);
  } else {
    write(from, s.head_dim, to);
  }
}

template <class X, class C>
void write_sequence(const Step& s, int64_t sequence) {
  thread_local std::vector<float> vector;
  vector.resize(s.padded());
  for (int64_t i = 0; i < s.sequence_tokens(sequence); i++) {
    int64_t token = s.first_token(sequence) + i, position = s.positions[token];
    if (position < 0) continue;
    for (int64_t head = 0; head < s.kv_heads; head++)
      for (int64_t part = 0; part < (s.shared ? 1 : 2); part++) {
        const X* from = (const X*)(part == 0 ? s.k : s.v) + (token * s.kv_heads + head) * s.head_dim;
        read(from, s.head_dim, nullptr, vector.data());
        write_vector<C>(s, vector.data(), s.slot(sequence, position, s.shared ? head : 2 * head + part));
      }
  }
}

// Calls row(i, slot) for the keys [chunk, last] of a chunk, page by page.
template <class F>
[[gnu::always_inline]] inline void each_key(const Step& s, int64_t sequence, int64_t head, int64_t chunk, int64_t last,
                                            F row) {
  const int64_t step = s.slots(), end = std::min(last + 1, chunk + kChunk);
  for (int64_t position = chunk; position < end;) {
    const int64_t page = position / s.page_size, next = std::min(end, (page + 1) * s.page_size);
    int64_t slot = s.page_begin(sequence, page) + (position - page * s.page_size) * step + (s.shared ? head : 2 * head);
    for (; position < next; position++, slot += step) row(int(position - chunk), slot);
  }
}

// Asks for a chunk's keys and values of one head, into L2: L1 couldn't hold them besides what is at work. Always inline:
// gcc takes a function that does nothing but prefetch for one without effects, and leaves out its calls.
template <class C>
[[gnu::always_inline]] inline void prefetch_chunk(const Step& s, int64_t sequence, int64_t head, int64_t chunk,
                                                  int64_t last) {
  const int64_t bytes = s.head_dim * (s.shared ? 1 : 2) * int64_t(sizeof(C));
  each_key(s, sequence, head, chunk, last, [&](int, int64_t slot) __attribute__((always_inline)) {
    const char* from = (const char*)((const C*)s.cache + slot * s.head_dim);
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at, 0, 2);
  });
}

}  // namespace isthmus
