// x times matrices of integers of 5 bits.
#include "linear_integers.h"

using namespace isthmus;
XLA_FFI_DEFINE_HANDLER_SYMBOL(linear_int5, integers<5>, integers_binding());
