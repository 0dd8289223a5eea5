"""Weights of layers that are divided over the ranks that hold them, and gathered layer by layer.

Each rank keeps some rows of a weight. Before a layer is used, its weights are gathered, and freed
when the next layer is used. The gather of the next layer overlaps the computation:

    forward    layer 0      layer 1      layer 2           backward   layer 2      layer 1
    gather     1            2            3                 gather     1            0
    free                    0            1                 free                    2

The backward pass finds the weights where autograd saved them: a gather fills the same storage
again. All ranks use the same layers in the same order, and therefore gather in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from megalard.model.decoder import Decoder
from megalard.model.names import ParameterName
from megalard.model.parameter_slice import ParameterSlice
from megalard.parallel.collectives import (
    PendingCollective,
    all_gather_tokens,
    start_all_gather_tokens_into,
)
from megalard.parallel.mesh import SINGLE, Axis, Mesh


class DividedParameter(nn.Parameter):
    """A parameter [n, ...] of which this rank keeps some rows.

    The parameter has its shape at all times, and values between ``finish`` and ``free``. Writing
    them does not change the version that autograd compares. Rows are divided as torch.chunk does;
    the rows of the last ranks are padded with zeros.

    Attributes:
        axis: the ranks that hold the same parameter.
        rows: [ceil(n / ranks), ...], this rank's rows, in the dtype of the parameter. The rows of a
            trained parameter are fp32 until ``megalard.training.masters`` takes them, and are
            rounded to that dtype when they are gathered.
    """

    axis: Axis
    rows: torch.Tensor
    _whole: torch.Tensor  # [ranks * rows, ...], with padding
    _bytes: int
    _pending: PendingCollective | None

    def keep_rows(self, value: torch.Tensor, axis: Axis, dtype: torch.dtype) -> None:
        """Keep this rank's rows of the value [n, ...], in ``dtype``; nothing is gathered yet."""
        self.axis, self._pending = axis, None
        count = -(-value.shape[0] // axis.size)
        local = value[axis.rank * count : (axis.rank + 1) * count]
        self.rows = torch.zeros(count, *value.shape[1:], dtype=dtype, device=self.device)
        self.rows[: local.shape[0]] = local.to(self.device)
        self._whole = self.new_empty(count * axis.size, *value.shape[1:], requires_grad=False)
        self._bytes = self._whole.untyped_storage().nbytes()
        # Assigned to ``data``, the tensors share their storage and not their version.
        self.data = self._whole[: value.shape[0]]
        self.free()

    @property
    def is_gathered(self) -> bool:
        """Whether the storage exists: the values are there, or on their way."""
        return self._whole.untyped_storage().nbytes() > 0

    def start(self) -> None:
        """Start to gather the values, unless they are there; a collective call."""
        if not self.is_gathered:
            self._whole.untyped_storage().resize_(self._bytes)
            rows = self.rows.to(self._whole.dtype)
            self._pending = start_all_gather_tokens_into(self._whole, rows, self.axis)

    def finish(self) -> None:
        """Let the stream of the computation wait for the values."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None

    def free(self) -> None:
        """Free the memory of the values, after the computation that has been launched."""
        self.finish()
        self._whole.untyped_storage().resize_(0)

    def write(self, rows: torch.Tensor) -> None:
        """Replace this rank's rows, padding included, by a tensor of as many elements."""
        self.free()
        # What comes from host memory is rounded on the device, as it is everywhere.
        self.rows.view(-1).copy_(rows.to(self.device, non_blocking=True))

    def local_part(self, value: torch.Tensor) -> torch.Tensor:
        """Return this rank's rows of a value [n, ...], with padding, as a flat tensor."""
        flat = torch.zeros_like(self.rows, device=value.device, dtype=value.dtype)
        count = self.rows.shape[0]
        local = value[self.axis.rank * count : (self.axis.rank + 1) * count]
        flat[: local.shape[0]] = local
        return flat.view(-1)

    def value(self) -> torch.Tensor:
        """Return all rows as a new tensor, in the dtype of ``rows``; a collective call."""
        return all_gather_tokens(self.rows, self.axis)[: self.shape[0]]

    def release(self) -> None:
        """Free the rows too; the parameter cannot be used any more."""
        self.free()
        self.rows = self.rows.new_empty(0)


class WeightDivision:
    """Which weights are divided, and over which ranks; made by a collective call.

    Args:
        mesh: the axes of the run.
        kv_replicas: the number of tp ranks that hold the same K/V heads.
    """

    def __init__(self, mesh: Mesh, kv_replicas: int):
        counts = sorted({1, kv_replicas})
        self._holders = {replicas: mesh.holders(replicas) for replicas in counts}

    def parameter(
        self,
        name: str,
        held: ParameterSlice,
        value: torch.Tensor,
        device: torch.device,
        dtype: torch.dtype,
        is_trained: bool = False,
    ) -> nn.Parameter:
        """Return a parameter with a value: divided if it is a projection's weight in a layer.

        Args:
            name: the name of the parameter.
            held: this rank's slice of it.
            value: the slice.
            device, dtype: those of the parameter.
            is_trained: whether fp32 values are kept, in the rows if the parameter is divided.
        """
        kept = torch.float32 if is_trained else dtype
        axis = self._holders[held.replicas] if is_divided_weight(name) else SINGLE
        if axis.size == 1:
            return nn.Parameter(value.to(device, kept, copy=True), requires_grad=is_trained)
        parameter = DividedParameter(torch.empty(0, dtype=dtype, device=device), is_trained)
        parameter.keep_rows(value, axis, kept)
        return parameter


def is_divided_weight(name: str) -> bool:
    """Whether ``parallel.shard_weights`` divides a parameter."""
    parameter = ParameterName.parse(name)
    is_projection = parameter.layer is not None and parameter.module.endswith("_proj")
    return is_projection and parameter.kind == "weight"


def kept_bytes(parameters: Iterable[torch.Tensor]) -> int:
    """Return the bytes that a rank keeps of parameters: of divided ones its rows."""
    kept = (p.rows if isinstance(p, DividedParameter) else p for p in parameters)
    return sum(tensor.numel() * tensor.element_size() for tensor in kept)


class LayerGathers:
    """Gathers the divided weights of a decoder, layer by layer.

    It is a ``megalard.model.weight_source.WeightSource``. Two decoders that share weights may run
    in lockstep: the one that runs a layer first gathers them, and frees them after the other.
    """

    def __init__(self, decoder: Decoder):
        # A head that is the embedding too is used after the last layer, when no layer follows.
        is_tied = decoder.spec.tied_embeddings
        self._embedding: nn.Module | None = None if is_tied else decoder.model.embed_tokens
        self._layers = [
            [p for p in layer.parameters() if isinstance(p, DividedParameter)]
            for layer in decoder.model.layers
        ]
        self._numbers: dict[nn.Module, int] = {
            layer: number for number, layer in enumerate(decoder.model.layers)
        }
        self._held: set[int] = set()

    def before_use(self, module: nn.Module) -> None:
        """Gather the weights of a layer, and start to gather those of the next one."""
        number = self._numbers.get(module)
        if number is not None:
            self._move(number, number + 1)
        elif module is self._embedding:
            self._start(0)

    def after_layer(self, layer: nn.Module, outputs: Iterable[torch.Tensor]) -> None:
        """Gather the weights again when the backward pass reaches what the layer returned."""
        number = self._numbers[layer]

        def on_gradient(gradient: torch.Tensor) -> None:
            self._move(number, number - 1)

        for output in outputs:
            if output.requires_grad:
                output.register_hook(on_gradient)

    def _move(self, number: int, ahead: int) -> None:
        """Complete a layer's weights, start to gather those ahead, and free all others."""
        for other in self._held - {number, ahead}:
            for parameter in self._layers[other]:
                parameter.free()
        self._held &= {number, ahead}
        self._start(number)
        for parameter in self._layers[number]:
            parameter.finish()
        if 0 <= ahead < len(self._layers):
            self._start(ahead)

    def _start(self, number: int) -> None:
        for parameter in self._layers[number]:
            parameter.start()
        self._held.add(number)
