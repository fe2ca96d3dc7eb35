// y[row] += (x[row] times A) times B, where A and B are those of the row's own adapter: model/ops/lora.py. Rows without an
// adapter are not touched.
#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "linear_call.h"

namespace isthmus {
namespace {

using Chosen = ffi::Buffer<ffi::S32, 1>;
using Sums = ffi::Buffer<ffi::F32, 2>;

// The rows of x of each adapter, but for rows of zeros, to which nothing is added.
template <class X>
std::vector<std::vector<int64_t>> places_of(const X* x, int64_t inputs, Chosen chosen, int64_t adapters) {
  std::vector<std::vector<int64_t>> places(adapters);
  for (int64_t row = 0; row < int64_t(chosen.element_count()); row++) {
    const int64_t adapter = int64_t(chosen.typed_data()[row]) - 1;
    if (adapter >= 0 && !is_zero(x + row * inputs, inputs)) places[adapter].push_back(row);
  }
  return places;
}

// The rows of each adapter times its matrix. weights: the first adapter's; the others' follow it in the stack.
template <class F, class X>
void multiply_each(const X* x, int64_t inputs, const std::vector<std::vector<int64_t>>& places, Weights weights, Out out) {
  const int64_t lines = lines_of<F>(inputs);
  std::vector<Work> works;
  for (const std::vector<int64_t>& rows : places) {
    if (!rows.empty()) works.push_back(prepare<F>(x, rows, inputs, lines, false, {{weights, out}}));
    weights.lines += weights.padded / kPanel * lines * kLine;
  }
  if (!works.empty()) run<F>(works);
}

// X: a number of x, which is of the same kind as the matrices'.
template <class F, class X>
ffi::Error lora(ffi::AnyBuffer x, Sums base, Chosen chosen, Index a_index, Stack a_stack, Index b_index, Stack b_stack,
                ffi::Result<Sums> y, int64_t adapters, int64_t rank) {
  constexpr bool kBf16 = std::is_same_v<X, uint16_t>;
  REQUIRE(x.element_type() == (kBf16 ? ffi::BF16 : ffi::F32), "x must be of the matrices' dtype");
  REQUIRE(x.dimensions().size() == 2 && adapters > 0 && rank > 0, "x must be a matrix, and adapters have a rank");
  const int64_t rows = x.dimensions()[0], inputs = x.dimensions()[1], outputs = y->dimensions()[1];
  REQUIRE(int64_t(chosen.element_count()) == rows && y->dimensions()[0] == rows, "x, chosen and y have other rows");
  REQUIRE(base.typed_data() == y->typed_data(), "what is added to must be the result's memory");
  auto a = find_matrix(a_index, a_stack, lines_of<F>(inputs), adapters);
  if (!a) return a.error();
  auto b = find_matrix(b_index, b_stack, lines_of<F>(rank), adapters);
  if (!b) return b.error();
  REQUIRE(a->padded == padded_to_panels(rank), "A has other outputs than the rank");
  REQUIRE(b->padded == padded_to_panels(outputs), "B has other outputs than y");
  const int32_t* first = chosen.typed_data();
  REQUIRE(std::all_of(first, first + rows, [&](int32_t i) { return i >= 0 && i <= adapters; }), "there is no such adapter");
  if (outputs == 0) return ffi::Error::Success();
  const X* from = (const X*)x.untyped_data();
  const auto places = places_of(from, inputs, chosen, adapters);
  if (std::all_of(places.begin(), places.end(), [](auto& each) { return each.empty(); })) return ffi::Error::Success();
  std::unique_ptr<X[]> hidden(new X[rows * rank]);
  multiply_each<F>(from, inputs, places, *a, Out{hidden.get(), kBf16, rank});
  multiply_each<F>(hidden.get(), rank, places, *b, Out{y->untyped_data(), false, outputs, true});
  return ffi::Error::Success();
}

auto binding() {
  return ffi::Ffi::Bind()
      .Arg<ffi::AnyBuffer>()
      .Arg<Sums>()
      .Arg<Chosen>()
      .Arg<Index>()
      .Arg<Stack>()
      .Arg<Index>()
      .Arg<Stack>()
      .Ret<Sums>()
      .Attr<int64_t>("adapters")
      .Attr<int64_t>("rank");
}

constexpr auto float32 = lora<Float32, float>;
constexpr auto bfloat16 = lora<Bfloat16Pairs, uint16_t>;

}  // namespace
}  // namespace isthmus

using namespace isthmus;
XLA_FFI_DEFINE_HANDLER_SYMBOL(lora_float32, float32, binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(lora_bfloat16, bfloat16, binding());
