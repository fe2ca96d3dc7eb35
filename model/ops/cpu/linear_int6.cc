// x times matrices of integers of 6 bits.
#include "linear_integers.h"

using namespace isthmus;
XLA_FFI_DEFINE_HANDLER_SYMBOL(linear_int6, integers<6>, integers_binding());
