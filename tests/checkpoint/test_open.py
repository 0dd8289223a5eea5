"""What cannot be read as a model is refused when it is opened, in one sentence."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalard.checkpoint.convert import check_complete, export_model, import_model
from megalard.checkpoint.huggingface import HuggingFaceWeights
from megalard.checkpoint.inspect import describe
from megalard.checkpoint.open import open_model
from megalard.checkpoint.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from megalard.checkpoint.sharded.manifest import MANIFEST, _digest, read_manifest
from megalard.checkpoint.sharded.save_load import checkpoint_axis
from megalard.errors import UserError
from megalard.parallel.mesh import SINGLE, build_mesh
from tests.models import make_model
from tests.permissions import give_up_rights
from tests.ranks import run_ranks
from tests.tools.test_checkpoint_tools import tool

LAYER = "base_model.model.model.layers.0."
Q = f"{LAYER}self_attn.q_proj"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model, a narrower and a wider one; the first also in two slices."""
    folder = tmp_path_factory.mktemp("input")
    make_model("llama", folder / "model")
    make_model("llama", folder / "other", intermediate_size=40)
    make_model("llama", folder / "wider", hidden_size=64)
    run_ranks(2, _import, str(folder))
    return folder


def _import(folder: str) -> None:
    mesh = build_mesh("cpu", 2)
    target = f"{folder}/sharded"
    import_model(open_model(f"{folder}/model"), target, mesh, checkpoint_axis(mesh))


def refusal(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def make_adapter(folder: Path, base: Path, config: object = None, tensors: dict | None = None):
    """A LoRA of rank 2 on a q_proj; settings of None are left out of its config."""
    folder.mkdir()
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "base_model_name_or_path": str(base),
    }
    if isinstance(config, dict):
        settings |= config
        settings = {key: value for key, value in settings.items() if value is not None}
    else:
        settings = settings if config is None else config
    (folder / ADAPTER_CONFIG).write_text(json.dumps(settings))
    if tensors is None:
        tensors = lora(Q)
    save_file(tensors, folder / ADAPTER_WEIGHTS)
    return folder


def lora(stem: str, rows: int = 32, columns: int = 32, rank: int = 2) -> dict:
    a, b = torch.ones(rank, columns), torch.ones(rows, rank)
    return {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}


BAD_ADAPTERS = {
    "no rank": ({"r": None}, None, "has no r: set it"),
    "rank 0": ({"r": 0}, None, "gives 0 as r: set it"),
    "rank as text": ({"r": "2"}, None, 'gives "2" as r: set it'),
    "no alpha": ({"lora_alpha": None}, None, "has no lora_alpha: set it"),
    "a list": ([], None, f"{ADAPTER_CONFIG} does not hold a JSON object"),
    "another type": ({"peft_type": "LOHA"}, None, "no plain LoRA (it is of peft_type LOHA)"),
    "a variant": ({"use_dora": True}, None, "no plain LoRA (it sets use_dora)"),
    "transposed": ({"fan_in_fan_out": True}, None, "no plain LoRA (it sets fan_in_fan_out)"),
    "another rank": ({"r": 3}, None, f"{Q}.lora_A.weight in "),
    "A alone": (
        None,
        {f"{Q}.lora_A.weight": torch.ones(2, 32)},
        "q_proj.lora_A.weight without its lora_B",
    ),
    "B alone": (
        None,
        {f"{Q}.lora_B.weight": torch.ones(32, 2)},
        "q_proj.lora_B.weight without its lora_A",
    ),
    "of another base": (
        {"init_lora_weights": "pissa_niter_4"},
        None,
        "init_lora_weights pissa_niter_4, which changes the base model",
    ),
    "no tensors": (None, {}, "holds no tensors, so it changes nothing"),
    "no such tensor": (
        None,
        lora("base_model.model.layers.0.self_attn.q_proj"),
        "has layers.0.self_attn.q_proj.lora_A, but ",
    ),
    "a shape": (
        None,
        lora(f"{LAYER}mlp.up_proj", rows=32),
        "up_proj.weight of shape [32, 32], but",
    ),
    "a vector": (
        None,
        {f"{Q}.lora_A.weight": torch.ones(2), f"{Q}.lora_B.weight": torch.ones(2)},
        "is not of the rank r = 2",
    ),
}


@pytest.mark.parametrize("case", BAD_ADAPTERS)
def test_a_bad_adapter_is_refused_when_it_is_opened(case, models, tmp_path):
    config, tensors, sentence = BAD_ADAPTERS[case]
    adapter = make_adapter(tmp_path / "adapter", models / "model", config, tensors)
    told = refusal(open_model, adapter)
    assert sentence in told and str(adapter) in told


def test_a_good_adapter_is_merged(models, tmp_path):
    model = open_model(make_adapter(tmp_path / "adapter", models / "model"))
    name = "model.layers.0.self_attn.q_proj.weight"
    original = load_file(models / "model" / "model.safetensors")[name]
    assert torch.equal(model.weights.read(name), original + 4.0)


def test_another_base_is_named(models, tmp_path):
    """By the adapter's own matrices, or by the config beside it where they would fit."""
    adapter = make_adapter(tmp_path / "adapter", models / "model")
    assert f"but in {models / 'wider'} it has shape" in refusal(
        open_model, adapter, models / "wider"
    )
    shutil.copy(models / "model" / "config.json", adapter)
    told = refusal(open_model, adapter, models / "other")
    assert f"mlp.gate_proj.weight in {models / 'other'} has shape [40, 32]" in told
    assert f"{adapter} is for [48, 32]: give the model it was trained on with --base" in told


def test_adapters_are_not_each_other_s_base(models, tmp_path):
    for name, base in (("one", "two"), ("two", "one")):
        make_adapter(tmp_path / name, tmp_path / base)
    told = refusal(open_model, tmp_path / "one")
    assert f"the base model of {tmp_path / 'two'} is not at {tmp_path / 'one'}" in told


@pytest.mark.parametrize("base", [5, [], {"path": "x"}, None])
def test_a_base_that_is_no_path_is_told(base, models, tmp_path):
    adapter = make_adapter(
        tmp_path / "adapter", models / "model", {"base_model_name_or_path": base}
    )
    assert "give its directory with --base" in refusal(open_model, adapter)


def test_a_merge_that_fp16_does_not_hold_is_told(models, tmp_path):
    source = shutil.copytree(models / "model", tmp_path / "source")
    tensors = {k: v.half() for k, v in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors")
    adapter = make_adapter(tmp_path / "adapter", source, {"lora_alpha": 1e6})
    told = refusal(export_model, open_model(adapter), tmp_path / "out", SINGLE)
    assert "self_attn.q_proj.weight with LoRA merged into it reaches" in told
    assert "more than float16 holds" in told and not (tmp_path / "out").exists()


def test_an_adapter_is_not_its_own_base(models, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "adapter")
    assert f"the base model of {adapter} is not at {adapter}" in refusal(open_model, adapter)


def with_manifest(models: Path, folder: Path, change) -> Path:
    """A copy whose manifest is changed, with a checksum that holds."""
    copy = shutil.copytree(models / "sharded", folder / "copy")
    body = json.loads((copy / MANIFEST).read_text())
    del body["checksum"]
    change(body)
    (copy / MANIFEST).write_text(json.dumps({**body, "checksum": _digest(body)}))
    return copy


SPLIT, WHOLE = "model.embed_tokens.weight", "model.norm.weight"


def chunks(body: dict, name: str = SPLIT) -> list[dict]:
    return body["tensors"][name]["chunks"]


BAD_MANIFESTS = {
    "a slice is missing": (lambda b: chunks(b).pop(), "overlap or leave gaps"),
    "no slices": (lambda b: chunks(b, WHOLE).clear(), "overlap or leave gaps"),
    "twice the same": (lambda b: chunks(b).append(chunks(b)[0]), "overlap or leave gaps"),
    "overlap": (lambda b: chunks(b)[1].update(chunks(b)[0]), "overlap or leave gaps"),
    "one row up": (
        lambda b: max(chunks(b), key=lambda c: c["offsets"]).update(offsets=[33, 0]),
        "overlap or leave gaps",
    ),
    "out of bounds": (lambda b: chunks(b)[0].update(offsets=[60, 0]), "outside its shape"),
    "below 0": (lambda b: chunks(b)[0].update(offsets=[-1, 0]), "is no shape or place"),
    "another dim": (lambda b: chunks(b)[0].update(offsets=[0]), "is not as megalard writes it"),
    "a file elsewhere": (lambda b: chunks(b)[0].update(file="../../x"), "'../../x', which is not"),
    "an unknown file": (lambda b: chunks(b)[0].update(file="x"), "which is not among its files"),
    "the parent": (lambda b: b["files"].update({"..": {"size": 1}}), "'..' outside its directory"),
    "dtype": (lambda b: b["tensors"][WHOLE].update(dtype="F4"), f"{WHOLE} of dtype F4, which"),
    "no dtype": (lambda b: b["tensors"][WHOLE].pop("dtype"), "it has no 'dtype'"),
    "kind": (lambda b: b.update(kind="x"), "its kind is 'x'"),
    "no base": (lambda b: b.update(kind="training"), "its section base is no JSON object"),
}


@pytest.mark.parametrize("case", BAD_MANIFESTS)
def test_a_manifest_that_does_not_make_up_its_tensors_is_refused(case, models, tmp_path):
    """Although its own checksum holds."""
    change, sentence = BAD_MANIFESTS[case]
    copy = with_manifest(models, tmp_path, change)
    told = refusal(open_model, copy)
    assert sentence in told and str(copy / MANIFEST) in told


def test_a_config_without_a_family_is_told(models, tmp_path):
    copy = with_manifest(models, tmp_path, lambda body: body["config"].pop("model_type"))
    assert "it has no 'model_type'" in refusal(describe, read_manifest(copy))


def test_slices_over_columns_and_rows_make_up_a_tensor(models, tmp_path):
    """Boxes that touch are no overlap; a pair that crosses in both dims is one."""

    def change(body, third=(16, 0)):
        file = chunks(body)[0]["file"]
        places = (((0, 0), (16, 32)), (third, (51, 8)), ((16, 8), (51, 24)))
        boxes = [{"file": file, "offsets": list(at), "shape": list(n)} for at, n in places]
        body["tensors"][SPLIT]["chunks"] = boxes

    read_manifest(with_manifest(models, tmp_path / "good", change))
    crossing = with_manifest(models, tmp_path / "bad", lambda body: change(body, (15, 0)))
    assert "overlap" in refusal(read_manifest, crossing)


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_tensor_is_lost_on_the_way(ranks, models, tmp_path):
    """Neither one without elements nor one whose name an optimizer's might have."""
    source = shutil.copytree(models / "model", tmp_path / "source")
    more = {
        "empty": torch.zeros(0, 5),
        "optimizer.scale": torch.arange(3.0),
        "rng.x": torch.ones(2),
    }
    tensors = load_file(source / "model.safetensors") | more
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    run_ranks(ranks, _there_and_back, str(tmp_path), ranks)
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].shape == value.shape and torch.equal(found[name], value), name
    assert "optimizer" not in describe(read_manifest(tmp_path / "sharded"))["tensors"]


def _there_and_back(folder: str, ranks: int) -> None:
    mesh = build_mesh("cpu", ranks)
    axis = checkpoint_axis(mesh)
    import_model(open_model(f"{folder}/source"), f"{folder}/sharded", mesh, axis)
    export_model(open_model(f"{folder}/sharded"), f"{folder}/back", mesh.world)


def test_what_may_not_be_read_is_told_as_that(models, tmp_path):
    run_ranks(1, _read_without_rights, str(models), str(tmp_path))


def _read_without_rights(models: str, folder: str) -> None:
    """A directory that may not be entered or listed, and a file that may not be read."""
    give_up_rights()
    adapter = make_adapter(Path(folder) / "an-adapter", Path(models) / "model")
    for number, (source, name) in enumerate(
        (
            (f"{models}/model", ""),
            (f"{models}/model", "config.json"),
            (f"{models}/model", "model.safetensors"),
            (f"{models}/sharded", ""),
            (f"{models}/sharded", MANIFEST),
            (f"{models}/sharded", "weights-00001-000.safetensors"),
            (adapter, ""),
            (adapter, ADAPTER_CONFIG),
            (adapter, ADAPTER_WEIGHTS),
        )
    ):
        copy = shutil.copytree(source, f"{folder}/{number}")
        victim = Path(copy, name)
        mode = victim.stat().st_mode
        victim.chmod(0)
        for work in (_export, _inspect):
            told = work(copy, f"{folder}/out")
            assert "Permission denied" in told and str(copy) in told, (source, name, told)
            assert "damaged" not in told and "again" not in told, told
        victim.chmod(mode)
    # a base whose directory is closed
    base = Path(shutil.copytree(f"{models}/model", f"{folder}/closed/base"))
    adapter = make_adapter(Path(folder) / "another-adapter", base)
    base.parent.chmod(0)
    assert f"cannot read {base}: Permission denied" in refusal(open_model, adapter)
    base.parent.chmod(0o755)


def _export(source: str, out: str) -> str:
    def work():
        export_model(open_model(source), out, SINGLE)

    return refusal(work)


def _inspect(source: str, out: str) -> str:
    with redirect_stdout(StringIO()) as printed:
        assert tool("inspect_checkpoint")(source) == 1
    return printed.getvalue()


@pytest.mark.parametrize("dtype", [torch.uint16, torch.complex64])
def test_a_dtype_that_is_not_read_is_named(dtype, models, tmp_path):
    source = shutil.copytree(models / "model", tmp_path / "source")
    tensors = load_file(source / "model.safetensors") | {"odd": torch.zeros(3, dtype=dtype)}
    save_file(tensors, source / "model.safetensors")
    name = {torch.uint16: "U16", torch.complex64: "C64"}[dtype]
    told = refusal(open_model, source)
    assert f"has the tensor odd of dtype {name}, which is not supported" in told


def test_a_file_that_becomes_shorter_while_it_is_read_is_told(models, tmp_path):
    source = shutil.copytree(models / "model", tmp_path / "source")
    weights = HuggingFaceWeights(source)
    os.truncate(source / "model.safetensors", 5000)
    told = refusal(lambda: [weights.read(name) for name in weights.names()])
    assert "it became shorter while it was read" in told


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "x"),
        ("hidden_size", 32.5),
        ("num_attention_heads", 0),
        ("vocab_size", None),
        ("num_hidden_layers", True),
        ("head_dim", "8"),
        ("rms_norm_eps", "small"),
        ("rope_theta", []),
        ("rope_parameters", "x"),
        ("rope_parameters", {"rope_theta": "x"}),
    ],
)
def test_a_config_with_no_number_where_one_is_needed(key, value, models, tmp_path):
    source = shutil.copytree(models / "model", tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {key: value}
    (source / "config.json").write_text(json.dumps(config))

    def work():
        model = open_model(source)
        check_complete(model.weights, model.spec)

    if isinstance(value, dict):
        ((key, value),) = value.items()
    assert f"{source}/config.json has {json.dumps(value)} as {key}, " in refusal(work)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear"},
        {"rope_type": "spiral", "factor": 2.0},
        {"rope_type": "yarn", "factor": "x", "original_max_position_embeddings": 32},
        {"rope_type": "linear", "factor": 0},
    ],
    ids=str,
)
def test_a_rope_that_cannot_be_built_is_told(rope, models, tmp_path):
    source = shutil.copytree(models / "model", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 10000.0, **rope}
    config["rope_theta"], config["rope_scaling"] = 10000.0, rope
    (source / "config.json").write_text(json.dumps(config))

    def work():
        model = open_model(source)
        check_complete(model.weights, model.spec)

    assert "describes a RoPE that transformers cannot build" in refusal(work)
