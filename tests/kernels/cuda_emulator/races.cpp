// Threads of two blocks read what the neighbour of their warp, or of another warp, or of the other block has
// written, with what is named in between: "block", "warp", "grid", "shuffle" or "nothing".
#include <string>

#include "cuda_bf16.h"

int main(int, char** arguments) {
  constexpr unsigned kThreads = 64;
  std::string between = arguments[1], whose = arguments[2];
  float written[2][kThreads], sum[2][kThreads];
  emulator::launch(2, kThreads, [&] {
    unsigned block = blockIdx.x, thread = threadIdx.x;
    written[block][thread] = 1.0f;
    if (between == "block") __syncthreads();
    if (between == "warp") __syncwarp();
    if (between == "grid") {
      GridArrival arrival = arrive_at_grid();
      wait_for_grid(arrival);
    }
    if (between == "shuffle") __shfl_xor_sync(0xffffffffu, 1.0f, 1);
    (whose == "grid" ? block : thread) ^= 1;
    if (whose == "block") thread ^= emulator::kWarp;
    sum[blockIdx.x][threadIdx.x] = written[block][thread];
  }, true);
}
