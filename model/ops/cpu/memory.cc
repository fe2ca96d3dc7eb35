// Memory for what every step reads, weights and KV cache, in large pages: they take a tenth of the time to get, and are
// found faster.
#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "pool.h"
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

// Without zeros nothing is written, and no memory taken before something is.
ffi::Error allocate(ffi::Result<ffi::AnyBuffer> out, bool zeros) {
  constexpr int64_t kPart = 16 << 20;
  char* to = (char*)out->untyped_data();
  const int64_t size = out->size_bytes();
  want_large_pages(to, size);
  if (zeros)
    Pool::get().run((size + kPart - 1) / kPart,
                    [&](int64_t part) { std::memset(to + part * kPart, 0, std::min(kPart, size - part * kPart)); });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace isthmus

using namespace isthmus;
XLA_FFI_DEFINE_HANDLER_SYMBOL(allocate_array, allocate,
                              ffi::Ffi::Bind().Ret<ffi::AnyBuffer>().Attr<bool>("zeros"));
