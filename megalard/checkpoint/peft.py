"""PEFT adapters: read as LoRA pairs, and written from a run with the student's config.json.

An adapter carries no RoPE. On its own it would be applied to the model with native RoPE, so the
base model must be loaded with the config.json that is next to the adapter.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import torch

from megalard.checkpoint.weights import Weights
from megalard.checkpoint.write_options import WriteOptions
from megalard.errors import UserError, shown
from megalard.files.atomic_folder import AtomicFolder
from megalard.files.reading import cannot_read, read_json
from megalard.files.safetensors import DamagedFile, Entry, TensorFile, write_tensor_file
from megalard.files.writing import cannot_write, sync_files
from megalard.model.parameter_slice import ParameterSlice

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Settings with which the merged weight is not W + alpha / r B A.
_VARIANTS = (
    "use_dora",
    "use_rslora",
    "use_qalora",
    "alpha_pattern",
    "rank_pattern",
    "alora_invocation_tokens",
    "fan_in_fan_out",
    "layer_replication",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "arrow_config",
    "use_bdlora",
)
# Initializations that also change the base model, whose changes the adapter does not contain.
_CHANGING_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def adapter_config(trained: dict, names: list[str], base: str) -> dict:
    """Return the ``adapter_config.json`` of a run.

    Args:
        trained: the section ``trained`` of the manifest, with LoRA's settings.
        names: the names of the trained tensors.
        base: the path of the base model.
    """
    modules = sorted({name.rpartition(".")[0] for name in names})
    kinds = sorted({module.rpartition(".")[2] for module in modules})
    layers = sorted({int(re.search(r"\.layers\.(\d+)\.", module)[1]) for module in modules})
    is_regular = len(modules) == len(kinds) * len(layers)
    lora = trained["lora"]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora["rank"],
        "lora_alpha": lora["alpha"],
        "lora_dropout": lora["dropout"],
        "bias": "none",
        "use_rslora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": kinds if is_regular else modules,
        "layers_to_transform": layers if is_regular else None,
        "layers_pattern": "layers" if is_regular else None,
    }


def adapter_name(name: str) -> str:
    """Return PEFT's name of a tensor that the trainer calls ``model...q_proj.lora_A``."""
    return f"{_PREFIX}{name}.weight"


class AdapterWeights:
    """The LoRA pairs of a PEFT adapter, under the names of the trainer.

    Attributes:
        directory: the directory of the adapter.
        config: the content of ``adapter_config.json``.
        scale: alpha / r.

    Raises:
        UserError: a file is missing or damaged, the adapter is not plain LoRA on projections, or
            its pairs are incomplete or have another rank than the config gives.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        path = self.directory / ADAPTER_WEIGHTS
        self.config = _read_config(self.directory / ADAPTER_CONFIG)
        self.scale = _scale(self.config, self.directory)
        if not path.exists() and path.with_suffix(".bin").exists():
            raise UserError(
                f"the adapter {self.directory} is stored as adapter_model.bin, a pickle, which is "
                "not read: load it with peft and save it again, which writes safetensors"
            )
        try:
            self._file = TensorFile(path)
        except OSError as error:
            raise cannot_read(path, error) from None
        except DamagedFile as error:
            raise _damaged(path, error) from None
        self._names = {_our_name(name, self.directory): name for name in self._file.keys()}  # noqa: SIM118
        if not self._names:
            raise UserError(f"{path} has no tensors, so it changes nothing: use another adapter")
        for name in self._names:
            shape, rank = self.shape(name), self.config["r"]
            dim = 0 if name.endswith("lora_A") else 1
            if len(shape) != 2 or shape[dim] != rank:
                raise UserError(
                    f"tensor {self._names[name]} in {path} has shape {list(shape)}, which does "
                    f"not fit the rank r = {rank} in its {ADAPTER_CONFIG}: the files do not belong "
                    "together"
                )
            other = name[:-1] + ("B" if name.endswith("A") else "A")
            if other not in self._names:
                raise UserError(
                    f"{path} has {self._names[name]} without its {other.rpartition('.')[2]}: it is "
                    "damaged; use another copy"
                )

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.entries[self._names[name]].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._file.entries[self._names[name]].dtype

    def files(self) -> list[Path]:
        return [self._file.path]

    def read(self, name: str, held: ParameterSlice | None = None) -> torch.Tensor:
        """Return the tensor, or a slice of it, in fp32."""
        try:
            tensor = self._file.read(self._names[name]).float()
            return tensor if held is None else held.cut(tensor)
        except OSError as error:
            raise cannot_read(self._file.path, error) from None
        except DamagedFile as error:
            raise _damaged(self._file.path, error) from None


def _damaged(path: Path, error: DamagedFile) -> UserError:
    return UserError(f"{path} is truncated or damaged ({error}): use another copy")


def _read_config(path: Path) -> dict:
    try:
        config = read_json(path)
    except OSError as error:
        raise cannot_read(path, error) from None
    except ValueError:
        raise UserError(f"{path} is damaged: it is not JSON; use another copy") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} does not contain a JSON object: use another copy")
    return config


def _scale(config: dict, directory: Path) -> float:
    """Return alpha / r of an adapter, or refuse an adapter that is not plain LoRA."""
    kind, start = config.get("peft_type"), config.get("init_lora_weights")
    variants = [key for key in _VARIANTS if config.get(key)]
    if isinstance(start, str) and start.startswith(_CHANGING_BASE):
        variants.append(f"init_lora_weights {shown(start)}, which changes the base model")
    if kind != "LORA" or variants:
        reason = f"sets {', '.join(variants)}" if kind == "LORA" else f"has peft_type {shown(kind)}"
        raise UserError(
            f"the adapter {directory} is not plain LoRA (it {reason}): merge it with peft and give "
            "the merged model"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise _bad_setting(directory, "r", rank, "a whole number of at least 1")
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise _bad_setting(directory, "lora_alpha", alpha, "a number")
    return alpha / rank


def _bad_setting(directory: Path, key: str, value, wanted: str) -> UserError:
    path = directory / ADAPTER_CONFIG
    content = "has no" if value is None else f"has {shown(value)} as"
    return UserError(
        f"{path} {content} {key}: set it to the value that the adapter was trained with, {wanted}"
    )


def _our_name(name: str, directory: Path) -> str:
    match = re.fullmatch(r"base_model\.model\.(.+\.lora_[AB])\.weight", name)
    if match is None:
        raise UserError(
            f"the adapter {directory} has the tensor {shown(name)}, which is not part of a LoRA "
            "pair: merge it with peft and give the merged model"
        )
    return match[1]


def check_lora(directory: Path, trained: dict) -> None:
    """Refuse a run that did not train LoRA pairs.

    Raises:
        UserError: the run, or an earlier stage of it, trained weights.
    """
    changed = [name for name in trained["tensors"] if not name.endswith(("lora_A", "lora_B"))]
    if trained["mode"] == "lora" and changed:
        raise UserError(
            f"an earlier stage of the run of {directory} changed weights, such as {changed[0]}, "
            "which an adapter does not hold: export it as a Hugging Face model"
        )
    if trained["mode"] != "lora":
        raise UserError(
            f"{directory} trained weights (trainable.mode {trained['mode']}), not LoRA "
            "pairs, so there is no adapter: export it as a Hugging Face model"
        )


def write_adapter(
    directory: str | Path,
    weights: Weights,
    trained: dict,
    config: dict,
    base: str,
    options: WriteOptions,
) -> None:
    """Write a run's LoRA pairs as a PEFT adapter, in one process, completely or not at all.

    Args:
        directory: the target; it must not exist or be empty.
        weights: the trained tensors.
        trained: the section ``trained`` of the manifest.
        config: the student's ``config.json``.
        base: the path of the base model, which the adapter names.

    Raises:
        UserError: the run trained weights and not LoRA pairs, or the files cannot be written.
    """
    directory = Path(directory)
    check_lora(weights.directory, trained)
    names = weights.names()
    entries = {adapter_name(n): Entry(weights.dtype(n), weights.shape(n)) for n in names}
    folder = AtomicFolder(directory)
    try:
        folder.begin()
        tensors = map(weights.read, names)
        metadata = {"format": "pt"}
        path = folder.path / ADAPTER_WEIGHTS
        write_tensor_file(path, entries, tensors, metadata, options.progress)
        for name, value in (
            (ADAPTER_CONFIG, adapter_config(trained, names, base)),
            ("config.json", config),
        ):
            (folder.path / name).write_text(json.dumps(value, indent=2) + "\n")
        for companion in options.companions:
            companion.write(folder.path)
        sync_files(folder.path)
        options.before_commit()
        options.check(folder.path)
        folder.commit()
    except OSError as error:
        raise cannot_write(directory, error) from None
    finally:
        folder.abandon()
