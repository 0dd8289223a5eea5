"""The run's configuration: frozen dataclasses, read by ``megalard.config.file``.

Everything that can be checked without the model or the data is checked at the start, in
``megalard.config.rules``. Checks that need the model's config live in ``megalard.model.spec``;
those that need the data in ``megalard.data``.
"""

from __future__ import annotations

import dataclasses
import zlib
from dataclasses import dataclass, field

from megalard.config.rules import RELATIONS


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
    attention_context: float = 0.0
    """Weight of the squared error of each head's attention output (A V, before o) over the
    teacher's squared norm, in the layers above."""
    hidden_cosine: float = 0.0
    """Weight of 1 - cosine between the hidden states at ``hidden_depths``, summed over them."""
    hidden_depths: list[float] = field(default_factory=lambda: [1.0])
    """Shares of the depth in (0, 1]: 0.5 is the output of the middle layer, 1 the last hidden
    state, after the final norm."""
    logits_kl: float = 0.0
    """Weight of KL(teacher || student) over the vocabulary; zero leaves the head out."""
    logits_positions: int | None = None
    """The last k positions of a block for the logits KL; all when not given."""
    language_modelling: float = 0.0
    """Weight of the cross-entropy of the next token; alone, it needs no teacher and may read up
    to the student's window."""

    def active_relations(self) -> dict[str, float]:
        """The relations with a weight, in the order of ``RELATIONS``."""
        weights = {name: getattr(self.relations, name) for name in RELATIONS}
        return {name: weight for name, weight in weights.items() if weight != 0}

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares the student with the teacher."""
        terms = (self.attention_context, self.hidden_cosine, self.logits_kl)
        return bool(self.active_relations()) or any(weight > 0 for weight in terms)


@dataclass(frozen=True)
class DataConfig:
    """The text the student is restored on."""

    paths: list[str] = field(default_factory=list)
    """.txt, .md, .py and .jsonl files, directories of them, or one prepared token directory."""
    text_key: str = "text"
    """Key of the text in .jsonl files."""
    context_length: int = 4096
    """Tokens a block; at most the native window where a teacher reads it."""
    positions: str = "contiguous"
    """Where the student reads a block: contiguous, or skip-gaussian or skip-uniform, which put its
    head and tail at the ends of the student's window and the middle somewhere between."""
    packing: bool = True
    """Fill blocks across documents (each attends to itself only); else one document a block."""
    cache: str | None = None
    """Where the tokens are kept; ``<output>/tokens`` (of a stream ``tokens-NAME``) when not given.
    Streams of different text that share one get a folder each in it."""


@dataclass(frozen=True)
class StreamConfig:
    """One of several kinds of text that every optimizer step draws on, each with its objective.

    What a stream's ``data`` leaves out is as in the section ``data``, and its batches are those of
    the section ``optimizer`` unless it gives its own. Its ``objective`` has only the terms it
    names.
    """

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    weight: float = 1.0
    """The step's loss is the sum of weight times the stream's mean loss."""
    global_batch: int = 8
    """Blocks an optimizer step, over all ranks and micro-steps."""
    micro_batch: int = 1
    """Blocks a forward pass of one rank."""


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
    deterministic: bool = False
    """Only kernels that give the same bits each time, also where that is slower (on GPUs, the
    backward pass of attention): a resumed run is then bit for bit the uninterrupted one."""
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
    streams: dict[str, StreamConfig] = field(default_factory=dict)
    """Name to stream, instead of the one that ``objective`` and ``data`` describe."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def all_streams(self) -> dict[str, StreamConfig]:
        """The streams of a step; without ``streams`` there is one, called main."""
        if self.streams:
            return self.streams
        batches = self.optimizer.global_batch, self.optimizer.micro_batch
        return {"main": StreamConfig(self.objective, self.data, 1.0, *batches)}

    def stream_seed(self, name: str) -> int:
        """What a stream's order, positions and dropout are drawn from, whatever other streams
        there are."""
        return self.run.seed + (0 if name == "main" else zlib.crc32(name.encode()))

    @property
    def tokens_a_step(self) -> int:
        """Tokens of one optimizer step, over all streams and ranks."""
        streams = self.all_streams().values()
        return sum(stream.global_batch * stream.data.context_length for stream in streams)


def to_dict(config: Config) -> dict:
    """The configuration as plain dictionaries, for YAML or JSON."""
    return dataclasses.asdict(config)
