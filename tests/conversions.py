"""Convert models between formats with the usual options, and make adapters by hand."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from megalard.checkpoint import convert
from megalard.checkpoint.convert import export_adapter, export_model, import_model
from megalard.checkpoint.open import StoredModel, open_model
from megalard.checkpoint.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from megalard.checkpoint.sharded.save_load import checkpoint_axis
from megalard.checkpoint.write_options import WriteOptions
from megalard.model.spec import ModelSpec
from megalard.parallel.mesh import SINGLE, Axis, Mesh, build_mesh

LAYER = "base_model.model.model.layers.0."
Q_PROJ = f"{LAYER}self_attn.q_proj"


def to_sharded(
    source: StoredModel | Path | str,
    target: Path | str,
    mesh: Mesh | None = None,
    axis: Axis = SINGLE,
    **options,
) -> None:
    """Write a model as a sharded checkpoint."""
    mesh = mesh or build_mesh("cpu", 1)
    import_model(_opened(source), target, mesh, axis, WriteOptions(**options))


def to_hugging_face(
    source: StoredModel | Path | str, target: Path | str, axis: Axis = SINGLE, **options
) -> None:
    """Write a model as a Hugging Face directory."""
    export_model(_opened(source), target, axis, WriteOptions(**options))


def to_adapter(source: StoredModel | Path | str, target: Path | str, **options) -> None:
    """Write the LoRA pairs of a run's checkpoint as a PEFT adapter."""
    export_adapter(_opened(source), target, WriteOptions(**options))


def _opened(source: StoredModel | Path | str) -> StoredModel:
    return source if isinstance(source, StoredModel) else open_model(source)


def shard_models(folder: str, names: tuple[str, ...], tp: int) -> None:
    """Write models of a folder as ``sharded-NAME``; every one of ``tp`` ranks calls it."""
    mesh = build_mesh("cpu", tp)
    axis = checkpoint_axis(mesh)
    for name in names:
        to_sharded(f"{folder}/{name}", f"{folder}/sharded-{name}", mesh, axis)


def unfused(tensors: dict[str, torch.Tensor], spec: ModelSpec) -> dict[str, torch.Tensor]:
    """Return tensors in which Phi-3's fused projections are cut apart, as its code cuts them."""
    kv_rows = spec.num_kv_heads * spec.head_dim
    q_rows = spec.num_heads * spec.head_dim
    parts = {}
    for name, value in tensors.items():
        if name.endswith("qkv_proj.weight"):
            cut = dict(zip("qkv", value.split([q_rows, kv_rows, kv_rows]), strict=True))
            parts |= {name.replace("qkv_proj", f"{p}_proj"): rows for p, rows in cut.items()}
        elif name.endswith("gate_up_proj.weight"):
            gate, up = value.chunk(2)
            parts[name.replace("gate_up", "gate")] = gate
            parts[name.replace("gate_up", "up")] = up
        else:
            parts[name] = value
    return parts


def make_adapter(
    folder: Path, base: Path, config: object = None, tensors: dict | None = None
) -> Path:
    """Write an adapter with a LoRA pair of rank 2 on a q_proj.

    Args:
        config: settings in addition to or in place of the usual ones, without those that are None;
            or a value that is the whole config.
        tensors: the tensors, in place of the usual pair.
    """
    folder.mkdir()
    settings: object = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "base_model_name_or_path": str(base),
    }
    if isinstance(config, dict):
        settings = {k: v for k, v in {**settings, **config}.items() if v is not None}
    elif config is not None:
        settings = config
    (folder / ADAPTER_CONFIG).write_text(json.dumps(settings))
    save_file(lora_pair(Q_PROJ) if tensors is None else tensors, folder / ADAPTER_WEIGHTS)
    return folder


def lora_pair(stem: str, rows: int = 32, columns: int = 32, rank: int = 2) -> dict:
    """Return A and B of ones under PEFT's names."""
    a, b = torch.ones(rank, columns), torch.ones(rows, rank)
    return {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}


def export_another_norm_eps(monkeypatch) -> None:
    """Let exports write the config.json of another model: its ``rms_norm_eps`` is 0.5."""
    export_config, wrong_norm = convert.export_config, {"rms_norm_eps": 0.5}
    monkeypatch.setattr(convert, "export_config", lambda spec: export_config(spec) | wrong_norm)
