// Three kernels of which the last does before its turn what it is asked for; prints the sum it makes.
#include <string>

#include "cuda_bf16.h"

int main(int, char** arguments) {
  constexpr unsigned kThreads = 32;
  std::string before_turn = arguments[1];
  float older[kThreads] = {}, newer[kThreads] = {}, result[kThreads] = {}, sum = 0.0f;
  for (float* x : {older, newer, result}) emulator::share(x, sizeof result);
  auto write = [&](float* x) {
    emulator::launch(1, kThreads, [&] {
      take_turn();
      x[threadIdx.x] = 1.0f;
    });
  };
  write(older), write(newer);
  emulator::launch(2, kThreads, [&] {
    if (before_turn == "end" && threadIdx.x == 5) return;
    if (before_turn == "write" && threadIdx.x == 5) result[5] = 1.0f;
    // in the one block by one thread, in the other by the rest
    bool early = (threadIdx.x == 5) == (blockIdx.x == 0);
    float x = 0.0f;
    if (early && before_turn == "read older") x = older[threadIdx.x];
    if (early && before_turn == "read newer") x = newer[threadIdx.x];
    take_turn();
    result[threadIdx.x] += x + newer[threadIdx.x];
  });
  for (float x : result) sum += x;
  printf("%g\n", sum);
}
