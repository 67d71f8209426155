// What csrc/cuda/kernels.h needs of the toolkit's header.
#pragma once

#include <stdint.h>

using cudaStream_t = void*;
