"""Opening a model however it is stored: Hugging Face, sharded, a run's checkpoint, an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megalard.checkpoint.build import empty_decoder
from megalard.checkpoint.huggingface import HuggingFaceWeights
from megalard.checkpoint.peft import ADAPTER_CONFIG, AdapterWeights
from megalard.checkpoint.provenance import check_base
from megalard.checkpoint.sharded.manifest import Manifest, incomplete, is_checkpoint
from megalard.checkpoint.sharded.save_load import ShardedWeights
from megalard.checkpoint.weights import MergedWeights, Weights
from megalard.data.tokenizer import TOKENIZER_FILES
from megalard.errors import UserError
from megalard.files.safetensors import cannot_read
from megalard.model.rope import rope_table
from megalard.model.spec import ModelSpec, read_spec, spec_from_config
from megalard.parallel.mesh import SINGLE, Axis

# what others need beside the weights to use the model as its makers meant it
COMPANIONS = ("generation_config.json", *TOKENIZER_FILES, "chat_template.json")


@dataclass(frozen=True)
class Model:
    """A model on disk.

    Attributes:
        directory: where it is.
        kind: ``huggingface``, ``sharded``, ``training`` or ``adapter``.
        spec: its shape; ``spec.hf_config`` is its ``config.json``.
        weights: its tensors, merged where they are a base's and trained ones.
        companions: tokenizer and generation files.
        manifest: of a sharded or training checkpoint.
        trained: the trained tensors alone, of a training checkpoint or an adapter.
        base: the model that training started from, of those two.
    """

    directory: Path
    kind: str
    spec: ModelSpec
    weights: Weights
    companions: tuple[Path, ...]
    manifest: Manifest | None = None
    trained: ShardedWeights | AdapterWeights | None = None
    base: Model | None = None

    def check_sums(self, share: Axis = SINGLE, progress=lambda count: None) -> None:
        """Compare this rank's share of every checksum that is recorded.

        Raises:
            UserError: when a file is damaged or another than it was.
        """
        if self.manifest is not None:
            ShardedWeights(self.directory).check_sums(share, progress)
            if self.base is not None:
                check_base(self.manifest.base, self.base.directory, share, progress)
        elif self.base is not None:
            self.base.check_sums(share, progress)

    def checked_bytes(self) -> int:
        """How much ``check_sums`` reads on all ranks together."""
        if self.manifest is None:
            return self.base.checked_bytes() if self.base is not None else 0
        parts = [self.manifest.files, (self.manifest.base or {"files": {}})["files"]]
        return sum(file["size"] for files in parts for file in files.values())


def open_model(
    directory: str | Path, base: str | Path | None = None, above: tuple[Path, ...] = ()
) -> Model:
    """Open what is there; no weight is read yet.

    Args:
        directory: a Hugging Face model, a sharded checkpoint or a PEFT adapter.
        base: the base model of a training checkpoint or an adapter, if it has moved.
        above: the models that this one is the base of, directly and indirectly.

    Raises:
        UserError: nothing of the kind is there, it is damaged, or its base is missing.
    """
    directory = Path(directory)
    if is_checkpoint(directory):
        weights = ShardedWeights(directory)
        manifest = weights.manifest
        spec = spec_from_config(manifest.config, str(directory))
        companions = _companions(directory)
        if manifest.kind == "model":
            return Model(directory, "sharded", spec, weights, companions, manifest)
        try:
            noted, lora = manifest.base["path"], manifest.trained["lora"]
            scale = lora["alpha"] / lora["rank"] if lora else 0.0
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise incomplete(manifest, error) from None
        origin = _open_base(directory, base, noted, above)
        merged = MergedWeights(origin.weights, weights, scale, spec.tied_embeddings)
        _check_shapes(origin, spec, directory)
        return Model(directory, "training", spec, merged, companions, manifest, weights, origin)
    if (directory / ADAPTER_CONFIG).is_file():
        adapter = AdapterWeights(directory)
        noted = adapter.config.get("base_model_name_or_path")
        origin = _open_base(directory, base, noted, above)
        own = (directory / "config.json").is_file()
        spec = read_spec(directory) if own else origin.spec
        merged = MergedWeights(origin.weights, adapter, adapter.scale, spec.tied_embeddings)
        _check_shapes(origin, spec, directory)
        companions = _companions(directory) or origin.companions
        return Model(directory, "adapter", spec, merged, companions, None, adapter, origin)
    spec = read_spec(directory)
    weights = HuggingFaceWeights(directory)
    return Model(directory, "huggingface", spec, weights, _companions(directory))


def open_weights(directory: str | Path) -> Weights:
    """The tensors of a model directory, for the trainer."""
    if is_checkpoint(directory) or (Path(directory) / ADAPTER_CONFIG).is_file():
        return open_model(directory).weights
    return HuggingFaceWeights(directory)


def check_recorded_sums(directory: str | Path, share: Axis = SINGLE) -> None:
    """Compare this rank's share of the checksums that a model directory records.

    Hugging Face directories record none.

    Raises:
        UserError: when a file is damaged or another than it was.
    """
    if is_checkpoint(directory) or (Path(directory) / ADAPTER_CONFIG).is_file():
        open_model(directory).check_sums(share)


def _open_base(
    directory: Path, given: str | Path | None, noted: object, above: tuple[Path, ...]
) -> Model:
    path, above = given or noted, (*above, directory)
    try:
        found = bool(path) and isinstance(path, (str, Path)) and Path(path).is_dir()
        again = found and any(Path(path).samefile(model) for model in above)
    except OSError as error:
        raise cannot_read(path, error) from None
    if not found or again:
        raise UserError(
            f"the base model of {directory} is not at {path}: give its directory with --base"
        )
    return open_model(path, above=above)


def _check_shapes(base: Model, spec: ModelSpec, directory: Path) -> None:
    """Refuse a base that is not of the shape a training checkpoint or an adapter is for."""
    for name, layout in empty_decoder(spec, rope_table(spec), SINGLE).layouts.items():
        found = base.weights.shape(name)
        if found != layout.full_shape:
            raise UserError(
                f"tensor {name} in {base.directory} has shape {list(found)}, but {directory} is "
                f"for {list(layout.full_shape)}: give the model it was trained on with --base"
            )


def _companions(directory: Path) -> tuple[Path, ...]:
    return tuple(path for name in COMPANIONS if (path := directory / name).is_file())
