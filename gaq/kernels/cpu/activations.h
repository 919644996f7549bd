// Activation functions of several numbers at once.

#pragma once

#include <cstdint>
#include <type_traits>

#include "lanes.h"

namespace {

// In the order of ACTIVATIONS in recording.py.
enum Activation { ACTIVATION_silu, ACTIVATION_tanh, ACTIVATION_sigmoid };

constexpr double FACTORIALS[] = {1,    1,     2,      6,       24,       120,       720,
                                 5040, 40320, 362880, 3628800, 39916800, 479001600, 6227020800};

// exp(x) as a power of 2 times 1 + rest, to some units in the last place of the rest. Beyond the range of exponents x
// is cut off; a NaN remains one.
template <typename T> inline void exponential(Vec<T> x, Vec<T>& power, Vec<T>& rest) {
  constexpr bool SHORT = sizeof(T) == 4;
  constexpr int DEGREE = SHORT ? 7 : 13, MANTISSA = SHORT ? 23 : 52;
  constexpr T LOW = SHORT ? T(-87) : T(-708), HIGH = SHORT ? T(88) : T(709);
  // ln 2 in two parts: multiples of the first one by integers are exact.
  constexpr T LN2 = SHORT ? T(0.693359375) : T(0.693145751953125);
  constexpr T REST = SHORT ? T(-2.12194440054690583e-4) : T(1.42860682030941723212e-6);
  constexpr T ROUND = T(3) * T(int64_t(1) << (MANTISSA - 1));  // added, it leaves the nearest integer in the last bits
  typedef typename Lanes<T>::index Index;
  const Vec<T> zero = {};
  x = x < zero + LOW ? zero + LOW : x;
  x = x > zero + HIGH ? zero + HIGH : x;
  const Vec<T> shifted = x * T(1.44269504088896340736) + ROUND;
  const Vec<T> n = shifted - ROUND, r = x - n * LN2 - n * REST;
  rest = zero;
#pragma GCC unroll 16
  for (int k = DEGREE; k >= 1; --k) rest = (rest + T(1 / FACTORIALS[k])) * r;
  const Vec<T> one = zero + T(1);
  power = (Vec<T>)((Index)one + ((Index)shifted << MANTISSA));
}

// An activation function times a factor, and its slope.
template <typename T> inline void activate(int64_t kind, T factor, Vec<T> x, Vec<T>& value, Vec<T>& slope) {
  Vec<T> power, rest;
  if (kind == ACTIVATION_tanh) {
    exponential<T>(x + x, power, rest);
    const Vec<T> e = power * rest + (power - T(1)), y = e / (e + T(2));  // e: without the 1, which would hide small x
    value = y * factor, slope = (T(1) - y * y) * factor;
  } else if (kind == ACTIVATION_sigmoid) {
    exponential<T>(-x, power, rest);
    const Vec<T> e = power * rest + power, s = T(1) / (T(1) + e);
    value = s * factor, slope = s * (e * s) * factor;
  } else {
    exponential<T>(-x, power, rest);
    const Vec<T> e = power * rest + power, s = T(1) / (T(1) + e);
    value = x * s * factor, slope = s * (T(1) + x * (e * s)) * factor;
  }
}

}  // namespace
