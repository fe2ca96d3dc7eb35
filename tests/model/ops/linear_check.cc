// Every kind of product of linear.cc against plain loops, without JAX: for CPUs that an emulator stands in for. Exits with 1
// when one is wrong.
#include "linear.cc"

#include <cstdio>
#include <cstdlib>
#include <random>

namespace {

std::mt19937 dice(1);

float normal() { return std::normal_distribution<float>()(dice); }

float rounded_bf16(float x) { return isthmus::from_bf16(isthmus::to_bf16(x)); }

// A matrix [inputs, outputs] of random numbers: what linear.cc reads, and what that means.
struct Matrix {
  int64_t inputs, outputs, padded, numbers, group, lines;
  std::vector<uint8_t> bytes;
  std::vector<int> integers;  // or `floats`, of [lines * numbers, padded]
  std::vector<float> floats;
  std::vector<float> scales;       // of int8
  std::vector<uint16_t> scales16;  // of int4, [padded / 16, groups, 16]
  std::vector<int32_t> sums;

  Matrix(int64_t inputs, int64_t outputs, int64_t numbers, int64_t group)
      : inputs(inputs), outputs(outputs), padded((outputs + 15) / 16 * 16), numbers(numbers), group(group) {
    int64_t whole = group ? (inputs + group - 1) / group * group : inputs;
    lines = (whole + numbers - 1) / numbers;
    bytes.assign(lines * padded * 4, 0);
    integers.assign(lines * numbers * padded, 0);
    floats.assign(lines * numbers * padded, 0);
    scales.assign(padded, 0), sums.assign(padded, 0);
    for (int64_t n = 0; n < outputs; n++) scales[n] = std::fabs(normal()) * 0.01f;
    if (group) {
      scales16.assign(whole / group * padded, 0);
      for (auto& scale : scales16) scale = isthmus::to_bf16(std::fabs(normal()));
    }
    for (int64_t k = 0; k < inputs; k++)
      for (int64_t n = 0; n < outputs; n++) put(k, n);
  }

  uint16_t scale16(int64_t k, int64_t n) const {
    return scales16[(n / 16 * (lines * numbers / group) + k / group) * 16 + n % 16];
  }

  uint8_t* quad(int64_t k, int64_t n) { return &bytes[((n / 16 * lines + k / numbers) * 16 + n % 16) * 4]; }

  void put(int64_t k, int64_t n) {
    float real = numbers == 2 ? rounded_bf16(normal()) : normal();
    int integer = numbers == 4 ? int(dice() % 255) - 127 : int(dice() % 16) - 8;
    uint16_t half = isthmus::to_bf16(real);
    switch (numbers) {
      case 1: std::memcpy(quad(k, n), &real, 4); break;
      case 2: std::memcpy(quad(k, n) + 2 * (k % 2), &half, 2); break;
      case 4: quad(k, n)[k % 4] = uint8_t(integer); break;
      case 8: quad(k, n)[k % 4] |= (integer + 8) << (k % 8 < 4 ? 0 : 4); break;
    }
    floats[k * padded + n] = real, integers[k * padded + n] = integer, sums[n] += integer;
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
void expect(const Matrix& w, const std::vector<float>& x, int64_t n, double* want, double* size) {
  *want = *size = 0;
  auto add = [&](double term) { *want += term, *size += std::fabs(term); };
  int64_t run = w.numbers < 4 ? 1 : w.numbers == 4 ? w.inputs : w.group % 64 == 0 ? 64 : 32;
  std::vector<int> integers(run);
  for (int64_t begin = 0; begin < w.inputs; begin += run) {
    if (w.numbers < 4) {
      add(double(x[begin]) * w.floats[begin * w.padded + n]);
      continue;
    }
    int64_t count = std::min(run, w.inputs - begin), sum = 0;
    float scale;
    round_run(&x[begin], count, integers.data(), &scale);
    for (int64_t i = 0; i < count; i++) sum += integers[i] * w.integers[(begin + i) * w.padded + n];
    double unit = w.group ? isthmus::from_bf16(w.scale16(begin, n)) : w.scales[n];
    add(double(sum) * unit * scale);
  }
}

template <class F, class X>
void check(int64_t rows, int64_t inputs, int64_t outputs, int64_t group = 0) {
  Matrix w(inputs, outputs, F::kNumbers, group);
  std::vector<X> x(rows * inputs);
  std::vector<float> read(inputs), y(rows * outputs, NAN);
  for (auto& number : x) {
    if constexpr (sizeof(X) == 2)
      number = isthmus::to_bf16(normal());
    else
      number = normal();
  }
  if (rows > 2) std::fill_n(x.begin() + inputs, inputs, X{});  // zeros, which are left out
  isthmus::Weights weights{w.bytes.data(), group ? (const void*)w.scales16.data() : w.scales.data(), w.sums.data(),
                           w.padded, group};
  std::vector<isthmus::Product> products{{weights, isthmus::Out{y.data(), false, outputs}}};
  isthmus::run<F>(x.data(), rows, inputs, w.lines, products);
  for (int64_t row = 0; row < rows; row++) {
    for (int64_t k = 0; k < inputs; k++) read[k] = isthmus::number(&x[row * inputs], k);
    for (int64_t n = 0; n < outputs; n++) {
      double want, size;
      expect(w, read, n, &want, &size);
      if (std::fabs(y[row * outputs + n] - want) <= 2e-6 * size + 1e-30) continue;
      std::fprintf(stderr, "%lld numbers a line, group %lld, [%lld, %lld] x [%lld, %lld]: y[%lld, %lld] is %g, not %g\n",
                   (long long)F::kNumbers, (long long)group, (long long)rows, (long long)inputs, (long long)inputs,
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
        check<Float32, float>(rows, inputs, outputs);
        check<Float32, uint16_t>(rows, inputs, outputs);
        check<Bfloat16, float>(rows, inputs, outputs);
        check<Bfloat16Pairs, uint16_t>(rows, inputs, outputs);
        check<Int8, float>(rows, inputs, outputs);
        check<Int8, uint16_t>(rows, inputs, outputs);
        check<Int4<32>, float>(rows, inputs, outputs, 32);
        check<Int4<64>, float>(rows, inputs, outputs, 64);
        check<Int4<64>, uint16_t>(rows, inputs, outputs, 128);
      }
  std::printf("right, with %d lanes\n", kLanes);
  std::fflush(stdout);
  std::_Exit(0);  // the pool's threads never end
}
