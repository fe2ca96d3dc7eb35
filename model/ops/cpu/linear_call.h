// What a call of linear*.cc is checked for: x against one or more weights, each a matrix of a stack: the arguments `index`,
// `lines` and, of integers, `scales`, and a result.
#pragma once
#include <vector>

#include "linear_product.h"
#include "xla/ffi/api/ffi.h"

namespace isthmus {

namespace ffi = xla::ffi;

#define REQUIRE(condition, message) \
  if (!(condition)) return ffi::Error::InvalidArgument("linear: " message)

using Index = ffi::BufferR0<ffi::S32>;
using Stack = ffi::Buffer<ffi::U8, 4>;

// Of a matrix with so many inputs.
template <class F>
int64_t lines_of(int64_t inputs) {
  return (inputs + F::kRun - 1) / F::kRun * F::kLines;
}
inline int64_t padded_to_panels(int64_t outputs) { return (outputs + kPanel - 1) / kPanel * kPanel; }

// Where a matrix is in a stack, and its outputs. count: how many matrices, from that one on, must be there.
inline ffi::ErrorOr<Weights> find_matrix(Index index, Stack stack, int64_t lines, int64_t count = 1) {
  auto fail = [](const char* what) { return ffi::Unexpected(ffi::Error::InvalidArgument(what)); };
  auto size = stack.dimensions();
  const int64_t matrices = size[0], panels = size[1], matrix = *index.typed_data();
  if (size[2] != lines || size[3] != kLine) return fail("linear: weights have other inputs than x");
  if (matrix < 0 || matrix > matrices - count) return fail("linear: weights have fewer matrices than the index says");
  Weights w{stack.typed_data() + matrix * panels * lines * kLine};
  w.padded = panels * kPanel;
  return w;
}

// Reads the arguments that belong to one weight, from `at` on; see model/ops/cpu/packed.py. count: how many matrices of the
// stack belong to it.
template <class F>
ffi::ErrorOr<Weights> read_weights(ffi::RemainingArgs arguments, size_t at, int64_t lines, int64_t group,
                                   int64_t count = 1) {
  auto fail = [](const char* what) { return ffi::Unexpected(ffi::Error::InvalidArgument(what)); };
  auto index = arguments.get<Index>(at);
  auto stack = arguments.get<Stack>(at + 1);
  if (!index || !stack) return fail("linear: weights must be an int32 index and uint8[matrices, panels, lines, 64]");
  auto found = find_matrix(*index, *stack, lines, count);
  if (!found) return found;
  Weights w = *found;
  if constexpr (is_integers<F>) {
    const int64_t matrices = stack->dimensions()[0], panels = stack->dimensions()[1], matrix = *index->typed_data();
    const int64_t runs = lines / F::kLines;
    w.group = group / F::kRun, w.groups = (runs + w.group - 1) / w.group;
    auto scales = arguments.get<ffi::AnyBuffer>(at + 2);
    auto right = [&](auto size) {
      return size.size() == 4 && size[0] == matrices && size[1] == panels && size[2] == w.groups && size[3] == kPanel;
    };
    if (!scales || !right(scales->dimensions()))
      return fail("linear: integers need scales [matrices, panels, groups, 16]");
    w.half = scales->element_type() == ffi::F16;
    if (!w.half && scales->element_type() != ffi::BF16) return fail("linear: scales must be bfloat16 or float16");
    w.scales = (const uint16_t*)scales->untyped_data() + matrix * panels * w.groups * kPanel;
  }
  return w;
}

template <class F, class X>
ffi::Error multiply_all(const X* x, int64_t rows, int64_t inputs, int64_t group, bool rotated,
                        ffi::RemainingArgs arguments, ffi::RemainingRets results) {
  constexpr size_t kArguments = is_integers<F> ? 3 : 2;
  REQUIRE(arguments.size() == results.size() * kArguments, "expected one result a weight");
  auto first = arguments.get<Stack>(1);
  REQUIRE(first, "weights must be uint8[matrices, panels, lines, 64]");
  const int64_t lines = first->dimensions()[2];
  REQUIRE(lines == lines_of<F>(inputs), "weights have other inputs than x");
  std::vector<Product> products;
  for (size_t i = 0; i < results.size(); i++) {
    auto weights = read_weights<F>(arguments, i * kArguments, lines, group);
    if (!weights) return weights.error();
    auto y = results.get<ffi::AnyBuffer>(i);
    REQUIRE(y && (*y)->dimensions().size() == 2 && (*y)->dimensions()[0] == rows, "a result must be [rows, outputs]");
    const bool bf16 = (*y)->element_type() == ffi::BF16;
    REQUIRE(bf16 || (*y)->element_type() == ffi::F32, "a result must be float32 or bfloat16");
    const int64_t outputs = (*y)->dimensions()[1];
    REQUIRE(weights->padded == padded_to_panels(outputs), "weights have other outputs than the result");
    if (outputs) products.push_back({*weights, Out{(*y)->untyped_data(), bf16, outputs}});
  }
  if (products.empty()) return ffi::Error::Success();
  std::vector<Work> works;
  works.push_back(prepare<F>(x, 0, rows, inputs, lines, rotated, std::move(products)));
  run<F>(works);
  return ffi::Error::Success();
}

template <class F, class Same>
ffi::Error linear(ffi::AnyBuffer x, int64_t group, bool rotated, ffi::RemainingArgs arguments,
                  ffi::RemainingRets results) {
  REQUIRE(x.dimensions().size() == 2 && results.size() > 0, "x must be a matrix");
  const int64_t rows = x.dimensions()[0], inputs = x.dimensions()[1];
  if (x.element_type() == ffi::F32)
    return multiply_all<F>(x.typed_data<float>(), rows, inputs, group, rotated, arguments, results);
  REQUIRE(x.element_type() == ffi::BF16, "x must be float32 or bfloat16");
  return multiply_all<Same>((const uint16_t*)x.untyped_data(), rows, inputs, group, rotated, arguments, results);
}

inline auto linear_binding() { return ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().RemainingArgs().RemainingRets(); }

}  // namespace isthmus
