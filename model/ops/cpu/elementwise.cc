// What lies between products and attention, row by row: norms, rotary embedding and gates, as model/ops/norm.py, rotary.py
// and gated.py say, in float32 and rounded once. A row's result depends on that row alone.
#include <algorithm>
#include <cmath>

#include "pool.h"
#include "simd.h"
#include "xla/ffi/api/ffi.h"

namespace isthmus {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kAlone = 1 << 14;  // numbers that are not worth a second thread

#define REQUIRE(condition, message) \
  if (!(condition)) return ffi::Error::InvalidArgument("elementwise: " message)

// Calls task(row) for every row of `size` numbers, on all threads where that is worth it.
template <class F>
void each_row(int64_t rows, int64_t size, F task) {
  const int64_t parts = rows * size < kAlone ? 1 : std::min<int64_t>(rows, 4 * Pool::get().threads());
  Pool::get().run(parts, [&](int64_t part) {
    for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; row++) task(row);
  });
}

// Calls run(X*) for the numbers of an array: float or uint16_t, which is bfloat16.
template <class F>
ffi::Error by_type(ffi::DataType type, F run) {
  if (type == ffi::F32) return run((float*)nullptr);
  if (type == ffi::BF16) return run((uint16_t*)nullptr);
  return ffi::Error::InvalidArgument("elementwise: arrays must be float32 or bfloat16");
}

bool alike(const ffi::AnyBuffer& a, const ffi::AnyBuffer& b) {
  return a.element_type() == b.element_type() && a.dimensions() == b.dimensions();
}

// ---- norm

template <class X, class Y>
void norm_row(const X* x, const float* scale, int64_t size, float eps, float offset, Y* y) {
  Floats squares = {};
  float rest = 0;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    Floats value = numbers(x + i);
    squares = fma(value, value, squares);
  }
  for (; i < size; i++) rest += number(x, i) * number(x, i);
  const float factor = 1.f / std::sqrt((sum(squares) + rest) / float(size) + eps);
  for (i = 0; i + kLanes <= size; i += kLanes)
    put(y + i, numbers(x + i) * splat(factor) * (load<Floats>(scale + i) + splat(offset)));
  for (; i < size; i++) put(y, i, number(x, i) * factor * (scale[i] + offset));
}

ffi::Error norm(ffi::AnyBuffer x, ffi::Buffer<ffi::F32, 1> scale, ffi::Result<ffi::AnyBuffer> y, float eps,
                float offset) {
  auto d = x.dimensions();
  REQUIRE(x.dimensions() == y->dimensions() && d.size() >= 1, "a norm's result must be as large as x");
  REQUIRE(d.back() > 0 && scale.dimensions()[0] == d.back(), "a scale must be as long as a row");
  const int64_t size = d.back(), rows = int64_t(x.element_count()) / size;
  return by_type(x.element_type(), [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    return by_type(y->element_type(), [&](auto* result) {
      using Y = std::remove_pointer_t<decltype(result)>;
      each_row(rows, size, [&](int64_t row) {
        norm_row((const X*)x.untyped_data() + row * size, scale.typed_data(), size, eps, offset,
                 (Y*)y->untyped_data() + row * size);
      });
      return ffi::Error::Success();
    });
  });
}

// ---- rotary embedding of the first `turned` numbers of each vector

template <class X>
void rotate_vector(const X* x, const float* cos, const float* sin, int64_t turned, int64_t size, X* y) {
  const int64_t half = turned / 2;
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    Floats low = numbers(x + i), high = numbers(x + half + i);
    put(y + i, low * load<Floats>(cos + i) + high * load<Floats>(sin + i));
    put(y + half + i, high * load<Floats>(cos + half + i) + low * load<Floats>(sin + half + i));
  }
  for (; i < half; i++) {
    float low = number(x, i), high = number(x, half + i);
    put(y, i, low * cos[i] + high * sin[i]);
    put(y, half + i, high * cos[half + i] + low * sin[half + i]);
  }
  if (turned < size) std::memcpy(y + turned, x + turned, (size - turned) * sizeof(X));
}

// cos, sin: [tokens, turned]; each x: [tokens, heads, head_dim].
ffi::Error rotate(ffi::Buffer<ffi::F32, 2> cos, ffi::Buffer<ffi::F32, 2> sin, ffi::RemainingArgs xs,
                  ffi::RemainingRets ys) {
  const int64_t tokens = cos.dimensions()[0], turned = cos.dimensions()[1];
  REQUIRE(sin.dimensions() == cos.dimensions() && turned % 2 == 0, "cos and sin must be alike, of pairs");
  REQUIRE(xs.size() == ys.size(), "one result an array");
  for (size_t i = 0; i < xs.size(); i++) {
    auto x = xs.get<ffi::AnyBuffer>(i);
    auto y = ys.get<ffi::AnyBuffer>(i);
    REQUIRE(x && y && alike(*x, **y), "a result must be like its array");
    auto d = x->dimensions();
    REQUIRE(d.size() == 3 && d[0] == tokens && d[2] >= turned, "an array must be [tokens, heads, head_dim]");
    const int64_t heads = d[1], size = d[2];
    auto error = by_type(x->element_type(), [&](auto* type) {
      using X = std::remove_pointer_t<decltype(type)>;
      each_row(tokens, heads * size, [&](int64_t token) {
        for (int64_t at = token * heads * size; at < (token + 1) * heads * size; at += size)
          rotate_vector((const X*)x->untyped_data() + at, cos.typed_data() + token * turned,
                        sin.typed_data() + token * turned, turned, size, (X*)(*y)->untyped_data() + at);
      });
      return ffi::Error::Success();
    });
    if (error.failure()) return error;
  }
  return ffi::Error::Success();
}

// ---- gates

inline Floats sigmoid(Floats x) {
  Floats small = exp((Floats)((Words)x | 0x80000000u)), one = splat(1.f);
  return (x < Floats{} ? small : one) / (one + small);
}

enum Activation { kSilu, kGeluTanh, kClampedSwiglu };

inline Floats gate_of(int64_t activation, float limit, Floats gate, Floats up) {
  if (activation == kSilu) return gate * sigmoid(gate) * up;
  if (activation == kGeluTanh) {  // 1/2 (1 + tanh u) is the sigmoid of 2u
    Floats cubic = gate * gate * gate;
    return gate * sigmoid(splat(1.5957691216f) * fma(splat(0.044715f), cubic, gate)) * up;
  }
  Floats most = splat(limit), least = splat(-limit);
  gate = gate > most ? most : gate;
  up = up > most ? most : up < least ? least : up;
  return (up + splat(1.f)) * gate * sigmoid(splat(1.702f) * gate);
}

ffi::Error gated(ffi::AnyBuffer gate, ffi::AnyBuffer up, ffi::Result<ffi::AnyBuffer> out, int64_t activation,
                 float limit) {
  REQUIRE(alike(gate, up) && alike(gate, *out) && gate.dimensions().size() >= 1, "gate, up and result must be alike");
  REQUIRE(activation >= kSilu && activation <= kClampedSwiglu, "no such activation");
  const int64_t size = gate.dimensions().back(), rows = size ? int64_t(gate.element_count()) / size : 0;
  return by_type(gate.element_type(), [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    each_row(rows, 4 * size, [&](int64_t row) {
      const X *g = (const X*)gate.untyped_data() + row * size, *u = (const X*)up.untyped_data() + row * size;
      X* y = (X*)out->untyped_data() + row * size;
      int64_t i = 0;
      for (; i + kLanes <= size; i += kLanes) put(y + i, gate_of(activation, limit, numbers(g + i), numbers(u + i)));
      for (; i < size; i++) put(y, i, gate_of(activation, limit, splat(number(g, i)), splat(number(u, i)))[0]);
    });
    return ffi::Error::Success();
  });
}

// ---- scores of a router

void softmax_row(const float* x, int64_t size, float* y) {
  float top = x[0], sum = 0;
  for (int64_t i = 1; i < size; i++) top = std::max(top, x[i]);
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) put(y + i, exp(load<Floats>(x + i) - splat(top)));
  for (; i < size; i++) y[i] = exp(splat(x[i] - top))[0];
  for (i = 0; i < size; i++) sum += y[i];
  for (i = 0; i < size; i++) y[i] /= sum;
}

ffi::Error scores(ffi::Buffer<ffi::F32, 2> x, ffi::Result<ffi::Buffer<ffi::F32, 2>> y, bool softmax) {
  REQUIRE(x.dimensions() == y->dimensions() && x.dimensions()[1] > 0, "scores must be as many as logits");
  const int64_t size = x.dimensions()[1];
  each_row(x.dimensions()[0], 4 * size, [&](int64_t row) {
    const float* from = x.typed_data() + row * size;
    float* to = y->typed_data() + row * size;
    if (softmax) return softmax_row(from, size, to);
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) put(to + i, sigmoid(load<Floats>(from + i)));
    for (; i < size; i++) to[i] = sigmoid(splat(from[i]))[0];
  });
  return ffi::Error::Success();
}

auto norm_binding() {
  return ffi::Ffi::Bind()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::Buffer<ffi::F32, 1>>()
      .Ret<ffi::AnyBuffer>()
      .Attr<float>("eps")
      .Attr<float>("offset");
}
auto rotate_binding() {
  using Angles = ffi::Buffer<ffi::F32, 2>;
  return ffi::Ffi::Bind().Arg<Angles>().Arg<Angles>().RemainingArgs().RemainingRets();
}
auto gated_binding() {
  return ffi::Ffi::Bind()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Ret<ffi::AnyBuffer>()
      .Attr<int64_t>("activation")
      .Attr<float>("limit");
}

auto scores_binding() {
  using Matrix = ffi::Buffer<ffi::F32, 2>;
  return ffi::Ffi::Bind().Arg<Matrix>().Ret<Matrix>().Attr<bool>("softmax");
}

}  // namespace
}  // namespace isthmus

using namespace isthmus;
XLA_FFI_DEFINE_HANDLER_SYMBOL(rms_norm, norm, norm_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(rotate_pairs, rotate, rotate_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(gated_product, gated, gated_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(router_scores, scores, scores_binding());
