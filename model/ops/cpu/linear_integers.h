// x times a matrix of integers, in runs as its groups allow: one handler for each number of bits.
#pragma once
#include "linear_call.h"

namespace isthmus {

// group: inputs of a weight that share a scale. Of x, 64 numbers do where they are turned and groups divide by that; else 32.
template <int Bits>
ffi::Error integers(ffi::AnyBuffer x, ffi::RemainingArgs arguments, ffi::RemainingRets results, int64_t group,
                    bool rotated) {
  REQUIRE(group > 0 && group % 32 == 0, "a group must be a multiple of 32 inputs");
  if (rotated && group % 64 == 0) return linear<Integers<Bits, 64>, Integers<Bits, 64>>(x, group, rotated, arguments, results);
  return linear<Integers<Bits, 32>, Integers<Bits, 32>>(x, group, rotated, arguments, results);
}

inline auto integers_binding() { return linear_binding().Attr<int64_t>("group").Attr<bool>("rotated"); }

}  // namespace isthmus
