// The vectors of the attention kernel, for the instruction set that this translation unit is
// compiled for: GCC/Clang vector extensions, and intrinsics where the extensions have no word for
// the instruction (bfloat16 dot product, float16 conversion, max).
//
// Everything here has internal linkage: the same names are compiled with different flags in other
// translation units, and the linker must never pick one of them for another.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace flashinfer_ops {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
constexpr bool kHasBFloat16Dot = true;
#else
constexpr bool kHasBFloat16Dot = false;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(kLanes * 2)));
typedef float UnalignedVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
// Also loads pairs of 16-bit elements, which any even address may begin.
typedef int32_t UnalignedIntVec __attribute__((vector_size(kLanes * 4), aligned(2), may_alias));
typedef uint16_t UnalignedHalfVec __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

// Storage types of the 16-bit formats.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

constexpr float kInfinity = __builtin_inff();

template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
  using type = Indices<I...>;
};

template <int... I>
inline Vec splat_impl(float x, Indices<I...>) {
  return Vec{(static_cast<void>(I), x)...};
}
inline Vec splat(float x) { return splat_impl(x, MakeIndices<kLanes>::type()); }

template <int... I>
inline IntVec splat_int_impl(int32_t x, Indices<I...>) {
  return IntVec{(static_cast<void>(I), x)...};
}
inline IntVec splat_int(int32_t x) { return splat_int_impl(x, MakeIndices<kLanes>::type()); }

inline Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }
inline IntVec load_int(const void* p) { return *static_cast<const UnalignedIntVec*>(p); }
inline void store_int(void* p, IntVec v) { *static_cast<UnalignedIntVec*>(p) = v; }

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// a > b ? a : b, hence b where either is NaN.
inline Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__x86_64__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// The lanes of v moved down by N, its lowest ones again at the top.
template <int N, int... I>
inline Vec rotate_impl(Vec v, Indices<I...>) {
  return __builtin_shufflevector(v, v, ((I + N) % kLanes)...);
}

// f over all lanes, in halves.
template <int N = kLanes / 2, typename F>
inline float reduce(Vec v, const F& f) {
  if constexpr (N == 0) {
    return v[0];
  } else {
    return reduce<N / 2>(f(v, rotate_impl<N>(v, MakeIndices<kLanes>::type())), f);
  }
}
inline float reduce_max(Vec v) {
  return reduce(v, [](Vec a, Vec b) { return max(a, b); });
}
inline float reduce_add(Vec v) {
  return reduce(v, [](Vec a, Vec b) { return a + b; });
}

// 2^x for x <= 0: relative error 2e-7, 0 below -126.5, exp2(-inf) = 0, exp2(NaN) = NaN.
inline Vec exp2(Vec x) {
  x = max(splat(-127.0f), x);
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits of the sum.
  const Vec magic = splat(12582912.0f);
  const Vec shifted = x + magic;
  const Vec f = x - (shifted - magic);
  Vec p = splat(1.535336188319500e-4f);
  p = p * f + splat(1.339887440266574e-3f);
  p = p * f + splat(9.618437357674640e-3f);
  p = p * f + splat(5.550332471162809e-2f);
  p = p * f + splat(2.402264791363012e-1f);
  p = p * f + splat(6.931472028550421e-1f);
  p = p * f + splat(1.0f);
  // 2^round(x), whose bits are 0 where round(x) = -127.
  const IntVec scale =
      reinterpret_cast<IntVec>(reinterpret_cast<IntVec>(shifted) << 23) + splat_int(127 << 23);
  return p * reinterpret_cast<Vec>(scale);
}

inline float exp2_scalar(float x) { return exp2(splat(x))[0]; }

// --- conversions -------------------------------------------------------------------------------

inline Vec load(const BFloat16* p) {
  const HalfVec bits = *reinterpret_cast<const UnalignedHalfVec*>(p);
  return reinterpret_cast<Vec>(__builtin_convertvector(bits, IntVec) << 16);
}

inline Vec load(const Float16* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  const HalfVec half = *reinterpret_cast<const UnalignedHalfVec*>(p);
  const IntVec bits = __builtin_convertvector(half, IntVec);
  const IntVec sign = (bits & splat_int(0x8000)) << 16;
  const IntVec magnitude = bits & splat_int(0x7fff);
  // Normal numbers and subnormals alike: shift into place, multiply by 2^(127 - 15).
  const Vec scaled = reinterpret_cast<Vec>(magnitude << 13) * splat(0x1p112f);
  const IntVec special = (magnitude << 13) | splat_int(0x7f800000);
  const IntVec finite = reinterpret_cast<IntVec>(scaled);
  return reinterpret_cast<Vec>((magnitude >= splat_int(0x7c00) ? special : finite) | sign);
#endif
}

// Round to nearest even; a NaN stays a NaN.
inline void store(BFloat16* p, Vec v) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
#else
  const IntVec bits = reinterpret_cast<IntVec>(v);
  const IntVec rounded = (bits + splat_int(0x7fff) + ((bits >> 16) & splat_int(1))) >> 16;
  const IntVec result = v == v ? rounded : splat_int(0x7fc0);
  *reinterpret_cast<UnalignedHalfVec*>(p) = __builtin_convertvector(result, HalfVec);
#endif
}

inline void store(Float16* p, Vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const IntVec bits = reinterpret_cast<IntVec>(v);
  const IntVec sign = (bits >> 16) & splat_int(0x8000);
  const IntVec magnitude = bits & splat_int(0x7fffffff);
  // Normal: round the 13 dropped bits to even. Subnormal: adding 0.5 rounds at 2^-24.
  const IntVec normal =
      (magnitude - splat_int(112 << 23) + splat_int(0xfff) + ((magnitude >> 13) & splat_int(1))) >>
      13;
  const IntVec subnormal =
      reinterpret_cast<IntVec>(reinterpret_cast<Vec>(magnitude) + splat(0.5f)) -
      splat_int(126 << 23);
  IntVec result = magnitude < splat_int(113 << 23) ? subnormal : normal;
  result = magnitude >= splat_int(0x477ff000) ? splat_int(0x7c00) : result;
  result = magnitude > splat_int(0x7f800000) ? splat_int(0x7e00) : result;
  *reinterpret_cast<UnalignedHalfVec*>(p) = __builtin_convertvector(result | sign, HalfVec);
#endif
}

// The first n (1 <= n <= kLanes) elements of p, zeros after them; nothing past them is touched.
template <typename T>
inline Vec load_first(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  T buffer[kLanes] = {};
  memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}

template <typename T>
inline void store_first(T* p, Vec v, int64_t n) {
  if (n >= kLanes) return store(p, v);
  T buffer[kLanes];
  store(buffer, v);
  memcpy(p, buffer, n * sizeof(T));
}

// --- two ways to multiply and add 32-bit units ---------------------------------------------------

// A unit is one float.
struct FloatUnits {
  static constexpr int kPerUnit = 1;
  static Vec multiply_add(Vec acc, Vec a, Vec b) { return a * b + acc; }
};

// A unit is a pair of bfloat16 whose two products are added.
struct PairUnits {
  static constexpr int kPerUnit = 2;
  static Vec multiply_add(Vec acc, [[maybe_unused]] Vec a, [[maybe_unused]] Vec b) {
#if defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#else
    return acc;
#endif
  }
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
// Pairs (a[i], b[i]) rounded to bfloat16.
inline Vec round_to_pairs(Vec a, Vec b) {
  const __m512i interleave =
      _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                       21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i packed = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
  return reinterpret_cast<Vec>(_mm512_permutexvar_epi16(interleave, packed));
}
// Pairs (a[i], b[i]) of the lower, then of the upper 16 of 32 bfloat16.
inline void interleave_pairs(Vec a, Vec b, Vec* lower, Vec* upper) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                       39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const __m512i x = reinterpret_cast<__m512i>(a), y = reinterpret_cast<__m512i>(b);
  *lower = reinterpret_cast<Vec>(_mm512_permutex2var_epi16(x, low, y));
  *upper = reinterpret_cast<Vec>(_mm512_permutex2var_epi16(x, high, y));
}
#else
inline Vec round_to_pairs(Vec a, Vec) { return a; }
inline void interleave_pairs(Vec, Vec, Vec*, Vec*) {}
#endif

// --- sums across lanes ---------------------------------------------------------------------------

// Of each four lanes of a and b: a[k], b[k], a[k + 1], b[k + 1].
template <int K, int... I>
inline Vec zip(Vec a, Vec b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (I / 4 * 4 + K + I % 4 / 2 + I % 2 * kLanes)...);
}
// Of each four lanes: a[k], a[k + 1], b[k], b[k + 1].
template <int K, int... I>
inline Vec zip_pairs(Vec a, Vec b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (I / 4 * 4 + K + I % 2 + I % 4 / 2 * kLanes)...);
}
// The even (K = 0) or odd (K = 1) groups of four lanes of a, then of b.
template <int K, int... I>
inline Vec fours(Vec a, Vec b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (I / 4 * 8 + K * 4 + I % 4)...);
}

// acc[i] of kLanes vectors -> one vector whose lane i is the sum of acc[i]'s lanes.
inline Vec sum_each(Vec (&acc)[kLanes]) {
  constexpr MakeIndices<kLanes>::type lanes;
  Vec sums[kLanes / 4];
#pragma GCC unroll 4
  for (int i = 0; i < kLanes / 4; ++i) {
    const Vec* v = acc + 4 * i;
    const Vec x = zip<0>(v[0], v[1], lanes) + zip<2>(v[0], v[1], lanes);
    const Vec y = zip<0>(v[2], v[3], lanes) + zip<2>(v[2], v[3], lanes);
    sums[i] = zip_pairs<0>(x, y, lanes) + zip_pairs<2>(x, y, lanes);
  }
#pragma GCC unroll 2
  for (int count = kLanes / 4; count > 1; count /= 2) {
#pragma GCC unroll 2
    for (int i = 0; i < count / 2; ++i) {
      const Vec a = sums[2 * i], b = sums[2 * i + 1];
      sums[i] = fours<0>(a, b, lanes) + fours<1>(a, b, lanes);
    }
  }
  return sums[0];
}

}  // namespace
}  // namespace flashinfer_ops
