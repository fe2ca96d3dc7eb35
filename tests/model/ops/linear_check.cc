// Every kind of product of linear_product.h against plain loops, without JAX: for CPUs that an emulator stands in for. Exits with 1
// when one is wrong.
#include "linear_product.h"

#include <cstdio>
#include <cstdlib>
#include <random>

namespace {

std::mt19937 dice(1);

float normal() { return std::normal_distribution<float>()(dice); }

float rounded_bf16(float x) { return isthmus::from_bf16(isthmus::to_bf16(x)); }

// A matrix [inputs, outputs] of random numbers: what the kernels read, and what that means.
struct Matrix {
  int64_t inputs, outputs, padded, bits, group, lines;  // bits: 32, 16, or of an integer
  std::vector<uint8_t> bytes;
  std::vector<int> integers;  // or `floats`, of [inputs, padded]
  std::vector<float> floats;
  std::vector<uint16_t> scales;  // of integers, [padded / 16, groups, 16]

  Matrix(int64_t inputs, int64_t outputs, int64_t bits, int64_t run, int64_t group)
      : inputs(inputs), outputs(outputs), padded((outputs + 15) / 16 * 16), bits(bits), group(group) {
    lines = (inputs + run - 1) / run * run * bits / 32;
    bytes.assign(lines * padded * 4, 0);
    integers.assign(inputs * padded, 0), floats.assign(inputs * padded, 0);
    scales.assign(group ? groups() * padded : 0, 0);
    for (auto& scale : scales) scale = isthmus::to_bf16(std::fabs(normal()));
    for (int64_t k = 0; k < inputs; k++)
      for (int64_t n = 0; n < outputs; n++) put(k, n);
  }

  int64_t groups() const { return (inputs + group - 1) / group; }
  float scale(int64_t k, int64_t n) const {
    return isthmus::from_bf16(scales[(n / 16 * groups() + k / group) * 16 + n % 16]);
  }
  uint8_t* quad(int64_t line, int64_t n) { return &bytes[((n / 16 * lines + line) * 16 + n % 16) * 4]; }

  void put(int64_t k, int64_t n) {
    const float real = bits == 16 ? rounded_bf16(normal()) : normal();
    const uint16_t half = isthmus::to_bf16(real);
    floats[k * padded + n] = real;
    if (bits == 32) return (void)std::memcpy(quad(k, n), &real, 4);
    if (bits == 16) return (void)std::memcpy(quad(k / 2, n) + 2 * (k % 2), &half, 2);
    const int offset = 1 << (bits - 1), value = int(dice() % (2 * offset)), i = int(k % 4), q = int(k % 32 / 4);
    integers[k * padded + n] = value - offset;
    const int64_t run = k / 32 * bits;
    if (bits == 8) return (void)(quad(run + q, n)[i] = uint8_t(value));
    quad(run + q / 2, n)[i] |= (value & 15) << (q % 2 * 4);
    if (bits == 5) quad(run + 4, n)[i] |= (value >> 4) << q;
    if (bits == 6) quad(run + 4 + q / 4, n)[i] |= (value >> 4) << (q % 4 * 2);
  }
};

// x over runs of `run` numbers, as integers times a scale.
void round_run(const float* x, int64_t size, int* to, float* scale) {
  float top = 0;
  for (int64_t i = 0; i < size; i++) top = std::max(top, std::fabs(x[i]));
  for (int64_t i = 0; i < size; i++) to[i] = top == 0 ? 0 : int(std::nearbyint(x[i] * (127.f / top)));
  *scale = top / 127.f;
}

// What the product of one row and one column is, and of what size its terms are.
void expect(const Matrix& w, const std::vector<float>& x, int64_t run, int64_t n, double* want, double* size) {
  *want = *size = 0;
  auto add = [&](double term) { *want += term, *size += std::fabs(term); };
  std::vector<int> integers(run);
  for (int64_t begin = 0; begin < w.inputs; begin += run) {
    const int64_t count = std::min(run, w.inputs - begin);
    if (!w.group) {
      for (int64_t k = begin; k < begin + count; k++) add(double(x[k]) * w.floats[k * w.padded + n]);
      continue;
    }
    int64_t sum = 0;
    float scale;
    round_run(&x[begin], count, integers.data(), &scale);
    for (int64_t i = 0; i < count; i++) sum += integers[i] * w.integers[(begin + i) * w.padded + n];
    add(double(sum) * w.scale(begin, n) * scale);
  }
}

template <class F, class X>
void check(int64_t bits, int64_t rows, int64_t inputs, int64_t outputs, int64_t group = 0) {
  Matrix w(inputs, outputs, bits, F::kRun, group);
  std::vector<X> x(rows * inputs);
  std::vector<float> read(inputs), y(rows * outputs, NAN);
  for (auto& number : x) {
    if constexpr (sizeof(X) == 2)
      number = isthmus::to_bf16(normal());
    else
      number = normal();
  }
  if (rows > 2) std::fill_n(x.begin() + inputs, inputs, X{});  // zeros, which are left out
  isthmus::Weights weights{w.bytes.data(), w.scales.data(), false, w.padded};
  if (group) weights.groups = w.groups(), weights.group = group / F::kRun;
  std::vector<isthmus::Product> products{{weights, isthmus::Out{y.data(), false, outputs}}};
  std::vector<isthmus::Work> works;
  const isthmus::Out out{y.data(), false, outputs};
  works.push_back(isthmus::prepare<F>(x.data(), 0, rows, inputs, w.lines, false, {{weights, out}}));
  isthmus::run<F>(works);
  for (int64_t row = 0; row < rows; row++) {
    for (int64_t k = 0; k < inputs; k++) read[k] = isthmus::number(&x[row * inputs], k);
    for (int64_t n = 0; n < outputs; n++) {
      double want, size;
      expect(w, read, F::kRun, n, &want, &size);
      if (std::fabs(y[row * outputs + n] - want) <= 2e-6 * size + 1e-30) continue;
      std::fprintf(stderr, "%lld bits, group %lld, [%lld, %lld] x [%lld, %lld]: y[%lld, %lld] is %g, not %g\n",
                   (long long)bits, (long long)group, (long long)rows, (long long)inputs, (long long)inputs,
                   (long long)outputs, (long long)row, (long long)n, y[row * outputs + n], want);
      std::exit(1);
    }
  }
}

}  // namespace

int main() {
  using namespace isthmus;
  Pool::use(3);  // chunks don't divide evenly among these threads
  for (int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 25})
    for (int64_t inputs : {1, 3, 31, 64, 130, 1100})
      for (int64_t outputs : {1, 15, 16, 50, 129}) {
        if (inputs == 1100 && outputs < 50) continue;
        check<Float32, float>(32, rows, inputs, outputs);
        check<Float32, uint16_t>(32, rows, inputs, outputs);
        check<Bfloat16, float>(16, rows, inputs, outputs);
        check<Bfloat16Pairs, uint16_t>(16, rows, inputs, outputs);
        check<Integers<8, 32>, float>(8, rows, inputs, outputs, 96);
        check<Integers<8, 64>, uint16_t>(8, rows, inputs, outputs, 256);
        check<Integers<6, 32>, float>(6, rows, inputs, outputs, 32);
        check<Integers<6, 64>, uint16_t>(6, rows, inputs, outputs, 64);
        check<Integers<5, 64>, float>(5, rows, inputs, outputs, 128);
        check<Integers<5, 32>, uint16_t>(5, rows, inputs, outputs, 32);
        check<Integers<4, 32>, float>(4, rows, inputs, outputs, 32);
        check<Integers<4, 64>, uint16_t>(4, rows, inputs, outputs, 128);
      }
  std::printf("right, with %d lanes\n", kLanes);
  std::fflush(stdout);
  std::_Exit(0);  // the pool's threads never end
}
