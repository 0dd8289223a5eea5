"""The run's configuration: frozen dataclasses, a YAML file, ``--section.key value`` overrides.

Everything that can be checked without the model or the data is checked at the start, in
``megalard.config_checks``. Checks that need the model's config live in ``megalard.model.spec``;
those that need the data in ``megalard.data``.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import textwrap
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from megalard.config_checks import RELATIONS, validate
from megalard.errors import UserError


@dataclass(frozen=True)
class ModelConfig:
    """Which model is restored."""

    teacher: str = ""
    """Hugging Face directory of the teacher (native RoPE)."""
    student: str | None = None
    """Directory the student starts from; the teacher's own weights when not given."""
    tokenizer: str | None = None
    """Directory of the tokenizer; the teacher's when not given."""
    native_context: int | None = None
    """Native window M in tokens; the teacher's max_position_embeddings when not given."""
    compute_dtype: str = "bfloat16"
    """bfloat16 or float32. Trained weights are always kept in float32."""


@dataclass(frozen=True)
class RopeConfig:
    """How the student's RoPE is scaled; what a type needs beyond its factor is derived."""

    type: str = "linear"
    """linear (position interpolation), abf (a new theta), yarn, llama3, longrope, table (inverse
    frequencies from a file), or checkpoint (the student checkpoint's own RoPE)."""
    factor: float = 8.0
    """f: the student's window is f times the native one."""
    theta: float | None = None
    """abf only: the new base; the NTK-aware theta * f^(d/(d-2)) when not given."""
    long_factors: list[float] | None = None
    """longrope only: one factor per pair of dimensions; all equal to f when not given."""
    table: str | None = None
    """table only: .json, .npy or .txt file with head_dim/2 inverse frequencies."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (the authors use rank 1024, alpha 2048, dropout 0.05 on q, k, v)."""

    targets: list[str] = field(default_factory=lambda: ["q", "k", "v"])
    """Which of the projections q, k, v, o get an adapter."""
    rank: int = 1024
    alpha: float = 2048.0
    """The adapter counts alpha / rank."""
    dropout: float = 0.05
    """Of the adapters' input."""


@dataclass(frozen=True)
class TrainableConfig:
    """Which of the student's weights are trained."""

    mode: str = "lora"
    """lora, weights (the projections in ``weights``), or all."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    weights: list[str] = field(default_factory=lambda: ["q", "k", "v"])
    """Mode weights: which of q, k, v, o are trained whole."""


@dataclass(frozen=True)
class RelationWeights:
    """Weight of each relation; zero leaves it out."""

    q: float = 1.0
    k: float = 1.0
    v: float = 1.0
    qk: float = 0.0
    """The attention map itself, which q and k alone do not pin; not in the published method."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the student learns to keep."""

    relations: RelationWeights = field(default_factory=RelationWeights)
    layers: list[int] | None = None
    """Layers whose relations are distilled, counted from 0; every layer when not given."""
    logits_kl: float = 0.0
    """Weight of KL(teacher || student) over the vocabulary; zero leaves the head out."""
    logits_positions: int | None = None
    """The last k positions of a block for the logits KL; all when not given."""


@dataclass(frozen=True)
class DataConfig:
    """The text the student is restored on."""

    paths: list[str] = field(default_factory=list)
    """.txt, .md, .py and .jsonl files, directories of them, or one prepared token directory."""
    text_key: str = "text"
    """Key of the text in .jsonl files."""
    context_length: int = 4096
    """Tokens a block; at most the native window."""
    packing: bool = True
    """Fill blocks across documents (each attends to itself only); else one document a block."""
    cache: str | None = None
    """Where the tokens are kept; ``<output>/tokens`` when not given."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, warm-up, then a cosine to ``min_ratio`` of the peak rate."""

    steps: int = 144
    """Optimizer steps of the run."""
    learning_rate: float = 2e-5
    """The peak."""
    warmup_steps: int = 4
    """Linear, above zero from the first step and at the peak with the last of them."""
    min_ratio: float = 0.9
    """The cosine's end over the peak."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 5.0
    """Largest global gradient norm; zero switches clipping off."""
    global_batch: int = 8
    """Blocks an optimizer step, over all ranks and micro-steps."""
    micro_batch: int = 1
    """Blocks a forward pass of one rank."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the job is spread; the data-parallel size is what is left of the world."""

    tp: int = 1
    """Tensor-parallel size (with sequence parallelism)."""
    cp: int = 1
    """Context-parallel size: the ranks that share the sequence of each block."""
    activation_checkpointing: bool = True
    """Keep only each student layer's input and recompute the layer in the backward pass."""
    offload: bool = False
    """Keep what the backward pass needs (with recomputation: layer inputs and the relations'
    gradients) in host memory."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Perplexity by length and agreement with the teacher, before and after training."""

    paths: list[str] = field(default_factory=list)
    """Held-out text; no evaluation when empty."""
    lengths: list[int] | None = None
    """Context lengths in tokens; M/4, M/2, M, ... f*M when not given."""
    max_tokens: int = 65536
    """Tokens read at each length."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved on the way, to resume from and to look at."""

    save_every: int = 0
    """Steps between checkpoints (and one at the end); zero saves on SIGTERM and SIGUSR1 only."""
    asynchronous: bool = True
    """Copy the state to pinned memory and write it while training goes on."""
    keep_last: int = 2
    """The newest checkpoints that are kept."""
    keep_every: int = 0
    """Checkpoints of a multiple of this step are kept as well; zero keeps none of them."""
    export_every: int = 0
    """Steps between saves of the student in Hugging Face format; zero saves at the end only."""


@dataclass(frozen=True)
class RunConfig:
    """Where the run writes and how it behaves."""

    output: str = ""
    """Output directory; empty, or that of this very run, which is then resumed."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu or cuda."""
    seed: int = 0
    """Of the order of the data, LoRA's start and dropout."""
    log_every: int = 1
    """Steps between reports."""
    non_finite: str = "stop"
    """stop the run, or skip the step, when the loss or a gradient is not finite."""


@dataclass(frozen=True)
class Config:
    """The whole configuration of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    rope: RopeConfig = field(default_factory=RopeConfig)
    trainable: TrainableConfig = field(default_factory=TrainableConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def active_relations(self) -> dict[str, float]:
        """The relations with a weight, in the order of ``RELATIONS``."""
        weights = {name: getattr(self.objective.relations, name) for name in RELATIONS}
        return {name: weight for name, weight in weights.items() if weight != 0}


def load_config(path: str | None, overrides: list[str]) -> Config:
    """Read a YAML file and apply ``--section.key value`` overrides.

    Raises:
        UserError: unreadable file, unknown key (the nearest known one is named), wrong type, or a
            value out of range.
    """
    tree: dict = {}
    if path is not None:
        try:
            tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise UserError(f"cannot read the config file {path}: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(tree, dict):
            raise UserError(f"{path} must hold sections such as 'model:' and 'data:'")
    for key, value in _pairs(overrides):
        node = tree
        *sections, last = key.split(".")
        for section in sections:
            if node.get(section) is None:
                node[section] = {}
            node = node[section]
            if not isinstance(node, dict):
                raise UserError(f"--{key}: '{section}' is a value, not a section")
        node[last] = value if _is_text(key, value) else _parse(value)
    config = _build(Config, tree, "")
    validate(config)
    return config


def to_dict(config: Config) -> dict:
    """The configuration as plain dictionaries, for YAML or JSON."""
    return dataclasses.asdict(config)


def describe_keys() -> str:
    """Every key with its meaning and default, for ``--help``."""
    return "\n".join(_describe(Config, "--"))


def _describe(cls, prefix: str) -> list[str]:
    lines, meanings = [], _meanings(cls)
    for item in dataclasses.fields(cls):
        default = (
            item.default if item.default is not dataclasses.MISSING else item.default_factory()
        )
        if dataclasses.is_dataclass(default):
            lines += _describe(type(default), f"{prefix}{item.name}.")
        else:
            lines.append(f"  {prefix}{item.name}  (default: {default})")
            lines += textwrap.wrap(meanings.get(item.name, ""), 90, **_INDENT)
    return lines


_INDENT = {"initial_indent": " " * 8, "subsequent_indent": " " * 8}


def _meanings(cls) -> dict[str, str]:
    """Field name to the string that follows it in the class."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    return {
        before.target.id: " ".join(after.value.value.split())
        for before, after in itertools.pairwise(body)
        if isinstance(before, ast.AnnAssign)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
    }


def _pairs(overrides: list[str]):
    position = 0
    while position < len(overrides):
        word = overrides[position]
        if not word.startswith("--"):
            raise UserError(f"expected --section.key value, got '{word}'")
        key, equals, value = word[2:].partition("=")
        if not equals:
            position += 1
            if position == len(overrides):
                raise UserError(f"--{key} needs a value")
            value = overrides[position]
        yield key, value
        position += 1


def _parse(value: str):
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _is_text(key: str, value: str) -> bool:
    """Whether the key holds text, which is taken as typed: a path may look like a number or date.

    ``null`` leaves out what may be left out.
    """
    hint = Config
    for name in key.split("."):
        hint = typing.get_type_hints(hint).get(name) if dataclasses.is_dataclass(hint) else None
    return hint is str or (hint == str | None and value not in ("null", "~", ""))


def _nearest(key: str, known: set[str], prefix: str) -> str:
    """The known key that ``key`` was most likely meant to be: here, else in any section."""
    everywhere = {path.rpartition(".")[2]: path for path in _paths(Config, "")}
    if key in everywhere:
        return everywhere[key]
    here = difflib.get_close_matches(key, known, n=1)
    elsewhere = [] if here else difflib.get_close_matches(key, everywhere, n=1)
    if elsewhere:
        return everywhere[elsewhere[0]]
    return prefix + (here or difflib.get_close_matches(key, known, n=1, cutoff=0.0))[0]


def _paths(cls, prefix: str) -> list[str]:
    paths = []
    for name, hint in typing.get_type_hints(cls).items():
        paths += _paths(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else []
        paths.append(prefix + name)
    return paths


def _build(cls, tree, prefix: str):
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"'{prefix.rstrip('.')}' is a section, got the value {tree!r}")
    hints = typing.get_type_hints(cls)
    known = {item.name for item in dataclasses.fields(cls)}
    values = {}
    for key, value in tree.items():
        if key not in known:
            near = _nearest(str(key), known, prefix)
            raise UserError(f"unknown key '{prefix}{key}'; the nearest known one is '{near}'")
        values[key] = _convert(hints[key], value, f"{prefix}{key}")
    return cls(**values)


def _convert(hint, value, key: str):
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, f"{key}.")
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    if typing.get_origin(hint) is list:
        items = value if isinstance(value, list) else [value]
        (item_hint,) = typing.get_args(hint)
        return [_convert(item_hint, item, key) for item in items]
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        # YAML 1.1 reads 2e-5 as text
        try:
            return float(value)
        except ValueError:
            pass
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise UserError(f"{key} must be of type {hint.__name__}, got {value!r}")
