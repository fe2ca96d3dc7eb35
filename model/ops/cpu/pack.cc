// Lays a matrix out as linear_product.h reads it (model/ops/cpu/packed.py says how): panels of 16 columns, in lines of 64 bytes.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "pool.h"
#include "xla/ffi/api/ffi.h"

namespace isthmus {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kPanel = 16, kLine = 64;

// matrix[k, n] at k * k_step + n * n_step.
template <class T>
struct Matrix {
  const T* at;
  int64_t inputs, outputs, k_step, n_step;
};

// A whole line: 16 columns of as many numbers as 4 bytes hold, one row of the matrix after the other or one column.
template <class T>
void pack_line(const T* from, int64_t k_step, int64_t n_step, void* to) {
  constexpr int kNumbers = 4 / sizeof(T);
  uint32_t words[kPanel] = {};
  if (n_step == 1)
    for (int k = 0; k < kNumbers; k++)
      for (int c = 0; c < kPanel; c++) words[c] |= uint32_t(from[k * k_step + c]) << 8 * sizeof(T) * k;
  else
    for (int c = 0; c < kPanel; c++) std::memcpy(&words[c], from + c * n_step, 4);
  std::memcpy(to, words, sizeof words);
}

template <class T>
void pack_panel(const Matrix<T>& m, int64_t panel, int64_t lines, T* to) {
  constexpr int64_t kNumbers = 4 / sizeof(T), kStep = kLine / sizeof(T);
  const int64_t first = panel * kPanel, columns = std::min(kPanel, m.outputs - first);
  for (int64_t line = 0; line < lines; line++, to += kStep) {
    const T* from = m.at + line * kNumbers * m.k_step + first * m.n_step;
    const int64_t numbers = std::min(kNumbers, m.inputs - line * kNumbers);
    if (columns == kPanel && numbers == kNumbers) {
      pack_line(from, m.k_step, m.n_step, to);
      continue;
    }
    std::memset(to, 0, kLine);
    for (int64_t k = 0; k < numbers; k++)
      for (int64_t c = 0; c < columns; c++) to[c * kNumbers + k] = from[k * m.k_step + c * m.n_step];
  }
}

#define REQUIRE(condition, message) \
  if (!(condition)) return ffi::Error::InvalidArgument("pack: " message)

using Stack = ffi::Buffer<ffi::U8, 4>;

// Packs matrices as those from number `index` on of the stack, which is the result's memory. transposed: each is given as
// [outputs, inputs].
ffi::Error pack(ffi::AnyBuffer matrices, Stack stack, ffi::BufferR0<ffi::S32> index, ffi::Result<Stack> out,
                bool transposed) {
  auto md = matrices.dimensions(), od = out->dimensions();
  REQUIRE(md.size() == 3 && od[3] == kLine, "expected matrices and lines of 64 bytes");
  REQUIRE(stack.typed_data() == out->typed_data(), "the stack must be the result's memory");
  const int32_t place = *index.typed_data();
  const int64_t count = md[0], rows = md[1], columns = md[2];
  REQUIRE(place >= 0 && place <= od[0] - count, "the stack has fewer matrices than the index says");
  const int64_t inputs = transposed ? columns : rows, outputs = transposed ? rows : columns;
  const int64_t panels = od[1], lines = od[2], k_step = transposed ? 1 : columns, n_step = transposed ? columns : 1;
  const int64_t numbers = matrices.element_type() == ffi::F32 ? 1 : matrices.element_type() == ffi::BF16 ? 2 : 4;
  REQUIRE(panels == (outputs + kPanel - 1) / kPanel && lines == (inputs + numbers - 1) / numbers,
          "the result has another size than the matrix");
  uint8_t* to = out->typed_data() + place * panels * lines * kLine;
  auto each = [&]<class T>(const T* from) {
    for (int64_t i = 0; i < count; i++, from += rows * columns, to += panels * lines * kLine) {
      Matrix<T> m{from, inputs, outputs, k_step, n_step};
      Pool::get().run(panels, [&](int64_t panel) { pack_panel(m, panel, lines, (T*)(to + panel * lines * kLine)); });
    }
  };
  const void* data = matrices.untyped_data();
  switch (matrices.element_type()) {
    case ffi::F32: each((const uint32_t*)data); break;
    case ffi::BF16: each((const uint16_t*)data); break;
    case ffi::U8: each((const uint8_t*)data); break;
    default: return ffi::Error::InvalidArgument("pack: expected float32, bfloat16, or integers in bytes");
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace isthmus

using namespace isthmus;
XLA_FFI_DEFINE_HANDLER_SYMBOL(pack_matrix, pack,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Stack>()
                                  .Arg<ffi::BufferR0<ffi::S32>>()
                                  .Ret<Stack>()
                                  .Attr<bool>("transposed"));
