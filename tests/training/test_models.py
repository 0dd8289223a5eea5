"""Loading teacher and student: shared weights, masters, and the student of a later stage."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalard.checkpoint.build import get_parameter
from megalard.errors import UserError
from megalard.training.models import load_models, load_teacher, next_student, student_to_restore
from tests.conversions import to_sharded
from tests.jobs import flip_bit
from tests.students import pretend_to_train

Q = "model.layers.1.self_attn.q_proj"
TWO = "stages={a: {}, b: {trainable: {mode: weights, weights: [q]}}}"


def test_what_is_not_trained_exists_once(planned):
    run = planned("trainable.mode=weights", "trainable.weights=[q]")
    teacher, student = load_models(run.stages[0], run.plan, run.mesh)
    shared = {
        name
        for name, parameter in student.decoder.named_parameters()
        if parameter is get_parameter(teacher, name)
    }
    trained = {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)}
    assert set(student.trained) == trained
    assert {name for name, _ in teacher.named_parameters()} - shared == trained


def test_trained_weights_are_fp32_from_the_files(planned, small_job, tmp_path):
    """Not the teacher's weights, which are rounded to the dtype of the activations."""
    run = planned("trainable.mode=weights", "model.compute_dtype=bfloat16")
    teacher, student = load_models(run.stages[0], run.plan, run.mesh)
    file = load_file(small_job / "model" / "model.safetensors")
    assert torch.equal(student.trained[f"{Q}.weight"], file[f"{Q}.weight"])
    assert get_parameter(teacher, f"{Q}.weight").dtype == torch.bfloat16
    assert torch.equal(get_parameter(teacher, f"{Q}.weight"), file[f"{Q}.weight"].bfloat16())


def test_a_student_with_weights_of_its_own_shares_none(planned, small_job, tmp_path):
    model = shutil.copytree(small_job / "model", tmp_path / "student")
    tensors = {k: v + 1 for k, v in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    run = planned(f"model.student={model}")
    teacher, student = load_models(run.stages[0], run.plan, run.mesh)
    for name, parameter in teacher.named_parameters():
        theirs = get_parameter(student.decoder, name)
        torch.testing.assert_close(theirs, parameter + 1)


def test_recorded_checksums_are_compared(planned, small_job, tmp_path):
    to_sharded(small_job / "model", tmp_path / "sharded")
    run = planned(f"model.teacher={tmp_path / 'sharded'}")
    load_models(run.stages[0], run.plan, run.mesh)
    flip_bit(next((tmp_path / "sharded").glob("weights-*.safetensors")))
    with pytest.raises(UserError, match="is damaged"):
        load_models(run.stages[0], run.plan, run.mesh)


def test_a_teacher_can_be_loaded_again(planned):
    run = planned()
    teacher, _ = load_models(run.stages[0], run.plan, run.mesh)
    again = load_teacher(run.config, run.plan, run.mesh)
    for name, parameter in teacher.named_parameters():
        assert torch.equal(parameter, get_parameter(again, name))


def test_the_next_stage_starts_from_the_merged_weights(planned, small_job):
    """W + alpha / rank * B A, where alpha / rank is 8 / 4."""
    run = planned(TWO)
    _, first = load_models(run.stages[0], run.plan, run.mesh)
    pretend_to_train(first)
    trained = {name: value.detach().clone() for name, value in first.trained.items()}
    second = next_student(first, run.stages[1], run.plan, run.mesh)
    assert sum(value.numel() for value in first.trained.values()) == 0, "its memory is free"
    file = load_file(small_job / "model" / "model.safetensors")
    for p in "qkv":
        stem = f"model.layers.0.self_attn.{p}_proj"
        update = trained[f"{stem}.lora_B"] @ trained[f"{stem}.lora_A"]
        expected = file[f"{stem}.weight"] + 2 * update
        torch.testing.assert_close(get_parameter(second.decoder, f"{stem}.weight"), expected)
    # q is trained further; what k and v became is carried along.
    assert {name.split(".")[-2] for name in second.trained} == {"q_proj"}
    assert {name.split(".")[-2] for name in second.carried} == {"k_proj", "v_proj"}
    assert get_parameter(second.decoder, f"{Q}.weight") is second.trained[f"{Q}.weight"]
    head = "lm_head.weight"
    assert get_parameter(second.decoder, head) is get_parameter(first.decoder, head)


def test_a_stage_that_keeps_the_optimizer_keeps_the_student(planned):
    run = planned("stages={a: {}, b: {keep_optimizer: true}}")
    _, first = load_models(run.stages[0], run.plan, run.mesh)
    assert next_student(first, run.stages[1], run.plan, run.mesh) is first
    assert student_to_restore(first, run.stages, 1, run.plan, run.mesh) is first


def test_a_student_to_restore_has_the_tensors_of_its_stage(planned):
    run = planned(TWO)
    _, first = load_models(run.stages[0], run.plan, run.mesh)
    expected = next_student(first, run.stages[1], run.plan, run.mesh)
    restored = student_to_restore(first, run.stages, 1, run.plan, run.mesh)
    assert restored.trained.keys() == expected.trained.keys()
    shapes = {name: expected.value(name).shape for name in expected.changed}
    assert {name: restored.value(name).shape for name in restored.changed} == shapes
