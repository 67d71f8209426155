// What the CUDA kernels share: element types, reductions over a warp and a block.
// No torch here, so nvcc alone compiles and inspects the kernels.
#pragma once

#if defined(__CUDACC__)
#include <cooperative_groups.h>
#endif
#include <cuda_bf16.h>
#include <stdint.h>

#include "../arguments.h"

namespace rodimus {

constexpr int kWarp = 32;

// Sixteen bytes of consecutive elements.
template <class T>
struct alignas(16) Piece {
  static constexpr int kSize = 16 / sizeof(T);
  T value[kSize];
};

#if defined(__CUDACC__)
// Wait for the previous kernel to end, if this one was started before that; then let the next
// kernel be started before this one has ended.
__device__ inline void take_turn() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// The grid barrier of a cooperative launch, for all threads: signal that this block has arrived,
// then wait until all have; what they wrote before is visible from then on. Work that does not need
// it can be done in between.
using GridArrival = cooperative_groups::grid_group::arrival_token;
__device__ inline GridArrival arrive_at_grid() { return cooperative_groups::this_grid().barrier_arrive(); }
__device__ inline void wait_for_grid(GridArrival& arrival) {
  cooperative_groups::this_grid().barrier_wait(static_cast<GridArrival&&>(arrival));
}

// To be called before reading asynchronous copies that were waited for: for the compiler, the wait
// alone is no memory barrier.
__device__ inline void see_copies() { asm volatile("" ::: "memory"); }

// Shared memory whose size the launch gives; aligned for 16-byte pieces.
#define RODIMUS_DYNAMIC_SHARED(T, name)               \
  extern __shared__ __align__(16) char dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(dynamic_shared)

// Load sixteen bytes that no other block reads, without a place in the L1 cache, which is left to
// shared data. Not with .nc: the assembler moves such loads across the wait of take_turn.
__device__ inline uint4 load_once(const void* from) {
  uint4 x;
  asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from));
  return x;
}

// Store sixteen bytes. Where single stores of the same values are the alternative, the compiler joins an
// assignment with them, and stores four times.
__device__ inline void store_together(float* to, float4 x) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(to), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
               : "memory");
}

// Prefetch data into the L2 cache: all multiprocessors share it, so the data cannot be stale there.
// Whole pieces of 16 bytes.
__device__ inline void prefetch(const void* from, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

// sum += A B on tensor cores, bfloat16 with sums in float32: A [16, 16], B [16, 8], a warp together.
// Lane 4 g + q holds A of rows g and g + 8 (a0 and a2; a1 and a3), columns 2q, 2q + 1 (a0, a1) and
// 2q + 8, 2q + 9 (a2, a3), B of those rows and column g, and sums of rows g (0, 1) and g + 8 (2, 3),
// columns 2q and 2q + 1.
__device__ inline void multiply_16x8x16(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                        uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#endif

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void narrow(float x, float* out) { *out = x; }
__device__ inline void narrow(float x, __nv_bfloat16* out) { *out = __float2bfloat16(x); }

// One element of an argument whose type is known at run time: for data that is read once per block.
__device__ inline float element(const Rows& a, int64_t row, int64_t column) {
  int64_t i = row * a.stride + column;
  if (a.type == Type::kFloat32) return static_cast<const float*>(a.data)[i];
  return __bfloat162float(static_cast<const __nv_bfloat16*>(a.data)[i]);
}

__device__ inline void set_element(const Rows& a, int64_t row, int64_t column, float x) {
  int64_t i = row * a.stride + column;
  if (a.type == Type::kFloat32)
    static_cast<float*>(a.data)[i] = x;
  else
    static_cast<__nv_bfloat16*>(a.data)[i] = __float2bfloat16(x);
}

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ inline float silu(float x) { return x / (1.0f + expf(-x)); }
__device__ inline float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }
// ln softplus(x), finite where softplus underflows.
__device__ inline float log_softplus(float x) {
  return x < -20.0f ? x - 0.5f * expf(x) : logf(softplus(x));
}

__device__ inline float warp_sum(float x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// Sum over a block of whole warps, the same in every thread; `shared` holds one float per warp.
__device__ inline float block_sum(float x, float* shared) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  float sum = 0.0f;
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) sum += shared[w];
  return sum;
}

}  // namespace rodimus
