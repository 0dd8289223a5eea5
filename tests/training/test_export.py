"""The exported student: transformers gives the trainer's logits, and the rest is copied.

Each case is made and saved once by one process and once by two (tp 2).
"""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalard.checkpoint.companions import Companion
from megalard.errors import UserError
from megalard.model.lora import initial_a
from megalard.model.parameter_slice import ParameterSlice, full_slice
from megalard.model.spec import read_spec
from megalard.parallel.mesh import Mesh, build_mesh
from megalard.training import export
from tests.conversions import unfused
from tests.logits import (
    assert_same_logits,
    decoder_logits,
    random_tokens,
    transformers_logits,
)
from tests.models import make_model
from tests.old_transformers import logits_of_transformers_4
from tests.ranks import run_ranks
from tests.students import (
    FACTOR,
    NATIVE,
    TABLE,
    StudentCase,
    make_config,
    make_student,
    pretend_to_train,
    shift,
)

CASES = {
    "lora-llama-linear": StudentCase("llama", "lora", "linear", ("q", "k", "v", "o")),
    "lora-qwen3-abf": StudentCase("qwen3", "lora", "abf", ("q", "v")),
    "lora-mistral-longrope": StudentCase("mistral", "lora", "longrope"),
    "weights-qwen2-yarn": StudentCase("qwen2", "weights", "yarn"),
    "all-biases-llama3": StudentCase("llama-biases", "all", "llama3"),
    "all-tied-table": StudentCase("llama-tied", "all", "table"),
    # transformers 4.57 reads no scaled RoPE of OLMo 2 but another theta.
    "all-olmo2-abf": StudentCase("olmo2", "all", "abf"),
    "lora-phi3-longrope": StudentCase("phi3", "lora", "longrope", ("q", "v", "o")),
    "weights-phi3-abf": StudentCase("phi3", "weights", "abf"),
}
# A short text, and one longer than the native window; tp 2 divides both.
TEXTS = (random_tokens(2, 33), random_tokens(1, NATIVE + 30))


def make(name: str, folder: Path, mesh: Mesh):
    """Make the student of a case."""
    config = make_config(CASES[name], folder / name / "teacher", folder / name / "table.json")
    return make_student(config, mesh)


def _save_all(folder: str, tp: int) -> None:
    """Save the student of every case as ``student-tp<tp>``, and its logits next to it."""
    mesh, root = build_mesh("cpu", tp), Path(folder)
    for name in CASES:
        made = make(name, root, mesh)
        pretend_to_train(made.student)
        companions = (Companion("tokenizer.json", root / "tokenizer.json"),)
        made.save(root / name / f"student-tp{tp}", companions)
        logits = [decoder_logits(made.student.decoder, text) for text in TEXTS]
        if mesh.world.rank == 0:
            torch.save(logits, root / name / f"logits-tp{tp}.pt")


def _save_on_two_ranks(folder: str) -> None:
    _save_all(folder, 2)
    _fail_everywhere(Path(folder))


def _fail_everywhere(root: Path) -> None:
    """Fail on rank 0 alone, at once and midway; every rank must raise the error."""
    mesh = build_mesh("cpu", 2)
    made = make("lora-llama-linear", root, mesh)
    (root / "a-file").touch()
    with pytest.raises(UserError, match="cannot write"):
        made.save(root / "a-file" / "student")
    with _full_disk(), pytest.raises(UserError, match="cannot write"):
        made.save(root / "midway")
    # The ranks are still in step: this save succeeds.
    made.save(root / "afterwards")


@contextlib.contextmanager
def _full_disk():
    """Limit the files of this process to a quarter of the student's size."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a directory for every case."""
    folder = tmp_path_factory.mktemp("export")
    for name, case in CASES.items():
        make_model(case.family, folder / name / "teacher")
        (folder / name / "table.json").write_text(json.dumps(TABLE))
    (folder / "tokenizer.json").write_text('{"a": "tokenizer"}')
    _save_all(str(folder), 1)
    run_ranks(2, _save_on_two_ranks, str(folder))
    return folder


def merged(name: str, case: StudentCase, originals: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return what a tensor of the saved student must be."""
    original = originals[name].float()
    if case.mode != "lora":
        return original + shift(name, original.shape)
    _, _, layer, _, module, _ = name.split(".")
    target = "qkvo".index(module[0])
    lora_a = initial_a(6, original.shape[1], int(layer) * 4 + target)
    prefix = name.removesuffix("weight")
    lora_a = lora_a + shift(f"{prefix}lora_A", lora_a.shape)
    lora_b = shift(f"{prefix}lora_B", (original.shape[0], 6))
    return original + 9.0 / 6 * (lora_b @ lora_a)


def is_trained(name: str, case: StudentCase) -> bool:
    """Whether a case trains a tensor."""
    if case.mode == "all":
        return True
    kinds = ("weight",) if case.mode == "lora" else ("weight", "bias")
    return any(f".{t}_proj.{kind}" in name for t in case.targets for kind in kinds)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_transformers_gives_the_trainer_s_logits(name, tp, saved):
    logits = torch.load(saved / name / f"logits-tp{tp}.pt")
    for text, ours in zip(TEXTS, logits, strict=True):
        expected = transformers_logits(saved / name / f"student-tp{tp}", text)
        assert_same_logits(ours, expected)


@pytest.mark.parametrize("name", CASES)
def test_trained_tensors_are_merged_and_the_rest_is_bit_identical(name, saved):
    case = CASES[name]
    spec = read_spec(saved / name / "teacher")
    stored = load_file(saved / name / "teacher" / "model.safetensors")
    source = unfused(stored, spec)
    for tp in (1, 2):
        student = load_file(saved / name / f"student-tp{tp}" / "model.safetensors")
        assert student.keys() == stored.keys()
        student = unfused(student, spec)
        for tensor, value in student.items():
            if is_trained(tensor, case):
                torch.testing.assert_close(value, merged(tensor, case, source))
            else:
                assert torch.equal(value, source[tensor]), tensor


@pytest.mark.parametrize("name", CASES)
def test_the_config_has_rope_in_both_spellings(name, saved):
    folder = saved / name / "student-tp1"
    config = json.loads((folder / "config.json").read_text())
    teacher = json.loads((saved / name / "teacher" / "config.json").read_text())
    rope = dict(config["rope_parameters"])
    if "phi3" in name:
        # The spelling of Phi-3's class; its lists are all that it derives nothing from.
        assert rope.pop("partial_rotary_factor") == config["partial_rotary_factor"] == 0.5
    scaling = config["rope_scaling"] or {"rope_type": "default"}
    if name == "lora-phi3-longrope":
        lists = {key: rope[key] for key in ("short_factor", "long_factor")}
        assert scaling == {"type": "longrope", **lists}
    else:
        assert {**scaling, "rope_theta": config["rope_theta"]} == rope
    assert config["max_position_embeddings"] == FACTOR * NATIVE
    assert config["head_dim"] == (16 if "qwen3" in name else 8)
    changed = {
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "max_position_embeddings",
        "original_max_position_embeddings",
        "partial_rotary_factor",
        "head_dim",
    }
    assert {k: v for k, v in config.items() if k not in changed} == {
        k: v for k, v in teacher.items() if k not in changed
    }


def test_generation_config_and_tokenizer_files_are_copied(saved):
    folder = saved / "lora-llama-linear"
    files = sorted(file.name for file in (folder / "student-tp2").iterdir())
    assert files == ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    for name, origin in (("generation_config.json", folder / "teacher"), ("tokenizer.json", saved)):
        assert (folder / "student-tp2" / name).read_bytes() == (origin / name).read_bytes()


def test_a_rank_that_cannot_write_stops_all(saved):
    """The ranks checked the errors; here are the directories that they left."""
    assert not (saved / "midway").exists()
    assert (saved / "afterwards" / "model.safetensors").exists()


def test_transformers_4_gives_the_trainer_s_logits(saved):
    folders = [saved / name / "student-tp1" for name in CASES]
    theirs = logits_of_transformers_4(folders, TEXTS, saved / "texts.pt")
    for name, folder in zip(CASES, folders, strict=True):
        logits = torch.load(saved / name / "logits-tp1.pt")
        for ours, expected in zip(logits, theirs[folder], strict=True):
            assert_same_logits(ours, expected)


@pytest.fixture
def mesh():
    """A mesh of one process."""
    return build_mesh("cpu", 1)


@pytest.fixture
def made(mesh, saved):
    """A student that one process saves."""
    made = make("lora-llama-linear", saved, mesh)
    pretend_to_train(made.student)
    return made


def in_bfloat16(source: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Copy a model as bfloat16 files; return its tensors."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    tensors = {name: value.bfloat16() for name, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tensors


@pytest.mark.parametrize("mode", ["lora", "weights"])
def test_the_dtype_of_the_files_is_kept_whatever_dtype_is_computed_in(mode, mesh, saved, tmp_path):
    case = StudentCase("llama", mode, "linear")
    source = in_bfloat16(saved / "lora-llama-linear" / "teacher", tmp_path / "teacher")
    student = make_student(make_config(case, tmp_path / "teacher", tmp_path / "table"), mesh)
    pretend_to_train(student.student)
    student.save(tmp_path / "student")
    for name, value in load_file(tmp_path / "student" / "model.safetensors").items():
        assert value.dtype == torch.bfloat16
        if is_trained(name, case):
            assert not torch.equal(value, source[name])
            expected = merged(name, case, source)
            torch.testing.assert_close(value.float(), expected, rtol=2**-8, atol=1e-6)
        else:
            assert torch.equal(value, source[name])


def test_masters_start_from_the_files_and_not_from_rounded_weights(mesh, saved, tmp_path):
    """With computation in bfloat16, weights that training does not change keep their bits."""
    teacher = saved / "all-biases-llama3" / "teacher"
    case = StudentCase("llama-biases", "all", "linear", compute_dtype="bfloat16")
    make_student(make_config(case, teacher, tmp_path / "table"), mesh).save(tmp_path / "student")
    source = load_file(teacher / "model.safetensors")
    for name, value in load_file(tmp_path / "student" / "model.safetensors").items():
        assert torch.equal(value, source[name]), name


def test_a_tied_head_in_the_files_stays_tied(mesh, saved, tmp_path):
    shutil.copytree(saved / "all-tied-table" / "teacher", tmp_path / "teacher")
    tensors = load_file(tmp_path / "teacher" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "teacher" / "model.safetensors", {"format": "pt"})
    table = saved / "all-tied-table" / "table.json"
    config = make_config(CASES["all-tied-table"], tmp_path / "teacher", table)
    student = make_student(config, mesh)
    pretend_to_train(student.student)
    student.save(tmp_path / "student")
    ours = decoder_logits(student.student.decoder, TEXTS[0])
    assert_same_logits(ours, transformers_logits(tmp_path / "student", TEXTS[0]))


def test_large_students_are_sharded_with_an_index(made, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_SHARD_BYTES", 20_000)
    made.save(tmp_path / "student")
    files = sorted((tmp_path / "student").glob("*.safetensors"))
    assert [f.name for f in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    shards = {file.name: load_file(file) for file in files}
    sizes = [sum(t.nbytes for t in tensors.values()) for tensors in shards.values()]
    assert len(files) > 3 and max(sizes) <= 20_000
    index = json.loads((tmp_path / "student" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"] == {n: file for file, tensors in shards.items() for n in tensors}
    single = load_file(saved / "lora-llama-linear" / "student-tp1" / "model.safetensors")
    joined = {name: t for tensors in shards.values() for name, t in tensors.items()}
    assert joined.keys() == single.keys()
    assert all(torch.equal(joined[name], value) for name, value in single.items())
    ours = decoder_logits(made.student.decoder, TEXTS[0])
    assert_same_logits(ours, transformers_logits(tmp_path / "student", TEXTS[0]))


@contextlib.contextmanager
def _interrupted(made):
    """Press Ctrl-C while the tenth tensor is read."""
    read, names = made.source.read, []

    def stop(name, held=None):
        names.append(name)
        if len(names) == 10:
            raise KeyboardInterrupt
        return read(name, held)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made.source, "read", stop)
        yield


@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt])
def test_an_interrupted_save_leaves_the_previous_one_unchanged(error, made, tmp_path):
    directory = tmp_path / "student"

    def fail():
        trouble = _full_disk() if error is UserError else _interrupted(made)
        with trouble, pytest.raises(error):
            made.save(directory)

    def contents():
        return {file.name: file.read_bytes() for file in directory.iterdir()}

    fail()
    assert not directory.exists(), "a part of a directory has the final name"
    made.save(directory)
    first = contents()
    pretend_to_train(made.student)
    fail()
    assert contents() == first
    made.save(directory)
    assert contents().keys() == first.keys() and contents() != first
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_a_directory_that_somebody_renamed_is_left_alone(made, tmp_path):
    """Such as the student of an earlier run."""
    for name in ("student.old", "student"):
        made.save(tmp_path / name)
    made.save(tmp_path / "student")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student", "student.old"]


def test_an_unwritable_directory_is_named_in_one_sentence(made, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*student") as caught:
        made.save(tmp_path / "file" / "student")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("replicas", "sizes"), [(1, [2, 2, 2, 1]), (1, [2, 2, 1, 0]), (2, [4, 4, 3, 3])]
)
def test_slices_are_gathered_in_order_and_once(replicas, sizes):
    """Uneven slices, a rank without rows, and slices that two ranks hold."""
    run_ranks(4, _gather, replicas, sizes)


def _gather(replicas: int, sizes: list[int]) -> None:
    axis = build_mesh("cpu", 4).tp
    starts = [sum(sizes[: rank // replicas * replicas : replicas]) for rank in range(4)]
    full = torch.arange(2.0 * sum(sizes[::replicas])).view(2, -1).T.contiguous()
    for dim, tensor in ((0, full), (1, full.T.contiguous())):
        start, length = starts[axis.rank], sizes[axis.rank]
        held = ParameterSlice(tuple(tensor.shape), dim, start, length, replicas)
        assert torch.equal(export.gather_full(held.cut(tensor), held, axis), tensor)
    assert export.gather_full(full, full_slice(tuple(full.shape), 4), axis) is full


def test_an_export_leaves_the_student_as_it_is(made, tmp_path):
    """A pair is added to a weight of an earlier stage, which the student keeps."""
    name = "model.layers.0.self_attn.q_proj.weight"
    made.student.carried[name] = torch.ones(made.student.decoder.slices[name].full_shape)
    made.save(tmp_path / "student")
    assert (made.student.carried[name] == 1).all()
    stem = name.removesuffix(".weight")
    lora_a, lora_b = (made.student.value(f"{stem}.lora_{part}") for part in "AB")
    exported = load_file(tmp_path / "student" / "model.safetensors")[name]
    torch.testing.assert_close(exported, 1 + 9.0 / 6 * (lora_b @ lora_a))
