// Reads a number of the host's memory that another thread may write to meanwhile.
#include <atomic>
#include <cstdint>

#include "xla/ffi/api/ffi.h"

namespace isthmus {
namespace {

namespace ffi = xla::ffi;

ffi::Error look(ffi::Buffer<ffi::U32> address, ffi::AnyBuffer turn, ffi::ResultBuffer<ffi::S32> out) {
  const uint32_t* half = address.typed_data();
  auto* value = reinterpret_cast<int32_t*>(uintptr_t(half[0]) | uintptr_t(half[1]) << 32);
  *out->typed_data() = value == nullptr ? 0 : std::atomic_ref<int32_t>(*value).load(std::memory_order_relaxed);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace isthmus

using namespace isthmus;
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    read_flag, look,
    ffi::Ffi::Bind().Arg<ffi::Buffer<ffi::U32>>().Arg<ffi::AnyBuffer>().Ret<ffi::Buffer<ffi::S32>>());
