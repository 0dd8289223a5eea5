"""Open a model directory of any kind: Hugging Face, sharded, a run's checkpoint, or an adapter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from megalard.checkpoint.build import full_slices
from megalard.checkpoint.companions import GENERATION_CONFIG, Companion, find_companions
from megalard.checkpoint.huggingface import HuggingFaceWeights
from megalard.checkpoint.peft import ADAPTER_CONFIG, AdapterWeights
from megalard.checkpoint.provenance import check_files
from megalard.checkpoint.sharded.manifest import Manifest, incomplete, is_checkpoint
from megalard.checkpoint.sharded.read import ShardedWeights
from megalard.checkpoint.stored_names import under_our_names
from megalard.checkpoint.weights import MergedWeights, Weights, are_equal
from megalard.data.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from megalard.errors import UserError
from megalard.files.reading import cannot_read
from megalard.files.writing import Progress, no_progress
from megalard.model.rope import window_of
from megalard.model.spec import ModelSpec, read_spec, spec_from_config
from megalard.parallel.mesh import SINGLE, Axis


@dataclass(frozen=True)
class StoredModel:
    """A model directory that has been opened: its config, weights, tokenizer and provenance.

    Attributes:
        directory: where the model is.
        kind: ``huggingface``, ``sharded``, ``training`` or ``adapter``.
        spec: its shape; ``spec.hf_config`` is its ``config.json``.
        weights: its tensors. Those of a run's checkpoint or an adapter are merged into the base.
        companions: its tokenizer and generation files.
        manifest: the manifest of a sharded checkpoint or a run's checkpoint.
        trained: the trained tensors alone, of a run's checkpoint or an adapter.
        base: the model that the training started from, of a run's checkpoint or an adapter.
    """

    directory: Path
    kind: str
    spec: ModelSpec
    weights: Weights
    companions: tuple[Companion, ...]
    manifest: Manifest | None = None
    trained: Weights | None = None
    base: StoredModel | None = None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model or, if it has none, of its base.

        Raises:
            UserError: there is no tokenizer, or it cannot be used.
        """
        return load_tokenizer(self.tokenizer_directory)

    @property
    def window(self) -> int:
        """The number of positions that the model reads."""
        return window_of(self.spec)

    @property
    def tokenizer_directory(self) -> Path:
        """The directory of the tokenizer: of the model or, if it has none, of its base."""
        if self.base is not None and not self.has_tokenizer:
            return self.base.tokenizer_directory
        return self.directory

    @property
    def has_tokenizer(self) -> bool:
        """Whether the directory itself has a tokenizer."""
        return has_tokenizer(self.directory)

    @property
    def finds_tokenizer(self) -> bool:
        """Whether the directory or its base has a tokenizer."""
        return self.has_tokenizer or (self.base is not None and self.base.finds_tokenizer)

    @property
    def generation_config(self) -> tuple[Companion, ...]:
        """The file that says how to generate text, if the model has one."""
        return tuple(file for file in self.companions if file.name == GENERATION_CONFIG)

    def check_sums(self, share: Axis = SINGLE, progress: Progress = no_progress) -> None:
        """Compare this rank's share of all recorded checksums. Hugging Face directories have none.

        Raises:
            UserError: a file is damaged or is not the file that was recorded.
        """
        if self.manifest is not None:
            ShardedWeights(self.directory).check_sums(share, progress)
            if self.base is not None:
                check_files(self.manifest.base, self.base.directory, share, progress)
        elif self.base is not None:
            self.base.check_sums(share, progress)

    def checked_bytes(self) -> int:
        """Return how many bytes ``check_sums`` reads on all ranks together."""
        if self.manifest is None:
            return self.base.checked_bytes() if self.base is not None else 0
        notes = [self.manifest.files, (self.manifest.base or {"files": {}})["files"]]
        return sum(file["size"] for files in notes for file in files.values())


def open_model(
    directory: str | Path, base: str | Path | None = None, derived: tuple[Path, ...] = ()
) -> StoredModel:
    """Open a model directory. No weight is read yet.

    Args:
        directory: a Hugging Face model, a sharded checkpoint, a run's checkpoint or a PEFT adapter.
        base: the base model of a run's checkpoint or an adapter, if it has moved.
        derived: the models that are being opened and whose base this one is.

    Raises:
        UserError: the directory is none of these, is damaged, or its base is missing.
    """
    directory = Path(directory)
    if is_checkpoint(directory):
        return _open_checkpoint(directory, base, derived)
    if (directory / ADAPTER_CONFIG).is_file():
        return _open_adapter(directory, base, derived)
    spec = read_spec(directory)
    files = HuggingFaceWeights(directory, spec.hf_config.get("transformers_weights"))
    weights = under_our_names(files, spec)
    spec = with_separate_head(spec, weights)
    return StoredModel(directory, "huggingface", spec, weights, find_companions(directory))


def with_separate_head(spec: ModelSpec, weights: Weights) -> ModelSpec:
    """Return the spec with ``tied_embeddings`` as the files have it.

    transformers does not tie a head that is in the files and differs from the embedding, whatever
    ``tie_word_embeddings`` says.
    """
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    is_tied = spec.tied_embeddings and {embedding, head} <= set(weights.names())
    if not is_tied or are_equal(weights, embedding, head):
        return spec
    config = {**spec.hf_config, "tie_word_embeddings": False}
    return replace(spec, tied_embeddings=False, hf_config=config)


def _open_checkpoint(
    directory: Path, base: str | Path | None, derived: tuple[Path, ...]
) -> StoredModel:
    weights = ShardedWeights(directory)
    manifest = weights.manifest
    spec = spec_from_config(manifest.config, str(directory))
    companions = find_companions(directory)
    if manifest.kind == "model":
        spec = with_separate_head(spec, weights)
        return StoredModel(directory, "sharded", spec, weights, companions, manifest)
    try:
        base_path, lora = manifest.base["path"], manifest.trained["lora"]
        scale = lora["alpha"] / lora["rank"] if lora else 0.0
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise incomplete(manifest, error) from None
    base_model = _open_base(directory, base, base_path, derived)
    merged = MergedWeights(base_model.weights, weights, scale, spec.tied_embeddings)
    _check_shapes(base_model, spec, directory)
    return StoredModel(
        directory, "training", spec, merged, companions, manifest, weights, base_model
    )


def _open_adapter(
    directory: Path, base: str | Path | None, derived: tuple[Path, ...]
) -> StoredModel:
    files = AdapterWeights(directory)
    base_path = files.config.get("base_model_name_or_path")
    base_model = _open_base(directory, base, base_path, derived)
    adapter = under_our_names(files, base_model.spec)
    has_config = (directory / "config.json").is_file()
    spec = read_spec(directory) if has_config else base_model.spec
    merged = MergedWeights(base_model.weights, adapter, files.scale, spec.tied_embeddings)
    _check_shapes(base_model, spec, directory)
    companions = find_companions(directory) or base_model.companions
    return StoredModel(directory, "adapter", spec, merged, companions, None, adapter, base_model)


def _open_base(
    directory: Path, given: str | Path | None, noted: Any, derived: tuple[Path, ...]
) -> StoredModel:
    path, derived = given or noted, (*derived, directory)
    try:
        is_directory = bool(path) and isinstance(path, (str, Path)) and Path(path).is_dir()
        is_circular = is_directory and any(Path(path).samefile(model) for model in derived)
    except OSError as error:
        raise cannot_read(path, error) from None
    if not is_directory or is_circular:
        raise UserError(
            f"the base model of {directory} is not at {path}: give its directory with --base"
        )
    return open_model(path, derived=derived)


def _check_shapes(base: StoredModel, spec: ModelSpec, directory: Path) -> None:
    """Refuse a base whose tensors do not have the shapes that the trained model implies."""
    for name, full in full_slices(spec).items():
        shape = base.weights.shape(name)
        if shape != full.full_shape:
            raise UserError(
                f"tensor {name} in {base.directory} has shape {list(shape)}, but {directory} is "
                f"for {list(full.full_shape)}: give the model it was trained on with --base"
            )
