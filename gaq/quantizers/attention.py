r"""Robust attention and bounded gates: invariants whose range is known before anything is rounded.

**Logits.** A query q and a key k are normalised and multiplied by a bounded temperature,

.. math:: l = t \, \hat q \cdot \hat k, \qquad \hat x = x / \sqrt{|x|^2 + \epsilon}

(cosine attention; the normalisation and the temperature are those of arXiv 2603.05343, the bounds are ours). By the
inequality of Cauchy and Schwarz \|l\| < t, so one grid over [-t, t] holds every logit there can be: nothing to
calibrate, nothing that saturates.

**Weights of neighbours** (our derivation). A plain softmax over the neighbours k of atom i, even one with the cutoff
function u inside, ``u_ij exp(l_ij) / sum_k u_ik exp(l_ik)``, is not continuous: the weight of a *last* neighbour is 1
for any u > 0, and drops to nothing at the cutoff. A constant in the denominator mends it,

.. math:: \alpha_{ij} = \frac{u_{ij} \exp l_{ij}}{1 + \sum_k u_{ik} \exp l_{ik}}

It is an extra neighbour that is always there, has logit 0 and sends nothing. Now alpha_ij is a smooth function of all
u and l (the denominator is at least 1), so it has as many continuous derivatives as u, and it goes to zero as u does:
with it go its derivatives, as far as those of u vanish at the cutoff. The same holds for the other neighbours' weights,
in which the one that leaves appears through u_ik exp(l_ik) alone. The step of a rounded logit is multiplied by u as
well, and so vanishes at the cutoff. Each atom has weights of its own, in which the order of neighbours does not matter
and atoms beyond the cutoff do not appear: energies stay permutation invariant and extensive. No maximum has to be
subtracted, because exp(l) <= exp(T_MAX) = 2981.

**Gates.** `BoundedGate` holds what goes into a non-linearity within twice a calibrated range, by a function that is
exactly the identity within the range.

This module is embedded in packages: it imports nothing but torch and the core.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from gaq.config.schema import TEMPERATURES, AttentionConfig, ScalarConfig, VectorConfig
from gaq.quantizers.features import FeatureLayout, FeatureQuantizer
from gaq.quantizers.magnitudes import round_linear

__all__ = [
    "EPSILON",
    "T_MAX",
    "T_MIN",
    "BoundedGate",
    "GridQuantizer",
    "LearnedEnvelope",
    "RobustAttention",
    "heads_of_weights",
    "neighbour_weights",
    "soft_bound",
    "unit",
]

T_MIN, T_MAX = TEMPERATURES
"""Bounds of the temperature. At the upper one the weights of two neighbours can differ by a factor of exp(2 T_MAX) =
9e6, and a step of 16 bits changes a weight by a share of 1.2e-4 at most."""

EPSILON = 1e-4
"""Added to the squared norm of queries and keys, whose components are of order one: it keeps the direction of a vector
near zero, and its derivatives, smooth and finite. The cosine of two vectors of norm 1 becomes smaller by 1e-4."""


def unit(x: Tensor, epsilon: float = EPSILON) -> Tensor:
    """``x / sqrt(|x|^2 + epsilon)`` along the last dimension: shorter than one, smooth everywhere, zero at zero."""
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + epsilon)


def neighbour_weights(logits: Tensor, envelope: Tensor, receiver: Tensor, atoms: int) -> Tensor:
    """The weights of neighbours, ``u exp(l) / (1 + sum of u exp(l) over the receiver's edges)``; see the module.

    Args:
        logits: shape (edges, heads), not larger than about 80 in float32.
        envelope: cutoff function of the edges, shape (edges,), between 0 and 1, zero at the cutoff.
        receiver: atom that each edge points to, shape (edges,).
        atoms: number of atoms.

    Returns:
        Shape (edges, heads); those of an atom sum to less than one, to zero where it has no neighbours.
    """
    share = envelope.unsqueeze(-1) * torch.exp(logits)
    total = torch.zeros([atoms, share.shape[1]], dtype=share.dtype, device=share.device)
    total = total.index_add(0, receiver, share)
    return share / (1.0 + total).index_select(0, receiver)


def heads_of_weights(multiplicities: Iterable[int], heads: int) -> Tensor:
    """The head that each weight of a channel-wise (``uvu``) tensor product belongs to, shape (weights,).

    Args:
        multiplicities: channels of each path, in the order of its instructions; they are dealt out to the heads in
            contiguous shares that differ by one channel at most.
        heads: number of heads.
    """
    return torch.cat([torch.div(torch.arange(m) * heads, m, rounding_mode="floor") for m in multiplicities])


def soft_bound(x: Tensor, limit: Tensor) -> Tensor:
    """The identity within ``[-limit, limit]``, bit for bit; beyond it a curve that never reaches twice the limit.

    ``sign(x) limit (1 + tanh(|x| / limit - 1))``: value and first two derivatives continue those of the identity, and
    the slope is never zero, so that what lies beyond the range keeps a force and can be trained back.

    Args:
        x: any shape.
        limit: positive, broadcastable to `x`.
    """
    size = x.abs()
    beyond = limit * (1.0 + torch.tanh((size - limit).clamp_min(0.0) / limit))
    return torch.where(size <= limit, x, torch.where(x < 0, -beyond, beyond))


class GridQuantizer(FeatureQuantizer):
    """Rounds invariants whose range is known by construction; there is nothing to observe.

    Args:
        channels: of the last dimension.
        bits: of a code.
        limit: largest size.
        signed: whether the range is [-limit, limit] or [0, limit].
        what: is rounded, for display.
    """

    __jit_unused_properties__ = ["needs_ranges"]  # noqa: RUF012

    def __init__(self, channels: int, bits: int, limit: float = 1.0, signed: bool = True, what: str = "logits") -> None:
        scalars = ScalarConfig(bits=bits, granularity="per_tensor")
        super().__init__(FeatureLayout(((channels, 1),)), scalars, VectorConfig(magnitude_bits=None), 1.0)
        self.signed = signed
        if not signed:
            self.scalar_top = float(2**bits - 1)
        self.limit.fill_(limit)
        self.note = f"{what}: {bits} bits"

    @property
    def needs_ranges(self) -> bool:
        """The range is known."""
        return False

    @torch.jit.unused
    def update_limits(self) -> None:
        """The range does not follow what is observed."""

    def forward(self, x: Tensor) -> Tensor:
        """Rounded invariants, the shape of `x`, which is (..., channels)."""
        if not self.scalars_enabled:
            return x
        return round_linear(x, self.limit.to(x.dtype), self.scalar_top, self.signed)


class BoundedGate(FeatureQuantizer):
    """Bounds the scalars that enter a gate or weigh a neighbour, and rounds them on the range that this gives.

    The range is that of `soft_bound`, with one limit for all channels: ``headroom`` times the largest size seen in
    calibration (a limit a channel would bend the ones that happened to be quiet then), or a given number. Within the
    limit it is the identity, bit for bit where nothing is rounded, so that a trained model stays the function it is on
    all that looks like its calibration set. Codes run over (-2 limit, 2 limit), which nothing leaves. Before
    calibration it does nothing.

    Args:
        layout: of the features; l > 0 and pieces of negative multiplicity pass through.
        bits: of a code; None bounds and does not round.
        headroom: as for `FeatureQuantizer`.
        limit: a range by construction, for training from scratch; None for a calibrated one.

    Raises:
        ValueError: if the layout has channels first.
    """

    __jit_unused_properties__ = ["needs_ranges"]  # noqa: RUF012

    def __init__(self, layout: FeatureLayout, bits: int | None, headroom: float, limit: float | None = None) -> None:
        if layout.channels_first:
            raise ValueError("a bounded gate reads features with the irreps in the last dimension.")
        scalars = ScalarConfig(bits=bits, granularity="per_tensor")
        super().__init__(layout, scalars, VectorConfig(magnitude_bits=None), headroom)
        self.by_construction = limit is not None
        self.calibrated = limit is not None
        if limit is not None:
            self.limit.fill_(limit)
        rounded = f"l=0: {bits} bits, " if bits is not None else "l=0: "
        self.note = rounded + (f"bounded by {2 * limit:g}" if limit is not None else "bounded by calibration")

    @property
    def needs_ranges(self) -> bool:
        """Whether the range has to be observed."""
        return not self.by_construction

    @torch.jit.unused
    def update_limits(self) -> None:
        """Ranges from what was observed; one by construction stays what it is."""
        if self.by_construction:
            return
        super().update_limits()
        self.calibrated = bool((self.observed > 0).any())

    def forward(self, x: Tensor) -> Tensor:
        """Bounded features, shape and dtype of `x`, which is (batch, irreps.dim)."""
        if self.observing:
            self.observe(x)
        if not (self.by_construction or (self.calibrated and self.scalars_enabled)):
            return x
        parts: list[Tensor] = []
        start = 0
        channel = 0
        for multiplicity, dimension in zip(self.multiplicities, self.dimensions):  # noqa: B905 (scripted)
            m = abs(multiplicity)
            piece = x[:, start : start + m * dimension]
            if multiplicity > 0 and dimension == 1:
                limit = self.limit[channel : channel + m].to(x.dtype)
                piece = soft_bound(piece, limit)
                if self.round_scalars and self.scalars_enabled:
                    piece = round_linear(piece, 2.0 * limit, self.scalar_top, True)
            parts.append(piece)
            start += m * dimension
            channel += m
        return torch.cat(parts, -1)


class LearnedEnvelope(torch.nn.Module):
    r"""A cutoff function from radial features that carry the cutoff in them, for hosts that hand over nothing else.

    .. math:: u = 1 - \exp(-\sum_n w_n b_n^2), \qquad w_n > 0

    With b_n a radial basis times a cutoff function f, u lies in [0, 1), is zero where f is, and goes to zero as f^2
    does, so that it has the continuous derivatives of f and more of them vanish at the cutoff (our construction).

    Args:
        basis: number of radial features.
    """

    def __init__(self, basis: int) -> None:
        super().__init__()
        # With MACE's Bessel functions of a 5 Å cutoff u is then 0.99 at 1.5 Å and 0.4 at 3 Å.
        self.log_weight = torch.nn.Parameter(torch.full((basis,), math.log(10.0)))

    def forward(self, radial: Tensor) -> Tensor:
        """Shape (edges,), of radial features of shape (edges, basis)."""
        return -torch.expm1(-(radial * radial * torch.exp(self.log_weight)).sum(-1))


class RobustAttention(torch.nn.Module):
    """The weights of neighbours from queries and keys; formula and reasons are in the docstring of the module.

    The temperature is ``T_MIN (T_MAX / T_MIN)^sigmoid(theta)``, one theta a head: bounded, and nowhere without a
    gradient as a clamped number would be.

    Args:
        heads: number of independent sets of weights.
        temperature: to begin with, between `T_MIN` and `T_MAX`.

    Raises:
        ValueError: for a temperature out of range.
    """

    def __init__(self, heads: int, temperature: float = 1.0) -> None:
        super().__init__()
        self.heads = heads
        self.normalize = True
        # Attributes, because TorchScript knows no constants of a module.
        self.lowest, self.log_range = T_MIN, math.log(T_MAX / T_MIN)
        self.theta = torch.nn.Parameter(torch.zeros(heads))
        self.set_temperature(temperature)
        # Replaced by a `GridQuantizer` where logits are rounded.
        self.input_quantizer = torch.nn.Identity()

    @torch.jit.unused
    def set_temperature(self, temperature: float) -> None:
        """Give all heads a temperature.

        Raises:
            ValueError: if it is out of range.
        """
        if not T_MIN < temperature < T_MAX:
            raise ValueError(f"a temperature lies between {T_MIN:g} and {T_MAX:g}, got {temperature:g}.")
        share = math.log(temperature / T_MIN) / math.log(T_MAX / T_MIN)
        with torch.no_grad():
            self.theta.fill_(math.log(share / (1.0 - share)))

    @torch.jit.unused
    def configure(self, config: AttentionConfig) -> None:
        """Take over normalisation and temperature from a configuration."""
        self.normalize = config.normalize
        if isinstance(config.temperature, str):
            self.theta.requires_grad_(True)
        else:
            self.set_temperature(config.temperature)
            self.theta.requires_grad_(False)

    def temperature(self) -> Tensor:
        """Of each head, shape (heads,)."""
        return self.lowest * torch.exp(self.log_range * torch.sigmoid(self.theta))

    def logits(self, query: Tensor, key: Tensor, receiver: Tensor) -> Tensor:
        """Bounded logits, rounded where the model rounds them, shape (edges, heads).

        Args:
            query: of the atoms, shape (atoms, heads, dim).
            key: of the edges, shape (edges, heads, dim).
            receiver: atom that each edge points to, shape (edges,).
        """
        temperature = self.temperature()
        if self.normalize:
            cosine = (unit(query).index_select(0, receiver) * unit(key)).sum(-1)
        else:
            product = (query.index_select(0, receiver) * key).sum(-1) / float(query.shape[-1]) ** 0.5
            cosine = torch.tanh(product / temperature)
        return temperature * self.input_quantizer(cosine)

    def forward(self, query: Tensor, key: Tensor, envelope: Tensor, receiver: Tensor) -> Tensor:
        """Weights, shape (edges, heads), of the arguments of `logits` and an envelope of shape (edges,)."""
        return neighbour_weights(self.logits(query, key, receiver), envelope, receiver, query.shape[0])
