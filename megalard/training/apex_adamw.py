"""AdamW whose update is one call of a kernel of NVIDIA's apex."""

from __future__ import annotations

from typing import Any

import torch

from megalard.gpu import is_hopper

try:
    from amp_C import multi_tensor_adam_capturable
    from apex.multi_tensor_apply import multi_tensor_applier
except ImportError:
    multi_tensor_adam_capturable = multi_tensor_applier = None

# The number in apex's source for weight decay that is not part of the gradient.
_DECOUPLED_WEIGHT_DECAY = 1


def is_chosen(device: torch.device) -> bool:
    """Whether to use apex for parameters on a device.

    It needs apex with its CUDA extensions, and a GPU that is not of the Hopper family, where
    torch's update takes two thirds of the time (docs/packages.md).
    """
    is_installed = multi_tensor_adam_capturable is not None
    return is_installed and device.type == "cuda" and not is_hopper(device)


class ApexAdamW(torch.optim.AdamW):
    """torch's AdamW, with the update of all parameters in one call of apex's kernel.

    The settings and the state are those of torch's class, so that a run which began with one of the
    two can go on with the other. The kernel adds in another order than torch's, within the
    rounding of fp32. The class ``apex.optimizers.FusedAdam`` is not used: it keeps its count of
    steps among the settings, and it counts an update that it leaves out.

    Args:
        parameters: fp32 tensors on one GPU.
        settings: ``lr``, ``betas``, ``eps`` and ``weight_decay`` of ``torch.optim.AdamW``.

    Attributes:
        found_inf: fp32 scalar on the GPU, set before ``step``, which changes nothing if it is 1.
            The host does not wait for it.
    """

    found_inf: torch.Tensor

    def __init__(self, parameters: list[torch.nn.Parameter], **settings: Any):
        super().__init__(parameters, fused=True, **settings)

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            states = [self._state_of(parameter) for parameter in parameters]
            counts = [state["step"] for state in states]
            torch._foreach_add_(counts, [1 - self.found_inf] * len(counts))
            device = parameters[0].device
            beta1, beta2 = group["betas"]
            multi_tensor_applier(
                multi_tensor_adam_capturable,
                self.found_inf.to(torch.int32).view(1),
                [
                    [parameter.grad for parameter in parameters],
                    parameters,
                    [state["exp_avg"] for state in states],
                    [state["exp_avg_sq"] for state in states],
                ],
                torch.full((1,), group["lr"], dtype=torch.float32, device=device),
                beta1,
                beta2,
                group["eps"],
                counts[0].to(torch.int32).view(1),
                _DECOUPLED_WEIGHT_DECAY,
                True,  # corrects the bias of the moments
                group["weight_decay"],
                torch.ones(1, device=device),  # the inverse of a scale of the gradients
            )

    def _state_of(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state
