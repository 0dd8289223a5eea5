"""The plan: windows, the student's config, its tokenizer, and what cannot work."""

from __future__ import annotations

import json
import shutil

import pytest

from megalard.errors import UserError
from megalard.training.plan import naming_stream
from tests.config.loading import load
from tests.jobs import NATIVE
from tests.models import change_config, scale_rope
from tests.small_tokenizers import save_fast_tokenizer


def test_the_student_has_the_teacher_s_shape_and_a_longer_window(planned):
    plan = planned("rope.factor=8").plan
    assert plan.source is plan.teacher
    assert (plan.native_window, plan.student.max_positions, plan.factor) == (NATIVE, 8 * NATIVE, 8)
    assert plan.student_config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert plan.student.hidden_size == plan.teacher.spec.hidden_size


def test_a_shorter_native_window_may_be_given(planned):
    """The window of the student, and RoPE that derives from the window, follow it."""
    run = planned("model.native_context=32", "rope.type=yarn", "data.context_length=16")
    assert (run.plan.native_window, run.plan.student.max_positions) == (32, 128)
    assert run.plan.student.rope["original_max_position_embeddings"] == 32
    with pytest.raises(UserError, match="context_length 33 is longer than the teacher's native"):
        planned("model.native_context=32", "data.context_length=33")


def test_a_longer_native_window_is_refused(planned):
    sentence = "model.native_context is 65, but .* reads 64 positions: leave it out, or give a"
    with pytest.raises(UserError, match=sentence):
        planned("model.native_context=65")


def test_a_student_of_its_own_keeps_its_rope_if_asked(planned, small_job, tmp_path):
    student = shutil.copytree(small_job / "model", tmp_path / "student")
    scale_rope(student)
    plan = planned(f"model.student={student}", "rope.type=checkpoint").plan
    assert plan.source is not plan.teacher
    assert plan.source.directory == student
    # Linear scaling by 2 of a native window of 64, although config.json names 64 positions.
    assert plan.student.max_positions == 2 * NATIVE and plan.factor == 2
    assert plan.student.rope == {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    assert plan.origins.base is plan.source and plan.origins.teacher is plan.teacher


def test_the_origin_of_a_student_of_the_teacher_is_noted_once(planned):
    plan = planned().plan
    assert plan.origins.base is plan.teacher and plan.origins.teacher is None


def test_another_tokenizer_may_be_given(planned, tmp_path):
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    folder = save_fast_tokenizer(tmp_path / "tokenizer", **settings)
    plan = planned(f"model.tokenizer={folder}").plan
    assert plan.tokenizer.directory == folder
    assert {file.source.parent for file in plan.companions} >= {folder}


def test_companions_have_the_lengths_of_the_student(planned, small_job, tmp_path):
    model = shutil.copytree(small_job / "model", tmp_path / "model")
    config = model / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": "</s>", "model_max_length": NATIVE}))
    (model / "generation_config.json").write_text(json.dumps({"max_length": NATIVE}))
    plan = planned(f"model.teacher={model}").plan
    contents = {file.name: file.content for file in plan.companions}
    for name, key in (
        ("tokenizer_config.json", "model_max_length"),
        ("generation_config.json", "max_length"),
    ):
        assert json.loads(contents[name])[key] == 4 * NATIVE


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("data.context_length=65",), "context_length 65 is longer than the teacher's native"),
        (
            (
                "objective.relations={q: 0, k: 0, v: 0}",
                "objective.language_modelling=1",
                "data.context_length=257",
            ),
            "context_length 257 is longer than the student's window: use at most 256, or raise",
        ),
        (("optimizer.micro_batch=3",), "a multiple of 3"),
        (("objective.layers=[3]",), "objective.layers names layer 3"),
        (("parallel.shard_weights=true",), "shard_weights divides weights over dp and cp ranks"),
    ],
)
def test_what_cannot_work_is_refused(options, sentence, planned):
    with pytest.raises(UserError, match=sentence):
        planned(*options)


def test_a_text_that_needs_no_teacher_may_be_as_long_as_the_student_s_window(planned):
    options = ("objective.relations={q: 0, k: 0, v: 0}", "objective.language_modelling=1")
    assert planned(*options, "data.context_length=256").plan.factor == 4


def test_a_rope_that_cannot_be_built_is_refused_before_weights_are_read(
    planned, small_job, tmp_path
):
    model = shutil.copytree(small_job / "model", tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"")
    change_config(model, rope_parameters={"rope_type": "linear", "rope_theta": 1e4})
    # Not "rope" alone, which is in the name of the test's directory.
    with pytest.raises(UserError, match=r"config.json is refused .*'rope_type'='linear'"):
        planned(f"model.teacher={model}")


@pytest.mark.parametrize(
    ("stage", "overrides", "sentence"),
    [
        ("main", (), "too long"),
        ("first", (), "stage first: too long"),
        ("main", ("--streams={a: {objective: {logits_kl: 1}}}",), "stream a: too long"),
        (
            "first",
            ("--streams={a: {objective: {logits_kl: 1}}}",),
            "stage first, stream a: too long",
        ),
    ],
)
def test_an_error_names_stage_and_stream_where_there_are_several(stage, overrides, sentence):
    with pytest.raises(UserError) as caught, naming_stream("a", load(*overrides), stage):
        raise UserError("too long")
    assert str(caught.value) == sentence
