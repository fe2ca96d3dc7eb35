// Draws a token of each row of logits, as model/ops/sampling.py says. A row's draw depends on that row alone.
//
// A filter keeps the tokens from some logit on, so most of a row need never be looked at again: the largest logit of every
// cell of 64 tokens says which cells hold a token that may stay. Where an adjustment changes a logit, its cell is copied.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "pool.h"
#include "simd.h"
#include "xla/ffi/api/ffi.h"

namespace isthmus {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kCell = 64;
constexpr int64_t kBlock = 512;  // BLOCK of sampling.py
constexpr int kHalvings = 12;    // of the range that holds a threshold, before the tokens within it are sorted
constexpr float kLowest = -88;   // e to it is 0 here
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLeast = -std::numeric_limits<float>::max();  // a token below it can't be drawn
constexpr int32_t kBadRow = -1;
static_assert(kBlock % kCell == 0 && kCell % kLanes == 0);

struct Filters {
  float temperature;
  int32_t top_k;
  float top_p, min_p;
};

// What changes a row before its draw, as model/ops/adjustments.py says.
struct Adjustment {
  const int32_t* bias_ids;
  const float* bias;
  int64_t biased;
  float repetition, frequency, presence;
  const int32_t* tokens;
  int64_t prompt, length;
  const int32_t* allowed;
};

class Row {
 public:
  // Reads a row of logits. The memory is kept from row to row.
  void read(const float* logits, int64_t vocab);

  // Changes what the draw sees; to be called after what is told of the model's own logits, and before the draw.
  void adjust(const Adjustment& by);

  // Whether a token can be drawn at all.
  bool is_finite() const { return !nan_ && std::isfinite(top_) && std::isfinite(best_); }

  // The first of the tokens with the largest logit.
  int32_t likeliest() const;

  // A token of those that the filters leave, by two numbers in [0, 1). It may be called once.
  int32_t draw(const Filters& filters, float first, float second);

  // The logarithm of what all tokens weigh before temperature and filters, the likeliest weighing 1.
  float log_total() const;

  // The log-probability of a token then.
  float log_probability(int32_t token, float total) const { return logits_[token] - top_ - total; }

  // The `count` tokens with the largest logits, of equal ones the first. To be called before draw.
  const std::vector<int32_t>& likeliest(int64_t count);

 private:
  float scaled(float logit) const { return (logit - best_) / temperature_; }
  int64_t cells() const { return (vocab_ + kCell - 1) / kCell; }
  int64_t blocks() const { return (vocab_ + kBlock - 1) / kBlock; }
  const float* cell_at(int64_t cell) const;
  float* changed(int64_t cell);
  float& changed_logit(int32_t token) { return changed(token / kCell)[token % kCell]; }
  void penalize(const Adjustment& by);
  void mask(const int32_t* allowed);
  void weigh(float least);
  void weigh_cell(int64_t cell);
  float unkept_mass(int64_t block, float least) const;
  float rank_bound(int64_t rank);
  float by_rank(int64_t rank, float least);
  float by_mass(double share, float least);
  double mass(float least) const;
  float block_mass(int64_t block, float least) const;
  template <class F>
  void each(float least, float end, F use) const;

  const float* logits_;
  int64_t vocab_;
  float top_;                            // the largest logit
  float best_;                           // the largest that the draw sees
  float temperature_;
  float weighed_;                        // every cell with a scaled logit of at least this is in scaled_ and weights_
  bool nan_;
  std::vector<float> largest_;           // of each cell; first logits, then scaled
  std::vector<float> scaled_, weights_;  // of the tokens in cells that may matter
  std::vector<float> ranked_;
  std::vector<std::pair<float, float>> between_;
  std::vector<float> masses_;  // of each block
  std::vector<int32_t> found_;
  std::vector<int32_t> copy_of_;  // of each cell; its place in copies_, or -1. Empty where nothing is changed
  std::vector<float> copies_;
  std::vector<int64_t> changed_;  // the cells that are in copies_
  std::vector<int32_t> counts_;   // of each token; 0 between rows
};

void Row::read(const float* logits, int64_t vocab) {
  logits_ = logits;
  vocab_ = vocab;
  largest_.resize(cells());
  Ints nan = {};
  bool rest_nan = false;
  for (int64_t cell = 0; cell < cells(); cell++) {
    const float* x = logits + cell * kCell;
    const int64_t size = std::min(kCell, vocab - cell * kCell);
    Floats best = splat(-kInfinity);
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
      Floats value = load<Floats>(x + i);
      nan |= value != value;
      best = max(value, best);
    }
    float rest = -kInfinity;
    for (; i < size; i++) {
      rest_nan |= x[i] != x[i];
      rest = std::max(rest, x[i]);
    }
    largest_[cell] = std::max(largest(best), rest);
  }
  best_ = top_ = *std::max_element(largest_.begin(), largest_.end());
  nan_ = rest_nan || any(nan);
  copy_of_.clear();
}

int32_t Row::likeliest() const {
  const int64_t cell = std::find(largest_.begin(), largest_.end(), best_) - largest_.begin();
  const float* x = cell_at(cell);
  return int32_t(cell * kCell + (std::find(x, x + std::min(kCell, vocab_ - cell * kCell), best_) - x));
}

// The logits of a cell as the draw sees them.
const float* Row::cell_at(int64_t cell) const {
  if (copy_of_.empty() || copy_of_[cell] < 0) return logits_ + cell * kCell;
  return copies_.data() + copy_of_[cell] * kCell;
}

// The same, to be changed. The pointer holds until the next call for another cell.
float* Row::changed(int64_t cell) {
  if (copy_of_[cell] < 0) {
    copy_of_[cell] = int32_t(changed_.size());
    changed_.push_back(cell);
    copies_.resize(changed_.size() * kCell, -kInfinity);
    const float* x = logits_ + cell * kCell;
    std::copy(x, x + std::min(kCell, vocab_ - cell * kCell), copies_.end() - kCell);
  }
  return copies_.data() + copy_of_[cell] * kCell;
}

void Row::adjust(const Adjustment& by) {
  copy_of_.assign(cells(), -1);
  copies_.clear();
  changed_.clear();
  for (int64_t i = 0; i < by.biased; i++)
    if (by.bias_ids[i] >= 0 && by.bias_ids[i] < vocab_) changed_logit(by.bias_ids[i]) += by.bias[i];
  if (by.repetition != 1 || by.frequency != 0 || by.presence != 0) penalize(by);
  for (int64_t cell : changed_) largest_[cell] = *std::max_element(cell_at(cell), cell_at(cell) + kCell);
  mask(by.allowed);
  best_ = *std::max_element(largest_.begin(), largest_.end());
}

void Row::penalize(const Adjustment& by) {
  counts_.resize(vocab_, 0);
  auto held = [&](int64_t i) { return by.tokens[i] >= 0 && by.tokens[i] < vocab_; };
  for (int64_t i = 0; i < by.length; i++)  // 1 for being there, and 2 for each time that it was drawn
    if (held(i)) counts_[by.tokens[i]] = (counts_[by.tokens[i]] | 1) + (i >= by.prompt ? 2 : 0);
  for (int64_t i = 0; i < by.length; i++) {
    if (!held(i) || counts_[by.tokens[i]] == 0) continue;
    const float drawn = counts_[by.tokens[i]] / 2;
    counts_[by.tokens[i]] = 0;
    float& logit = changed_logit(by.tokens[i]);
    logit = logit > 0 ? logit / by.repetition : logit * by.repetition;
    logit = logit - by.frequency * drawn - (drawn > 0 ? by.presence : 0);
  }
}

// A cell without an allowed token has -inf as its largest logit, and is never looked at.
void Row::mask(const int32_t* allowed) {
  for (int64_t cell = 0; cell < cells(); cell++) {
    const int64_t size = std::min(kCell, vocab_ - cell * kCell);
    const uint64_t inside = size == kCell ? ~uint64_t(0) : (uint64_t(1) << size) - 1;
    const uint64_t low = uint32_t(allowed[2 * cell]), high = size > 32 ? uint32_t(allowed[2 * cell + 1]) : 0;
    const uint64_t kept = (high << 32 | low) & inside;
    if (kept == inside) continue;
    if (kept == 0) {
      largest_[cell] = -kInfinity;
      continue;
    }
    float* x = changed(cell);
    for (int64_t i = 0; i < kCell; i++)
      if (!(kept >> i & 1)) x[i] = -kInfinity;
    largest_[cell] = *std::max_element(x, x + kCell);
  }
}

// Scales and weighs the tokens of every cell that holds one of at least `least`, unless that was done.
void Row::weigh(float least) {
  for (int64_t cell = 0; cell < cells(); cell++)
    if (largest_[cell] >= least && !(largest_[cell] >= weighed_)) weigh_cell(cell);
  weighed_ = std::min(weighed_, least);
}

void Row::weigh_cell(int64_t cell) {
  const int64_t at = cell * kCell, size = std::min(kCell, vocab_ - at);
  const float* x = cell_at(cell);
  float *scales = &scaled_[at], *weights = &weights_[at];
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    Floats value = (load<Floats>(x + i) - splat(best_)) / splat(temperature_);
    store(scales + i, value);
    store(weights + i, exp(value));
  }
  for (; i < kCell; i++) {
    scales[i] = i < size ? scaled(x[i]) : -kInfinity;
    weights[i] = exp(splat(scales[i]))[0];
  }
}

// What the tokens of a block weigh that are at least `least`, with nothing kept: memory is slower than the exponential.
float Row::unkept_mass(int64_t block, float least) const {
  Floats sums = {};
  float rest = 0;
  const int64_t first = block * kBlock / kCell, last = std::min(first + kBlock / kCell, cells());
  for (int64_t cell = first; cell < last; cell++) {
    if (!(largest_[cell] >= least)) continue;
    const int64_t size = std::min(kCell, vocab_ - cell * kCell);
    const float* x = cell_at(cell);
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
      Floats value = (load<Floats>(x + i) - splat(best_)) / splat(temperature_);
      sums += value >= splat(least) ? exp(value) : Floats{};
    }
    for (; i < size; i++)
      if (scaled(x[i]) >= least) rest += exp(splat(scaled(x[i])))[0];
  }
  return sum(sums) + rest;
}

// A logit that at least `rank` tokens reach: as many cells do. -inf where there are fewer cells.
float Row::rank_bound(int64_t rank) {
  if (rank > cells()) return -kInfinity;
  ranked_ = largest_;
  std::nth_element(ranked_.begin(), ranked_.begin() + rank - 1, ranked_.end(), std::greater<>());
  return ranked_[rank - 1];
}

// use(token) for those from `least` on and below `end`.
template <class F>
void Row::each(float least, float end, F use) const {
  for (int64_t cell = 0; cell < cells(); cell++) {
    if (!(largest_[cell] >= least)) continue;
    for (int64_t i = cell * kCell; i < (cell + 1) * kCell; i += kLanes) {
      Floats value = load<Floats>(&scaled_[i]);
      if (!any((value >= splat(least)) & (value < splat(end)))) continue;
      for (int lane = 0; lane < kLanes; lane++)
        if (value[lane] >= least && value[lane] < end) use(i + lane);
    }
  }
}

// The scaled logit of the token of that rank, the likeliest being 1; `least` where no so many reach it.
float Row::by_rank(int64_t rank, float least) {
  ranked_.clear();
  each(least, kInfinity, [&](int64_t i) { ranked_.push_back(scaled_[i]); });
  if (int64_t(ranked_.size()) < rank) return least;
  std::nth_element(ranked_.begin(), ranked_.begin() + rank - 1, ranked_.end(), std::greater<>());
  return ranked_[rank - 1];
}

// What the tokens of a block weigh that are at least `least`.
float Row::block_mass(int64_t block, float least) const {
  Floats total = {};
  const int64_t first = block * kBlock / kCell, end = std::min(first + kBlock / kCell, cells());
  for (int64_t cell = first; cell < end; cell++) {
    if (!(largest_[cell] >= least)) continue;
#pragma GCC unroll 4
    for (int64_t i = cell * kCell; i < (cell + 1) * kCell; i += kLanes) {
      Floats value = load<Floats>(&scaled_[i]);
      total += value >= splat(least) ? load<Floats>(&weights_[i]) : Floats{};
    }
  }
  return sum(total);
}

double Row::mass(float least) const {
  double total = 0;
  for (int64_t block = 0; block < blocks(); block++) total += block_mass(block, least);
  return total;
}

// The largest scaled logit such that the tokens from it on weigh at least `share` of those from `least` on.
float Row::by_mass(double share, float least) {
  double whole = 0;
  for (int64_t block = 0; block < blocks(); block++) whole += unkept_mass(block, least);
  const double wanted = share * whole;
  float low = 0, high = 0;
  for (float guess : {0.f, -4.f, -16.f, kLowest}) {  // most of a trained model's probability lies within a few nats
    high = low;
    low = std::max(guess, least);
    weigh(low);
    if (low == least || mass(low) >= wanted) break;
  }
  if (low == 0) return 0;
  for (int i = 0; i < kHalvings; i++) {
    const float middle = low + (high - low) / 2;
    (mass(middle) >= wanted ? low : high) = middle;
  }
  between_.clear();
  each(low, high, [&](int64_t i) { between_.emplace_back(scaled_[i], weights_[i]); });
  std::stable_sort(between_.begin(), between_.end(), [](auto& a, auto& b) { return a.first > b.first; });
  double found = mass(high);
  for (size_t i = 0; i < between_.size(); i++) {
    found += between_[i].second;
    const bool tied = i + 1 < between_.size() && between_[i + 1].first == between_[i].first;
    if (!tied && found >= wanted) return between_[i].first;
  }
  return low;
}

// The first place at which the sum of the weights so far exceeds `share` of the whole, or the last that weighs anything.
template <class F>
int64_t pick(int64_t count, double share, F weight) {
  double whole = 0, sum = 0;
  for (int64_t i = 0; i < count; i++) whole += weight(i);
  int64_t last = 0;
  for (int64_t i = 0; i < count; i++) {
    const double w = weight(i);
    if (!(w > 0)) continue;
    last = i;
    sum += w;
    if (sum > share * whole) break;
  }
  return last;
}

int32_t Row::draw(const Filters& filters, float first, float second) {
  temperature_ = filters.temperature;
  for (float& logit : largest_) logit = scaled(logit);
  scaled_.resize(cells() * kCell);
  weights_.resize(cells() * kCell);
  weighed_ = kInfinity;
  const bool ranks = filters.top_k > 0 && filters.top_k < vocab_, sums = filters.top_p < 1;
  float floor = kLeast;
  if (ranks) {
    floor = std::max(rank_bound(filters.top_k), kLeast);
    weigh(floor);
    floor = by_rank(filters.top_k, floor);
  }
  if (sums) floor = by_mass(filters.top_p, floor);
  if (filters.min_p > 0) floor = std::max(floor, std::log(filters.min_p));

  masses_.resize(blocks());
  for (int64_t block = 0; block < blocks(); block++)
    masses_[block] = floor >= weighed_ ? block_mass(block, floor) : unkept_mass(block, floor);
  const int64_t block = pick(blocks(), first, [&](int64_t i) { return masses_[i]; });
  const int64_t at = block * kBlock, size = std::min(kBlock, cells() * kCell - at);
  for (int64_t cell = at / kCell; cell < (at + size) / kCell; cell++) {
    weigh_cell(cell);
    if (!(largest_[cell] >= floor)) std::fill_n(&scaled_[cell * kCell], kCell, -kInfinity);
  }
  return int32_t(at + pick(size, second, [&](int64_t i) { return scaled_[at + i] >= floor ? weights_[at + i] : 0.f; }));
}

float Row::log_total() const {
  double total = 0;
  for (int64_t block = 0; block < blocks(); block++) {
    const int64_t at = block * kBlock, end = std::min(at + kBlock, vocab_);
    Floats sums = {};
    float rest = 0;
    int64_t i = at;
    for (; i + kLanes <= end; i += kLanes) sums += exp(load<Floats>(logits_ + i) - splat(top_));
    for (; i < end; i++) rest += exp(splat(logits_[i] - top_))[0];
    total += sum(sums) + rest;
  }
  return float(std::log(total));
}

const std::vector<int32_t>& Row::likeliest(int64_t count) {
  count = std::min(count, vocab_);
  const float bound = rank_bound(count);
  found_.clear();
  for (int64_t cell = 0; cell < cells(); cell++) {
    if (!(largest_[cell] >= bound)) continue;
    for (int64_t i = cell * kCell; i < std::min((cell + 1) * kCell, vocab_); i++)
      if (logits_[i] >= bound) found_.push_back(int32_t(i));
  }
  std::partial_sort(found_.begin(), found_.begin() + count, found_.end(), [&](int32_t a, int32_t b) {
    return logits_[a] != logits_[b] ? logits_[a] > logits_[b] : a < b;
  });
  found_.resize(count);
  return found_;
}

using Logits = ffi::Buffer<ffi::F32, 2>;
using Numbers = ffi::Buffer<ffi::F32, 1>;
using Integers = ffi::Buffer<ffi::S32, 1>;
using Table = ffi::Buffer<ffi::S32, 2>;

// The draws of all rows; adjust(i, row) is called before each that isn't forced.
template <class F>
ffi::Error draw_rows(Logits logits, Numbers temperature, Integers top_k, Numbers top_p, Numbers min_p, Logits uniform,
                     Integers judged, Integers forced, ffi::Result<Integers> drawn,
                     ffi::Result<Numbers> log_probability, ffi::Result<Table> top_tokens,
                     ffi::Result<Logits> top_log_probabilities, int64_t vocab, F adjust) {
  const int64_t rows = logits.dimensions()[0], width = logits.dimensions()[1];
  for (int64_t size : {temperature.dimensions()[0], top_k.dimensions()[0], top_p.dimensions()[0],
                       min_p.dimensions()[0], uniform.dimensions()[0], judged.dimensions()[0], forced.dimensions()[0],
                       drawn->dimensions()[0], log_probability->dimensions()[0], top_tokens->dimensions()[0],
                       top_log_probabilities->dimensions()[0]})
    if (size != rows) return ffi::Error::InvalidArgument("sampling: each parameter must have as many rows as the logits");
  const int64_t most = top_tokens->dimensions()[1];
  if (vocab < 1 || vocab > width || uniform.dimensions()[1] != 2 || top_log_probabilities->dimensions()[1] != most)
    return ffi::Error::InvalidArgument("sampling: a row must hold the vocabulary, and have two uniform numbers");
  Pool::get().run(rows, [&](int64_t i) {
    static thread_local Row row;
    row.read(logits.typed_data() + i * width, vocab);
    const Filters filters = {temperature.typed_data()[i], top_k.typed_data()[i], top_p.typed_data()[i],
                             min_p.typed_data()[i]};
    const float* numbers = uniform.typed_data() + 2 * i;
    int32_t* tokens = top_tokens->typed_data() + i * most;
    float* log_probabilities = top_log_probabilities->typed_data() + i * most;
    std::fill(tokens, tokens + most, 0);
    std::fill(log_probabilities, log_probabilities + most, -kInfinity);
    log_probability->typed_data()[i] = 0;
    int32_t& token = drawn->typed_data()[i] = kBadRow;
    const int32_t given = forced.typed_data()[i];
    if (!row.is_finite() || given >= vocab) return;
    const int64_t wanted = std::min<int64_t>(judged.typed_data()[i], most);
    const float total = wanted < 0 ? 0 : row.log_total();
    const auto told = wanted > 0 ? row.likeliest(wanted) : std::vector<int32_t>();
    if (given >= 0) {
      token = given;
    } else {
      adjust(i, row);
      if (!row.is_finite()) return;
      token = filters.temperature > 0 ? row.draw(filters, numbers[0], numbers[1]) : row.likeliest();
    }
    for (int32_t likely : told) {
      *tokens++ = likely;
      *log_probabilities++ = row.log_probability(likely, total);
    }
    if (wanted >= 0) log_probability->typed_data()[i] = row.log_probability(token, total);
  });
  return ffi::Error::Success();
}

ffi::Error sample_rows(Logits logits, Numbers temperature, Integers top_k, Numbers top_p, Numbers min_p, Logits uniform,
                       Integers judged, Integers forced, ffi::Result<Integers> drawn,
                       ffi::Result<Numbers> log_probability, ffi::Result<Table> top_tokens,
                       ffi::Result<Logits> top_log_probabilities, int64_t vocab) {
  return draw_rows(logits, temperature, top_k, top_p, min_p, uniform, judged, forced, drawn, log_probability,
                   top_tokens, top_log_probabilities, vocab, [](int64_t, Row&) {});
}

ffi::Error sample_adjusted_rows(Logits logits, Numbers temperature, Integers top_k, Numbers top_p, Numbers min_p,
                                Logits uniform, Integers judged, Integers forced, Table bias_ids, Logits bias,
                                Numbers repetition, Numbers frequency, Numbers presence, Table tokens, Integers slot,
                                Integers prompt, Integers length, Table allowed, ffi::Result<Integers> drawn,
                                ffi::Result<Numbers> log_probability, ffi::Result<Table> top_tokens,
                                ffi::Result<Logits> top_log_probabilities, int64_t vocab) {
  const int64_t rows = logits.dimensions()[0], biased = bias_ids.dimensions()[1], context = tokens.dimensions()[1];
  const int64_t words = allowed.dimensions()[1];
  for (int64_t size : {bias_ids.dimensions()[0], bias.dimensions()[0], repetition.dimensions()[0],
                       frequency.dimensions()[0], presence.dimensions()[0], slot.dimensions()[0],
                       prompt.dimensions()[0], length.dimensions()[0], allowed.dimensions()[0]})
    if (size != rows) return ffi::Error::InvalidArgument("sampling: each adjustment must have as many rows as the logits");
  if (bias.dimensions()[1] != biased || words * 32 < vocab)
    return ffi::Error::InvalidArgument("sampling: each bias must have an id, and a mask bits for the whole vocabulary");
  for (int64_t i = 0; i < rows; i++)
    if (slot.typed_data()[i] < 0 || slot.typed_data()[i] >= tokens.dimensions()[0] || length.typed_data()[i] > context)
      return ffi::Error::InvalidArgument("sampling: a row's sequence must lie in a slot");
  return draw_rows(logits, temperature, top_k, top_p, min_p, uniform, judged, forced, drawn, log_probability,
                   top_tokens, top_log_probabilities, vocab, [&](int64_t i, Row& row) {
                     row.adjust({bias_ids.typed_data() + i * biased, bias.typed_data() + i * biased, biased,
                                 repetition.typed_data()[i], frequency.typed_data()[i], presence.typed_data()[i],
                                 tokens.typed_data() + slot.typed_data()[i] * context, prompt.typed_data()[i],
                                 length.typed_data()[i], allowed.typed_data() + i * words});
                   });
}

// What a draw of each token would tell of it, whatever the row: where it isn't finite, the result isn't either.
ffi::Error log_probabilities(Logits logits, Integers tokens, ffi::Result<Numbers> out, int64_t vocab) {
  const int64_t rows = logits.dimensions()[0], width = logits.dimensions()[1];
  if (tokens.dimensions()[0] != rows || out->dimensions()[0] != rows || vocab < 1 || vocab > width)
    return ffi::Error::InvalidArgument("log_probability: each row must have a token, and hold the vocabulary");
  Pool::get().run(rows, [&](int64_t i) {
    static thread_local Row row;
    row.read(logits.typed_data() + i * width, vocab);
    const int32_t token = tokens.typed_data()[i];
    const bool known = row.is_finite() && token >= 0 && token < vocab;
    out->typed_data()[i] = known ? row.log_probability(token, row.log_total()) : NAN;
  });
  return ffi::Error::Success();
}

auto log_probability_binding() {
  return ffi::Ffi::Bind().Arg<Logits>().Arg<Integers>().Ret<Numbers>().Attr<int64_t>("vocab");
}

template <class Binding>
auto with_results(Binding binding) {
  return std::move(binding)
      .template Ret<Integers>()
      .template Ret<Numbers>()
      .template Ret<Table>()
      .template Ret<Logits>()
      .template Attr<int64_t>("vocab");
}

auto sample_arguments() {
  return ffi::Ffi::Bind()
      .Arg<Logits>()
      .Arg<Numbers>()
      .Arg<Integers>()
      .Arg<Numbers>()
      .Arg<Numbers>()
      .Arg<Logits>()
      .Arg<Integers>()
      .Arg<Integers>();
}

auto sample_binding() { return with_results(sample_arguments()); }

auto sample_adjusted_binding() {
  return with_results(sample_arguments()
                          .Arg<Table>()
                          .Arg<Logits>()
                          .Arg<Numbers>()
                          .Arg<Numbers>()
                          .Arg<Numbers>()
                          .Arg<Table>()
                          .Arg<Integers>()
                          .Arg<Integers>()
                          .Arg<Integers>()
                          .Arg<Table>());
}

}  // namespace
}  // namespace isthmus

using namespace isthmus;
XLA_FFI_DEFINE_HANDLER_SYMBOL(sample, sample_rows, sample_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(sample_adjusted, sample_adjusted_rows, sample_adjusted_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(log_probability, log_probabilities, log_probability_binding());
