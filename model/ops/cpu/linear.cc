// x times matrices of float32 or bfloat16: all of its rows times each, or every group of rows times a matrix of its own.
#include <algorithm>

#include "linear_call.h"

namespace isthmus {
namespace {

template <class F, class Same>
ffi::Error floats(ffi::AnyBuffer x, ffi::RemainingArgs arguments, ffi::RemainingRets results) {
  return linear<F, Same>(x, 0, false, arguments, results);
}

constexpr auto float32 = floats<Float32, Float32>;
constexpr auto bfloat16 = floats<Bfloat16, Bfloat16Pairs>;

using Sizes = ffi::Buffer<ffi::S32, 1>;

// Rows past the groups' ends give 0.
template <class F, class X>
ffi::Error multiply_groups(const X* x, int64_t rows, int64_t inputs, Sizes sizes, Weights weights, int64_t lines, Out out) {
  std::vector<Work> works;
  int64_t first = 0;
  for (int64_t group = 0; group < int64_t(sizes.element_count()); group++) {
    const int64_t size = sizes.typed_data()[group];
    REQUIRE(size >= 0 && size <= rows - first, "groups have more rows than x");
    if (size) works.push_back(prepare<F>(x, first, first + size, inputs, lines, false, {{weights, out}}));
    first += size, weights.lines += weights.padded / kPanel * lines * kLine;
  }
  for (; first < rows; first++) out.clear(first);
  run<F>(works);
  return ffi::Error::Success();
}

// The matrix of a group is that which `index` says for the first, and the next of the stack for each other one.
template <class F, class Same>
ffi::Error groups(ffi::AnyBuffer x, Sizes sizes, ffi::RemainingArgs arguments, ffi::Result<ffi::AnyBuffer> y) {
  REQUIRE(x.dimensions().size() == 2 && y->dimensions().size() == 2, "x and the result must be matrices");
  const int64_t rows = x.dimensions()[0], inputs = x.dimensions()[1], outputs = y->dimensions()[1];
  const int64_t lines = lines_of<F>(inputs);
  auto weights = read_weights<F>(arguments, 0, lines, 0, sizes.element_count());
  if (!weights) return weights.error();
  REQUIRE(weights->padded == padded_to_panels(outputs), "weights have other outputs than the result");
  REQUIRE(y->dimensions()[0] == rows && y->element_type() == ffi::F32, "the result must be float32[rows, outputs]");
  if (outputs == 0) return ffi::Error::Success();
  const Out out{y->untyped_data(), false, outputs};
  if (x.element_type() == ffi::F32)
    return multiply_groups<F>(x.typed_data<float>(), rows, inputs, sizes, *weights, lines, out);
  REQUIRE(x.element_type() == ffi::BF16, "x must be float32 or bfloat16");
  return multiply_groups<Same>((const uint16_t*)x.untyped_data(), rows, inputs, sizes, *weights, lines, out);
}

constexpr auto float32_groups = groups<Float32, Float32>;
constexpr auto bfloat16_groups = groups<Bfloat16, Bfloat16Pairs>;

auto groups_binding() {
  return ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Arg<Sizes>().RemainingArgs().Ret<ffi::AnyBuffer>();
}

}  // namespace
}  // namespace isthmus

using namespace isthmus;
XLA_FFI_DEFINE_HANDLER_SYMBOL(linear_float32, float32, linear_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(linear_bfloat16, bfloat16, linear_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(linear_groups_float32, float32_groups, groups_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(linear_groups_bfloat16, bfloat16_groups, groups_binding());
