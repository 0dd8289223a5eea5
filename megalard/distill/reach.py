"""How deep a loss reads into a model, and which parameters it therefore reaches."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from megalard.config.schema import Config, ObjectiveConfig
from megalard.errors import UserError


class Stage(IntEnum):
    """How much of a layer is computed: q, k and v; attention too; all of it."""

    QKV = 0
    CONTEXT = 1
    WHOLE = 2


@dataclass(frozen=True, order=True)
class Reach:
    """The last thing a loss reads: layers up to ``layer``, of it up to ``stage``, and then
    the final norm and the head where it says so."""

    layer: int
    stage: Stage
    norm: bool = False
    head: bool = False


def hidden_states(objective: ObjectiveConfig, num_layers: int) -> list[int]:
    """The hidden states compared: i < num_layers is the output of layer i - 1, num_layers the last
    state, after the final norm.

    Raises:
        UserError: two depths are the same layer's.
    """
    states = sorted(max(1, round(depth * num_layers)) for depth in objective.hidden_depths)
    if len(set(states)) < len(states):
        raise UserError(
            f"objective.hidden_depths {objective.hidden_depths} name a layer twice in a model of "
            f"{num_layers}: the outputs of layers {', '.join(map(str, states))}, counted from 1"
        )
    return states


def reach_of(objective: ObjectiveConfig, num_layers: int) -> Reach:
    """How deep an objective reads.

    Raises:
        UserError: it names a layer the model does not have.
    """
    by_layer = objective.active_relations() or objective.attention_context > 0
    last = num_layers - 1
    if by_layer and objective.layers is not None:
        last = max(objective.layers)
    if last >= num_layers:
        raise UserError(
            f"objective.layers names layer {last}, but the model has layers 0 to {num_layers - 1}"
        )
    found = []
    if objective.active_relations():
        found.append(Reach(last, Stage.QKV))
    if objective.attention_context > 0:
        found.append(Reach(last, Stage.CONTEXT))
    if objective.hidden_cosine > 0:
        state = hidden_states(objective, num_layers)[-1]
        found.append(Reach(state - 1, Stage.WHOLE, norm=state == num_layers))
    if objective.logits_kl > 0 or objective.language_modelling > 0:
        found.append(Reach(num_layers - 1, Stage.WHOLE, norm=True, head=True))
    return max(found)


_READERS = {
    "q_proj": {"q", "qk"},
    "q_norm": {"q", "qk"},
    "k_proj": {"k", "qk"},
    "k_norm": {"k", "qk"},
    "v_proj": {"v"},
}


def is_reached(name: str, config: Config, num_layers: int) -> bool:
    """Whether the loss of any stream depends on this parameter.

    What lies behind the last thing a loss reads is not even computed.
    """
    objectives = (stream.objective for stream in config.all_streams().values())
    return any(_is_reached_by(name, objective, num_layers) for objective in objectives)


def _is_reached_by(name: str, objective: ObjectiveConfig, num_layers: int) -> bool:
    reach, parts = reach_of(objective, num_layers), name.split(".")
    if parts[0] == "lm_head":
        return reach.head
    if parts[1] != "layers":
        return parts[1] == "embed_tokens" or reach.norm
    layer, module = int(parts[2]), parts[-2]
    if layer != reach.layer or reach.stage == Stage.WHOLE:
        return layer <= reach.layer
    if module == "input_layernorm":
        return True
    if reach.stage == Stage.CONTEXT:
        return module in _READERS
    return bool(_READERS.get(module, set()) & objective.active_relations().keys())
