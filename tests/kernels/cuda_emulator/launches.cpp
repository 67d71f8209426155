// How linear steps would be launched. Reads a step a line, "processors rows inputs norm gated
// outputs outputs ..."; prints what step_linear_launch says of it, and whether it is taken at all.
#include <cstdio>
#include <iostream>
#include <sstream>
#include <string>

#include "cuda/kernels.h"

using namespace rodimus;

int main() {
  // nobody reads it
  void* somewhere = reinterpret_cast<void*>(4096);
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream numbers(line);
    StepLinear a;
    int64_t processors, outputs;
    bool norm;
    numbers >> processors >> a.rows >> a.inputs >> norm >> a.gated;
    Rows half = {somewhere, Type::kBFloat16, a.inputs};
    if (norm) a.norm_weight = half;
    for (a.count = 0; numbers >> outputs; ++a.count) a.layers[a.count] = {half, half, {}, half, outputs};
    StepLinearLaunch how = step_linear_launch(a, processors);
    std::printf("%d %d %d %d %lld %lld %d %d\n", how.warps, how.depth, how.blocks, how.scaled,
                static_cast<long long>(how.fixed), static_cast<long long>(how.staged), how.asks(),
                fits_step_linear(a));
  }
}
