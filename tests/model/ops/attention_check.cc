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

// One step: two rows, then a block of `block` tokens of one sequence. Every sequence has 8 pages of its own.
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
  auto v = normals(s.tokens * kv_heads * head_dim), cache = normals(s.pages * page_size * s.slots() * head_dim);
  auto sinks = normals(s.heads);
  std::vector<float> out(q.size(), NAN);
  s.q = q.data(), s.k = k.data(), s.v = v.data(), s.cache = cache.data(), s.out = out.data();
  s.tables = tables.data(), s.positions = positions.data(), s.sinks = with_sinks ? sinks.data() : nullptr;
  isthmus::run<float, float>(s);
  auto place = [&](int64_t sequence, int64_t position, int64_t slot) {
    int64_t page = tables[sequence * kWidth + position / page_size];
    return &cache[((page * page_size + position % page_size) * s.slots() + slot) * head_dim];
  };
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
        if (std::fabs(got - right) <= 2e-5) continue;
        std::fprintf(stderr, "head_dim %lld, page_size %lld, window %lld: token %lld, head %lld is %g, not %g\n",
                     (long long)head_dim, (long long)page_size, (long long)window, (long long)token, (long long)head, got,
                     right);
        std::exit(1);
      }
    }
}

}  // namespace

int main() {
  isthmus::Pool::use(3);
  for (int64_t head_dim : {1, 7, 20, 64, 72})
    for (int64_t page_size : {1, 5, 16})
      for (int64_t window : {0, 1, 33}) {
        check(head_dim, 1, 2, page_size, 0, window, 0, false, false);
        check(head_dim, 3, 1, page_size, 7, window, 0, true, false);
        check(head_dim, 2, 2, page_size, 8, window, 3, false, true);
      }
  std::printf("right, with %d lanes\n", isthmus::kLanes);
  std::fflush(stdout);
  std::_Exit(0);  // the pool's threads never end
}
