r"""Fused equivariant convolution on a card: the Triton twin of `gaq.kernels.convolution`, same layouts.

The source of the kernels is written for each problem, with the coefficients and the polynomials of the harmonics as
constants: channels are lanes, everything without a channel index is a scalar in registers. One program has one atom and
one block of channels and runs over the atom's edges, so nothing with one row an edge and channel is written and nothing
is added by atomics: results are the same from run to run.

- Messages: edges by receiver. The paths are dealt to as many programs as keep the sums in registers.
- Derivative: edges by sender where features have one, else by receiver. With g the gradient of the message, per path
  and lane

  .. math:: t_{m_2} = \sum_{m_1 m_3} C_{m_1 m_2 m_3} g_{m_3} h_{m_1}, \quad
      \frac{\partial E}{\partial R} = \sum_{m_2} Y_{m_2} t_{m_2}, \quad
      \frac{\partial E}{\partial Y_{m_2}} = R\, t_{m_2}, \quad
      \frac{\partial E}{\partial h_{m_1}} = R \sum_{m_3} B_{m_3 m_1} g_{m_3}

  (our derivation). What goes to the vector is summed over the lanes only after it has been brought to three components
  and the slope: four sums an edge, whatever the paths. Blocks of channels write parts of their own, added at the end.

Lists of edges are made by sorting on the device, without waiting for it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path as File
from typing import Any

from torch import Tensor

from gaq.caches import cached
from gaq.kernels import harmonics
from gaq.kernels.cpu.native import cache_folder, refuse_second_derivative
from gaq.kernels.gpu import tracing, why_not
from gaq.kernels.problem import ConvolutionProblem, Graph, Path

__all__ = ["convolution", "operation", "register", "source"]

LANES = 128
"""Most channels of one program."""
SUMS = 48
"""Most rows of sums that one program of the forward pass keeps."""

# -- source --


def _terms(parts: Iterable[tuple[float, str]]) -> str:
    """A sum of products with constants."""
    return " + ".join(name if c == 1.0 else f"{c!r} * {name}" for c, name in parts).replace("+ -", "- ")


Polynomial = dict[tuple[int, int, int], float]


def _monomial(powers: tuple[int, int, int]) -> str:
    return " * ".join(f"{axis}{n}" for axis, n in zip("xyz", powers, strict=True) if n)


def _polynomial(p: Polynomial) -> str:
    """A homogeneous one of a degree above 0 as an expression."""
    return _terms((c, _monomial(powers)) for powers, c in p.items())


def _slope(p: Polynomial, axis: int) -> Polynomial:
    found: Polynomial = {}
    for powers, c in p.items():
        if powers[axis]:
            lower = list(powers)
            lower[axis] -= 1
            found[lower[0], lower[1], lower[2]] = c * powers[axis]
    return found


class _Source:
    """Writes the kernels of one problem.

    Args:
        problem: what is convolved.
        tabulated: whether weights are knots of tables.
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
        self.lines += ["    " * self.depth + line if line else "" for line in lines]

    # What the kernels share.

    def lanes(self) -> None:
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

    def geometry(self, slopes: bool) -> None:
        """Of edge number e: length, whether it lies within the cutoff."""
        self.put("vx = tl.load(vectors + 3 * e)", "vy = tl.load(vectors + 3 * e + 1)")
        self.put("vz = tl.load(vectors + 3 * e + 2)", "length = tl.sqrt(vx * vx + vy * vy + vz * vz)")
        self.put(f"if (length > 0.0) & (length < {float(self.problem.r_max)!r}):")
        self.depth += 1
        self.put("inverse = 1.0 / length")
        self.put("x1 = vx * inverse", "y1 = vy * inverse", "z1 = vz * inverse")
        if not self.tabulated:
            return
        r_max = float(self.problem.r_max)
        self.put(
            f"step = tl.full((), {r_max!r}, dtype=vectors.dtype.element_ty) / intervals",
            "position = length / step",
            "knot = tl.minimum(position.to(tl.int32), intervals - 1)",
            "t = position - knot",
            "s = 1.0 - t",
            "t2 = t * t",
            "s2 = s * s",
            "half = 0.5 * step * step",
            "w0 = s2 * s * (1.0 + 3.0 * t + 6.0 * t2)",
            "w1 = s2 * s * t * (1.0 + 3.0 * t) * step",
            "w2 = s2 * s * t2 * half",
            "w3 = t2 * t * (1.0 + 3.0 * s + 6.0 * s2)",
            "w4 = -t2 * t * s * (1.0 + 3.0 * s) * step",
            "w5 = t2 * t * s2 * half",
        )
        if slopes:
            self.put(
                "d3 = 30.0 * t2 * s2 / step",
                "d1 = s2 * (1.0 + 2.0 * t - 15.0 * t2)",
                "d2 = s2 * t * (2.0 - 5.0 * t) * (0.5 * step)",
                "d4 = t2 * (1.0 + 2.0 * s - 15.0 * s2)",
                "d5 = -t2 * s * (2.0 - 5.0 * s) * (0.5 * step)",
            )
        paths = len(self.problem.paths)
        self.put(
            "row = knot.to(tl.int64)",
            "if SEVERAL:",
            f"    row += tl.load(tables + e).to(tl.int64) * {paths} * (intervals + 1)",
            f"values = weights + row * {3 * self.problem.channels} + c",
            f"span = tl.full((), intervals + 1, dtype=tl.int64) * {3 * self.problem.channels}",
        )

    def powers(self, degree: int) -> None:
        for axis in "xyz":
            for n in range(2, degree + 1):
                self.put(f"{axis}{n} = {axis}{n - 1} * {axis}1")

    def harmonic(self, degree: int) -> None:
        """Those of a degree above 0, named ``y{l}_{m}``."""
        for m, p in enumerate(self.sh[degree]):
            self.put(f"y{degree}_{m} = {_polynomial(p)}")

    def matrix(self, path: Path) -> dict[tuple[int, int], list[tuple[float, str]]]:
        """B[m3, m1] as sums of harmonics, those of degree 0 as numbers (with an empty name)."""
        found: dict[tuple[int, int], list[tuple[float, str]]] = {}
        for m1, m2, m3 in path.coefficients.nonzero().tolist():
            c = float(path.coefficients[m1, m2, m3])
            if path.edge_degree == 0:
                found.setdefault((m3, m1), []).append((c * self.sh[0][0].get((0, 0, 0), 0.0), ""))
            else:
                found.setdefault((m3, m1), []).append((c, f"y{path.edge_degree}_{m2}"))
        return found

    def put_matrix(self, number: int, path: Path) -> dict[tuple[int, int], str]:
        """Names, or numbers, of the elements of B that are not zero."""
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

    def weight(self, number: int, slope: bool) -> None:
        """Radial weights ``w`` of a path, and their slopes."""
        channels, paths = self.problem.channels, len(self.problem.paths)
        if not self.tabulated:
            self.put(f"w = {self.load(f'weights + e * {paths * channels} + {number * channels} + c')}")
            return
        for k in range(6):
            place = f"values + {number} * span + {k * channels}" if number else f"values + {k * channels}"
            self.put(f"k{k} = {self.load(place)}")
        self.put("w = " + " + ".join(f"k{k} * w{k}" for k in range(6)))
        if slope:
            # The slopes of the values' weights are opposite: of large values only the difference counts.
            self.put("slope = (k3 - k0) * d3 + k1 * d1 + k2 * d2 + k4 * d4 + k5 * d5")

    def inputs(self, blocks: Iterable[int], atom: str) -> None:
        self.put(f"h = features + {atom} * {self.problem.rows_in * self.problem.channels} + c")
        for block in sorted(set(blocks)):
            for m in range(2 * self.problem.blocks[block] + 1):
                place = (self.starts[block] + m) * self.problem.channels
                self.put(f"h{block}_{m} = {self.load(f'h + {place}')}")

    def output(self, number: int, atom: str) -> tuple[str, int]:
        """Where the first component of a path's message lies, and the distance to the next."""
        problem, group = self.problem, self.problem.paths[number].group
        own = problem.group_paths(group)
        rows = problem.group_rows()[group]
        channels = problem.channels
        start = f"{atom} * {rows * channels} + {own.index(number) * channels} + c"
        if self.offsets[group]:
            start = f"atoms * {self.offsets[group] * channels} + {start}"
        return start, len(own) * channels

    # Kernels.

    def parts(self) -> list[list[int]]:
        """The paths, dealt to programs: in equal shares as far as their rows go."""
        problem = self.problem
        rows = [2 * problem.groups[path.group] + 1 for path in problem.paths]
        count = -(-sum(rows) // SUMS)
        # Those of one edge degree together, so that a program makes few harmonics.
        ordered = sorted(range(len(rows)), key=lambda i: (problem.paths[i].edge_degree, problem.paths[i].block, i))
        found: list[list[int]] = [[]]
        for i in ordered:
            if found[-1] and sum(rows[k] for k in found[-1]) + rows[i] / 2 > sum(rows) / count:
                found.append([])
            found[-1].append(i)
        return found

    def forward(self) -> None:
        self.put("@triton.jit", "def gaq_convolution(")
        self.put("    features, vectors, weights, first, edge, sender, tables, message, intervals,")
        self.put("    SEVERAL: tl.constexpr,", "):")
        self.depth = 1
        self.lanes()
        self.put("atoms = tl.num_programs(0).to(tl.int64)")
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
        problem, top = self.problem, self.depth
        degrees = sorted({problem.paths[p].edge_degree for p in paths})
        for p in paths:
            for n in range(2 * problem.groups[problem.paths[p].group] + 1):
                self.put(f"s{p}_{n} = tl.zeros(({self.block},), dtype=features.dtype.element_ty)")
        self.put("for k in range(begin, end):")
        self.depth += 1
        self.put("e = tl.load(edge + k).to(tl.int64)", "j = tl.load(sender + k).to(tl.int64)")
        self.geometry(slopes=False)
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
        """Derivatives by vectors and weights an edge; by features as well where edges are by sender."""
        problem = self.problem
        channels, count = problem.channels, len(problem.paths)
        self.put("@triton.jit", f"def gaq_convolution_backward{'_all' if by_sender else ''}(")
        self.put("    grad, features, vectors, weights, first, edge, other, tables, grad_features, grad_vectors,")
        self.put("    grad_weights, edges, intervals, SEVERAL: tl.constexpr,", "):")
        self.depth = 1
        self.lanes()
        self.put("atoms = tl.num_programs(0).to(tl.int64)")
        self.put("begin = tl.load(first + atom)", "end = tl.load(first + atom + 1)")
        self.put("part = grad_vectors + tl.program_id(1).to(tl.int64) * edges * 3")
        used = {path.block for path in problem.paths}
        if by_sender:
            self.inputs(used, "atom")
            for block, l in enumerate(problem.blocks):  # noqa: E741
                for m in range(2 * l + 1):
                    self.put(f"f{block}_{m} = tl.zeros(({self.block},), dtype=features.dtype.element_ty)")
        self.put("for k in range(begin, end):")
        self.depth = 2
        self.put("e = tl.load(edge + k).to(tl.int64)", "j = tl.load(other + k).to(tl.int64)")
        self.geometry(slopes=True)
        receiver = "j" if by_sender else "atom"
        if not by_sender:
            self.inputs(used, "j")
        degrees = sorted({path.edge_degree for path in problem.paths})
        self.powers(degrees[-1])
        for degree in degrees:
            if degree:
                self.harmonic(degree)
        into_harmonics: set[str] = set()
        along = False
        for p, path in enumerate(problem.paths):
            self.weight(p, slope=True)
            start, stride = self.output(p, receiver)
            self.put(f"out = grad + {start}")
            entries = [(*m, float(path.coefficients[tuple(m)])) for m in path.coefficients.nonzero().tolist()]
            for m3 in sorted({m3 for _, _, m3, _ in entries}):
                self.put(f"g{m3} = {self.load(f'out + {m3 * stride}' if m3 else 'out')}")
            for m1, m3 in sorted({(m1, m3) for m1, _, m3, _ in entries}):
                self.put(f"q{m1}_{m3} = g{m3} * h{path.block}_{m1}")
            into = []
            for m2 in sorted({m2 for _, m2, _, _ in entries}):
                own = [(c, f"q{m1}_{m3}") for m1, n, m3, c in entries if n == m2]
                if path.edge_degree == 0:
                    value = self.sh[0][0].get((0, 0, 0), 0.0)
                    into.append(f"({_terms((c * value, name) for c, name in own)})")
                    continue
                self.put(f"t{m2} = {_terms(own)}")
                into.append(f"t{m2} * y{path.edge_degree}_{m2}")
                name = f"gy{path.edge_degree}_{m2}"
                self.put(f"{name} {'+' if name in into_harmonics else ''}= t{m2} * w")
                into_harmonics.add(name)
            total = " + ".join(into) if into else f"tl.zeros(({self.block},), dtype=features.dtype.element_ty)"
            self.put(f"q = {total}")
            if self.tabulated:
                self.put(f"along {'+' if along else ''}= q * slope")
                along = True
            else:
                place = f"grad_weights + e * {count * channels} + {p * channels} + c"
                self.put(self.store(place, "q"))
            if by_sender:
                names = self.put_matrix(p, path)
                for m1 in sorted({m1 for _, m1 in names}):
                    added = " + ".join(f"g{m3} * {name}" for (m3, m), name in names.items() if m == m1)
                    self.put(f"f{path.block}_{m1} += ({added}) * w")
        for axis, name in enumerate("xyz"):
            parts = []
            for degree, row in enumerate(self.sh):
                for m, polynomial in enumerate(row):
                    slope = _slope(polynomial, axis)
                    if not slope or f"gy{degree}_{m}" not in into_harmonics:
                        continue
                    if degree == 1:
                        # A literal takes the dtype of what it meets; a variable would have been float32.
                        parts.append(f"gy{degree}_{m} * {slope[0, 0, 0]!r}")
                        continue
                    self.put(f"slope_{degree}_{m} = {_polynomial(slope)}")
                    parts.append(f"gy{degree}_{m} * slope_{degree}_{m}")
            zero = "0.0 * length"
            self.put(f"u{name} = " + (f"tl.sum({' + '.join(parts)}, axis=0)" if parts else zero))
        self.put("radial = ux * x1 + uy * y1 + uz * z1")
        self.put("ahead = tl.sum(along, axis=0) - radial * inverse" if along else "ahead = -radial * inverse")
        for axis, name in enumerate("xyz"):
            self.put(f"tl.store(part + 3 * e + {axis}, u{name} * inverse + ahead * {name}1)")
        self.depth = 2
        self.put("else:")
        self.depth = 3
        self.put("nothing = length * 0.0")
        self.put(*(f"tl.store(part + 3 * e + {axis}, nothing)" for axis in range(3)))
        if not self.tabulated:
            self.put(f"empty = tl.zeros(({self.block},), dtype=features.dtype.element_ty)")
            for p in range(count):
                self.put(self.store(f"grad_weights + e * {count * channels} + {p * channels} + c", "empty"))
        self.depth = 1
        if by_sender:
            self.put(f"h = grad_features + atom * {problem.rows_in * channels} + c")
            for block, l in enumerate(problem.blocks):  # noqa: E741
                for m in range(2 * l + 1):
                    self.put(self.store(f"h + {(self.starts[block] + m) * channels}", f"f{block}_{m}"))
        self.depth = 0

    def text(self) -> str:
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
    """Channels of a program, a power of two, and its warps.

    Two channels a thread share the scalars of an edge; with many rows of messages their registers would not suffice.
    """
    block = min(LANES, 1 << (channels - 1).bit_length())
    return block, max(1, block // (64 if rows <= 2 * SUMS else 32))


def source(problem: ConvolutionProblem, tabulated: bool) -> str:
    """Python source of the kernels of a problem."""
    return _Source(problem, tabulated).text()


# -- operations --


@cached(most=64)
def _written(key: str) -> Any:
    """The module of generated kernels; its file has to exist, because Triton reads the source of what it compiles."""
    path = _folder() / f"{key}.py"
    spec = importlib.util.spec_from_file_location(f"gaq.kernels.gpu.{key}", path)
    if spec is None or spec.loader is None or not path.exists():
        raise RuntimeError(f"{path}: the generated kernels are gone; make the model anew")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@cached(most=1)
def _folder() -> File:
    folder = cache_folder() / "triton"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:
        return File(tempfile.mkdtemp(prefix="gaq-"))
    return folder


def register(problem: ConvolutionProblem, tabulated: bool) -> str:
    """Name of the kernels of a problem, written to the cache folder where they are not there yet.

    Raises:
        RuntimeError: where Triton kernels cannot run.
    """
    if tabulated not in problem.sources:
        reason = why_not()
        if reason is not None:
            raise RuntimeError(reason)
        text = source(problem, tabulated)
        key = f"convolution_{hashlib.sha256(text.encode()).hexdigest()[:20]}"
        path = _folder() / f"{key}.py"
        if not path.exists():
            # Under a name of its own first: processes that start together must not read half a file.
            with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".py", delete=False) as file:
                file.write(text)
            os.replace(file.name, path)
        problem.sources[tabulated] = key
    return problem.sources[tabulated]


def _empty(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape)


@tracing.operation("gaq::edge_convolution_triton", mutates_args=())
def operation(
    features: Tensor,
    vectors: Tensor,
    weights: Tensor,
    tables: Tensor | None,
    first: Tensor,
    edges: Tensor,
    first_sent: Tensor | None,
    edges_sent: Tensor | None,
    key: str,
) -> Tensor:
    kernels = _written(key)
    atoms = features.shape[0]
    message = _empty(features, kernels.ROWS_OUT * atoms, kernels.CHANNELS)
    tracing.wrapped(kernels.gaq_convolution)[(atoms, kernels.BLOCKS, kernels.PARTS)](
        features,
        vectors,
        weights,
        first,
        edges[0],
        edges[1],
        first if tables is None else tables,
        message,
        weights.shape[1] - 1,
        SEVERAL=tables is not None,
        num_warps=kernels.WARPS,
    )
    return message


@tracing.operation("gaq::edge_convolution_triton_backward", mutates_args=())
def _backward(
    grad: Tensor,
    features: Tensor,
    vectors: Tensor,
    weights: Tensor,
    tables: Tensor | None,
    first: Tensor,
    edges: Tensor,
    of_features: bool,
    key: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = _written(key)
    atoms, count = features.shape[0], vectors.shape[0]
    grad_features = _empty(features, *features.shape) if of_features else _empty(features, 0)
    grad_weights = _empty(weights, *weights.shape) if weights.dim() == 3 else _empty(weights, 0)
    parts = _empty(vectors, kernels.BLOCKS, count, 3)
    kernel = kernels.gaq_convolution_backward_all if of_features else kernels.gaq_convolution_backward
    tracing.wrapped(kernel)[(atoms, kernels.BLOCKS)](
        grad,
        features,
        vectors,
        weights,
        first,
        edges[0],
        edges[1],
        first if tables is None else tables,
        grad_features,
        parts,
        grad_weights,
        count,
        weights.shape[1] - 1,
        SEVERAL=tables is not None,
        num_warps=kernels.WARPS,
    )
    return grad_features, parts.sum(0), grad_weights


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.key = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative()
    features, vectors, weights, tables, first, edges, first_sent, edges_sent = ctx.saved_tensors
    of_features, _, of_weights = ctx.needs_input_grad[:3]
    if of_weights and weights.dim() == 4:
        raise RuntimeError("the knots of a radial table have no gradient")
    if of_features:
        first, edges = first_sent, edges_sent
    g_features, g_vectors, g_weights = _backward(
        grad.contiguous(), features, vectors, weights, tables, first, edges, of_features, ctx.key
    )
    return (g_features if of_features else None, g_vectors, g_weights if of_weights else None, *(None,) * 6)


operation.register_autograd(_differentiate, setup_context=_setup)


def convolution(
    problem: ConvolutionProblem,
    graph: Graph,
    features: Tensor,
    vectors: Tensor,
    weights: Tensor,
    tabulated: bool = True,
) -> Tensor:
    """See `gaq.kernels.convolution.convolution`, which calls this."""
    atoms = features.shape[0]
    sent: Sequence[Tensor | None] = graph.by_sender(atoms) if features.requires_grad else (None, None)
    return operation(  # type: ignore[no-any-return]
        features.contiguous(),
        vectors.contiguous(),
        weights.contiguous(),
        None if graph.tables is None else graph.tables.contiguous(),
        *graph.by_receiver(atoms),
        *sent,
        register(problem, tabulated),
    )
