"""A model as a program: each operation and its derivative against plain torch in float64."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gaq.kernels import contraction, convolution, harmonics, program, radial, recording
from gaq.kernels.builder import Builder
from gaq.kernels.cpu import native
from gaq.kernels.program import Program
from gaq.kernels.recording import Gated, Layer, View

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no kernels: {native.why_not()}")

CHANNELS, SPECIES, R_MAX = 5, 3, 4.0
D = torch.float64
SPECIES_OF_ATOMS = torch.tensor([0, 0, 1, 1, 1, 2, 2])
SLICES = torch.tensor([[0, 0, 2], [1, 2, 5], [2, 5, 7]])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def vector_harmonics(directions: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(directions[:, :1]), directions], dim=1)


PATHS = (
    convolution.Path(0, 0, 0, torch.ones(1, 1, 1, dtype=D)),
    convolution.Path(0, 1, 1, torch.eye(3, dtype=D)[None]),
)
PROBLEM = convolution.ConvolutionProblem(
    CHANNELS, (0,), (0, 1), PATHS, tuple(harmonics.fit(vector_harmonics, 1)), R_MAX
)


def radial_function(lengths: Tensor) -> Tensor:
    frequencies = torch.arange(1, CHANNELS + 1, dtype=D)
    return torch.sin(lengths[:, None] * frequencies) * (1 - lengths[:, None] / R_MAX).clamp(min=0) ** 3


WEIGHTS = radial.tabulate(radial_function, R_MAX).coefficients.expand(2, -1, -1, -1).contiguous()
DENSITY = radial.tabulate(lambda r: (1 - r[:, None] / R_MAX).clamp(min=0) ** 2, R_MAX).coefficients


def graph() -> tuple[Tensor, Tensor, Tensor]:
    atoms = SPECIES_OF_ATOMS.numel()
    first, second = torch.meshgrid(torch.arange(atoms), torch.arange(atoms), indexing="ij")
    kept = first != second
    sender, receiver = first[kept].contiguous(), second[kept].contiguous()
    positions = 2.0 * random(atoms, 3, seed=1)
    return sender, receiver, (positions[receiver] - positions[sender]).contiguous()


POLYNOMIAL = contraction.Polynomial.make(4, 2, [((0,), 0), ((0, 1), 0), ((1, 1, 2), 1), ((0, 3), 1)])
COEFFICIENTS = random(SPECIES, len(POLYNOMIAL.terms), CHANNELS, seed=2)
MATRICES = {
    "scalars": random(CHANNELS, CHANNELS, seed=3),
    "vectors": random(CHANNELS, CHANNELS, seed=4),
    "species": random(SPECIES, CHANNELS, CHANNELS, seed=5),
    "hidden": random(2 * CHANNELS, 6, seed=6),
    "out": random(6, 2, seed=7),
    "gates": random(CHANNELS, CHANNELS, seed=18),
    "mixing": random(4 * CHANNELS, CHANNELS, seed=19),
}
ROWS = random(SPECIES, CHANNELS, seed=8)
KEPT = random(SPECIES, 2 * CHANNELS, seed=9)
HEADS = torch.tensor([0, 1, 0, 1, 1, 0, 1])
SCALES, SHIFTS = torch.tensor([1.5, 0.5], dtype=D), torch.tensor([0.25, -1.0], dtype=D)
PAIRS = recording.Repulsion(
    torch.tensor([0.18, 0.51, 0.28, 0.03], dtype=D),
    random(SPECIES, SPECIES, seed=10).abs(),
    1 + random(SPECIES, SPECIES, seed=11).abs(),
    2.5 + 0 * random(SPECIES, SPECIES),
    6,
    (3.1, 0.9, 0.4, 0.25),
)


def built(parts: bool = False) -> Program:
    """A small model with every operation."""
    builder = Builder(D, SCALES, SHIFTS, parts)
    builder.repulsion(PAIRS)
    x = builder.gather(ROWS, of_senders=True)
    message = builder.convolution(x, PROBLEM.rows_out, CHANNELS)
    # Groups are matrices end to end: scalars, then vectors.
    to = (View(1, 4 * CHANNELS, 0), View(3, 4 * CHANNELS, CHANNELS, CHANNELS))
    groups = (View(1, CHANNELS, CHANNELS), View(3, 3 * CHANNELS, CHANNELS, scaled_offset=CHANNELS))
    x = builder.linear(
        message, 4 * CHANNELS, [(groups[0], to[0], MATRICES["scalars"]), (groups[1], to[1], MATRICES["vectors"])]
    )
    x = builder.divide_by_density(x)
    x = builder.contraction(x, POLYNOMIAL, COEFFICIENTS)
    kept = builder.gather(KEPT)
    first, second = View(1, 2 * CHANNELS, 0), View(1, 2 * CHANNELS, 0, CHANNELS)
    x = builder.linear(x, 2 * CHANNELS, [(first, second, MATRICES["species"])], kept, full=False)
    builder.export(x, CHANNELS, [1, 1])
    whole, six = View(1, 2 * CHANNELS, 0), View(1, 6, 0)
    hidden = builder.linear(x, 6, [(whole, six, MATRICES["hidden"])])
    hidden = builder.activation(hidden, "silu", 1.7, 2)
    builder.energy(builder.linear(hidden, 2, [(six, View(1, 2, 0), MATRICES["out"])]))
    hidden = builder.activation(builder.linear(x, 6, [(whole, six, MATRICES["hidden"])]), "tanh", 0.3, 1)
    builder.energy(builder.linear(hidden, 2, [(six, View(1, 2, 0), MATRICES["out"])]))
    return builder.build()


def reference(vectors: Tensor, sender: Tensor, receiver: Tensor) -> tuple[Tensor, Tensor]:
    """Energies of the same model and its features, in plain torch."""
    atoms, species = SPECIES_OF_ATOMS.numel(), SPECIES_OF_ATOMS
    lengths = vectors.norm(dim=-1)
    edges = convolution.Graph(sender, receiver)
    message = convolution.reference(PROBLEM, edges, ROWS[species][:, None], vectors, WEIGHTS)
    scalars, rest = PROBLEM.split(message, atoms)
    x = torch.cat([(scalars @ MATRICES["scalars"])[:, None], (rest @ MATRICES["vectors"]).view(atoms, 3, -1)], dim=1)
    density = radial.evaluate(DENSITY, lengths, R_MAX)[:, 0, 0]
    x = x / (1 + torch.zeros(atoms, dtype=D).index_add(0, receiver, density))[:, None, None]
    x = contraction.reference(POLYNOMIAL, x, species, COEFFICIENTS)
    added = torch.einsum("ac,acd->ad", x[:, 0], MATRICES["species"][species])
    x = KEPT[species] + torch.cat([torch.zeros_like(added), added], dim=1)
    hidden = x @ MATRICES["hidden"]
    of_head = torch.arange(6)[None] // 3 == HEADS[:, None]
    energies = 1.7 * torch.nn.functional.silu(hidden) * of_head @ MATRICES["out"]
    energies = energies + 0.3 * torch.tanh(hidden) @ MATRICES["out"]
    energy = energies[torch.arange(atoms), HEADS]
    pair = species[sender], species[receiver]
    rates = torch.tensor(PAIRS.exponents, dtype=D)
    phi = (PAIRS.factors * torch.exp(-rates * (lengths * PAIRS.rates[pair])[:, None])).sum(1)
    part = lengths / PAIRS.cutoffs[pair]
    envelope = (1 - 28 * part**6 + 48 * part**7 - 21 * part**8) * (part < 1)
    energy = energy.index_add(0, receiver, 0.5 * PAIRS.charges[pair] / lengths * phi * envelope)
    return SCALES[HEADS] * energy + SHIFTS[HEADS], x


def called(made: Program, threads: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    sender, receiver, vectors = graph()
    exported = torch.empty(SPECIES_OF_ATOMS.numel(), 2 * CHANNELS, dtype=D)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        energies, grad = made(
            [Layer(PROBLEM, WEIGHTS, DENSITY)],
            sender,
            receiver,
            vectors,
            SPECIES_OF_ATOMS,
            SLICES,
            torch.arange(SPECIES_OF_ATOMS.numel()),
            heads=HEADS,
            exports=[exported],
        )
    finally:
        torch.set_num_threads(before)
    return energies, grad, exported


@pytest.mark.parametrize("threads", [1, 2])
def test_energies_and_their_gradient(threads: int) -> None:
    sender, receiver, vectors = graph()
    vectors.requires_grad_(True)
    expected, features = reference(vectors, sender, receiver)
    (gradient,) = torch.autograd.grad(expected.sum(), [vectors])
    energies, grad, exported = called(built(), threads)
    torch.testing.assert_close(energies, expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(grad, gradient, rtol=0, atol=1e-12)
    torch.testing.assert_close(exported, features.detach(), rtol=0, atol=1e-12)


def test_memory_is_shared_by_what_is_not_used_at_one_time() -> None:
    builder = Builder(D, SCALES, SHIFTS)
    x = builder.gather(ROWS)
    whole = View(1, CHANNELS, 0)
    for _ in range(6):  # nothing of it depends on positions, so nothing has to be kept
        x = builder.linear(x, CHANNELS, [(whole, whole, MATRICES["scalars"])])
    builder.energy(x)
    builder.build()
    assert len(builder._sizes) == 2


SCALARS, VECTORS = View(1, CHANNELS, CHANNELS), View(3, 3 * CHANNELS, CHANNELS, scaled_offset=CHANNELS)
LAST = random(CHANNELS, 1, seed=12)


def two_layers(made: Builder) -> Program:
    """Scalars alone between two convolutions."""
    x = made.convolution(made.gather(ROWS, of_senders=True), PROBLEM.rows_out, CHANNELS)
    x = made.linear(x, CHANNELS, [(SCALARS, View(1, CHANNELS, 0), MATRICES["scalars"])])
    x = made.convolution(made.exchange(x), PROBLEM.rows_out, CHANNELS)
    made.energy(made.linear(x, 1, [(SCALARS, View(1, 1, 0), LAST)]))
    return made.build()


def gated_layers(made: Builder) -> Program:
    """A gate between two convolutions; its result is copied to other places, and added to what is made of it."""
    width, after = 5 * CHANNELS, 4 * CHANNELS
    x = made.convolution(made.gather(ROWS, of_senders=True), PROBLEM.rows_out, CHANNELS)
    blocks = [
        (SCALARS, View(1, width, 0), MATRICES["scalars"]),
        (SCALARS, View(1, width, 0, CHANNELS), MATRICES["gates"]),
        (VECTORS, View(3, width, CHANNELS, 2 * CHANNELS), MATRICES["vectors"]),
    ]
    x = made.linear(x, width, blocks)
    pieces = [
        Gated(CHANNELS, 0, 0, "tanh", 1.3),
        Gated(CHANNELS, CHANNELS, CHANNELS, "silu", 0.7, 3, 2 * CHANNELS),
    ]
    x = made.gate(x, after, pieces)
    first, second = View(1, after, 0), View(3, after, CHANNELS, CHANNELS)
    moved = View(3, after, CHANNELS), View(1, after, 0, 3 * CHANNELS)
    x = made.copy(x, after, [(first, moved[1], CHANNELS), (second, moved[0], CHANNELS)])
    mixed = made.linear(x, after, [(moved[0], moved[0], MATRICES["gates"])], full=False)
    x = made.add(x, mixed)
    made.export(x, CHANNELS, [3, 1])
    both = View(4, after, CHANNELS)
    # The sum over components is no scalar, but a function of the vectors.
    x = made.linear(x, after, [(both, both, MATRICES["scalars"])])
    x = made.linear(x, CHANNELS, [(View(1, after, 0), View(1, CHANNELS, 0), MATRICES["mixing"])])
    x = made.convolution(made.exchange(x), PROBLEM.rows_out, CHANNELS)
    made.energy(made.linear(x, 1, [(SCALARS, View(1, 1, 0), LAST)]))
    return made.build()


def of_kinds(made: Builder) -> Program:
    """Rows of kinds, one polynomial for all species, a density with factors, sigmoids and a bias."""
    width = 5 * CHANNELS
    sent, kept = made.given(CHANNELS), made.given(width)
    x = made.convolution(sent, PROBLEM.rows_out, CHANNELS)
    blocks = [
        (SCALARS, View(1, width, 0), MATRICES["scalars"]),
        (SCALARS, View(1, width, 0, CHANNELS), MATRICES["gates"]),
        (VECTORS, View(3, width, CHANNELS, 2 * CHANNELS), MATRICES["vectors"]),
    ]
    x = made.add(made.divide_by_density(made.linear(x, width, blocks), 1.5, 0.7), kept)
    pieces = [
        Gated(CHANNELS, 0, 0, "silu", 1.3),
        Gated(CHANNELS, CHANNELS, CHANNELS, "sigmoid", 1.8, 3, 2 * CHANNELS),
    ]
    x = made.contraction(made.gate(x, 4 * CHANNELS, pieces), POLYNOMIAL, COEFFICIENTS[:1])
    whole, two = View(1, 2 * CHANNELS, 0), View(1, 2, 0)
    x = made.linear(x, 2, [(whole, two, MATRICES["hidden"][:, :2])], made.repeated(random(2, seed=21)))
    made.energy(made.activation(x, "sigmoid", 0.8, 1))
    return made.build()


def reference_of_kinds(given: list[Tensor], kinds: Tensor, vectors: Tensor, sender: Tensor, receiver: Tensor) -> Tensor:
    """Energies of `of_kinds`, in plain torch."""
    atoms = kinds.numel()
    message = convolution.reference(
        PROBLEM, convolution.Graph(sender, receiver), given[0][kinds][:, None], vectors, WEIGHTS
    )
    scalars, rest = PROBLEM.split(message, atoms)
    parts = [scalars @ MATRICES["scalars"], scalars @ MATRICES["gates"], (rest @ MATRICES["vectors"]).view(atoms, -1)]
    density = radial.evaluate(DENSITY, vectors.norm(dim=-1), R_MAX)[:, 0, 0]
    x = torch.cat(parts, dim=1) / (1.5 + 0.7 * torch.zeros(atoms, dtype=D).index_add(0, receiver, density))[:, None]
    x = (x + given[1][kinds]).view(atoms, 5, CHANNELS)
    gates = 1.8 * torch.sigmoid(x[:, 1:2])
    x = torch.cat([1.3 * torch.nn.functional.silu(x[:, :1]), gates * x[:, 2:]], dim=1)
    x = contraction.reference(POLYNOMIAL, x, torch.zeros(atoms).long(), COEFFICIENTS[:1]).flatten(1)
    return 0.8 * torch.sigmoid(x @ MATRICES["hidden"][:, :2] + random(2, seed=21))[torch.arange(atoms), HEADS]


def test_rows_of_kinds_are_given_with_a_call() -> None:
    sender, receiver, vectors = graph()
    vectors.requires_grad_(True)
    kinds, given = torch.tensor([0, 1, 2, 2, 3, 4, 4]), [random(5, CHANNELS, seed=22), random(5, 25, seed=23)]
    expected = reference_of_kinds(given, kinds, vectors, sender, receiver)
    (gradient,) = torch.autograd.grad(expected.sum(), [vectors])
    made = of_kinds(Builder(D, torch.ones(2), torch.zeros(2)))
    order = torch.arange(SPECIES_OF_ATOMS.numel())
    inputs = (sender, receiver, vectors.detach(), SPECIES_OF_ATOMS, SLICES, order)
    layers = [Layer(PROBLEM, WEIGHTS, DENSITY)]
    energies, grad = made(layers, *inputs, heads=HEADS, given=given, kinds=kinds)
    torch.testing.assert_close(energies, expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(grad, gradient, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"rows of \(5,\) numbers are given, not of \(5, 25\)"):
        made(layers, *inputs, heads=HEADS, given=given[:1], kinds=kinds)


TRANSFORMS = {
    "agnesi": recording.Transform("agnesi", (0.9, 4.5, 1.1), torch.tensor([0.3, 0.4, 0.6], dtype=D), R_MAX, 5),
    "soft": recording.Transform("soft", (4.0,), torch.tensor([0.6, 0.9, 1.1], dtype=D), R_MAX, 6),
}
"""Of lengths within the cutoff, which tables up to `R_MAX` hold after the transform."""


def transformed(of: recording.Transform, r: Tensor, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Transformed distances and the cutoff function, in plain torch."""
    length, x = of.lengths[pair[0]] + of.lengths[pair[1]], r / of.r_max
    p = float(of.power)
    cutoff = 1 - (p + 1) * (p + 2) / 2 * x**p + p * (p + 2) * x ** (p + 1) - p * (p + 1) / 2 * x ** (p + 2)
    if of.kind == "agnesi":
        q, p, a = of.parameters
        u = 1 / (1 + a * (r / length) ** q / (1 + (r / length) ** (q - p)))
    else:
        near, far = 0.75 * length, 4 / 3 * length
        u = near + (r - near) * 0.5 * (1 + torch.tanh(of.parameters[0] / (far - near) * (r - (near + far) / 2)))
    return u, cutoff * (x < 1)


@pytest.mark.parametrize("kind", recording.TRANSFORMS)
def test_tables_over_transformed_distances(kind: str) -> None:
    """Weights and densities are functions of the transformed distance, times the cutoff function of the distance."""
    sender, receiver, vectors = graph()
    vectors.requires_grad_(True)
    of, atoms = TRANSFORMS[kind], SPECIES_OF_ATOMS.numel()
    u, cutoff = transformed(of, vectors.norm(dim=-1), (SPECIES_OF_ATOMS[sender], SPECIES_OF_ATOMS[receiver]))
    weights = radial.evaluate(WEIGHTS, u, R_MAX) * cutoff[:, None, None]
    edges = convolution.Graph(sender, receiver)
    x = ROWS[SPECIES_OF_ATOMS][:, None]
    message = convolution.reference(PROBLEM, edges, x, vectors, weights, tabulated=False)
    of_edges = radial.evaluate(DENSITY, u, R_MAX)[:, 0, 0] * cutoff
    density = torch.zeros(atoms, dtype=D).index_add(0, receiver, of_edges)
    scalars, rest = PROBLEM.split(message, atoms)
    mixed = scalars @ MATRICES["scalars"] + (rest @ MATRICES["vectors"]).view(atoms, 3, -1).sum(1)
    expected = (mixed / (1 + density)[:, None] @ LAST)[:, 0]
    (gradient,) = torch.autograd.grad(expected.sum(), [vectors])

    builder = Builder(D, torch.ones(1), torch.zeros(1))
    builder.transform(of)
    made = builder.convolution(builder.gather(ROWS, of_senders=True), PROBLEM.rows_out, CHANNELS, transformed=True)
    three = View(3, 4 * CHANNELS, CHANNELS, CHANNELS)
    blocks = [(SCALARS, View(1, 4 * CHANNELS, 0), MATRICES["scalars"]), (VECTORS, three, MATRICES["vectors"])]
    made = builder.divide_by_density(builder.linear(made, 4 * CHANNELS, blocks))
    sums = torch.cat([LAST] * 4)
    builder.energy(builder.linear(made, 1, [(View(1, 4 * CHANNELS, 0), View(1, 1, 0), sums)]))
    order, layers = torch.arange(atoms), [Layer(PROBLEM, WEIGHTS, DENSITY)]
    energies, grad = builder.build()(layers, sender, receiver, vectors.detach(), SPECIES_OF_ATOMS, SLICES, order)
    torch.testing.assert_close(energies, expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(grad, gradient, rtol=0, atol=1e-12)


def gated_reference(vectors: Tensor, sender: Tensor, receiver: Tensor) -> tuple[Tensor, Tensor]:
    """Energies of `gated_layers` and the features that it exports, in plain torch."""
    atoms, species = SPECIES_OF_ATOMS.numel(), SPECIES_OF_ATOMS
    edges = convolution.Graph(sender, receiver)
    message = convolution.reference(PROBLEM, edges, ROWS[species][:, None], vectors, WEIGHTS)
    scalars, rest = PROBLEM.split(message, atoms)
    gates = 0.7 * torch.nn.functional.silu(scalars @ MATRICES["gates"])
    gated = (rest @ MATRICES["vectors"]).view(atoms, 3, -1) * gates[:, None]
    x = torch.cat([gated, 1.3 * torch.tanh(scalars @ MATRICES["scalars"])[:, None]], dim=1)
    x = x + torch.cat([x[:, :3] @ MATRICES["gates"], torch.zeros_like(x[:, :1])], dim=1)
    sent = (x @ MATRICES["scalars"]).flatten(1) @ MATRICES["mixing"]
    message = convolution.reference(PROBLEM, edges, sent[:, None], vectors, WEIGHTS)
    return (PROBLEM.split(message, atoms)[0] @ LAST)[:, 0], x


@pytest.mark.parametrize("threads", [1, 2])
def test_gates_copies_and_sums(threads: int) -> None:
    sender, receiver, vectors = graph()
    vectors.requires_grad_(True)
    expected, features = gated_reference(vectors, sender, receiver)
    (gradient,) = torch.autograd.grad(expected.sum(), [vectors])
    made = gated_layers(Builder(D, torch.ones(1), torch.zeros(1)))
    order, exported = torch.arange(SPECIES_OF_ATOMS.numel()), torch.empty(7, 4 * CHANNELS, dtype=D)
    both = [Layer(PROBLEM, WEIGHTS, None)] * 2
    torch.set_num_threads(threads)
    energies, grad = made(both, sender, receiver, vectors.detach(), SPECIES_OF_ATOMS, SLICES, order, exports=[exported])
    torch.testing.assert_close(energies, expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(grad, gradient, rtol=0, atol=1e-12)
    blocks = [features[:, :3].transpose(1, 2).flatten(1), features[:, 3]]
    torch.testing.assert_close(exported, torch.cat(blocks, dim=1).detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", recording.ACTIVATIONS)
def test_activation_functions_of_a_gate(dtype: torch.dtype, kind: str) -> None:
    """To some units in the last place for numbers of every size, and without overflow."""
    small = torch.logspace(-12, 2.6, 53, dtype=D)
    x = torch.cat([small, -small, torch.zeros(1), torch.tensor([torch.nan])]).to(dtype)
    builder = Builder(dtype, torch.ones(1), torch.zeros(1))
    count = x.numel()
    builder.export(builder.gate(builder.gather(x[None]), count, [Gated(count, 0, 0, kind, 1.0)]), count, [1])
    out, none, zeros = torch.empty(1, count, dtype=dtype), torch.zeros(0, dtype=torch.int64), torch.zeros(1).long()
    builder.build()(
        [], none, none, torch.zeros(0, 3, dtype=dtype), zeros, torch.tensor([[0, 0, 1]]), zeros, exports=[out]
    )
    function = {"silu": torch.nn.functional.silu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}[kind]
    # Below the smallest exponent, silu and sigmoid are cut off at x exp(-88) and exp(-88), or exp(-709).
    rtol, tiny = (3e-7, 1e-35) if dtype == torch.float32 else (1e-15, 1e-300)
    torch.testing.assert_close(out[0].double(), function(x.double()), rtol=rtol, atol=tiny, equal_nan=True)


@pytest.mark.parametrize("layers", [two_layers, gated_layers])
def test_a_program_on_two_parts_of_space(layers: Callable[[Builder], Program]) -> None:
    """Rows of senders are exchanged, and their gradients added where they come from."""
    sender, receiver, vectors = graph()
    builder = Builder(D, torch.ones(1), torch.zeros(1), parts=True)
    whole = layers(Builder(D, torch.ones(1), torch.zeros(1)))
    both = [Layer(PROBLEM, WEIGHTS, None)] * 2
    order = torch.arange(SPECIES_OF_ATOMS.numel())
    energies, grad = whole(both, sender, receiver, vectors, SPECIES_OF_ATOMS, SLICES, order)
    divided = layers(builder)
    exchanged: dict[tuple[int, int], Tensor] = {}
    barrier, found = threading.Barrier(2), {}
    bounds = {0: (0, 4), 1: (4, 7)}

    def run(part: int) -> None:
        begin, end = bounds[part]
        others = [a for a in range(7) if not begin <= a < end]
        all_atoms = torch.tensor([*range(begin, end), *others])
        place = torch.empty(7, dtype=torch.int64)
        place[all_atoms] = torch.arange(7)
        mine = (receiver >= begin) & (receiver < end)
        local = end - begin

        def exchange(back: bool, rows: Tensor) -> None:
            exchanged[part, int(back)] = rows.clone()
            barrier.wait()
            other = exchanged[1 - part, int(back)]
            count = other.shape[0] - local
            if back:  # ghosts of the other part are my atoms
                rows[:local] += other[count:]
            else:
                rows[local:] = other[:count]
            barrier.wait()

        species = SPECIES_OF_ATOMS[begin:end].contiguous()
        starts = [(int(z), int((species < z).sum()), int((species <= z).sum())) for z in species.unique()]
        result = divided(
            both,
            place[sender[mine]],
            receiver[mine] - begin,
            vectors[mine].contiguous(),
            species,
            torch.tensor(starts),
            torch.arange(local),
            senders=SPECIES_OF_ATOMS[all_atoms],
            exchange=exchange,
        )
        found[part] = (mine, *result)

    workers = [threading.Thread(target=run, args=(part,)) for part in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    torch.testing.assert_close(torch.cat([found[0][1], found[1][1]]), energies, rtol=0, atol=1e-12)
    for mine, _, gradient in found.values():
        torch.testing.assert_close(gradient, grad[mine], rtol=0, atol=1e-12)


def test_what_an_exchange_raises_is_raised() -> None:
    builder = Builder(D, torch.ones(1), torch.zeros(1), parts=True)
    x = builder.convolution(builder.gather(ROWS, of_senders=True), PROBLEM.rows_out, CHANNELS)
    scalars, zeros = View(1, CHANNELS, CHANNELS), View(1, CHANNELS, 0)
    x = builder.exchange(builder.linear(x, CHANNELS, [(scalars, zeros, MATRICES["scalars"])]))
    builder.energy(builder.linear(x, 1, [(zeros, View(1, 1, 0), random(CHANNELS, 1))]))
    sender, receiver, vectors = graph()

    def exchange(back: bool, rows: Tensor) -> None:
        raise RuntimeError("no neighbour answers")

    arguments = (sender, receiver, vectors, SPECIES_OF_ATOMS, SLICES, torch.arange(7))
    with pytest.raises(RuntimeError, match="no neighbour answers"):
        builder.build()([Layer(PROBLEM, WEIGHTS, None)], *arguments, exchange=exchange)


def test_a_head_that_does_not_exist() -> None:
    arguments = (*graph(), SPECIES_OF_ATOMS, SLICES, torch.arange(7))
    with pytest.raises(IndexError, match="head 2 of a model with 2"):
        built()([Layer(PROBLEM, WEIGHTS, DENSITY)], *arguments, heads=HEADS + 1)


@pytest.mark.parametrize("parts", [True, False])
def test_an_exchange_where_it_belongs(parts: bool) -> None:
    """Without one, a program for parts of space would call nothing."""
    arguments = (*graph(), SPECIES_OF_ATOMS, SLICES, torch.arange(7))
    exchange = None if parts else lambda back, rows: None
    with pytest.raises(ValueError, match="an exchange belongs to a program for parts of space"):
        built(parts)([Layer(PROBLEM, WEIGHTS, DENSITY)], *arguments, heads=HEADS, exchange=exchange)


def test_time_of_operations() -> None:
    made = built()
    made.seconds = {}
    called(made)
    assert set(made.seconds) == set(made.operations)
    assert all(value > 0 for value in made.seconds.values())
    once = dict(made.seconds)
    called(made)
    assert made.seconds["convolution_back"] > once["convolution_back"]


def test_threads_share_a_program() -> None:
    made = built()
    expected = called(made)
    results: list[tuple[Tensor, ...]] = []
    workers = [threading.Thread(target=lambda: results.append(called(made))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 4
    for result in results:
        for one, other in zip(result, expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [1, 16, 37, 130])
def test_products_of_every_width(dtype: torch.dtype, columns: int) -> None:
    """The last panel of a matrix and the last rows of a block are not full."""
    matrix = random(19, columns, seed=13)
    rows = random(1, 19, seed=14)
    builder = Builder(dtype, torch.ones(columns), torch.zeros(columns))
    x = builder.gather(rows.expand(1, -1))
    x = builder.linear(x, columns, [(View(1, 19, 0), View(1, columns, 0), matrix)])
    builder.export(x, columns, [1])
    made = builder.build()
    for atoms in (1, 5, 6, 50):
        out = torch.empty(atoms, columns, dtype=dtype)
        zeros, none = torch.zeros(atoms, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        slices, vectors = torch.tensor([[0, 0, atoms]]), torch.zeros(0, 3, dtype=dtype)
        made([], none, none, vectors, zeros, slices, torch.arange(atoms), exports=[out])
        expected = (rows @ matrix).to(dtype).expand(atoms, -1)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12 if dtype == D else 1e-5)


def test_forces_and_strain() -> None:
    positions, shifts = random(4, 3, seed=15), random(6, 3, seed=16)
    sender, receiver = torch.tensor([0, 1, 1, 2, 3, 3]), torch.tensor([1, 0, 1, 3, 2, 3])
    structure, grad = torch.tensor([0, 0, 1, 1]), random(6, 3, seed=17)
    vectors = program.edge_vectors(positions, sender, receiver, shifts)
    torch.testing.assert_close(vectors, positions[receiver] - positions[sender] + shifts, rtol=0, atol=0)
    forces, strain = program.forces_and_strain(vectors, grad, sender, receiver, structure, 2, True)
    expected = torch.zeros(4, 3, dtype=D).index_add(0, receiver, -grad).index_add(0, sender, grad)
    torch.testing.assert_close(forces, expected, rtol=0, atol=1e-15)
    outer = vectors[:, :, None] * grad[:, None]
    symmetric = torch.zeros(2, 3, 3, dtype=D).index_add(0, structure[receiver], 0.5 * (outer + outer.mT))
    torch.testing.assert_close(strain, symmetric, rtol=0, atol=1e-15)
