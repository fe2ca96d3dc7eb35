// x times matrices of integers of 8 bits.
#include "linear_integers.h"

using namespace isthmus;
XLA_FFI_DEFINE_HANDLER_SYMBOL(linear_int8, integers<8>, integers_binding());
