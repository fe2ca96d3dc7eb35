// attention.cc against plain loops, without JAX: for CPUs that an emulator stands in for. Exits with 1 when it is wrong.
#include "attention.cc"

#include <cstdio>
#include <cstdlib>
#include <random>

namespace {

std::mt19937 dice(1);

float normal() { return std::normal_distribution<float>()(dice); }

std::vector<float> normals(int64_t size) {
  std::vector<float> out(size);
  for (float& x : out) x = normal();
  return out;
}

// What lies in the cache as numbers: int8 vectors are times their scales and turned back, by signs from the places' bits.
std::vector<double> plain(const isthmus::Step&, const std::vector<float>& cache) { return {cache.begin(), cache.end()}; }
std::vector<double> plain(const isthmus::Step& s, const std::vector<int8_t>& cache) {
  const int64_t size = s.head_dim, each = (size + 63) / 64;
  int64_t block = 1;
  while (size % (2 * block) == 0) block *= 2;
  std::vector<double> out(cache.size());
  for (size_t i = 0; i < cache.size(); i++) {
    const int64_t begin = int64_t(i) / size * size, d = int64_t(i) % size, first = d / block * block;
    for (int64_t j = 0; j < block; j++) {
      const double kept = cache[begin + first + j] * double(s.scales[begin / size * each + (first + j) / 64]);
      out[i] += __builtin_parityll((d - first) & j) ? -kept : kept;
    }
    out[i] /= std::sqrt(double(block));
  }
  return out;
}

// One step: two rows, then a block of `block` tokens of one sequence. Every sequence has 8 pages of its own.
template <class C>
void check(int64_t head_dim, int64_t group, int64_t kv_heads, int64_t page_size, int64_t block, int64_t window,
           float soft_cap, bool with_sinks, bool shared) {
  constexpr int64_t kWidth = 8, kSequences = 3;
  isthmus::Step s{};
  s.rows = 2, s.block = block, s.tokens = s.rows + block;
  s.kv_heads = kv_heads, s.heads = kv_heads * group, s.head_dim = head_dim, s.shared = shared;
  s.page_size = page_size, s.table_width = kWidth, s.pages = kSequences * kWidth + 1;
  s.scale = 0.3f, s.soft_cap = soft_cap, s.window = window;
  std::vector<int32_t> tables, positions;
  for (int32_t i = 0; i < kSequences * kWidth; i++) tables.push_back(1 + (i * 7) % (kSequences * kWidth));
  const int64_t longest = kWidth * page_size;
  for (int64_t i = 0; i < s.rows; i++) positions.push_back(int32_t(dice() % longest));
  const int32_t start = int32_t(dice() % (longest - block + 1));
  for (int32_t i = 0; i < block; i++) positions.push_back(start + i);
  if (block > 2) positions[3] = -1;
  auto q = normals(s.tokens * s.heads * head_dim), k = normals(s.tokens * kv_heads * head_dim);
  auto v = normals(s.tokens * kv_heads * head_dim), sinks = normals(s.heads);
  constexpr bool kIntegers = std::is_same_v<C, int8_t>;
  std::vector<C> cache(s.pages * page_size * s.slots() * head_dim);
  for (C& x : cache) x = C(kIntegers ? int(dice() % 255) - 127 : normal());
  std::vector<float> scales(cache.size() / head_dim * s.scales_each(), 0.012f);
  std::vector<float> out(q.size(), NAN);
  s.q = q.data(), s.k = k.data(), s.v = v.data(), s.cache = cache.data(), s.out = out.data();
  s.tables = tables.data(), s.positions = positions.data(), s.sinks = with_sinks ? sinks.data() : nullptr;
  s.scales = kIntegers ? scales.data() : nullptr;
  isthmus::run<float, C>(s);
  const std::vector<double> numbers = plain(s, cache);
  auto place = [&](int64_t sequence, int64_t position, int64_t slot) {
    int64_t page = tables[sequence * kWidth + position / page_size];
    return &numbers[((page * page_size + position % page_size) * s.slots() + slot) * head_dim];
  };
  auto expect = [&](double got, double right, double within, const char* what, int64_t token, int64_t head) {
    if (std::fabs(got - right) <= within) return;
    std::fprintf(stderr, "%s, head_dim %lld, page_size %lld, window %lld: token %lld, head %lld is %g, not %g\n", what,
                 (long long)head_dim, (long long)page_size, (long long)window, (long long)token, (long long)head, got, right);
    std::exit(1);
  };
  for (int64_t token = 0; token < s.tokens; token++)
    for (int64_t i = 0; i < kv_heads * head_dim && positions[token] >= 0; i++) {
      const int64_t head = i / head_dim, at = token * kv_heads * head_dim + i;
      const double* kept = place(std::min<int64_t>(token, 2), positions[token], shared ? head : 2 * head) + i % head_dim;
      expect(*kept, k[at], kIntegers ? 0.1 : 0, "key", token, head);
      if (!shared) expect(kept[head_dim], v[at], kIntegers ? 0.1 : 0, "value", token, head);
    }
  for (int64_t token = 0; token < s.tokens; token++)
    for (int64_t head = 0; head < s.heads; head++) {
      const int64_t sequence = std::min<int64_t>(token, 2), position = positions[token];
      const int64_t slot = head / group * (shared ? 1 : 2);
      std::vector<double> want(head_dim, 0);
      double total = with_sinks ? std::exp(double(sinks[head])) : 0;
      for (int64_t at = window ? std::max<int64_t>(0, position - window + 1) : 0; at <= position; at++) {
        double score = 0;
        for (int64_t d = 0; d < head_dim; d++)
          score += double(q[(token * s.heads + head) * head_dim + d]) * place(sequence, at, slot)[d];
        score *= s.scale;
        if (soft_cap) score = soft_cap * std::tanh(score / soft_cap);
        total += std::exp(score);
        for (int64_t d = 0; d < head_dim; d++)
          want[d] += std::exp(score) * place(sequence, at, shared ? slot : slot + 1)[d];
      }
      for (int64_t d = 0; d < head_dim; d++) {
        double right = position < 0 ? 0 : want[d] / total, got = out[(token * s.heads + head) * head_dim + d];
        expect(got, right, 2e-5, "out", token, head);
      }
    }
}

template <class C>
void check_all(std::initializer_list<int64_t> head_dims) {
  for (int64_t head_dim : head_dims)
    for (int64_t page_size : {1, 5, 16})
      for (int64_t window : {0, 1, 33}) {
        check<C>(head_dim, 1, 2, page_size, 0, window, 0, false, false);
        check<C>(head_dim, 3, 1, page_size, 7, window, 0, true, false);
        check<C>(head_dim, 2, 2, page_size, 8, window, 3, false, true);
      }
}

}  // namespace

int main() {
  isthmus::Pool::use(3);
  check_all<float>({1, 7, 20, 64, 72});
  check_all<int8_t>({1, 7, 24, 64, 96, 128});
  std::printf("right, with %d lanes\n", isthmus::kLanes);
  std::fflush(stdout);
  std::_Exit(0);  // the pool's threads never end
}
