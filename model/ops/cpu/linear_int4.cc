// x times matrices of integers of 4 bits.
#include "linear_integers.h"

using namespace isthmus;
XLA_FFI_DEFINE_HANDLER_SYMBOL(linear_int4, integers<4>, integers_binding());
