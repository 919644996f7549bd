r"""Source of the Triton kernels of a convolution, written for each problem.

Coefficients and the polynomials of the harmonics are constants in it. Channels are lanes; everything without a channel
index is a scalar in registers. One program serves one atom and one block of channels, and runs over the atom's edges.

- Messages: edges by receiver. The paths are dealt to as many programs as keep the sums in registers.
- Derivative: edges by sender where features have a gradient, else by receiver. With g the gradient of the message, for
  each path and lane

  .. math:: t_{m_2} = \sum_{m_1 m_3} C_{m_1 m_2 m_3} g_{m_3} h_{m_1}, \quad
      \frac{\partial E}{\partial R} = \sum_{m_2} Y_{m_2} t_{m_2}, \quad
      \frac{\partial E}{\partial Y_{m_2}} = R\, t_{m_2}, \quad
      \frac{\partial E}{\partial h_{m_1}} = R \sum_{m_3} B_{m_3 m_1} g_{m_3}

  (our derivation; notation of `gaq.kernels.convolution`). The gradient by the edge vector is summed over the lanes only
  after it has been reduced to three components and the slope: four sums for an edge, however many paths there are.
  Each block of channels writes its own part; the parts are added at the end.
"""

from __future__ import annotations

from collections.abc import Iterable

from gaq.kernels import harmonics, radial
from gaq.kernels.problem import ConvolutionProblem, Path

__all__ = ["source"]

LANES = 128
"""Largest number of channels in one program."""
SUMS = 48
"""Largest number of rows of sums that one program of the forward pass keeps in registers."""


def _terms(parts: Iterable[tuple[float, str]]) -> str:
    """Write a sum of names, each times a constant."""
    return " + ".join(name if c == 1.0 else f"{c!r} * {name}" for c, name in parts).replace("+ -", "- ")


Polynomial = dict[tuple[int, int, int], float]
"""Coefficients by the exponents of x, y and z."""


def _monomial(powers: tuple[int, int, int]) -> str:
    return " * ".join(f"{axis}{n}" for axis, n in zip("xyz", powers, strict=True) if n)


def _polynomial(p: Polynomial) -> str:
    """Write a homogeneous polynomial of a degree above 0 as an expression."""
    return _terms((c, _monomial(powers)) for powers, c in p.items())


def _slope(p: Polynomial, axis: int) -> Polynomial:
    """Derivative of a polynomial by x, y or z."""
    derivative: Polynomial = {}
    for powers, c in p.items():
        if powers[axis]:
            lower = list(powers)
            lower[axis] -= 1
            derivative[lower[0], lower[1], lower[2]] = c * powers[axis]
    return derivative


class _Source:
    """Writes the kernels of one problem.

    Args:
        problem: the tensor product.
        tabulated: whether radial weights are tables, or given for each edge.
    """

    def __init__(self, problem: ConvolutionProblem, tabulated: bool) -> None:
        self.problem, self.tabulated = problem, tabulated
        self.lines: list[str] = []
        self.depth = 0
        self.block, self.warps = launch(problem.channels, problem.rows_out)
        self.starts = [sum(2 * l + 1 for l in problem.blocks[:i]) for i in range(len(problem.blocks))]  # noqa: E741
        rows = problem.group_rows()
        self.offsets = [sum(rows[:g]) for g in range(len(rows))]
        self.sh: list[list[Polynomial]] = []
        for l, matrix in enumerate(problem.harmonics):  # noqa: E741
            powers = harmonics.exponents(l)
            self.sh.append(
                [{e: c for e, c in zip(powers, row, strict=True) if c != 0.0} for row in matrix.double().tolist()]
            )

    def put(self, *lines: str) -> None:
        """Append lines at the current depth."""
        self.lines += ["    " * self.depth + line if line else "" for line in lines]

    # Parts of both kernels.

    def lanes(self) -> None:
        """Write which atom and channels a program serves."""
        self.put("atom = tl.program_id(0).to(tl.int64)", f"lane = tl.program_id(1) * {self.block}")
        self.put(f"c = lane + tl.arange(0, {self.block})")
        if self.problem.channels % self.block:
            self.put(f"kept = c < {self.problem.channels}")

    def load(self, place: str) -> str:
        tail = ", mask=kept, other=0.0" if self.problem.channels % self.block else ""
        return f"tl.load({place}{tail})"

    def store(self, place: str, value: str) -> str:
        tail = ", mask=kept" if self.problem.channels % self.block else ""
        return f"tl.store({place}, {value}{tail})"

    def geometry(self) -> None:
        """Write the geometry of edge number e: its length, direction, and place in the table if within the cutoff."""
        self.put("vx = tl.load(vectors + 3 * e)", "vy = tl.load(vectors + 3 * e + 1)")
        self.put("vz = tl.load(vectors + 3 * e + 2)", "length = tl.sqrt(vx * vx + vy * vy + vz * vz)")
        self.put(f"if length < {float(self.problem.r_max)!r}:")
        self.depth += 1
        self.put("inverse = 1.0 / length")
        self.put("x1 = vx * inverse", "y1 = vy * inverse", "z1 = vz * inverse")
        if not self.tabulated:
            return
        r_max = float(self.problem.r_max)
        paths, row = len(self.problem.paths), radial.COEFFICIENTS * self.problem.channels
        self.put(
            f"step = tl.full((), {r_max!r}, dtype=vectors.dtype.element_ty) / intervals",
            "position = length / step",
            "interval = tl.minimum(position.to(tl.int32), intervals - 1)",
            "t = position - interval",
            "row = interval.to(tl.int64)",
            "if SEVERAL:",
            f"    row += tl.load(tables + e).to(tl.int64) * {paths} * intervals",
            f"values = weights + row * {row} + c",
            f"span = tl.full((), intervals, dtype=tl.int64) * {row}",
        )

    def powers(self, degree: int) -> None:
        """Write the powers of the direction's components, up to a degree."""
        for axis in "xyz":
            for n in range(2, degree + 1):
                self.put(f"{axis}{n} = {axis}{n - 1} * {axis}1")

    def harmonic(self, degree: int) -> None:
        """Write the spherical harmonics of a degree above 0, named ``y{l}_{m}``."""
        for m, p in enumerate(self.sh[degree]):
            self.put(f"y{degree}_{m} = {_polynomial(p)}")

    def matrix(self, path: Path) -> dict[tuple[int, int], list[tuple[float, str]]]:
        """Elements B[m3, m1] of a path as sums of harmonics; degree 0 is a number with an empty name."""
        elements: dict[tuple[int, int], list[tuple[float, str]]] = {}
        for m1, m2, m3 in path.coefficients.nonzero().tolist():
            c = float(path.coefficients[m1, m2, m3])
            if path.edge_degree == 0:
                elements.setdefault((m3, m1), []).append((c * self.sh[0][0].get((0, 0, 0), 0.0), ""))
            else:
                elements.setdefault((m3, m1), []).append((c, f"y{path.edge_degree}_{m2}"))
        return elements

    def put_matrix(self, number: int, path: Path) -> dict[tuple[int, int], str]:
        """Write the elements of B that are not zero, and return their names, or numbers."""
        names = {}
        for (m3, m1), parts in self.matrix(path).items():
            if parts[0][1] == "":
                names[m3, m1] = repr(sum(c for c, _ in parts))
            elif len(parts) == 1 and parts[0][0] == 1.0:
                names[m3, m1] = parts[0][1]
            else:
                names[m3, m1] = f"b{number}_{m3}_{m1}"
                self.put(f"{names[m3, m1]} = {_terms(parts)}")
        return names

    def weight_place(self, name: str, number: int) -> str:
        """Where a path's weights of edge number e lie, in a tensor of weights for each edge."""
        channels, paths = self.problem.channels, len(self.problem.paths)
        return f"{name} + e * {paths * channels} + {number * channels} + c"

    def weight(self, number: int, slope: bool) -> None:
        """Write the radial weights ``w`` of a path, and their ``slope`` by the position in the interval."""
        channels = self.problem.channels
        if not self.tabulated:
            self.put(f"w = {self.load(self.weight_place('weights', number))}")
            self.scale(number, slope)
            return
        highest = radial.COEFFICIENTS - 1
        for k in range(highest, -1, -1):
            place = f"values + {number} * span + {k * channels}" if number else f"values + {k * channels}"
            coefficient = self.load(place)
            self.put(f"w = {coefficient}" if k == highest else f"w = w * t + {coefficient}")
            if slope and k == highest:
                self.put("slope = w")
            elif slope and k:
                self.put("slope = slope * t + w")
        self.scale(number, slope)

    def scale_place(self, name: str, row: int) -> str:
        """Where a row of the factors of edge number e lies."""
        channels = self.problem.channels
        return f"{name} + e * {self.problem.scales * channels} + {row * channels} + c"

    def scale(self, number: int, backward: bool) -> None:
        """Write the product of a path's radial weights, and of their slope, with the factors of edge number e."""
        if not self.problem.scale_rows:
            return
        row = self.problem.scale_rows[self.problem.paths[number].block]
        if backward:
            self.put("unscaled = w")
        self.put(f"scale = {self.load(self.scale_place('scales', row))}", "w = w * scale")
        if backward and self.tabulated:
            self.put("slope = slope * scale")

    def inputs(self, blocks: Iterable[int], atom: str) -> None:
        """Write the loads of an atom's features, named ``h{block}_{m}``."""
        self.put(f"h = features + {atom} * {self.problem.rows_in * self.problem.channels} + c")
        for block in sorted(set(blocks)):
            for m in range(2 * self.problem.blocks[block] + 1):
                place = (self.starts[block] + m) * self.problem.channels
                self.put(f"h{block}_{m} = {self.load(f'h + {place}')}")

    def output(self, number: int, atom: str) -> tuple[str, int]:
        """Offset of the first component of a path's message, and the distance to the next component."""
        problem, group = self.problem, self.problem.paths[number].group
        group_paths = problem.group_paths(group)
        rows = problem.group_rows()[group]
        channels = problem.channels
        start = f"{atom} * {rows * channels} + {group_paths.index(number) * channels} + c"
        if self.offsets[group]:
            start = f"received * {self.offsets[group] * channels} + {start}"
        return start, len(group_paths) * channels

    # The kernels.

    def parts(self) -> list[list[int]]:
        """Deal the paths to programs, in shares of about equal numbers of rows."""
        problem = self.problem
        rows = [2 * problem.groups[path.group] + 1 for path in problem.paths]
        count = -(-sum(rows) // SUMS)
        # Paths of one edge degree go together, so that a program evaluates few harmonics.
        ordered = sorted(range(len(rows)), key=lambda i: (problem.paths[i].edge_degree, problem.paths[i].block, i))
        shares: list[list[int]] = [[]]
        for i in ordered:
            if shares[-1] and sum(rows[k] for k in shares[-1]) + rows[i] / 2 > sum(rows) / count:
                shares.append([])
            shares[-1].append(i)
        return shares

    def forward(self) -> None:
        """Write the kernel of the messages."""
        self.put("@triton.jit", "def gaq_convolution(")
        self.put("    features, vectors, weights, first, edge, sender, tables, scales, message,")
        self.put("    intervals,")
        self.put("    SEVERAL: tl.constexpr,", "):")
        self.depth = 1
        self.lanes()
        self.put("received = tl.num_programs(0).to(tl.int64)")
        self.put("begin = tl.load(first + atom)", "end = tl.load(first + atom + 1)")
        parts = self.parts()
        for part, paths in enumerate(parts):
            if len(parts) > 1:
                self.depth = 1
                self.put("part = tl.program_id(2)" if part == 0 else "", f"if part == {part}:")
                self.depth = 2
            self.forward_part(paths)
        self.depth = 0

    def forward_part(self, paths: list[int]) -> None:
        """Write the messages of some paths."""
        problem, top = self.problem, self.depth
        degrees = sorted({problem.paths[p].edge_degree for p in paths})
        for p in paths:
            for n in range(2 * problem.groups[problem.paths[p].group] + 1):
                self.put(f"s{p}_{n} = tl.zeros(({self.block},), dtype=features.dtype.element_ty)")
        self.put("for k in range(begin, end):")
        self.depth += 1
        self.put("e = tl.load(edge + k).to(tl.int64)", "j = tl.load(sender + k).to(tl.int64)")
        self.geometry()
        self.inputs((problem.paths[p].block for p in paths), "j")
        self.powers(degrees[-1])
        for degree in degrees:
            if degree:
                self.harmonic(degree)
        for p in paths:
            path = problem.paths[p]
            names = self.put_matrix(p, path)
            self.weight(p, slope=False)
            for m1 in sorted({m1 for _, m1 in names}):
                self.put(f"a{m1} = h{path.block}_{m1} * w")
            for m3 in sorted({m3 for m3, _ in names}):
                added = " + ".join(f"a{m1} * {name}" for (n, m1), name in names.items() if n == m3)
                self.put(f"s{p}_{m3} += {added}")
        self.depth = top
        for p in paths:
            start, stride = self.output(p, "atom")
            self.put(f"out = message + {start}")
            for n in range(2 * problem.groups[problem.paths[p].group] + 1):
                self.put(self.store(f"out + {n * stride}" if n else "out", f"s{p}_{n}"))

    def backward(self, by_sender: bool) -> None:
        """Write the kernel of the derivatives by vectors and weights; by features as well where edges are by sender."""
        problem = self.problem
        self.put("@triton.jit", f"def gaq_convolution_backward{'_all' if by_sender else ''}(")
        self.put("    grad, features, vectors, weights, first, edge, other, tables, scales, grad_features,")
        self.put("    grad_vectors, grad_weights, grad_scales, edges, receivers, intervals,")
        self.put("    SEVERAL: tl.constexpr,", "):")
        self.depth = 1
        self.lanes()
        self.put("received = tl.cast(receivers, tl.int64)")
        self.put("begin = tl.load(first + atom)", "end = tl.load(first + atom + 1)")
        self.put("part = grad_vectors + tl.program_id(1).to(tl.int64) * edges * 3")
        used = {path.block for path in problem.paths}
        if by_sender:
            self.inputs(used, "atom")
            for block, m, _ in self.feature_rows():
                self.put(f"f{block}_{m} = tl.zeros(({self.block},), dtype=features.dtype.element_ty)")
        self.put("for k in range(begin, end):")
        self.depth = 2
        self.put("e = tl.load(edge + k).to(tl.int64)", "j = tl.load(other + k).to(tl.int64)")
        self.geometry()
        if not by_sender:
            self.inputs(used, "j")
        degrees = sorted({path.edge_degree for path in problem.paths})
        self.powers(degrees[-1])
        for degree in degrees:
            if degree:
                self.harmonic(degree)
        summed: set[str] = set()
        for p in range(len(problem.paths)):
            self.backward_path(p, by_sender, summed)
        self.backward_vector(summed)
        self.backward_scales(summed)
        self.depth = 2
        self.put("else:")
        self.depth = 3
        self.backward_beyond()
        self.depth = 1
        if by_sender:
            self.put(f"h = grad_features + atom * {problem.rows_in * problem.channels} + c")
            for block, m, row in self.feature_rows():
                self.put(self.store(f"h + {row * problem.channels}", f"f{block}_{m}"))
        self.depth = 0

    def feature_rows(self) -> list[tuple[int, int, int]]:
        """Block, component and row of each row of the features."""
        return [
            (block, m, self.starts[block] + m)
            for block, l in enumerate(self.problem.blocks)  # noqa: E741
            for m in range(2 * l + 1)
        ]

    def backward_path(self, p: int, by_sender: bool, summed: set[str]) -> None:
        """Write the derivatives of one path by its weight, its harmonics and, where edges are by sender, its features.

        Args:
            p: number of the path.
            by_sender: whether edges are by sender.
            summed: names of the gradients by harmonics and factors written so far; those of the path are added.
        """
        path = self.problem.paths[p]
        self.weight(p, slope=True)
        start, stride = self.output(p, "j" if by_sender else "atom")
        self.put(f"out = grad + {start}")
        entries = [(*m, float(path.coefficients[tuple(m)])) for m in path.coefficients.nonzero().tolist()]
        for m3 in sorted({m3 for _, _, m3, _ in entries}):
            self.put(f"g{m3} = {self.load(f'out + {m3 * stride}' if m3 else 'out')}")
        for m1, m3 in sorted({(m1, m3) for m1, _, m3, _ in entries}):
            self.put(f"q{m1}_{m3} = g{m3} * h{path.block}_{m1}")
        into_weight = []
        for m2 in sorted({m2 for _, m2, _, _ in entries}):
            products = [(c, f"q{m1}_{m3}") for m1, n, m3, c in entries if n == m2]
            if path.edge_degree == 0:
                value = self.sh[0][0].get((0, 0, 0), 0.0)
                into_weight.append(f"({_terms((c * value, name) for c, name in products)})")
                continue
            self.put(f"t{m2} = {_terms(products)}")
            into_weight.append(f"t{m2} * y{path.edge_degree}_{m2}")
            name = f"gy{path.edge_degree}_{m2}"
            self.put(f"{name} {'+' if name in summed else ''}= t{m2} * w")
            summed.add(name)
        zero = f"tl.zeros(({self.block},), dtype=features.dtype.element_ty)"
        self.put(f"q = {' + '.join(into_weight) if into_weight else zero}")
        if self.problem.scale_rows:
            name = f"gs{self.problem.scale_rows[path.block]}"
            self.put(f"{name} {'+' if name in summed else ''}= q * unscaled")
            summed.add(name)
        if self.tabulated:
            self.put(f"along {'+' if p else ''}= q * slope")
        else:
            if self.problem.scale_rows:
                self.put("q = q * scale")
            self.put(self.store(self.weight_place("grad_weights", p), "q"))
        if by_sender:
            names = self.put_matrix(p, path)
            for m1 in sorted({m1 for _, m1 in names}):
                added = " + ".join(f"g{m3} * {name}" for (m3, m), name in names.items() if m == m1)
                self.put(f"f{path.block}_{m1} += ({added}) * w")

    def backward_vector(self, summed: set[str]) -> None:
        """Write the gradient by an edge vector, from those by its harmonics and its length."""
        for axis, name in enumerate("xyz"):
            parts = []
            for degree, row in enumerate(self.sh):
                for m, polynomial in enumerate(row):
                    slope = _slope(polynomial, axis)
                    if not slope or f"gy{degree}_{m}" not in summed:
                        continue
                    if degree == 1:
                        # A literal takes the dtype of its operand; a variable would be float32.
                        parts.append(f"gy{degree}_{m} * {slope[0, 0, 0]!r}")
                        continue
                    self.put(f"slope_{degree}_{m} = {_polynomial(slope)}")
                    parts.append(f"gy{degree}_{m} * slope_{degree}_{m}")
            self.put(f"u{name} = " + (f"tl.sum({' + '.join(parts)}, axis=0)" if parts else "0.0 * length"))
        self.put("radial = ux * x1 + uy * y1 + uz * z1")
        ahead = "tl.sum(along, axis=0) / step - radial * inverse" if self.tabulated else "-radial * inverse"
        self.put(f"ahead = {ahead}")
        for axis, name in enumerate("xyz"):
            self.put(f"tl.store(part + 3 * e + {axis}, u{name} * inverse + ahead * {name}1)")

    def backward_scales(self, summed: set[str]) -> None:
        """Write the gradients by an edge's factors; zero for rows that no path reads."""
        for row in range(self.problem.scales):
            if f"gs{row}" not in summed:
                self.put(f"gs{row} = tl.zeros(({self.block},), dtype=features.dtype.element_ty)")
            self.put(self.store(self.scale_place("grad_scales", row), f"gs{row}"))

    def backward_beyond(self) -> None:
        """Write the gradients of an edge beyond the cutoff: zero."""
        self.put("nothing = length * 0.0")
        self.put(*(f"tl.store(part + 3 * e + {axis}, nothing)" for axis in range(3)))
        self.backward_scales(set())
        if not self.tabulated:
            self.put(f"empty = tl.zeros(({self.block},), dtype=features.dtype.element_ty)")
            for p in range(len(self.problem.paths)):
                self.put(self.store(self.weight_place("grad_weights", p), "empty"))

    def text(self) -> str:
        """Source of the module."""
        problem = self.problem
        self.put("import triton", "import triton.language as tl", "")
        self.put(f"CHANNELS, ROWS_OUT, PARTS = {problem.channels}, {problem.rows_out}, {len(self.parts())}")
        self.put(f"BLOCKS, WARPS = {-(-problem.channels // self.block)}, {self.warps}", "", "")
        self.forward()
        self.put("", "")
        self.backward(by_sender=False)
        self.put("", "")
        self.backward(by_sender=True)
        return "\n".join(self.lines) + "\n"


def launch(channels: int, rows: int) -> tuple[int, int]:
    """Channels of a program, a power of two, and its number of warps.

    With two channels, a thread uses the scalars of an edge twice. With many rows of messages it has too few registers
    for that.
    """
    block = min(LANES, 1 << (channels - 1).bit_length())
    return block, max(1, block // (64 if rows <= 2 * SUMS else 32))


def source(problem: ConvolutionProblem, tabulated: bool) -> str:
    """Python source of the kernels of a problem.

    Args:
        problem: the tensor product.
        tabulated: whether radial weights are tables, or given for each edge.
    """
    return _Source(problem, tabulated).text()
