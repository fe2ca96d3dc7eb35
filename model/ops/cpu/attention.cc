// Attention over the paged cache, which it reads in place: `paged_step` of model/ops/paged_attention.py for one layer; and
// by the same code, `causal` of model/ops/attention.py over the documents of a packed batch.
//
// First the step's keys and values go to their pages, then every (sequence, key head) is a task, or where there are many
// rows, every one of them with all of its heads, which lie side by side, and where there are few blocks, a part of a
// block's queries: they pass over the keys kChunk at a time with a running softmax (Milakov and Gimelshein 2018, arXiv
// 1805.02867). Chunks lie on a grid of absolute positions and every sum has a fixed order, so a query's result depends on
// its own sequence alone: not on the batch, on where its pages are, or on how many queries of its sequence the step has.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "pages.h"
#include "pool.h"
#include "scores.h"
#include "simd.h"
#include "xla/ffi/api/ffi.h"

namespace isthmus {
namespace {

namespace ffi = xla::ffi;

constexpr int kQueries = kLanes == 16 ? 4 : 2;  // at a time, as registers allow
constexpr int64_t kAlone = 1 << 15;  // numbers to write that are not worth a second thread
constexpr int64_t kBlock = 64;  // queries of a document that are a task
constexpr float kMinusInfinity = -INFINITY;

// ---- one task

// A query head of one token on its way through the keys.
struct Query {
  int64_t token, head, position;
  float top, total;
};

struct Scratch {
  std::vector<Query> queries;
  std::vector<float> q, out, keys, values, turned, scores, zeros;  // q, keys and turned may be pairs of bfloat16
  const void* key[kChunk];  // of the chunk: in the cache, or as they are in keys and values
  const void* value[kChunk];
};

// out[i] += sum over keys of weights[i][key] * values[key], keys in order.
template <int N, int B, class K>
void add_values(const float* weights, const void* const* values, int64_t width, int first, int last, int64_t d,
                float* out) {
  Floats sums[N][B];
  for (int i = 0; i < N; i++)
    for (int b = 0; b < B; b++) sums[i][b] = load<Floats>(out + i * width + d + b * kLanes);
  for (int key = first; key < last; key++) {
    Floats value[B];
#pragma GCC unroll 4
    for (int b = 0; b < B; b++) value[b] = numbers((const K*)values[key] + d + b * kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) {
      Floats weight = splat(weights[i * kChunk + key]);
#pragma GCC unroll 4
      for (int b = 0; b < B; b++) sums[i][b] = fma(weight, value[b], sums[i][b]);
    }
  }
  for (int i = 0; i < N; i++)
    for (int b = 0; b < B; b++) store(out + i * width + d + b * kLanes, sums[i][b]);
}

// Turns one query's scores into weights and rescales what it has gathered. Keys outside [first, last) weigh nothing.
void weigh(const Step& s, Query& query, float* scores, int first, int last, float* out, int64_t width) {
  Floats tops = splat(query.top);
  for (int key = 0; key < kChunk; key += kLanes) {
    Floats some = load<Floats>(scores + key) * splat(s.scale);
    if (s.soft_cap != 0)
      for (int i = 0; i < kLanes; i++) some[i] = s.soft_cap * std::tanh(some[i] / s.soft_cap);
    if (key < first || key + kLanes > last)
      for (int i = 0; i < kLanes; i++)
        if (key + i < first || key + i >= last) some[i] = kMinusInfinity;
    tops = max(some, tops);
    store(scores + key, some);
  }
  const float top = largest(tops);
  Floats total = {};
  for (int key = 0; key < kChunk; key += kLanes) {
    Floats weights = exp(load<Floats>(scores + key) - splat(top));
    store(scores + key, weights);
    total += weights;
  }
  if (top > query.top) {
    Floats shrink = exp(splat(query.top - top));
    query.total *= shrink[0];
    for (int64_t d = 0; d < width; d += kLanes) store(out + d, load<Floats>(out + d) * shrink);
    query.top = top;
  }
  query.total += sum(total);
}

// Keys [first, last) of the chunk that a query sees.
inline int first_seen(const Step& s, const Query& query, int64_t chunk) {
  int64_t first = s.window ? query.position - s.window + 1 - chunk : 0;
  return int(std::clamp<int64_t>(first, 0, kChunk));
}
inline int last_seen(const Query& query, int64_t chunk) {
  return int(std::clamp<int64_t>(query.position + 1 - chunk, 0, kChunk));
}

// N queries, of `words` words, against a chunk whose keys and values are T, or whose keys are pairs.
template <int N, class T, bool Pairs>
void attend(const Step& s, Query* queries, const float* q, int64_t words, Scratch& scratch, int64_t chunk, float* out) {
  const int64_t width = s.padded();
  float* scores = scratch.scores.data();
  int first = kChunk, last = 0;
  for (int i = 0; i < N; i++) {
    first = std::min(first, first_seen(s, queries[i], chunk));
    last = std::max(last, last_seen(queries[i], chunk));
  }
  if (first >= last) return;
  if constexpr (Pairs)
    score_pairs<N>(q, scratch.turned.data(), words, scores);
  else
    score<N, T>(q, scratch.key, width, last, scores);
  for (int i = 0; i < N; i++) {
    int begin = first_seen(s, queries[i], chunk), end = last_seen(queries[i], chunk);
    if (begin < end)
      weigh(s, queries[i], scores + i * kChunk, begin, end, out + i * width, width);
    else
      std::fill_n(scores + i * kChunk, kChunk, 0.f);
  }
  int64_t d = 0;
  for (; d + 4 * kLanes <= width; d += 4 * kLanes) add_values<N, 4, T>(scores, scratch.value, width, first, last, d, out);
  for (; d < width; d += kLanes) add_values<N, 1, T>(scores, scratch.value, width, first, last, d, out);
}

// `count` queries, N at a time and then what is left.
template <int N, class T, bool Pairs>
void attend_all(const Step& s, Query* queries, int64_t count, const float* q, int64_t words, Scratch& scratch,
                int64_t chunk, float* out) {
  int64_t i = 0;
  for (; i + N <= count; i += N)
    attend<N, T, Pairs>(s, queries + i, q + i * words, words, scratch, chunk, out + i * s.padded());
  if constexpr (N > 1)
    if (i < count)
      attend_all<N - 1, T, Pairs>(s, queries + i, count - i, q + i * words, words, scratch, chunk, out + i * s.padded());
}

// Makes the chunk's keys and values ready: the cache's own numbers where they may stay in place, else turned to float32,
// or keys that are pairs to a row of `words` words.
template <class C, bool Pairs>
void read_chunk(const Step& s, int64_t sequence, int64_t head, int64_t chunk, int64_t last, int64_t words, bool in_place,
                Scratch& scratch) {
  using K = std::conditional_t<Pairs, C, float>;
  const bool keys_in_place = Pairs ? words * 4 == s.head_dim * int64_t(sizeof(C)) : in_place;
  const C* cache = (const C*)s.cache;
  const int64_t size = s.head_dim, scales_each = s.scales ? s.scales_each() : 0;
  const float* scales = s.scales;
  prefetch_chunk<C>(s, sequence, head, chunk + kChunk, last);  // what comes next is far from here
  int64_t slots[kChunk];
  each_key(s, sequence, head, chunk, last, [&](int i, int64_t slot) __attribute__((always_inline)) { slots[i] = slot; });
  const int seen = int(std::clamp<int64_t>(last + 1 - chunk, 0, kChunk));
  auto place = [&](const void** at, int64_t part, bool stays, auto* to, int64_t step) {
    for (int i = 0; i < seen; i++) at[i] = stays ? (const void*)(cache + (slots[i] + part) * s.head_dim) : to + i * step;
    if (stays) return;
    for (int i = 0; i < seen; i++, to += step)
      read(cache + (slots[i] + part) * size, size, scales + (slots[i] + part) * scales_each, to);
  };
  place(scratch.key, 0, keys_in_place, (K*)scratch.keys.data(), words * 4 / int64_t(sizeof(K)));
  place(scratch.value, s.shared ? 0 : 1, in_place, scratch.values.data(), s.padded());
  // Nobody sees these: whatever lies there, NaN included, must not be read.
  for (int i = seen; i < kChunk; i++)
    scratch.key[i] = scratch.value[i] = scratch.zeros.data();
  if constexpr (Pairs) turn(scratch.key, words, scratch.turned.data());
}

template <class X>
void finish(const Step& s, Query& query, float* out) {
  float shrink = 1.f;
  if (s.sinks) {
    float top = std::max(query.top, s.sinks[query.head]);
    shrink = exp(splat(query.top - top))[0];
    query.total = query.total * shrink + exp(splat(s.sinks[query.head] - top))[0];
  }
  for (int64_t d = 0; d < s.head_dim; d++) out[d] = out[d] * shrink / query.total;
  if (s.scales) spread(out, s.head_dim);
  write(out, s.head_dim, (X*)s.out + (query.token * s.heads + query.head) * s.head_dim);
}

// The queries of a sequence's tokens [first_token, last_token) that the key heads [first_head, last_head) serve, head by
// head.
template <class X, class C>
void attend_heads(const Step& s, int64_t sequence, int64_t first_head, int64_t last_head, int64_t first_token,
                  int64_t last_token) {
  thread_local Scratch scratch;
  const int64_t width = s.padded(), group = s.group();
  auto& queries = scratch.queries;
  queries.clear();
  int64_t last = -1, first = INT64_MAX;
  for (int64_t head = first_head; head < last_head; head++)
    for (int64_t i = first_token; i < last_token; i++) {
      int64_t token = s.first_token(sequence) + i, position = s.positions[token];
      if (position < 0) {
        X* out = (X*)s.out + (token * s.heads + head * group) * s.head_dim;
        std::fill_n(out, group * s.head_dim, X{});
        continue;
      }
      for (int64_t h = head * group; h < (head + 1) * group; h++)
        queries.push_back({token, h, position, kMinusInfinity, 0.f});
      last = std::max(last, position);
      first = std::min(first, s.window ? std::max<int64_t>(0, position - s.window + 1) : 0);
    }
  if (queries.empty()) return;
  constexpr bool kFloats = std::is_same_v<C, float>, kInPairs = kPairs<X, C>;
  using Q = std::conditional_t<kInPairs, X, float>;
  const int64_t all = int64_t(queries.size()), count = all / (last_head - first_head);
  const int64_t words = kInPairs ? round_up(s.head_dim, 2 * kLanes) / 2 : width;
  // Many queries of a head are worth turning its numbers to float32 once.
  const bool in_place = !std::is_same_v<C, int8_t> && width == s.head_dim && (kFloats || count <= kQueries);
  scratch.q.assign(all * words, 0.f);
  scratch.out.assign(all * width, 0.f);
  scratch.keys.assign(kChunk * words, 0.f);  // zeros after head_dim numbers
  scratch.values.assign(kChunk * width, 0.f);
  scratch.zeros.assign(width, 0.f);
  scratch.turned.resize(kChunk * words);
  scratch.scores.resize(kQueries * kChunk);
  for (int64_t i = 0; i < all; i++) {
    float* q = scratch.q.data() + i * words;
    read((const X*)s.q + (queries[i].token * s.heads + queries[i].head) * s.head_dim, s.head_dim, nullptr, (Q*)q);
    if constexpr (std::is_same_v<C, int8_t>) spread(q, s.head_dim);
  }
  const int64_t begin = first / kChunk * kChunk;
  for (int64_t head = first_head; head < last_head; head++) prefetch_chunk<C>(s, sequence, head, begin, last);
  // The row that this thread has after this one, most likely.
  const int64_t follower = sequence + Pool::get().threads();
  const int64_t its_last = follower < s.rows ? s.positions[follower] : -1;
  const int64_t its_first = s.window ? std::max<int64_t>(0, its_last - s.window + 1) / kChunk * kChunk : 0;
  for (int64_t chunk = begin; chunk <= last; chunk += kChunk)
    for (int64_t head = first_head; head < last_head; head++) {
      const int64_t i = (head - first_head) * count;
      if (chunk + kChunk > last) prefetch_chunk<C>(s, follower, head, its_first, its_last);
      read_chunk<C, kInPairs>(s, sequence, head, chunk, last, words, in_place, scratch);
      Query* some = &queries[i];
      float *q = scratch.q.data() + i * words, *out = scratch.out.data() + i * width;
      if constexpr (std::is_same_v<C, uint16_t>)
        if (in_place) {
          attend_all<kQueries, uint16_t, kInPairs>(s, some, count, q, words, scratch, chunk, out);
          continue;
        }
      attend_all<kQueries, float, kInPairs>(s, some, count, q, words, scratch, chunk, out);
    }
  for (int64_t i = 0; i < all; i++) finish<X>(s, queries[i], scratch.out.data() + i * width);
}

// Into how many parts the queries of a block's head are divided: as few as leave the threads no more than an eighth of
// their time waiting for the last one, since each part makes the keys ready anew.
int64_t parts_of_block(const Step& s) {
  const int64_t threads = Pool::get().threads(), tasks = (s.sequences() - s.rows) * s.kv_heads;
  int64_t parts = 1;
  const auto waits = [&] { return 8 * (round_up(tasks * parts, threads) - tasks * parts) > tasks * parts; };
  while (waits() && 2 * parts <= s.block && s.block / (2 * parts) * s.group() >= 2 * kQueries) parts *= 2;
  return parts;
}

template <class X, class C>
void run(const Step& s) {
  if (s.tokens * s.kv_heads * s.head_dim < kAlone)
    for (int64_t sequence = 0; sequence < s.sequences(); sequence++) write_sequence<X, C>(s, sequence);
  else
    Pool::get().run(s.sequences(), [&](int64_t sequence) { write_sequence<X, C>(s, sequence); });
  // One task for all heads of a row, where rows enough are left for every thread.
  const int64_t heads = s.rows >= 2 * Pool::get().threads() ? s.kv_heads : 1, row_tasks = s.kv_heads / heads;
  const int64_t parts = parts_of_block(s), size = (s.block + parts - 1) / parts;
  const int64_t tasks = s.rows * row_tasks + (s.sequences() - s.rows) * s.kv_heads * parts;
  Pool::get().run(tasks, [&](int64_t task) {
    if (task < s.rows * row_tasks) {
      const int64_t head = task % row_tasks * heads;
      attend_heads<X, C>(s, task / row_tasks, head, head + heads, 0, 1);
    } else {
      task -= s.rows * row_tasks;
      const int64_t first = task % parts * size, head = task / parts % s.kv_heads;
      attend_heads<X, C>(s, s.rows + task / parts / s.kv_heads, head, head + 1, std::min(first, s.block),
                         std::min(first + size, s.block));
    }
  });
}

// Attention of each document of a packed batch over itself. s: all but the places of a document. A document is a run of
// tokens of one number; its keys and values lie where its tokens do, as in a cache with one page for it.
template <class X>
void run_documents(const Step& s, const int32_t* segments, int64_t batch, int64_t seq) {
  struct Block {
    int64_t document, first, count;
  };
  std::vector<Block> blocks;
  for (int64_t row = 0; row < batch; row++)
    for (int64_t begin = row * seq, end; begin < (row + 1) * seq; begin = end) {
      for (end = begin + 1; end < (row + 1) * seq && segments[end] == segments[begin];) end++;
      for (int64_t first = 0; first < end - begin; first += kBlock)
        blocks.push_back({begin, first, std::min(kBlock, end - begin - first)});
    }
  std::vector<int32_t> positions(seq);
  std::iota(positions.begin(), positions.end(), 0);
  const int32_t only_page = 0;
  Pool::get().run(int64_t(blocks.size()) * s.kv_heads, [&](int64_t task) {
    const Block& block = blocks[task / s.kv_heads];
    const int64_t head = task % s.kv_heads, queries = (block.document + block.first) * s.heads * s.head_dim;
    Step mine = s;
    mine.tokens = mine.block = block.count;
    mine.pages = mine.table_width = 1, mine.page_size = seq, mine.tables = &only_page;
    mine.positions = positions.data() + block.first;
    mine.q = (const X*)s.q + queries, mine.out = (X*)s.out + queries;
    mine.cache = (X*)s.cache + block.document * s.slots() * s.head_dim;
    attend_heads<X, X>(mine, 0, head, head + 1, 0, mine.block);
  });
}

// ---- the handlers

#define REQUIRE(condition, message) \
  if (!(condition)) return ffi::Error::InvalidArgument("paged_attention: " message)

ffi::Error attention(ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer cache, ffi::AnyBuffer scales,
                     ffi::Buffer<ffi::S32> tables, ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::S32> first,
                     ffi::Buffer<ffi::F32> sinks, ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> new_cache,
                     ffi::Result<ffi::AnyBuffer> new_scales, int64_t rows, float scale, float soft_cap, int64_t window,
                     bool shared) {
  auto qd = q.dimensions(), kd = k.dimensions(), vd = v.dimensions(), cd = cache.dimensions();
  auto td = tables.dimensions();
  REQUIRE(qd.size() == 3 && kd.size() == 3 && cd.size() == 4 && td.size() == 2, "q, k, cache or tables has the wrong rank");
  Step s{};
  s.tokens = qd[0], s.rows = rows, s.heads = qd[1], s.head_dim = qd[2], s.kv_heads = kd[1];
  s.pages = cd[0], s.page_size = cd[1], s.table_width = td[1], s.shared = shared;
  REQUIRE(kd[0] == s.tokens && kd[2] == s.head_dim, "k must be [tokens, kv_heads, head_dim]");
  REQUIRE(shared || (vd.size() == 3 && vd[0] == kd[0] && vd[1] == kd[1] && vd[2] == kd[2]), "v must have k's shape");
  REQUIRE(s.kv_heads > 0 && s.heads % s.kv_heads == 0, "heads must be a multiple of kv_heads");
  REQUIRE(s.pages > 0 && s.page_size > 0 && cd[2] == s.slots() && cd[3] == s.head_dim,
          "cache must be [pages, page_size, slots, head_dim]");
  REQUIRE(positions.element_count() == size_t(s.tokens) && first.element_count() == 1, "a position a token, one first page");
  REQUIRE(rows >= 0 && rows <= s.tokens && td[0] >= rows, "rows must be at most the tokens and the tables");
  int64_t blocks = td[0] - rows;
  REQUIRE(blocks == 0 ? rows == s.tokens : (s.tokens - rows) % blocks == 0, "blocks must have the same size");
  s.block = blocks ? (s.tokens - rows) / blocks : 0;
  REQUIRE(sinks.element_count() == 0 || sinks.element_count() == size_t(s.heads), "sinks must be one a head");
  REQUIRE(cache.untyped_data() == new_cache->untyped_data(), "the cache must be written in place");
  REQUIRE(q.element_type() == k.element_type() && (shared || v.element_type() == k.element_type()) &&
              q.element_type() == out->element_type() && out->element_count() == q.element_count(),
          "q, k, v and the result must be alike");
  s.q = q.untyped_data(), s.k = k.untyped_data(), s.v = v.untyped_data(), s.out = out->untyped_data();
  s.cache = new_cache->untyped_data(), s.tables = tables.typed_data(), s.positions = positions.typed_data();
  s.first = first.typed_data()[0], s.scale = scale, s.soft_cap = soft_cap, s.window = window;
  s.sinks = sinks.element_count() ? sinks.typed_data() : nullptr;
  bool is_bf16 = q.element_type() == ffi::BF16;
  REQUIRE(is_bf16 || q.element_type() == ffi::F32, "q must be float32 or bfloat16");
  if (cache.element_type() == ffi::S8) {
    REQUIRE(scales.element_type() == ffi::F32 &&
                scales.element_count() == size_t(s.pages * s.page_size * s.slots() * s.scales_each()) &&
                scales.untyped_data() == new_scales->untyped_data(),
            "an int8 cache needs a scale for every 64 numbers of a vector, written in place");
    s.scales = (float*)new_scales->untyped_data();
    is_bf16 ? run<uint16_t, int8_t>(s) : run<float, int8_t>(s);
  } else if (cache.element_type() == ffi::BF16) {
    is_bf16 ? run<uint16_t, uint16_t>(s) : run<float, uint16_t>(s);
  } else if (cache.element_type() == ffi::F32) {
    is_bf16 ? run<uint16_t, float>(s) : run<float, float>(s);
  } else {
    return ffi::Error::InvalidArgument("paged_attention: the cache must be float32, bfloat16 or int8");
  }
  return ffi::Error::Success();
}

ffi::Error documents(ffi::AnyBuffer q, ffi::AnyBuffer kv, ffi::Buffer<ffi::S32, 2> segments, ffi::Buffer<ffi::F32> sinks,
                     ffi::Result<ffi::AnyBuffer> out, float scale, float soft_cap, int64_t window, bool shared) {
  auto qd = q.dimensions(), kd = kv.dimensions(), sd = segments.dimensions();
  REQUIRE(qd.size() == 4 && kd.size() == 4, "q and kv must be [batch, seq, heads, head_dim]");
  Step s{};
  s.heads = qd[2], s.head_dim = qd[3], s.shared = shared, s.kv_heads = kd[2] / (shared ? 1 : 2);
  REQUIRE(sd[0] == qd[0] && sd[1] == qd[1] && kd[0] == qd[0] && kd[1] == qd[1] && kd[3] == qd[3] && kd[2] == s.slots(),
          "q, kv and segments must be of the same tokens");
  REQUIRE(s.kv_heads > 0 && s.heads % s.kv_heads == 0, "heads must be a multiple of kv_heads");
  REQUIRE(sinks.element_count() == 0 || sinks.element_count() == size_t(s.heads), "sinks must be one a head");
  REQUIRE(q.element_type() == kv.element_type() && q.element_type() == out->element_type() && out->dimensions() == qd,
          "q, kv and the result must be alike");
  s.q = q.untyped_data(), s.cache = kv.untyped_data(), s.out = out->untyped_data();
  s.scale = scale, s.soft_cap = soft_cap, s.window = window;
  s.sinks = sinks.element_count() ? sinks.typed_data() : nullptr;
  const bool is_bf16 = q.element_type() == ffi::BF16;
  REQUIRE(is_bf16 || q.element_type() == ffi::F32, "q must be float32 or bfloat16");
  (is_bf16 ? run_documents<uint16_t> : run_documents<float>)(s, segments.typed_data(), sd[0], sd[1]);
  return ffi::Error::Success();
}

auto documents_binding() {
  return ffi::Ffi::Bind()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::Buffer<ffi::S32, 2>>()
      .Arg<ffi::Buffer<ffi::F32>>()
      .Ret<ffi::AnyBuffer>()
      .Attr<float>("scale")
      .Attr<float>("soft_cap")
      .Attr<int64_t>("window")
      .Attr<bool>("shared");
}

auto binding() {
  using Ints = ffi::Buffer<ffi::S32>;
  return ffi::Ffi::Bind()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<Ints>()
      .Arg<Ints>()
      .Arg<Ints>()
      .Arg<ffi::Buffer<ffi::F32>>()
      .Ret<ffi::AnyBuffer>()
      .Ret<ffi::AnyBuffer>()
      .Ret<ffi::AnyBuffer>()
      .Attr<int64_t>("rows")
      .Attr<float>("scale")
      .Attr<float>("soft_cap")
      .Attr<int64_t>("window")
      .Attr<bool>("shared");
}

}  // namespace
}  // namespace isthmus

using namespace isthmus;
XLA_FFI_DEFINE_HANDLER_SYMBOL(paged_attention, attention, binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(causal_attention, documents, documents_binding());
