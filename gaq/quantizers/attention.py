r"""Robust attention and bounded gates: invariants with a range known in advance.

**Logits.** A query q and a key k are normalised and multiplied by a bounded temperature,

.. math:: l = t \, \hat q \cdot \hat k, \qquad \hat x = x / \sqrt{|x|^2 + \epsilon}

(cosine attention; the normalisation and the temperature are those of arXiv 2603.05343, the bounds are ours). By the
Cauchy-Schwarz inequality \|l\| < t, so one grid over [-t, t] holds every possible logit: nothing needs calibration and
nothing saturates.

**Weights of neighbours** (our derivation). A plain softmax over the neighbours k of atom i, even one with the cutoff
function u inside, ``u_ij exp(l_ij) / sum_k u_ik exp(l_ik)``, is not continuous: the weight of an *only* neighbour is 1
for any u > 0 and drops to zero at the cutoff. A constant in the denominator removes the jump,

.. math:: \alpha_{ij} = \frac{u_{ij} \exp l_{ij}}{1 + \sum_k u_{ik} \exp l_{ik}}

The constant acts as an extra neighbour that is always present, has logit 0 and sends nothing. Now alpha_ij is a smooth
function of all u and l (the denominator is at least 1), so it has as many continuous derivatives as u and goes to zero
with u; its derivatives vanish at the cutoff as far as those of u do. The same holds for the weights of the other
neighbours, which depend on the leaving one through u_ik exp(l_ik) only. The step of a rounded logit is multiplied by u
and vanishes at the cutoff too. The weights of an atom do not depend on the order of its neighbours or on atoms beyond
the cutoff: energies stay permutation invariant and extensive. No maximum has to be subtracted, because
exp(l) <= exp(T_MAX) = 2981.

**Gates.** `BoundedGate` keeps the input of a non-linearity within twice a calibrated range, by a function that is
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
9e6, and a step of 16 bits changes a weight by at most 1.2e-4 of its value."""

EPSILON = 1e-4
"""Added to the squared norm of queries and keys, whose components are of order one: it keeps the direction of a vector
near zero smooth, and its derivatives finite. The cosine of two vectors of norm 1 becomes smaller by 1e-4."""


def unit(x: Tensor, epsilon: float = EPSILON) -> Tensor:
    """Compute ``x / sqrt(|x|^2 + epsilon)`` along the last axis: shorter than 1, smooth everywhere, zero at zero."""
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + epsilon)


def neighbour_weights(logits: Tensor, envelope: Tensor, receiver: Tensor, atoms: int, enveloped: bool = True) -> Tensor:
    """Compute weights of neighbours, ``u exp(l) / (1 + sum of u exp(l) over the receiver's edges)``; see the module.

    Args:
        logits: shape (edges, heads), at most about 80 in float32.
        envelope: cutoff function of the edges, shape (edges,), between 0 and 1, zero at the cutoff.
        receiver: atom that each edge points to, shape (edges,).
        atoms: number of atoms.
        enveloped: whether the weights are multiplied by the envelope; False where something else is.

    Returns:
        Shape (edges, heads); the weights of an atom sum to less than 1, and to zero without neighbours.
    """
    exponential = torch.exp(logits)
    share = envelope.unsqueeze(-1) * exponential
    total = torch.zeros([atoms, share.shape[1]], dtype=share.dtype, device=share.device)
    total = total.index_add(0, receiver, share)
    return (share if enveloped else exponential) / (1.0 + total).index_select(0, receiver)


def heads_of_weights(multiplicities: Iterable[int], heads: int) -> Tensor:
    """Return the head of each weight of a channel-wise (``uvu``) tensor product, shape (weights,).

    Args:
        multiplicities: channels of each path, in the order of the instructions. The heads get contiguous ranges of
            channels whose sizes differ by at most one.
        heads: number of heads.
    """
    return torch.cat([torch.div(torch.arange(m) * heads, m, rounding_mode="floor") for m in multiplicities])


def soft_bound(x: Tensor, limit: Tensor) -> Tensor:
    """Bound numbers: the exact identity within ``[-limit, limit]``, beyond it a curve that stays below twice the limit.

    ``sign(x) limit (1 + tanh(|x| / limit - 1))``: value and first two derivatives continue those of the identity, and
    the slope is never zero, so that values beyond the range keep a force and can be trained back.

    Args:
        x: any shape.
        limit: positive, broadcastable to `x`.
    """
    size = x.abs()
    beyond = limit * (1.0 + torch.tanh((size - limit).clamp_min(0.0) / limit))
    return torch.where(size <= limit, x, torch.where(x < 0, -beyond, beyond))


class GridQuantizer(FeatureQuantizer):
    """Rounds invariants with a range known by construction; it observes nothing.

    Args:
        channels: size of the last axis.
        bits: code width.
        limit: largest size of an invariant.
        signed: True for the range [-limit, limit], False for [0, limit].
        what: name of the invariants, for display.
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
        """False: the range is known."""
        return False

    @torch.jit.unused
    def update_limits(self) -> None:
        """Keep the range: it does not follow observed sizes."""

    def forward(self, x: Tensor) -> Tensor:
        """Round invariants of shape (..., channels); the result has the same shape."""
        if not self.scalars_enabled:
            return x
        return round_linear(x, self.limit.to(x.dtype), self.scalar_top, self.signed)


class BoundedGate(FeatureQuantizer):
    """Bounds the scalars that enter a gate or weigh a neighbour, and rounds them on the bounded range.

    The bound is `soft_bound` with one limit for all channels: ``headroom`` times the largest size observed in
    calibration, or a given number. (Limits per channel would distort channels that were small in calibration.) Within
    the limit it is the identity, bit for bit where nothing is rounded, so a trained model stays the same function on
    inputs like those of its calibration set. Codes cover (-2 limit, 2 limit), which no value leaves. Before calibration
    it does nothing.

    Args:
        layout: layout of the features; l > 0 and pieces of negative multiplicity pass through.
        bits: code width; None bounds and does not round.
        headroom: as for `FeatureQuantizer`.
        limit: fixed limit, for training from scratch; None for a calibrated one.

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
        """Set the limit from the observed sizes, unless it is fixed by construction."""
        if self.by_construction:
            return
        super().update_limits()
        self.calibrated = bool((self.observed > 0).any())

    def forward(self, x: Tensor) -> Tensor:
        """Bound features of shape (batch, irreps.dim); the result has the shape and dtype of `x`."""
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
    r"""A cutoff function derived from radial features that include one, for frameworks that pass nothing else.

    .. math:: u = 1 - \exp(-\sum_n w_n b_n^2), \qquad w_n > 0

    With b_n a radial basis times a cutoff function f, u lies in [0, 1), is zero where f is, and goes to zero as f^2
    does: it has the continuous derivatives of f, and more of them vanish at the cutoff (our construction).

    Args:
        basis: number of radial features.
    """

    def __init__(self, basis: int) -> None:
        super().__init__()
        # With MACE's Bessel functions of a 5 Å cutoff u is then 0.99 at 1.5 Å and 0.4 at 3 Å.
        self.log_weight = torch.nn.Parameter(torch.full((basis,), math.log(10.0)))

    def forward(self, radial: Tensor) -> Tensor:
        """Compute the cutoff function, shape (edges,), from radial features of shape (edges, basis)."""
        return -torch.expm1(-(radial * radial * torch.exp(self.log_weight)).sum(-1))


class RobustAttention(torch.nn.Module):
    """Computes weights of neighbours from queries and keys; the docstring of the module gives the formula.

    The temperature is ``T_MIN (T_MAX / T_MIN)^sigmoid(theta)``, one theta per head: it is bounded and, unlike a clamped
    number, has a gradient everywhere.

    Args:
        heads: number of independent sets of weights.
        temperature: initial temperature, between `T_MIN` and `T_MAX`.

    Raises:
        ValueError: for a temperature out of range.
    """

    def __init__(self, heads: int, temperature: float = 1.0) -> None:
        super().__init__()
        self.heads = heads
        self.normalize = True
        # Attributes, because TorchScript cannot read the globals of a module.
        self.lowest, self.log_range = T_MIN, math.log(T_MAX / T_MIN)
        self.theta = torch.nn.Parameter(torch.zeros(heads))
        self.set_temperature(temperature)
        # Insertion replaces it by a `GridQuantizer` where logits are rounded.
        self.input_quantizer = torch.nn.Identity()

    @torch.jit.unused
    def set_temperature(self, temperature: float) -> None:
        """Set the temperature of all heads.

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
        """Apply normalisation and temperature of a configuration."""
        self.normalize = config.normalize
        if isinstance(config.temperature, str):
            self.theta.requires_grad_(True)
        else:
            self.set_temperature(config.temperature)
            self.theta.requires_grad_(False)

    def temperature(self) -> Tensor:
        """Temperature of each head, shape (heads,)."""
        return self.lowest * torch.exp(self.log_range * torch.sigmoid(self.theta))

    def logits(self, query: Tensor, key: Tensor, receiver: Tensor) -> Tensor:
        """Compute bounded logits, rounded where the model rounds them, shape (edges, heads).

        Args:
            query: queries of the atoms, shape (atoms, heads, dim).
            key: keys of the edges, shape (edges, heads, dim).
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
        """Compute weights, shape (edges, heads), from the arguments of `logits` and an envelope of shape (edges,)."""
        return neighbour_weights(self.logits(query, key, receiver), envelope, receiver, query.shape[0])
