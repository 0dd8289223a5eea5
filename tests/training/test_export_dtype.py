"""The dtype of an export: chosen, written into config.json, and what it loses is counted."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalard.errors import UserError
from megalard.parallel.mesh import build_mesh
from megalard.training import export
from tests.logits import assert_same_logits, decoder_logits, random_tokens, transformers_logits
from tests.models import make_model
from tests.students import StudentCase, make_config, make_student, shift


@pytest.mark.parametrize("mode", ["lora", "weights"])
def test_the_dtype_of_an_export_is_chosen_and_what_it_loses_is_counted(mode, tmp_path):
    """Against the merged weights in fp32, rounded here."""
    case = StudentCase("llama", mode, "linear")
    make_model("llama", tmp_path / "teacher")
    stored = load_file(tmp_path / "teacher" / "model.safetensors")
    source = {name: value.bfloat16() for name, value in stored.items()}
    save_file(source, tmp_path / "teacher" / "model.safetensors", {"format": "pt"})
    config = make_config(case, tmp_path / "teacher", tmp_path / "table.json")
    made = make_student(config, build_mesh("cpu", 1))
    with torch.no_grad():
        for name, parameter in made.student.trained.items():
            parameter.add_(shift(name, parameter.shape) * 0.02)
    read, losses = {}, {}
    for dtype in (None, torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype)
        arguments = (made.source, made.config, (), made.mesh, dtype)
        losses[dtype] = export.save_student(folder, made.student, *arguments)
        read[dtype] = load_file(folder / "model.safetensors")
        config_json = json.loads((folder / "config.json").read_text())
        if dtype is not None:
            name = str(dtype).removeprefix("torch.")
            assert config_json["dtype"] == config_json["torch_dtype"] == name
    assert {value.dtype for value in read[torch.float32].values()} == {torch.float32}
    changed = lost = 0
    for name, value in read[torch.float32].items():
        assert torch.equal(read[None][name], value.bfloat16()), name
        assert torch.equal(read[torch.bfloat16][name], value.bfloat16()), name
        differs = value != source[name].float()
        changed += int(differs.sum())
        lost += int((differs & (value.bfloat16() == source[name])).sum())
    assert 0 < lost < changed
    for dtype, expected in ((None, lost), (torch.bfloat16, lost), (torch.float32, 0)):
        assert (losses[dtype].changed, losses[dtype].lost) == (changed, expected)
    text = random_tokens(1, 33)
    ours = decoder_logits(made.student.decoder, text)
    assert_same_logits(ours, transformers_logits(tmp_path / "torch.float32", text))


@pytest.mark.parametrize("value", ["nan", "inf", "1e6"])
def test_a_trained_weight_that_does_not_fit_is_refused(value, tmp_path):
    make_model("llama", tmp_path / "teacher")
    case = StudentCase("llama", "weights", "linear")
    config = make_config(case, tmp_path / "teacher", tmp_path / "table.json")
    made = make_student(config, build_mesh("cpu", 1))
    name = "model.layers.1.self_attn.k_proj.weight"
    made.student.trained[name].data[0, 0] = float(value)
    arguments = (made.source, made.config, (), made.mesh, torch.float16)
    with pytest.raises(UserError, match=f"{name} holds NaN or infinity as float16"):
        export.save_student(tmp_path / "student", made.student, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]
