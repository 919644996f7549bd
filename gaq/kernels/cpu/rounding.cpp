// Rounding of node or edge features on the CPU: scalars to equal steps, vectors to codes of magnitude and direction.
// See rounding.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

// Vectors longer than a register would be compared element by element, and this file compares a lot.
#ifdef __AVX512F__
#define GAQ_BYTES 64
#elif defined(__AVX__)
#define GAQ_BYTES 32
#else
#define GAQ_BYTES 16
#endif
#include "lanes.h"
#include "signatures.h"

namespace {

constexpr int MAX_D = 9;

// Rounds to the nearest integer, halves to even, for values far below 2^22 (double: 2^51).
template <typename T> inline Vec<T> nearest(Vec<T> v) {
  constexpr T magic = sizeof(T) == 4 ? T(12582912.0) : T(6755399441055744.0);
  return (v + magic) - magic;
}
template <typename T> inline Vec<T> magnitude(Vec<T> v) { return v < 0 ? -v : v; }
// The same up to 2^23 (double: 2^52), where codes of 24 bits end.
template <typename T> inline Vec<T> nearest_wide(Vec<T> v) {
  constexpr T magic = sizeof(T) == 4 ? T(8388608.0) : T(4503599627370496.0);
  const Vec<T> size = (magnitude<T>(v) + magic) - magic;
  return v < 0 ? -size : size;
}
template <typename T> inline Vec<T> larger(Vec<T> a, Vec<T> b) { return a > b ? a : b; }
template <typename T> inline Vec<T> root(Vec<T> v) {
  Vec<T> r;
  for (int i = 0; i < Lanes<T>::width; ++i) r[i] = std::sqrt(v[i]);
  return r;
}
template <typename T> inline T largest(Vec<T> v) {
  T m = v[0];
  for (int i = 1; i < Lanes<T>::width; ++i) m = std::max(m, v[i]);
  return m;
}

struct Piece {
  int64_t scaled_offset, offset;  // of the first element: scaled_offset * atoms + offset
  int64_t dimension, channels, atom_stride, row_stride;
  int64_t framed, levels, channel_stride;
};

// Largest size, enlarged a little so that no code exceeds the largest one, and never zero.
template <typename T> T limit(T size) { return std::max(size, T(1e-30)) * T(1.000001); }

// Replaces zero axes by directions orthogonal to the others, so that no component of the features is lost.
inline void complete(double a[MAX_D][MAX_D], int axes, int d) {
  for (int k = 0; k < axes; ++k) {
    double size = 0;
    for (int m = 0; m < d; ++m) size += a[k][m] * a[k][m];
    if (size > 0.5) continue;
    int best = 0;
    double most = 0;
    for (int i = 0; i < d; ++i) {
      double left = 1;
      for (int j = 0; j < axes; ++j) left -= a[j][i] * a[j][i];
      if (left > most) most = left, best = i;
    }
    double rest[MAX_D] = {};
    rest[best] = 1;
    for (int j = 0; j < axes; ++j)
      for (int m = 0; m < d; ++m) rest[m] -= a[j][best] * a[j][m];
    const double length = std::sqrt(std::max(most, 1e-30));
    for (int m = 0; m < d; ++m) a[k][m] = rest[m] / length;
  }
}

// Sums of each component of x over channels, with fixed factors for each axis: v[k][m].
template <typename T, int D, int COUNT>
void mixtures(const Piece& p, const T* x, const double* mixing, int64_t mixing_stride, double v[MAX_D][MAX_D]) {
  constexpr int W = Lanes<double>::width;
  constexpr int AT_ONCE = D == 3 ? 3 : 1;  // components whose sums fit into registers
  typedef T Narrow __attribute__((vector_size(W * sizeof(T)), aligned(sizeof(T)), may_alias));
  for (int first = 0; first < D; first += AT_ONCE) {
    const T* row = x + first * p.row_stride;
    Vec<double> totals[AT_ONCE][COUNT] = {};
    int64_t c = 0;
    for (; c + W <= p.channels; c += W) {
      Vec<double> values[AT_ONCE];
#pragma GCC unroll 3
      for (int m = 0; m < AT_ONCE; ++m)
        values[m] = __builtin_convertvector(*reinterpret_cast<const Narrow*>(row + m * p.row_stride + c), Vec<double>);
#pragma GCC unroll 9
      for (int k = 0; k < COUNT; ++k) {
        const Vec<double> factors = load(mixing + k * mixing_stride + c, W);
#pragma GCC unroll 3
        for (int m = 0; m < AT_ONCE; ++m) totals[m][k] += factors * values[m];
      }
    }
    for (int k = 0; k < COUNT; ++k)
      for (int m = 0; m < AT_ONCE; ++m) {
        double& to = v[k][first + m] = sum<double>(totals[m][k]);
        for (int64_t tail = c; tail < p.channels; ++tail)
          to += mixing[k * mixing_stride + tail] * double(row[m * p.row_stride + tail]);
      }
  }
}

// Orthonormal axes that rotate with the features: Gram-Schmidt on fixed mixtures of the channels.
template <typename T, int D>
void frame(const Piece& p, const T* x, const double* mixing, int64_t mixing_stride, T axes[MAX_D][MAX_D]) {
  constexpr int d = D, spanning = D == 3 ? 2 : D;
  double v[MAX_D][MAX_D], a[MAX_D][MAX_D] = {};
  mixtures<T, D, D>(p, x, mixing, mixing_stride, v);
  double size = 0;
  for (int k = 0; k < spanning; ++k) {
    double s = 0;
    for (int m = 0; m < d; ++m) s += v[k][m] * v[k][m];
    size = std::max(size, std::sqrt(s));
  }
  const double floor = size * 32 * double(std::numeric_limits<T>::epsilon());
  for (int k = 0; k < spanning; ++k) {
    double axis[MAX_D];
    std::copy(v[k], v[k] + d, axis);
    double before = 0;
    for (int m = 0; m < d; ++m) before += axis[m] * axis[m];
    for (int pass = 0; pass < 2; ++pass) {
      for (int j = 0; j < k; ++j) {
        double s = 0;
        for (int m = 0; m < d; ++m) s += axis[m] * a[j][m];
        for (int m = 0; m < d; ++m) axis[m] -= s * a[j][m];
      }
      double length = 0;
      for (int m = 0; m < d; ++m) length += axis[m] * axis[m];
      length = std::sqrt(length);
      const double least = pass == 0 ? floor : 0.5;
      const double factor = length > least ? 1 / std::max(length, 1e-30) : 0.0;
      for (int m = 0; m < d; ++m) axis[m] *= factor;
      // The rest of a mixture is orthogonal to within its digits. Where little is left these are few, so repeat.
      if (length * length > 0.01 * before) break;
    }
    std::copy(axis, axis + d, a[k]);
  }
  complete(a, spanning, d);
  if constexpr (D == 3) {
    const double c[3] = {a[0][1] * a[1][2] - a[0][2] * a[1][1], a[0][2] * a[1][0] - a[0][0] * a[1][2],
                         a[0][0] * a[1][1] - a[0][1] * a[1][0]};
    // Under inversion the other axes change sign, a cross product does not: the third mixture gives it its sign.
    const double side = v[2][0] * c[0] + v[2][1] * c[1] + v[2][2] * c[2];
    for (int m = 0; m < 3; ++m) a[2][m] = side < 0 ? -c[m] : c[m];
  }
  for (int k = 0; k < d; ++k)
    for (int m = 0; m < d; ++m) axes[k][m] = T(a[k][m]);
}

// Rounds the vectors of one atom's piece.
template <typename T, int D>
void vectors(const Piece& p, const T* x, const double* mixing, int64_t mixing_stride, T top, T* out) {
  constexpr int W = Lanes<T>::width;
  T axes[MAX_D][MAX_D];
  if (p.framed) frame<T, D>(p, x, mixing, mixing_stride, axes);
  Vec<T> most = {};
  for (int64_t c = 0; c < p.channels; c += W) {
    Vec<T> s = {};
    for (int m = 0; m < D; ++m) {
      const Vec<T> v = load(x + m * p.row_stride + c, p.channels - c);
      s += v * v;
    }
    most = larger<T>(most, s);
  }
  const T step = limit(std::sqrt(largest<T>(most))) / top;
  const T n = T(p.levels);
  for (int64_t c = 0; c < p.channels; c += W) {
    const int64_t left = p.channels - c;
    Vec<T> v[D], along[D], squared = {};
    for (int m = 0; m < D; ++m) v[m] = load(x + m * p.row_stride + c, left), squared += v[m] * v[m];
    const Vec<T> rounded = nearest<T>(root<T>(squared) / step) * step;
    if (p.framed)
      for (int k = 0; k < D; ++k) {
        along[k] = v[0] * axes[k][0];
        for (int m = 1; m < D; ++m) along[k] += v[m] * axes[k][m];
      }
    else
      std::copy(v, v + D, along);
    Vec<T> point[D];
    if constexpr (D == 3) {
      const Vec<T> ax = magnitude<T>(along[0]), ay = magnitude<T>(along[1]), az = magnitude<T>(along[2]);
      const Vec<T> scale = n / larger<T>(ax + ay + az, Vec<T>{} + T(1e-30));
      const Vec<T> sx = ax * scale, sy = ay * scale, sz = az * scale;
      Vec<T> kx = nearest<T>(sx), ky = nearest<T>(sy), kz = nearest<T>(sz);
      const Vec<T> mx = magnitude<T>(sx - kx), my = magnitude<T>(sy - ky), mz = magnitude<T>(sz - kz);
      const Vec<T> missing = n - (kx + ky + kz);
      kx = ((mx >= my) & (mx >= mz)) ? kx + missing : kx;
      kz = ((mz > mx) & (mz > my)) ? kz + missing : kz;
      ky = n - kx - kz;
      // A zero vector lands on an axis; its magnitude is zero.
      point[0] = along[0] < 0 ? -kx : kx, point[1] = along[1] < 0 ? -ky : ky, point[2] = along[2] < 0 ? -kz : kz;
    } else {
      Vec<T> peak = magnitude<T>(along[0]);
      for (int m = 1; m < D; ++m) peak = larger<T>(peak, magnitude<T>(along[m]));
      const Vec<T> scale = n / larger<T>(peak, Vec<T>{} + T(1e-30));
      for (int m = 0; m < D; ++m) point[m] = nearest<T>(along[m] * scale);
    }
    Vec<T> square = point[0] * point[0];
    for (int m = 1; m < D; ++m) square += point[m] * point[m];
    const Vec<T> factor = rounded / root<T>(larger<T>(square, Vec<T>{} + T(1)));
    for (int m = 0; m < D; ++m) {
      Vec<T> y;
      if (p.framed) {
        y = point[0] * axes[0][m];
        for (int k = 1; k < D; ++k) y += point[k] * axes[k][m];
      } else {
        y = point[m];
      }
      store(out + m * p.row_stride + c, y * factor, left);
    }
  }
}

// Rounds the scalars of one atom's piece.
template <typename T>
void scalars(const Piece& p, const T* x, T top, T* out) {
  constexpr int W = Lanes<T>::width;
  Vec<T> most = {};
  for (int64_t c = 0; c < p.channels; c += W) most = larger<T>(most, magnitude<T>(load(x + c, p.channels - c)));
  const T step = limit(largest<T>(most)) / top;
  for (int64_t c = 0; c < p.channels; c += W)
    store(out + c, nearest_wide<T>(load(x + c, p.channels - c) / step) * step, p.channels - c);
}

template <typename T>
void round_piece(const Piece& p, const T* x, const double* mixing, int64_t mixing_stride, T top, T* out) {
  switch (p.dimension) {
    case 1: scalars(p, x, top, out); break;
    case 3: vectors<T, 3>(p, x, mixing, mixing_stride, top, out); break;
    case 5: vectors<T, 5>(p, x, mixing, mixing_stride, top, out); break;
    case 7: vectors<T, 7>(p, x, mixing, mixing_stride, top, out); break;
    case 9: vectors<T, 9>(p, x, mixing, mixing_stride, top, out); break;
  }
}

template <typename T>
void round(const int64_t* ints, const double* reals, int64_t atoms, const T* x, T* out, int64_t threads) {
  const int64_t pieces = ints[0], mixing_stride = ints[1];
  const Piece* piece = reinterpret_cast<const Piece*>(ints + 2);
  const double* tops = reals;
  const double* mixing = reals + pieces;
  int64_t scattered = 0;
  for (int64_t i = 0; i < pieces; ++i)
    if (piece[i].channel_stride != 1) scattered = std::max(scattered, piece[i].dimension * piece[i].channels);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    // Copies with channels side by side, of pieces whose channels are apart.
    std::vector<T> gathered(scattered), rounded(scattered);
#pragma omp for schedule(static)
    for (int64_t a = 0; a < atoms; ++a)
      for (int64_t i = 0; i < pieces; ++i) {
        const Piece& p = piece[i];
        const int64_t at = p.scaled_offset * atoms + p.offset + a * p.atom_stride;
        const T top = T(tops[i]);
        if (p.channel_stride == 1) {
          round_piece(p, x + at, mixing, mixing_stride, top, out + at);
          continue;
        }
        Piece side_by_side = p;
        side_by_side.row_stride = p.channels;
        for (int64_t c = 0; c < p.channels; ++c)
          for (int64_t m = 0; m < p.dimension; ++m)
            gathered[m * p.channels + c] = x[at + c * p.channel_stride + m * p.row_stride];
        round_piece(side_by_side, gathered.data(), mixing, mixing_stride, top, rounded.data());
        for (int64_t c = 0; c < p.channels; ++c)
          for (int64_t m = 0; m < p.dimension; ++m)
            out[at + c * p.channel_stride + m * p.row_stride] = rounded[m * p.channels + c];
      }
  }
}

}  // namespace

extern "C" {

#define GAQ_EXPORT(NAME, T) \
  GAQ_KERNEL(round, NAME, T) { round<T>(ints, reals, atoms, features, rounded, threads); }
#ifndef GAQ_ONLY_FLOAT64
GAQ_EXPORT(float32, float)
#endif
#ifndef GAQ_ONLY_FLOAT32
GAQ_EXPORT(float64, double)
#endif
}
