// Memory for what steps read, weights and KV cache: in large pages, which are found faster, and not written to, so that
// the system only gives a page when it is used.
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace isthmus {
namespace {

namespace ffi = xla::ffi;

// Only works before the first touch.
void want_large_pages(void* at, int64_t size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLarge = 2 << 20;
  uintptr_t begin = (uintptr_t(at) + kLarge - 1) & ~(kLarge - 1), end = (uintptr_t(at) + size) & ~(kLarge - 1);
  if (begin < end) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#endif
}

ffi::Error allocate(ffi::Result<ffi::AnyBuffer> out) {
  want_large_pages(out->untyped_data(), out->size_bytes());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace isthmus

using namespace isthmus;
XLA_FFI_DEFINE_HANDLER_SYMBOL(allocate_array, allocate, ffi::Ffi::Bind().Ret<ffi::AnyBuffer>());
