// Matrix products of a warpgroup (128 threads) on Hopper: D[64, N] = A[64, 16] B[16, N] (+ D).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace flashinfer_ops::sm90 {

// 8 rows of 128 bytes of a tile in shared memory: after so many bytes the swizzle repeats.
constexpr uint32_t kSwizzleBytes = 1024;

// A tile in shared memory: rows of 128 bytes, swizzled in groups of 8 rows. `group` is the distance
// in bytes from a group to the next, and for a tile that is transposed, `next` that to the next 128
// bytes of its rows.
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t address,
                                                    uint32_t group = kSwizzleBytes,
                                                    uint32_t next = 16) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return (uint64_t{address & 0x3FFFF} >> 4) | (uint64_t{next >> 4} << 16) |
         (uint64_t{group >> 4} << 32) | kSwizzle128;
}

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most kPending groups are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of these registers across this point.
template <int kCount>
__device__ __forceinline__ void pin(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

// The registers of D, as operands and by their numbers.
#define FLASHINFER_OPS_D32(d)                                                                     \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
      "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),    \
      "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),  \
      "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),  \
      "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define FLASHINFER_OPS_D64(d)                                                                    \
  FLASHINFER_OPS_D32(d), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]),        \
      "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), \
      "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), \
      "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), \
      "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define FLASHINFER_OPS_NUMBERS32                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, " \
  "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FLASHINFER_OPS_NUMBERS64                                                            \
  FLASHINFER_OPS_NUMBERS32                                                                  \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, " \
  "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// D in `count` registers named d. `ab`: operands A and B; `accumulate`: whether D is added;
// `layout`: flags that follow the signs of A and B; then the operands themselves.
#define FLASHINFER_OPS_WGMMA(type, shape, count, ab, accumulate, layout, ...)            \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate                            \
               ", 0;\n"                                                                  \
               "wgmma.mma_async.sync.aligned." shape ".f32." type "." type               \
               " {" FLASHINFER_OPS_NUMBERS##count "}, " ab ", p, 1, 1, " layout ";\n}\n" \
               : FLASHINFER_OPS_D##count(d)                                              \
               : __VA_ARGS__)
// Of elements T.
#define FLASHINFER_OPS_WGMMA_OF(T, ...)        \
  if constexpr (std::is_same_v<T, __half>) {   \
    FLASHINFER_OPS_WGMMA("f16", __VA_ARGS__);  \
  } else {                                     \
    FLASHINFER_OPS_WGMMA("bf16", __VA_ARGS__); \
  }

// A from registers; B[16, 64] is the transpose of rows in shared memory: scores of 64 tokens.
template <class T>
__device__ __forceinline__ void wgmma_scores(float (&d)[32], const uint32_t (&a)[4], uint64_t b,
                                             int accumulate) {
  FLASHINFER_OPS_WGMMA_OF(T, "m64n64k16", 32, "{%32, %33, %34, %35}, %36", "%37", "0", "r"(a[0]),
                          "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))
}

// The same with A, rows too, from shared memory.
template <class T>
__device__ __forceinline__ void wgmma_scores(float (&d)[32], uint64_t a, uint64_t b,
                                             int accumulate) {
  FLASHINFER_OPS_WGMMA_OF(T, "m64n64k16", 32, "%32, %33", "%34", "0, 0", "l"(a), "l"(b),
                          "r"(accumulate))
}

// A from registers; B[16, N] as its rows stand in shared memory: values of 16 tokens.
template <class T>
__device__ __forceinline__ void wgmma_values(float (&d)[32], const uint32_t (&a)[4], uint64_t b,
                                             int accumulate) {
  FLASHINFER_OPS_WGMMA_OF(T, "m64n64k16", 32, "{%32, %33, %34, %35}, %36", "%37", "1", "r"(a[0]),
                          "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))
}

// The same for N = 128.
template <class T>
__device__ __forceinline__ void wgmma_values(float (&d)[64], const uint32_t (&a)[4], uint64_t b,
                                             int accumulate) {
  FLASHINFER_OPS_WGMMA_OF(T, "m64n128k16", 64, "{%64, %65, %66, %67}, %68", "%69", "1", "r"(a[0]),
                          "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))
}

#undef FLASHINFER_OPS_WGMMA_OF
#undef FLASHINFER_OPS_WGMMA
#undef FLASHINFER_OPS_NUMBERS64
#undef FLASHINFER_OPS_NUMBERS32
#undef FLASHINFER_OPS_D64
#undef FLASHINFER_OPS_D32

}  // namespace flashinfer_ops::sm90
