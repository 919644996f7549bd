// SIMD registers, with loads and stores that may be shorter at the end of a row.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

namespace {

// Bytes of a register. Compilers may split longer ones, but not always well: for AVX2, g++ 12 keeps 64 bytes in memory,
// and the kernels take several times as long.
#ifndef GAQ_BYTES
#if defined(__AVX__) && !defined(__AVX512F__)
#define GAQ_BYTES 32
#else
#define GAQ_BYTES 64
#endif
#endif

template <typename T> struct Lanes {
  static constexpr int width = GAQ_BYTES / sizeof(T);
  typedef T type __attribute__((vector_size(GAQ_BYTES), aligned(sizeof(T)), may_alias));
  typedef T value __attribute__((vector_size(GAQ_BYTES)));
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> integer;
  typedef integer index __attribute__((vector_size(GAQ_BYTES)));
};

template <typename T> using Vec = typename Lanes<T>::value;

template <typename T> inline Vec<T> load(const T* p, int64_t left) {
  if (left >= Lanes<T>::width) return *reinterpret_cast<const typename Lanes<T>::type*>(p);
  Vec<T> v = {};
  std::memcpy(&v, p, left * sizeof(T));
  return v;
}
template <typename T> inline void store(T* p, Vec<T> v, int64_t left) {
  if (left >= Lanes<T>::width)
    *reinterpret_cast<typename Lanes<T>::type*>(p) = v;
  else
    std::memcpy(p, &v, left * sizeof(T));
}
// Sum of N lanes by halves, because a compiler may not reorder the additions of a loop.
template <typename T, int N> inline T halved(const T* v) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    typedef T half __attribute__((vector_size(N / 2 * sizeof(T)), aligned(sizeof(T)), may_alias));
    const half s = *reinterpret_cast<const half*>(v) + *reinterpret_cast<const half*>(v + N / 2);
    T rest[N / 2];
    std::memcpy(rest, &s, sizeof(rest));
    return halved<T, N / 2>(rest);
  }
}
template <typename T> inline T sum(Vec<T> v) {
  T flat[Lanes<T>::width];
  std::memcpy(flat, &v, sizeof(v));
  return halved<T, Lanes<T>::width>(flat);
}

// Sums over the lanes of several registers at once: in each step halves of two are added, and stand side by side.
#ifdef __AVX512F__
#ifdef __clang__
#define GAQ_SHUFFLE(T, A, B, ...) __builtin_shufflevector(A, B, __VA_ARGS__)
#else
#define GAQ_SHUFFLE(T, A, B, ...) __builtin_shuffle(A, B, typename Lanes<T>::index{__VA_ARGS__})
#endif

// Adds the halves of each of SEGMENTS parts of a, and of b.
template <typename T, int SEGMENTS, int... LANE>
inline Vec<T> fold(Vec<T> a, Vec<T> b, std::integer_sequence<int, LANE...>) {
  constexpr int W = Lanes<T>::width, HALF = W / SEGMENTS / 2;
  // Lane of (a, b) that is the LANE-th of their first halves; those of b follow on those of a.
  return GAQ_SHUFFLE(T, a, b, (LANE / HALF * 2 * HALF + LANE % HALF)...) +
         GAQ_SHUFFLE(T, a, b, (LANE / HALF * 2 * HALF + LANE % HALF + HALF)...);
}
// COUNT <= WAYS sums, each in W / WAYS lanes.
template <typename T, int WAYS, int COUNT> inline Vec<T> folded(const Vec<T>* v) {
  if constexpr (WAYS == 1) {
    return v[0];
  } else {
    constexpr int HALF = WAYS / 2;
    const Vec<T> a = folded<T, HALF, (COUNT < HALF ? COUNT : HALF)>(v);
    Vec<T> b = a;
    if constexpr (COUNT > HALF) b = folded<T, HALF, COUNT - HALF>(v + HALF);
    return fold<T, HALF>(a, b, std::make_integer_sequence<int, Lanes<T>::width>());
  }
}
template <typename T, int COUNT> inline void sums(const Vec<T>* v, T* to, int64_t step) {
  constexpr int W = Lanes<T>::width, NOW = COUNT < W ? COUNT : W;
  const Vec<T> all = folded<T, W, NOW>(v);
#pragma GCC unroll 16
  for (int i = 0; i < NOW; ++i) to[i * step] = all[i];
  if constexpr (COUNT > W) sums<T, COUNT - W>(v + W, to + W * step, step);
}
#else
template <typename T, int COUNT> inline void sums(const Vec<T>* v, T* to, int64_t step) {
  for (int i = 0; i < COUNT; ++i) to[i * step] = sum<T>(v[i]);
}
#endif

// Memory of registers, aligned. It keeps its size: to touch fresh pages in each call costs as much as to compute.
template <typename V> class Registers {
  V* data = nullptr;
  size_t size = 0;

 public:
  Registers() = default;
  Registers(const Registers&) = delete;
  Registers(Registers&& other) : data(std::exchange(other.data, nullptr)), size(std::exchange(other.size, 0)) {}
  ~Registers() { ::operator delete(data, std::align_val_t(64)); }

  // At least `count` values, of which nothing is known.
  V* reserve(size_t count) {
    if (count > size) {
      ::operator delete(data, std::align_val_t(64));
      data = nullptr, size = 0;
      data = static_cast<V*>(::operator new(count * sizeof(V), std::align_val_t(64)));
      size = count;
    }
    return data;
  }
  const V* values() const { return data; }
};

// Working memory of this thread. Not inlined: a compiler would ask for its address again and again.
template <typename W> __attribute__((noinline)) W* of_thread() {
  static thread_local W kept;
  return &kept;
}

}  // namespace
