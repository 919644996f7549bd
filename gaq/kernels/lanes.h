// One SIMD register of 64 bytes (two or four where the machine has shorter ones), with loads and stores of tails.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

template <typename T> struct Lanes;
template <> struct Lanes<float> {
  static constexpr int width = 16;
  typedef float type __attribute__((vector_size(64), aligned(4), may_alias));
  typedef float value __attribute__((vector_size(64)));
};
template <> struct Lanes<double> {
  static constexpr int width = 8;
  typedef double type __attribute__((vector_size(64), aligned(8), may_alias));
  typedef double value __attribute__((vector_size(64)));
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
template <typename T> inline T sum(Vec<T> v) {
  T s = 0;
  for (int i = 0; i < Lanes<T>::width; ++i) s += v[i];
  return s;
}
template <> inline float sum<float>(Vec<float> v) {
  typedef float half __attribute__((vector_size(32)));
  typedef float quarter __attribute__((vector_size(16)));
  half a, b;
  std::memcpy(&a, &v, 32);
  std::memcpy(&b, reinterpret_cast<char*>(&v) + 32, 32);
  a += b;
  quarter c, d;
  std::memcpy(&c, &a, 16);
  std::memcpy(&d, reinterpret_cast<char*>(&a) + 16, 16);
  c += d;
  return (c[0] + c[1]) + (c[2] + c[3]);
}

}  // namespace
