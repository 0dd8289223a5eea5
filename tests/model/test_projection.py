"""The parameters of a projection."""

from __future__ import annotations

from megalard.model.projection import Projection


def test_a_projection_has_weight_and_bias_and_no_lora_pair():
    projection = Projection(3, 5, bias=True)
    shapes = {name: tuple(p.shape) for name, p in projection.named_parameters()}
    assert shapes == {"weight": (5, 3), "bias": (5,)}
    assert not any(p.requires_grad for p in projection.parameters())
    assert [*dict(Projection(3, 5, bias=False).named_parameters())] == ["weight"]
    assert projection.lora_A is projection.lora_B is projection.lora_dropout is None
