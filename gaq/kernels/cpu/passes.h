// Passes: paths with one input block that are computed together, by functions made for their numbers of components.

#pragma once

#include <cstdint>
#include <vector>

#include "plan.h"

namespace {

constexpr int64_t MOST_PATHS = 4;  // of a pass

// A function for paths from d1 input components to those of d3 output components.
template <typename F> struct Kind {
  int64_t d1;
  std::vector<int64_t> d3;
  F function;
};

// Kinds of passes with one path.
#define GAQ_KIND(FUNCTION, D1, ...) {D1, {__VA_ARGS__}, FUNCTION<T, D1, __VA_ARGS__>}
#define GAQ_SINGLE(FUNCTION, D1)                                                                              \
  GAQ_KIND(FUNCTION, D1, 1), GAQ_KIND(FUNCTION, D1, 3), GAQ_KIND(FUNCTION, D1, 5), GAQ_KIND(FUNCTION, D1, 7), \
      GAQ_KIND(FUNCTION, D1, 9)
#define GAQ_SINGLES(FUNCTION)                                                                         \
  GAQ_SINGLE(FUNCTION, 1), GAQ_SINGLE(FUNCTION, 3), GAQ_SINGLE(FUNCTION, 5), GAQ_SINGLE(FUNCTION, 7), \
      GAQ_SINGLE(FUNCTION, 9)

// `paths` paths from a place in `Plan::path` on.
template <typename F> struct Pass {
  int64_t first, paths;
  F function;
};

template <typename F> bool fits(const Plan& plan, const Kind<F>& kind, size_t first) {
  if (plan.path[first].d1 != kind.d1 || first + kind.d3.size() > plan.path.size()) return false;
  for (size_t j = 0; j < kind.d3.size(); ++j)
    if (plan.path[first + j].d3 != kind.d3[j] || !plan.path[first].same_input(plan.path[first + j])) return false;
  return true;
}

// Passes for all paths, each of the first of the kinds that fit.
template <typename F> std::vector<Pass<F>> passes(const Plan& plan, const std::vector<Kind<F>>& kinds) {
  std::vector<Pass<F>> made;
  for (size_t first = 0; first < plan.path.size(); first += made.back().paths)
    for (const Kind<F>& kind : kinds)
      if (fits(plan, kind, first)) {
        made.push_back({int64_t(first), int64_t(kind.d3.size()), kind.function});
        break;
      }
  return made;
}

}  // namespace
