// x times matrices of float32 or bfloat16.
#include "linear_call.h"

namespace isthmus {
namespace {

template <class F, class Same>
ffi::Error floats(ffi::AnyBuffer x, ffi::RemainingArgs arguments, ffi::RemainingRets results) {
  return linear<F, Same>(x, 0, false, arguments, results);
}

constexpr auto float32 = floats<Float32, Float32>;
constexpr auto bfloat16 = floats<Bfloat16, Bfloat16Pairs>;

}  // namespace
}  // namespace isthmus

using namespace isthmus;
XLA_FFI_DEFINE_HANDLER_SYMBOL(linear_float32, float32, linear_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(linear_bfloat16, bfloat16, linear_binding());
