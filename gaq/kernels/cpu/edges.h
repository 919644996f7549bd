// Edges sorted by atom, and their distribution over threads.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

// Stable counting sort of edges by atom: atom a has the edges order[first[a]] to order[first[a + 1] - 1].
struct Sorted {
  std::vector<int64_t> first, order;
  Sorted(int64_t edges, int64_t atoms, const int64_t* atom) : first(atoms + 1, 0), order(edges) {
    for (int64_t e = 0; e < edges; ++e) ++first[atom[e] + 1];
    for (int64_t a = 0; a < atoms; ++a) first[a + 1] += first[a];
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    for (int64_t e = 0; e < edges; ++e) order[next[atom[e]]++] = e;
  }
};

// Atoms begin to end - 1, which are number `part` of `parts` shares with about equal numbers of edges.
struct Share {
  int64_t begin, end;
  Share(const std::vector<int64_t>& first, int64_t part, int64_t parts) {
    const auto bound = [&](int64_t p) {
      const int64_t atoms = int64_t(first.size()) - 1;
      if (p == 0) return int64_t(0);
      if (p == parts) return atoms;
      return int64_t(std::lower_bound(first.begin(), first.begin() + atoms, first[atoms] * p / parts) - first.begin());
    };
    begin = bound(part), end = bound(part + 1);
  }
};

}  // namespace
