"""The stages of a run: which steps belong to each, and which weights earlier stages changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from megalard.config.schema import Config
from megalard.distill.objective import is_reached
from megalard.distill.student import changed_weights

MAIN = "main"


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        name: ``main`` for a run without stages.
        config: the configuration of the stage, as of a run with one stage.
        steps_before: the steps of all earlier stages.
        keeps_optimizer: whether it continues with the optimizer state of the previous stage.
        exports: whether the student is exported when the stage ends.
    """

    name: str
    config: Config
    steps_before: int
    keeps_optimizer: bool
    exports: bool

    @property
    def last_step(self) -> int:
        """The number of the stage's last step, counted from 1 over all stages."""
        return self.steps_before + self.config.optimizer.steps

    def steps_after(self, step: int) -> range:
        """Return the numbers of the stage's steps after ``step``."""
        return range(max(step, self.steps_before) + 1, self.last_step + 1)


def stages_of(config: Config) -> list[Stage]:
    """Return the stages of a run in their order."""
    stages, steps = [], 0
    for name, stage_config in config.all_stages().items():
        declared = config.stages.get(name)
        stages.append(
            Stage(
                name,
                stage_config,
                steps,
                keeps_optimizer=declared is not None and declared.keep_optimizer,
                exports=declared is not None and declared.export,
            )
        )
        steps += stage_config.optimizer.steps
    return stages


def data_key(stage: Stage, stream: str) -> str:
    """Return the name of a stream of a stage in the manifest of a checkpoint."""
    return stream if stage.name == MAIN else f"{stage.name}/{stream}"


def needs_teacher(stages: Iterable[Stage]) -> bool:
    """Whether any stage compares the student with the teacher."""
    return any(
        stream.objective.needs_teacher
        for stage in stages
        for stream in stage.config.all_streams().values()
    )


def stage_after(stages: Sequence[Stage], step: int) -> int:
    """Return the number of the stage whose state a run has after ``step`` steps, counted from 0.

    At a boundary this is the earlier stage.
    """
    return next(number for number, stage in enumerate(stages) if step <= stage.last_step)


def first_with_same_parameters(stages: Sequence[Stage], number: int) -> int:
    """Return the earliest stage whose parameters a stage continues to train, counted from 0.

    A stage that keeps the optimizer keeps the parameters too.
    """
    while stages[number].keeps_optimizer:
        number -= 1
    return number


def weights_changed_before(
    stages: Sequence[Stage], number: int, names: Iterable[str], num_layers: int
) -> set[str]:
    """Return the weights that are merged when a stage begins, because earlier stages changed them.

    Args:
        number: the number of the stage, counted from 0.
        names: the names of all weights.
        num_layers: the number of the model's layers.
    """
    names = list(names)
    changed: set[str] = set()
    for stage in stages[: first_with_same_parameters(stages, number)]:
        reached = partial(is_reached, streams=stage.config.all_streams(), num_layers=num_layers)
        changed |= changed_weights(names, stage.config.trainable, reached)
    return changed
