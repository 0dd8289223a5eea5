"""The student: which parameters it trains, written out, and which it shares with the teacher."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch

from megalard.checkpoint.huggingface import HuggingFaceWeights
from megalard.config.objective import ObjectiveConfig, RelationWeights
from megalard.config.schema import DataConfig, LoraConfig, RopeConfig, StreamConfig, TrainableConfig
from megalard.distill.objective import is_reached
from megalard.distill.student import Student, build_student, changed_weights, merged_weights
from megalard.model.lora import DropoutKey
from megalard.model.rope import rope_table, scaled_config
from megalard.model.spec import read_spec, spec_from_config
from megalard.parallel.mesh import SINGLE, Axis
from tests.command_line import user_error
from tests.logits import load
from tests.models import make_model

LAYERS = 3
ALL_NAMES_OF_A_LAYER = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher, a model of the same shape, and one of another shape."""
    folder = tmp_path_factory.mktemp("student")
    make_model("llama", folder / "teacher")
    make_model("llama", folder / "start", seed=1)
    make_model("llama", folder / "wider", num_attention_heads=8)
    return folder


def build(
    folder,
    trainable: TrainableConfig,
    relations: dict | None = None,
    axis: Axis = SINGLE,
    **options,
) -> Student:
    """Build a student whose loss has some relations, or the logits if none are given."""
    spec = read_spec(folder / "teacher")
    student_spec = spec_from_config(scaled_config(spec, RopeConfig("linear", 4.0), 64), "student")
    weights = RelationWeights(**{"q": 0.0, "k": 0.0, "v": 0.0, **(relations or {})})
    objective = ObjectiveConfig(weights, logits_kl=0.0 if relations else 1.0)
    streams = {"main": StreamConfig(objective, DataConfig(["unused"]))}
    return build_student(
        options.pop("teacher", None) or load(folder / "teacher", axis),
        options.pop("spec", student_spec),
        rope_table(student_spec),
        axis,
        trainable,
        partial(is_reached, streams=streams, num_layers=LAYERS),
        options.pop("seed", 3),
        **options,
    )


def lora(*targets: str) -> TrainableConfig:
    return TrainableConfig("lora", LoraConfig(list(targets), rank=6, alpha=9.0, dropout=0.0))


def pairs(*projections: str) -> set[str]:
    """Return the names of LoRA pairs, for projections such as ``2.q``."""
    return {
        f"model.layers.{layer}.self_attn.{kind}_proj.lora_{part}"
        for layer, kind in (name.split(".") for name in projections)
        for part in "AB"
    }


@pytest.mark.parametrize(
    ("relations", "expected"),
    [
        # The published method. The last layer's q, k and v are read by the loss itself.
        ({"q": 1, "k": 1, "v": 1}, ("0.q 0.k 0.v 1.q 1.k 1.v 2.q 2.k 2.v")),
        # Q Kᵀ alone depends on k of the last layer too, and not on its v.
        ({"qk": 1}, "0.q 0.k 0.v 1.q 1.k 1.v 2.q 2.k"),
        ({"v": 1}, "0.q 0.k 0.v 1.q 1.k 1.v 2.v"),
        ({"q": 1}, "0.q 0.k 0.v 1.q 1.k 1.v 2.q"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_the_trained_lora_pairs_are_those_the_loss_depends_on(relations, expected, folder):
    student = build(folder, lora("q", "k", "v"), relations)
    assert student.trained.keys() == pairs(*expected.split())


def test_the_output_projection_of_the_last_layer_is_out_of_reach_of_relations(folder):
    student = build(folder, lora("q", "o"), {"q": 1})
    assert student.trained.keys() == pairs("0.q", "0.o", "1.q", "1.o", "2.q")
    assert build(folder, lora("o")).trained.keys() == pairs("0.o", "1.o", "2.o")


def test_weights_that_are_trained_are_those_of_the_listed_projections(folder):
    student = build(folder, TrainableConfig("weights", weights=["q", "o"]), {"qk": 1})
    expected = {
        f"model.layers.{layer}.self_attn.{kind}_proj.weight"
        for layer, kind in ((0, "q"), (0, "o"), (1, "q"), (1, "o"), (2, "q"))
    }
    assert student.trained.keys() == expected


def test_all_trains_everything_that_the_loss_depends_on(folder):
    everything = {
        f"model.layers.{layer}.{part}.weight"
        for layer in range(LAYERS)
        for part in ALL_NAMES_OF_A_LAYER
    }
    ends = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert build(folder, TrainableConfig("all")).trained.keys() == everything | ends
    # The relation V Vᵀ reads v of the last layer and nothing behind it.
    last = {f"model.layers.2.{part}.weight" for part in ALL_NAMES_OF_A_LAYER}
    reached = {
        "model.layers.2.input_layernorm.weight",
        "model.layers.2.self_attn.v_proj.weight",
    }
    student = build(folder, TrainableConfig("all"), {"v": 1})
    assert student.trained.keys() == everything - last | reached | {"model.embed_tokens.weight"}


def test_frozen_weights_are_the_teacher_s_objects_and_trained_ones_fp32_copies(folder):
    teacher = load(folder / "teacher").bfloat16()
    student = build(folder, TrainableConfig("weights", weights=["q"]), {"q": 1}, teacher=teacher)
    theirs = dict(teacher.named_parameters())
    for name, parameter in student.decoder.named_parameters():
        if name in student.trained:
            assert parameter.dtype == torch.float32 and parameter is not theirs[name]
            assert parameter.requires_grad and torch.equal(parameter, theirs[name].float())
        else:
            assert parameter is theirs[name] and not parameter.requires_grad


def test_masters_are_read_from_the_files_and_not_from_rounded_weights(folder):
    teacher = load(folder / "teacher").bfloat16()
    files = HuggingFaceWeights(folder / "teacher")
    mode = TrainableConfig("weights", weights=["q"])
    student = build(folder, mode, {"q": 1}, teacher=teacher, masters=files)
    for name, parameter in student.trained.items():
        assert torch.equal(parameter, files.read(name))
        assert not torch.equal(parameter, parameter.bfloat16().float())


def test_a_student_with_weights_of_its_own_shares_nothing(folder):
    files = HuggingFaceWeights(folder / "start")
    teacher = load(folder / "teacher")
    mode = TrainableConfig("weights", weights=["q"])
    student = build(folder, mode, {"q": 1}, teacher=teacher, weights=files, masters=files)
    theirs = {id(parameter) for parameter in teacher.parameters()}
    for name, parameter in student.decoder.named_parameters():
        assert id(parameter) not in theirs and torch.equal(parameter, files.read(name)), name


def test_b_starts_at_zero_and_every_a_is_different(folder):
    student = build(folder, lora("q", "k", "v", "o"))
    a = {name: p for name, p in student.trained.items() if name.endswith("lora_A")}
    b = {name: p for name, p in student.trained.items() if name.endswith("lora_B")}
    assert len(a) == len(b) == 12 and not any(p.any() for p in b.values())
    assert all(p.shape == (6, 32) and p.dtype == torch.float32 for p in a.values())
    assert len({p[0, 0].item() for p in a.values()}) == 12
    # As in peft, A is uniform between -1 / sqrt(features) and its negative: 2,304 values, whose
    # standard deviation is 1 / sqrt(3 features), with an error of 1 %.
    values = torch.cat([p.detach().flatten() for p in a.values()])
    assert 0.99 / 32**0.5 < float(values.abs().max()) <= 1 / 32**0.5
    assert float(values.std()) == pytest.approx((3 * 32) ** -0.5, rel=0.04)
    again = build(folder, lora("q", "k", "v", "o")).trained
    assert all(torch.equal(again[name], p) for name, p in a.items())
    other = build(folder, lora("q", "k", "v", "o"), seed=4).trained
    assert not any(torch.equal(other[name], p) for name, p in a.items())


def test_ranks_hold_slices_of_the_same_pair(folder):
    full = build(folder, lora("q", "k", "o")).trained
    for rank in range(2):
        part = build(folder, lora("q", "k", "o"), axis=Axis(None, rank, 2)).trained
        prefix = "model.layers.0.self_attn."
        assert torch.equal(part[f"{prefix}q_proj.lora_A"], full[f"{prefix}q_proj.lora_A"])
        columns = slice(16 * rank, 16 * rank + 16)
        assert torch.equal(
            part[f"{prefix}o_proj.lora_A"], full[f"{prefix}o_proj.lora_A"][:, columns]
        )
        assert part[f"{prefix}q_proj.lora_B"].shape == (16, 6)
        assert part[f"{prefix}k_proj.lora_B"].shape == (8, 6)
        assert part[f"{prefix}o_proj.lora_B"].shape == (32, 6)


def test_alpha_over_rank_and_the_rate_of_dropout_are_those_of_the_configuration(folder):
    trainable = TrainableConfig("lora", LoraConfig(["q", "o"], rank=4, alpha=10.0, dropout=0.25))
    student = build(folder, trainable)
    places = set()
    for layer in student.decoder.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.o_proj):
            assert projection.lora_scale == 2.5 and projection.lora_dropout.rate == 0.25
            assert projection.lora_dropout.key is student.dropout
            places.add(projection.lora_dropout.place)
        assert layer.self_attn.k_proj.lora_A is None
    assert len(places) == 2 * LAYERS, "two projections with different inputs share a mask"


def test_a_loss_that_depends_on_nothing_trained_is_refused(folder):
    """The output projection of the last layer is out of reach of the relations of the first."""
    spec = read_spec(folder / "teacher")
    sentence = user_error(
        build_student,
        load(folder / "teacher"),
        spec,
        rope_table(spec),
        SINGLE,
        lora("q"),
        lambda name: False,
        0,
    )
    assert sentence.startswith("nothing is trained: the loss does not depend on any of the weights")


def test_a_student_of_another_shape_is_refused(folder):
    wider = read_spec(folder / "wider")
    files = HuggingFaceWeights(folder / "wider")
    sentence = user_error(build, folder, lora("q"), {"q": 1}, weights=files, spec=wider)
    assert "the student's num_heads is 8 but the teacher's is 4" in sentence
    assert sentence.endswith("so model.student must have the teacher's shape")
    spec = read_spec(folder / "teacher")
    for name in ("num_layers", "num_kv_heads"):
        other = dataclasses.replace(spec, **{name: 1})
        sentence = user_error(build, folder, lora("q"), {"q": 1}, weights=files, spec=other)
        assert f"the student's {name} is 1 but the teacher's is {getattr(spec, name)}" in sentence


def test_what_earlier_stages_changed_goes_on_to_the_next_stage(folder):
    """A stage that does not train these weights hands them to the next stage unchanged."""
    decoder = load(folder / "teacher")
    name, trained = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"
    carried = {name: torch.full((32,), 3.0)}
    values = {trained: torch.nn.Parameter(torch.ones(2, 2))}
    handed_over = merged_weights(Student(decoder, values, DropoutKey(), carried), None)
    assert handed_over.keys() == {name, trained}
    assert torch.equal(handed_over[name], carried[name])
    assert torch.equal(handed_over[trained], torch.ones(2, 2))


def test_a_stage_changes_the_weights_that_its_loss_reaches():
    names = [f"model.layers.{n}.self_attn.{p}_proj.weight" for n in (0, 1) for p in "qkvo"]
    first_layer = {name for name in names if ".layers.0." in name}
    lora_of_q = TrainableConfig(lora=LoraConfig(targets=["q"]))
    assert changed_weights(names, lora_of_q, first_layer.__contains__) == {names[0]}
