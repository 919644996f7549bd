"""NequIP's convolution and Allegro's tensor product through the fused kernels, for compiled files.

`fuse` changes the class of every interaction block that the kernels serve. Its tensor product, radial weights,
spherical harmonics and sum over neighbours become one operation (`gaq.kernels.convolution`), which a compiled file
carries as a static library or, for a GPU, as compiled Triton. The radial network of a block is evaluated at a few
hundred lengths instead of at every edge, and interpolated (`gaq.kernels.radial`): the file keeps the network's integer
codes and no table. On the CPU, Allegro's tensor product (`gaq.kernels.product`) and the rounding of
vectors (`gaq.kernels.rounding`) become one operation each. Scalar networks and the rounding of scalars do not change.

Only for `nequip-deploy`: a NequIP package has to run where GAQ is not installed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from nequip.data import AtomicDataDict
from nequip.nn.interaction_block import InteractionBlock
from torch import Tensor

from gaq.caches import Cache
from gaq.kernels import chunks, convolution, gpu, product, radial, rounding
from gaq.model.state import is_kind
from gaq.quantizers.attention import heads_of_weights
from gaq.quantizers.features import FeatureQuantizer
from gaq.untyped import AnyModule, Irreps
from gaq_nequip.attention import AttentionInteractionBlock
from gaq_nequip.engine.edges import Embedding, Unsupported, before_last, edge_part, fit_harmonics
from gaq_nequip.sites import class_name

__all__ = [
    "BLOCKS",
    "FusedAttentionBlock",
    "FusedInteractionBlock",
    "FusedProduct",
    "Unsupported",
    "chunked_of",
    "fuse",
    "head_of_scale",
    "refusals",
]


class FusedInteractionBlock(InteractionBlock):
    """`InteractionBlock` whose convolution is one operation on edge vectors and node features."""

    chunked: chunks.ChunkedConvolution
    embedding: Embedding
    columns: Tensor
    nodes: Tensor
    to_coefficients: Tensor
    plan_ints: Tensor
    plan_reals: Tensor
    table_error: float

    def table(self, dtype: torch.dtype) -> Tensor:
        """Tables of the radial weights, (paths, intervals, COEFFICIENTS, channels).

        Hidden layers are evaluated in float64, because slopes are differences of their values. The last layer, which
        is most of the work, multiplies coefficients in the dtype of the model.
        """
        # Evaluated, because the inputs would be the largest constant of a small model's file.
        hidden, last = before_last(self.edge_mlp.mlp, self.embedding(self.nodes), dtype)
        coefficients = radial.polynomials(hidden, self.to_coefficients).flatten(0, 1)
        weights = self.chunked.weights(last(coefficients.to(dtype)), self.columns)
        return weights.unflatten(0, (-1, radial.COEFFICIENTS)).permute(2, 0, 1, 3).contiguous()

    def scales(self, data: AtomicDataDict.Type) -> Tensor | None:
        """Factors of the edges, (edges, scales, channels); None without."""
        return None

    def forward(self, data: AtomicDataDict.Type) -> AtomicDataDict.Type:
        if AtomicDataDict.LMP_MLIAP_DATA_KEY in data:
            raise ValueError("the fused convolution is for compiled files, not for ML-IAP")
        x = data[AtomicDataDict.NODE_FEATURES_KEY]
        sc = None if self.sc is None else self.sc(x, data[AtomicDataDict.NODE_ATTRS_KEY])
        scales = self.scales(data)
        data[AtomicDataDict.NODE_FEATURES_KEY] = self.linear_1(x)
        data = self.avg_num_neighbors_norm(data)
        x = data[AtomicDataDict.NODE_FEATURES_KEY]
        edges = data[AtomicDataDict.EDGE_INDEX_KEY]
        problem, table = self.chunked.problem, self.table(x.dtype)
        features = self.chunked.rows(x).contiguous()
        vectors = data[AtomicDataDict.EDGE_VECTORS_KEY].to(x.dtype).contiguous()
        if gpu.chosen(x.device):
            graph = convolution.Graph(edges[1], edges[0])
            message = convolution.convolution(problem, graph, features, vectors, table, scales=scales)
        else:
            # The plan lies in buffers, which a compiled file keeps.
            message = torch.ops.gaq.edge_convolution(
                features,
                vectors,
                table,
                x.new_empty(0) if scales is None else scales,
                self.plan_ints,
                self.plan_reals,
                edges[1].contiguous(),
                edges[0].contiguous(),
                edges.new_empty(0),
                problem.rows_out,
                x.shape[0],
            )
        x = self.linear_2(self.chunked.mul_ir(message, x.shape[0]))
        data[AtomicDataDict.NODE_FEATURES_KEY] = x if sc is None else x + sc
        return data


class FusedAttentionBlock(FusedInteractionBlock, AttentionInteractionBlock):
    """The same for `AttentionInteractionBlock`: weights of neighbours are factors of the edges."""

    head_of_scale: Tensor

    def scales(self, data: AtomicDataDict.Type) -> Tensor:
        weights = self.edge_weights(data).index_select(1, self.head_of_scale)
        return weights.view(-1, self.chunked.problem.scales, self.chunked.problem.channels)


def head_of_scale(chunked: chunks.ChunkedConvolution, heads: int) -> Tensor:
    """Head of each of an edge's factors, (scales * channels,)."""
    return torch.cat([heads_of_weights([m], heads)[channels] for m, channels in chunked.scale_channels()])


BLOCKS = {"InteractionBlock": FusedInteractionBlock, "AttentionInteractionBlock": FusedAttentionBlock}
"""Fused class of each class of blocks that the kernels serve."""


def chunked_of(
    block: AnyModule, sh: list[Tensor], r_max: float, device: torch.device, dtype: torch.dtype
) -> chunks.ChunkedConvolution:
    """Convolution of a block.

    Raises:
        Unsupported: for a block that the kernels do not serve.
    """
    from e3nn import o3

    tp = block.tp_scatter.tp
    multiplicities = [mul for mul, _ in tp.irreps_in1]
    if [ir.l for _, ir in tp.irreps_in2] != list(range(len(sh))):
        raise Unsupported(f"edge attributes {tp.irreps_in2} that are not one harmonic of each degree")
    groups: list[Irreps] = []
    group_of: list[int] = []
    for _, ir in tp.irreps_out:
        if not groups or groups[-1] != ir:
            groups.append(ir)
        group_of.append(len(groups) - 1)
    if [ir for _, ir in block.linear_2.irreps_in] != groups:
        raise Unsupported("the second linear layer reads its inputs in an order of its own")
    order = sorted(range(len(tp.instructions)), key=lambda i: tp.instructions[i].i_out)
    starts = [0]
    for ins in tp.instructions:
        starts.append(starts[-1] + multiplicities[ins.i_in1])
    paths = []
    for number in order:
        ins = tp.instructions[number]
        if ins.connection_mode != "uvu" or not ins.has_weight:
            raise Unsupported("the tensor product is not channel-wise")
        degrees = [
            tp.irreps_in1[ins.i_in1].ir.l,
            tp.irreps_in2[ins.i_in2].ir.l,
            tp.irreps_out[ins.i_out].ir.l,
        ]
        coefficients = o3.wigner_3j(*degrees, dtype=torch.float64) * ins.path_weight
        paths.append(convolution.Path(ins.i_in1, degrees[1], group_of[ins.i_out], coefficients))
    return chunks.ChunkedConvolution.make(
        multiplicities,
        [ir.l for _, ir in tp.irreps_in1],
        [ir.l for ir in groups],
        paths,
        [starts[number] for number in order],
        sh,
        r_max,
        chunks.GPU_WIDTHS if device.type == "cuda" else chunks.cpu_widths(multiplicities, dtype),
        scaled=class_name(block) == "AttentionInteractionBlock",
    )


class FusedProduct:
    """Base that makes the product of Allegro's `Contracter` one operation; see `_fuse_products`."""

    mul: int
    num_paths: int
    path_channel_coupling: bool
    weights: Tensor
    rows_out: int
    plan_ints: Tensor
    plan_reals: Tensor

    def _contract_conv(self, x1: Tensor, x2: Tensor, idxs: Tensor) -> Tensor:
        weights = self.weights.reshape(self.mul if self.path_channel_coupling else 1, self.num_paths)
        return torch.ops.gaq.edge_product(  # type: ignore[no-any-return]  # untyped in torch
            x1.contiguous(),
            x2.contiguous(),
            weights.expand(self.mul, -1).contiguous(),
            self.plan_ints,
            self.plan_reals,
            idxs.contiguous(),
            self.rows_out,
        )


class FusedRounding:
    """Base that makes a `FeatureQuantizer` one operation; see `_fuse_rounding`."""

    plan_ints: Tensor
    plan_reals: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return rounding.rounded(x.contiguous(), self.plan_ints, self.plan_reals)


_FUSED: Cache[type, type] = Cache(most=32)


def _fused_class(base: type, kind: type) -> type:
    """Class of a fused module: `base` before the class that the module has."""
    return _FUSED.get(kind, lambda: type(f"Fused{kind.__name__}", (base, kind), {}))


def _coefficients(contracter: AnyModule) -> Tensor:
    """Coefficients of a contracter, (paths, i, j, k), float64."""
    w3j: Tensor = contracter.w3j.double().cpu()
    if contracter.num_paths == 1:
        w3j = w3j.unsqueeze(0)
    if not contracter.w3j_is_ij_diagonal:
        return w3j
    # Allegro stores the diagonal i = j only, without the axis j.
    return torch.diag_embed(w3j.transpose(1, 2)).permute(0, 2, 3, 1)


def _fuse_products(model: torch.nn.Module) -> None:
    """Give Allegro's tensor products the fused operation, in place."""
    contracters: list[AnyModule] = [m for m in model.modules() if class_name(m) == "Contracter"]
    for contracter in contracters:
        problem = product.ProductProblem.make(contracter.mul, _coefficients(contracter))
        contracter.rows_out = problem.rows_out
        for name, tensor in zip(("plan_ints", "plan_reals"), problem.plan, strict=True):
            contracter.register_buffer(name, tensor, persistent=False)
        contracter.__class__ = _fused_class(FusedProduct, type(contracter))


def _fuse_rounding(model: torch.nn.Module) -> None:
    """Make the rounding of vectors one operation where the kernel serves it, in place."""
    for module in [m for m in model.modules() if is_kind(m, FeatureQuantizer)]:
        quantizer: AnyModule = module
        vectors = any(m > 0 and d > 1 for m, d in zip(quantizer.multiplicities, quantizer.dimensions, strict=True))
        if not (vectors and quantizer.round_vectors and quantizer.vectors_enabled):
            continue  # a compiler fuses the rounding of scalars with the operations around it
        plan = rounding.plan(quantizer, rounding.own_layout(quantizer))
        if plan is None:
            continue
        for name, tensor in (("plan_ints", plan.ints), ("plan_reals", plan.reals)):
            quantizer.register_buffer(name, tensor, persistent=False)
        quantizer.__class__ = _fused_class(FusedRounding, type(quantizer))


def fuse(model: torch.nn.Module, device: str = "cpu") -> dict[str, str]:
    """Give interaction blocks, contracters and the rounding of vectors their fused operations, in place.

    Args:
        model: frozen, on the CPU.
        device: on which the compiled file will run. Product and rounding are fused for the CPU only.

    Returns:
        The reason for each block that keeps NequIP's own operations, by the block's name.
    """
    if torch.device(device).type == "cpu":
        _fuse_products(model)
        _fuse_rounding(model)
    served, kept = _examine(model, torch.device(device))
    for name, examined in served.items():
        try:
            _fuse_convolution(examined, torch.device(device))
        except ValueError as error:
            kept[name] = str(error)
    return kept


def refusals(model: torch.nn.Module, device: str = "cpu") -> dict[str, str]:
    """Return what `fuse` would return, as far as the architecture tells, and change nothing."""
    return _examine(model, torch.device(device))[1]


def _dtype(model: torch.nn.Module) -> torch.dtype:
    dtype = model.model_dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


_Examined = tuple[AnyModule, Embedding, chunks.ChunkedConvolution]


def _examine(model: torch.nn.Module, device: torch.device) -> tuple[dict[str, _Examined], dict[str, str]]:
    """Blocks that the kernels serve, with what describes their convolutions, and why they do not serve the others."""
    blocks: list[tuple[str, AnyModule]] = [(name, m) for name, m in model.named_modules() if class_name(m) in BLOCKS]
    served: dict[str, _Examined] = {}
    kept: dict[str, str] = {}
    if not blocks:
        return served, kept
    try:
        edge = edge_part(model)
        sh = fit_harmonics(edge.harmonics)
        embedding = Embedding(edge)
    except ValueError as error:
        return served, {name: str(error) for name, _ in blocks}
    dtype = _dtype(model)
    for name, block in blocks:
        try:
            chunked = chunked_of(block, sh, edge.r_max, device, dtype)
            network = copy.deepcopy(block.edge_mlp.mlp).double()
            before_last(network, embedding(torch.ones(1, dtype=torch.float64)), torch.float64)
            served[name] = block, embedding, chunked
        except ValueError as error:
            kept[name] = str(error)
    return served, kept


def _radial_function(block: AnyModule, embedding: Embedding) -> Callable[[Tensor], Tensor]:
    """Radial weights of a block as a function of the edge length, in float64."""
    network = copy.deepcopy(block.edge_mlp).double()
    return lambda lengths: network(embedding(lengths))


def _fuse_convolution(examined: _Examined, device: torch.device) -> None:
    """Give an interaction block the fused convolution, in place; a block that is refused stays as it is.

    Args:
        examined: the block, with what describes its convolution.
        device: on which the compiled file will run.

    Raises:
        ValueError: for a block that the kernels do not serve; the message says why.
    """
    block, embedding, chunked = examined
    problem = chunked.problem
    with torch.no_grad():
        table = radial.tabulate(_radial_function(block, embedding), problem.r_max)
        intervals = table.coefficients.shape[1]
        nodes = radial.node_lengths(problem.r_max, intervals)
        hidden, last = before_last(copy.deepcopy(block.edge_mlp.mlp).double(), embedding(nodes), torch.float64)
        propagated = last(radial.polynomials(hidden).flatten(0, 1)).view_as(table.coefficients)
    if not torch.allclose(propagated, table.coefficients, rtol=0, atol=1e-9 * float(table.coefficients.abs().max())):
        raise Unsupported("the layers of the radial network are not what they should be")
    block.chunked, block.table_error, block.embedding = chunked, table.error, embedding
    if device.type == "cuda":
        # Now, because coefficients cannot be read while a graph is traced.
        from gaq.kernels.gpu.convolution import register

        register(problem, True)
    ints, reals = problem.plan(intervals)
    # In buffers, which a compiled file keeps on its device.
    block.register_buffer("nodes", nodes, persistent=False)
    block.register_buffer("to_coefficients", radial.inverse(), persistent=False)
    block.register_buffer("columns", chunked.columns, persistent=False)
    block.register_buffer("plan_ints", ints, persistent=False)
    block.register_buffer("plan_reals", reals, persistent=False)
    del block.tp_scatter
    block.__class__ = BLOCKS[class_name(block)]
    if isinstance(block, FusedAttentionBlock):
        block.register_buffer("head_of_scale", head_of_scale(chunked, block.heads), persistent=False)
