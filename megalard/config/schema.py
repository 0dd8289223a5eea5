"""The settings of a run: frozen dataclasses whose fields state their default, range and meaning.

``config.file`` reads them from YAML and the command line, and ``config.rules`` checks what concerns
several fields. Checks that need a model's config.json are in ``megalard.model.spec`` and
``megalard.training.plan``; checks that need the text are in ``megalard.data``.
"""

from __future__ import annotations

import dataclasses
import zlib
from dataclasses import dataclass
from typing import Literal

from megalard.config.fields import section, setting
from megalard.config.objective import ObjectiveConfig

ROPE_TYPES = ("linear", "abf", "yarn", "llama3", "longrope", "table", "checkpoint")
RopeType = Literal["linear", "abf", "yarn", "llama3", "longrope", "table", "checkpoint"]
Projection = Literal["q", "k", "v", "o"]


@dataclass(frozen=True)
class ModelConfig:
    """Which model is restored."""

    teacher: str = setting("", path=True, required="give the teacher's Hugging Face directory")
    """Hugging Face directory of the teacher, which has its native RoPE."""
    student: str | None = setting(None, path=True)
    """Directory of the student's initial weights; the teacher's weights when not given."""
    tokenizer: str | None = setting(None, path=True)
    """Directory of the tokenizer; the teacher's directory when not given."""
    native_context: int | None = setting(None, at_least=1, tokens=True)
    """Native window M in tokens; the teacher's max_position_embeddings when not given."""
    compute_dtype: Literal["bfloat16", "float32"] = setting("bfloat16")
    """Dtype of activations and frozen weights. Trained weights are always kept in float32."""


@dataclass(frozen=True)
class RopeConfig:
    """How the student's RoPE is scaled. What a type needs in addition to its factor is derived."""

    type: RopeType = setting("linear")
    """linear is position interpolation, abf a new theta, table reads inverse frequencies from a
    file, and checkpoint keeps the RoPE that the student's own config.json describes."""
    factor: float = setting(8.0, above=1)
    """f: the student's window is f times the native window."""
    theta: float | None = setting(None, above=0)
    """Type abf: the new base; the NTK-aware theta * f^(d/(d-2)) when not given."""
    long_factors: list[float] | None = setting(None, above=0)
    """Type longrope: one factor per pair of dimensions; all equal to f when not given."""
    table: str | None = setting(None, path=True)
    """Type table: a .json, .npy or .txt file with head_dim/2 inverse frequencies."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters. The authors use rank 1024, alpha 2048 and dropout 0.05 on q, k and v."""

    targets: list[Projection] = setting(["q", "k", "v"], distinct=True)
    """The projections that get an adapter."""
    rank: int = setting(1024, at_least=1, at_most=2**20)
    """Rank of the adapters."""
    alpha: float = setting(2048.0, above=0)
    """The product of an adapter's two matrices is multiplied by alpha / rank."""
    dropout: float = setting(0.05, at_least=0, below=1)
    """Share of the adapters' inputs that is set to zero."""


@dataclass(frozen=True)
class TrainableConfig:
    """Which of the student's weights are trained."""

    mode: Literal["lora", "weights", "all"] = setting("lora")
    """lora trains adapters, weights the projections that ``weights`` lists, all every weight."""
    lora: LoraConfig = section(LoraConfig)
    weights: list[Projection] = setting(["q", "k", "v"], distinct=True)
    """Mode weights: the projections whose weights are trained."""


@dataclass(frozen=True)
class DataConfig:
    """The text that the student is trained on."""

    paths: list[str] = setting([], path=True, may_be_empty=True)
    """Required: .txt, .md, .py, .jsonl, .parquet and .arrow files (text also as .gz and .zst),
    directories of them, or one prepared token directory."""
    weights: list[float] | None = setting(None, above=0)
    """Share of the text that each of ``paths`` gets, in characters; only ratios count. The mixture
    ends with the path that is used up first. Without weights everything is read."""
    text_key: str = setting("text")
    """Key of the text in .jsonl files, or its column in .parquet and .arrow files."""
    format: Literal["text", "chat"] = setting("text")
    """chat: text_key names a list of messages, each with role and content, of which the model's
    chat template makes the text. The default text_key, text, then stands for messages."""
    context_length: int = setting(4096, at_least=2, tokens=True)
    """Tokens per block; at most the native window where the teacher reads the block."""
    positions: Literal["contiguous", "skip-gaussian", "skip-uniform"] = setting("contiguous")
    """The positions at which the student reads a block. The skip- types place the head and the tail
    of the block at the ends of the student's window and the middle somewhere between."""
    bos: Literal["auto", "yes", "no"] = setting("auto")
    """Whether every document begins with the BOS token; auto does what the tokenizer does."""
    eos: Literal["auto", "yes", "no"] = setting("auto")
    """Whether every document ends with the end token; auto does what the tokenizer does."""
    end_token: str | None = setting(None)
    """eos yes: the text of the end token, if it is not the tokenizer's EOS. The EOS of a chat model
    may end a turn and not a document."""
    packing: bool = setting(True)
    """true fills blocks across documents, each of which attends to itself only; false puts one
    document into a block."""
    drop_tails: bool = setting(False)
    """packing false: leave out the end of a document that does not fill a block."""
    cache: str | None = setting(None, path=True)
    """Directory of the tokenized text; ``tokens`` in the output directory when not given. Streams
    of different text that name the same directory get a subdirectory each."""


@dataclass(frozen=True)
class StreamConfig:
    """A stream is one of several kinds of text that every step draws on, with its own objective.

    A stream takes what its ``data`` leaves out from the section ``data``, and its batch sizes from
    the section ``optimizer``. Its ``objective`` has only the terms that it names.
    """

    objective: ObjectiveConfig = section(ObjectiveConfig)
    data: DataConfig = section(DataConfig)
    weight: float = setting(1.0, above=0)
    """The loss of a step is the sum over streams of this weight times the stream's mean loss."""
    global_batch: int = setting(8, at_least=1)
    """Blocks per step, over all ranks and micro-batches."""
    micro_batch: int = setting(1, at_least=1)
    """Blocks per forward pass of one rank."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a linear warm-up, then a cosine to ``min_ratio`` of the peak learning rate."""

    steps: int = setting(144, at_least=1)
    """Number of steps."""
    learning_rate: float = setting(2e-5, above=0)
    """The peak learning rate."""
    warmup_steps: int = setting(4, at_least=0)
    """Steps of the warm-up. It starts above zero and reaches the peak at its last step."""
    start_at_zero: bool = setting(False)
    """Begin the schedule one step earlier, at a learning rate of zero, as the authors do. The first
    step then changes nothing."""
    min_ratio: float = setting(0.9, at_least=0, at_most=1)
    """The learning rate at the end of the cosine, relative to the peak."""
    betas: list[float] = setting([0.9, 0.95], at_least=0, below=1, length=2)
    """Decay rates of the first and the second moment."""
    eps: float = setting(1e-8, at_least=0)
    """Added to the root of the second moment."""
    weight_decay: float = setting(0.0, at_least=0)
    """Decoupled weight decay."""
    clip: float = setting(5.0, at_least=0)
    """Largest global gradient norm; zero switches clipping off."""
    global_batch: int = setting(8, at_least=1)
    """Blocks per step, over all ranks and micro-batches."""
    micro_batch: int = setting(1, at_least=1)
    """Blocks per forward pass of one rank."""


@dataclass(frozen=True)
class StageConfig:
    """A stage is one phase of a run, and continues from the weights of the previous stage.

    A stage takes what it leaves out from the sections ``trainable``, ``data`` and ``optimizer``. If
    it names an objective, this objective has only the terms that it names; otherwise the stage has
    the objective or the streams of the run.
    """

    trainable: TrainableConfig = section(TrainableConfig)
    objective: ObjectiveConfig = section(ObjectiveConfig)
    data: DataConfig = section(DataConfig)
    streams: dict[str, StreamConfig] = dataclasses.field(default_factory=dict)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    keep_optimizer: bool = setting(False)
    """Continue with the optimizer state of the previous stage, which must train the same
    parameters. Otherwise the state starts anew, and LoRA adapters are merged into the weights
    first."""
    export: bool = setting(False)
    """Save the student as ``stage-NAME`` when the stage ends. The last stage always gives
    ``student``."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and the text are split over ranks. The data-parallel size is what remains:
    ranks / (tp * cp)."""

    tp: int = setting(1, at_least=1)
    """Tensor-parallel size, with sequence parallelism."""
    cp: int = setting(1, at_least=1)
    """Context-parallel size: the number of ranks that share the tokens of each block."""
    activation_checkpointing: bool = setting(True)
    """Keep only the input of each student layer, and compute the layer again in the backward
    pass."""
    offload: bool = setting(False)
    """Keep the tensors that the backward pass needs in host memory."""
    shard_optimizer: bool = setting(True)
    """Divide the optimizer's fp32 weights, moments and gradients over all ranks that hold the same
    weights. It has no effect where one rank holds them alone."""
    shard_weights: bool = setting(False)
    """Divide the weights of the layers, frozen and trained, over all ranks that hold the same
    weights, and gather one layer ahead of the computation. It costs exchanges, and is for models
    that do not fit otherwise."""
    offload_optimizer: bool = setting(False)
    """Keep the optimizer's fp32 weights and moments in host memory, and update them there."""
    gradient_dtype: Literal["float32", "bfloat16"] = setting("float32")
    """Dtype in which divided or offloaded gradients are exchanged and summed over ranks and
    micro-batches."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Perplexity by length and agreement with the teacher, before and after training."""

    paths: list[str] = setting([], path=True, may_be_empty=True)
    """Held-out text, in the forms that ``data.paths`` takes."""
    holdout: int = setting(32768, at_least=0, tokens=True)
    """Without ``paths``, tokens taken from the end of the training text for evaluation: at most
    this many and at most a fiftieth of the text. Zero takes none, and nothing is evaluated."""
    lengths: list[int] | None = setting(None, at_least=2, tokens=True)
    """Context lengths in tokens; M/4, M/2, M, ... f*M when not given."""
    max_tokens: int = setting(65536, at_least=2, tokens=True)
    """Tokens that are read at each length."""
    every: int = setting(0, at_least=0)
    """Steps between validations of the student during training, and one more after the last step;
    zero measures before, between and after the stages only."""
    validation_tokens: int = setting(16384, at_least=2, tokens=True)
    """Tokens that a validation reads at each length, of those that the evaluation reads. One window
    of each length is always read."""
    best: Literal["gap_restored", "loss"] = setting("gap_restored")
    """What makes a validation the best one: gap_restored takes the lowest mean loss over the
    lengths up to the native window, loss the lowest mean loss over all lengths."""
    patience: int = setting(0, at_least=0)
    """End the run, and export the best student, when this many validations in a row are not better
    than the best one before them; zero takes all steps. With stages this holds for the last one."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Which states and students are saved during the run."""

    save_every: int = setting(50, at_least=0)
    """Steps between checkpoints; one more is saved at the end. With zero only SIGTERM and SIGUSR1
    save one, and a crash loses the whole run."""
    asynchronous: bool = setting(True)
    """Copy the state to pinned memory and write it while training continues."""
    keep_last: int = setting(2, at_least=1)
    """How many of the newest checkpoints are kept."""
    keep_every: int = setting(0, at_least=0)
    """Checkpoints at multiples of this step are kept as well; zero keeps no others."""
    keep_best: bool = setting(False)
    """Save a checkpoint of the best validation and keep it, and export its student at the end
    instead of the last one. evaluation.patience does the same."""
    export_every: int = setting(0, at_least=0)
    """Steps between exports of the student as a Hugging Face directory; zero exports at the end
    only."""
    export_dtype: Literal["source", "float32", "bfloat16", "float16"] = setting("source")
    """Dtype of an exported student; source keeps the dtype of each tensor. bfloat16 and float16
    lose changes that are smaller than half a step of the dtype, and the run reports how many."""
    export_rounding: Literal["nearest", "stochastic"] = setting("nearest")
    """How trained weights are rounded to 16 bits. stochastic takes one of the two neighbors, the
    nearer one more often, so that small changes are kept in the mean."""


@dataclass(frozen=True)
class RunConfig:
    """Where the run writes and how it behaves."""

    output: str = setting("", path=True, required="give the output directory")
    """Output directory: empty, or the directory of this same run, which is then resumed."""
    device: Literal["auto", "cpu", "cuda"] = setting("auto")
    """auto uses a GPU if there is one."""
    seed: int = setting(0, at_least=0)
    """Seed of the order of the data, of LoRA's initial values and of dropout."""
    deterministic: bool = setting(False)
    """Use only kernels that give the same bits every time, which is slower on GPUs (in the backward
    pass of attention). A resumed run is then bit for bit equal to an uninterrupted one."""
    log_every: int = setting(1, at_least=1)
    """Steps between reports."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = setting(
        ["tensorboard"], may_be_empty=True, distinct=True
    )
    """What gets the reported values, besides ``metrics.jsonl``. wandb and trackio are packages to
    install; their own settings choose the project, the server and an offline mode."""
    profile: list[int] = setting([], at_least=1, may_be_empty=True, distinct=True)
    """Steps of which every rank writes a profile to ``profile/``, counted over all stages."""
    report: bool = setting(True)
    """Write ``report.html`` at the end: configuration, curves, tables and cost on one page."""
    non_finite: Literal["stop", "skip"] = setting("stop")
    """What happens when the loss or a gradient is not finite: stop the run, or skip the update."""


@dataclass(frozen=True)
class Config:
    """The whole configuration of a run."""

    model: ModelConfig = section(ModelConfig)
    rope: RopeConfig = section(RopeConfig)
    trainable: TrainableConfig = section(TrainableConfig)
    objective: ObjectiveConfig = section(ObjectiveConfig)
    data: DataConfig = section(DataConfig)
    streams: dict[str, StreamConfig] = dataclasses.field(default_factory=dict)
    """The streams by name. They replace the one stream that ``objective`` and ``data`` describe."""
    stages: dict[str, StageConfig] = dataclasses.field(default_factory=dict)
    """The stages by name, in the order in which they run. Without them the run has one stage."""
    optimizer: OptimizerConfig = section(OptimizerConfig)
    parallel: ParallelConfig = section(ParallelConfig)
    evaluation: EvaluationConfig = section(EvaluationConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
    run: RunConfig = section(RunConfig)

    def all_stages(self) -> dict[str, Config]:
        """Return the configuration of each stage as of a run with one stage, by name.

        Without ``stages`` there is one stage, called main.
        """
        if not self.stages:
            return {"main": self}
        return {
            name: dataclasses.replace(
                self,
                trainable=stage.trainable,
                objective=stage.objective,
                data=stage.data,
                streams=stage.streams,
                optimizer=stage.optimizer,
                stages={},
                # The first stage has the seed of a run with one stage.
                run=dataclasses.replace(
                    self.run, seed=self.run.seed + (zlib.crc32(name.encode()) if number else 0)
                ),
            )
            for number, (name, stage) in enumerate(self.stages.items())
        }

    @property
    def steps(self) -> int:
        """The number of steps of all stages."""
        return sum(stage.optimizer.steps for stage in self.all_stages().values())

    @property
    def tokens(self) -> int:
        """The number of training tokens of all stages."""
        stages = self.all_stages().values()
        return sum(stage.optimizer.steps * stage.tokens_per_step for stage in stages)

    def all_streams(self) -> dict[str, StreamConfig]:
        """Return the streams of a step. Without ``streams`` there is one, called main."""
        if self.streams:
            return self.streams
        batches = self.optimizer.global_batch, self.optimizer.micro_batch
        return {"main": StreamConfig(self.objective, self.data, 1.0, *batches)}

    def stream_seed(self, name: str) -> int:
        """Return the seed of a stream's order, positions and dropout.

        It does not depend on the other streams of the run.
        """
        return self.run.seed + (0 if name == "main" else zlib.crc32(name.encode()))

    @property
    def keeps_best(self) -> bool:
        """Whether the student of the best validation is exported."""
        return self.checkpoint.keep_best or self.evaluation.patience > 0

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one step, over all streams and ranks."""
        streams = self.all_streams().values()
        return sum(stream.global_batch * stream.data.context_length for stream in streams)


def to_dict(config: Config) -> dict:
    """Return the configuration as plain dictionaries, for YAML or JSON."""
    return dataclasses.asdict(config)
