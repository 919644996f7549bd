// SIMD registers, with loads and stores that may be shorter at the end of a row.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

namespace {

// 64 bytes. Where registers are shorter, a compiler splits them, and sums of products are faster for it.
#ifndef GAQ_BYTES
#define GAQ_BYTES 64
#endif

template <typename T> struct Lanes {
  static constexpr int width = GAQ_BYTES / sizeof(T);
  typedef T type __attribute__((vector_size(GAQ_BYTES), aligned(sizeof(T)), may_alias));
  typedef T value __attribute__((vector_size(GAQ_BYTES)));
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

// Memory of registers, aligned. It keeps its size: to touch fresh pages in each call costs as much as to compute.
template <typename V> class Registers {
  V* data = nullptr;
  size_t size = 0;

 public:
  Registers() = default;
  Registers(const Registers&) = delete;
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
};

}  // namespace
