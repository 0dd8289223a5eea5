"""What a run trained, exported: merged for transformers 4.57 and 5, and as an adapter for peft."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megalard.checkpoint.compare import logits_of, tensor_differences
from megalard.checkpoint.convert import export_adapter, export_model, import_model
from megalard.checkpoint.open import open_model
from megalard.errors import UserError
from megalard.parallel.mesh import SINGLE, build_mesh
from megalard.train import main
from megalard.training.run_folder import checkpoint_path
from tests.jobs import arguments, make_job
from tests.logits import assert_same_logits, random_tokens
from tests.ranks import run_ranks

OLD_TRANSFORMERS = Path(__file__).parents[1] / ".transformers-4.57"
SAVE = ("checkpoint.save_every=4", "optimizer.steps=4")
RUNS = {
    "linear": (2, ("parallel.tp=2",)),
    "yarn": (1, ("rope.type=yarn", "trainable.lora={targets: [q, o], rank: 6, alpha: 9}")),
    "some-layers": (1, ("objective.layers=[0, 1]", "rope.type=longrope")),
    "one-relation": (1, ("objective.relations.q=0", "objective.relations.k=0", "rope.type=abf")),
    "weights": (1, ("trainable.mode=weights", "rope.type=llama3")),
}
TOKENS = random_tokens(1, 90, 257)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run of each kind, with its exports beside it."""
    folder = make_job(tmp_path_factory.mktemp("peft"))
    for name, (ranks, options) in RUNS.items():
        run_ranks(ranks, main, arguments(folder, folder / name, *SAVE, *options))
        model = open_model(checkpoint_path(folder / name / "checkpoints", 4))
        export_model(model, folder / name / "merged", SINGLE)
        if name != "weights":
            export_adapter(model, folder / name / "adapter")
    return folder


def ours(runs: Path, name: str) -> torch.Tensor:
    """The trainer's logits, [1, tokens, vocabulary]."""
    model = open_model(checkpoint_path(runs / name / "checkpoints", 4))
    return logits_of(model, TOKENS[0], torch.float32)[None]


@pytest.mark.parametrize("name", RUNS)
def test_the_merged_export_is_the_run_s_student(name, runs):
    merged, student = open_model(runs / name / "merged"), open_model(runs / name / "student")
    assert tensor_differences(merged, student) == []
    assert merged.spec == student.spec
    assert {p.name for p in (runs / name / "merged").iterdir()} == {
        p.name for p in (runs / name / "student").iterdir()
    }
    model = AutoModelForCausalLM.from_pretrained(runs / name / "merged", dtype=torch.float64)
    with torch.no_grad():
        assert_same_logits(ours(runs, name), model(TOKENS, use_cache=False).logits)
    assert AutoTokenizer.from_pretrained(runs / name / "merged").eos_token == "</s>"


_OLD = """
import sys
import torch, transformers
assert transformers.__version__.startswith("4.57."), transformers.__version__
out, *folders = sys.argv[1:]
tokens, found = torch.load(out), []
for folder in folders:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        found.append(model(tokens, use_cache=False).logits)
torch.save(found, out)
"""


def test_transformers_4_gives_the_trainers_logits(runs):
    if not OLD_TRANSFORMERS.is_dir():
        pytest.skip("transformers 4.57 is not installed beside the tests: run tests/run.sh")
    out = runs / "old.pt"
    torch.save(TOKENS, out)
    folders = [str(runs / name / "merged") for name in RUNS]
    environment = {**os.environ, "PYTHONPATH": str(OLD_TRANSFORMERS)}
    subprocess.run([sys.executable, "-c", _OLD, str(out), *folders], env=environment, check=True)
    for name, theirs in zip(RUNS, torch.load(out), strict=True):
        assert_same_logits(ours(runs, name), theirs)


@pytest.mark.parametrize("name", [name for name in RUNS if name != "weights"])
def test_peft_gives_the_trainers_logits_on_the_base_with_the_students_config(name, runs):
    from peft import PeftModel

    adapter = runs / name / "adapter"
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(runs / "model")
    config = AutoConfig.from_pretrained(adapter)
    model = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=torch.float64)
    model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        logits = model(TOKENS, use_cache=False).logits
        assert_same_logits(ours(runs, name), logits)
        # an adapter carries no RoPE: without the config beside it, it is another model
        native = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
        native = PeftModel.from_pretrained(native, adapter)
        other = native(TOKENS, use_cache=False).logits
    assert float((other - logits).norm() / logits.norm()) > 1e-2


@pytest.mark.parametrize("name", ["linear", "some-layers", "one-relation"])
def test_an_adapter_is_read_back_as_the_merged_model(name, runs):
    adapter = open_model(runs / name / "adapter")
    merged = open_model(runs / name / "merged")
    assert tensor_differences(adapter, merged) == []
    assert adapter.spec.rope == merged.spec.rope


def test_trained_weights_are_no_adapter(runs, tmp_path):
    model = open_model(checkpoint_path(runs / "weights" / "checkpoints", 4))
    with pytest.raises(UserError, match="not LoRA pairs"):
        export_adapter(model, tmp_path / "adapter")
    with pytest.raises(UserError, match="no checkpoint of a run"):
        export_adapter(open_model(runs / "model"), tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_a_run_s_checkpoint_becomes_a_whole_sharded_model(runs, tmp_path):
    source = open_model(checkpoint_path(runs / "linear" / "checkpoints", 4))
    import_model(source, tmp_path / "whole", build_mesh("cpu", 1), SINGLE)
    whole = open_model(tmp_path / "whole")
    assert whole.kind == "sharded" and whole.base is None
    assert tensor_differences(whole, open_model(runs / "linear" / "student")) == []


def test_a_run_starts_from_sharded_checkpoints(runs, tmp_path):
    """As the teacher, imported, and as the student, a run's checkpoint that goes on training."""
    mesh = build_mesh("cpu", 1)
    import_model(open_model(runs / "model"), tmp_path / "teacher", mesh, SINGLE)
    student = checkpoint_path(runs / "linear" / "checkpoints", 4)
    options = (f"model.teacher={tmp_path / 'teacher'}", f"model.student={student}")
    command = arguments(runs, tmp_path / "next", *SAVE, *options, "rope.type=checkpoint")
    main(command)
    model = open_model(checkpoint_path(tmp_path / "next" / "checkpoints", 4))
    model.check_sums()
    assert tensor_differences(model, open_model(tmp_path / "next" / "student")) == []


@pytest.mark.parametrize("section", ["teacher", "student"])
def test_a_run_does_not_start_from_a_damaged_checkpoint(section, runs, tmp_path, capsys):
    """Its checksums are compared while it is loaded; nothing is left of the start."""
    copy = tmp_path / "copy"
    import_model(open_model(runs / "model"), copy, build_mesh("cpu", 1), SINGLE)
    shard = copy / "weights-00000-000.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    command = arguments(runs, tmp_path / "output", f"model.{section}={copy}")
    for options in ([], ["--preflight"]):
        with pytest.raises(SystemExit) as caught:
            main([*options, *command])
        assert caught.value.code == 1
        printed = capsys.readouterr().err.strip()
        assert printed.startswith(f"megalard: error: {shard} is damaged or of another model")
        assert "\n" not in printed
    assert not any((tmp_path / "output").iterdir())
    shard.write_bytes(content)
    main([*command, "--optimizer.steps=1", "--checkpoint.save_every=0"])
    assert (tmp_path / "output" / "student" / "model.safetensors").exists()


def test_a_base_that_has_moved_or_changed_is_told(runs, tmp_path):
    import shutil

    run = shutil.copytree(checkpoint_path(runs / "linear" / "checkpoints", 4), tmp_path / "step")
    base = shutil.copytree(runs / "model", tmp_path / "base")
    export_model(open_model(run, base), tmp_path / "moved", SINGLE)
    content = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match="is damaged or of another model"):
        export_model(open_model(run, base), tmp_path / "changed", SINGLE)
    assert not (tmp_path / "changed").exists()
    with pytest.raises(UserError, match="give its directory with --base"):
        open_model(run, tmp_path / "nowhere")
