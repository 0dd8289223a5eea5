"""model, rope and trainable: which models are read, how RoPE is scaled, and what is trained."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megalard.checkpoint.open import open_model
from tests.settings.tiny_run import M, TinyRun, changed, projections

THETA, HEAD_DIM, FACTOR = 1e4, 8, 4
NATIVE = [THETA ** (-2 * i / HEAD_DIM) for i in range(HEAD_DIM // 2)]
MLP = "model.layers.0.mlp.up_proj.weight"


def frequencies(run: TinyRun) -> list[float]:
    """Return the frequencies that transformers reads from the exported config.json."""
    config = LlamaConfig(**run.config)
    rotary = LlamaRotaryEmbedding(config)
    positions = torch.arange(config.max_position_embeddings)[None]
    rotary(torch.zeros(1), positions)  # longrope has other frequencies for long text
    return rotary.inv_freq.double().tolist()


def same(actual: list[float], expected: list[float]) -> bool:
    return actual == pytest.approx(expected, rel=1e-5)


def test_model_teacher(run, job):
    student = run(f"model.teacher={job / 'other'}").student
    assert torch.equal(student[MLP], open_model(job / "other").weights.read(MLP))
    assert not torch.equal(student[MLP], run().student[MLP])


def test_model_student(run, job):
    """The student starts from weights that are not the teacher's, and learns from the teacher."""
    other_student = run(f"model.student={job / 'other'}")
    assert torch.equal(other_student.student[MLP], open_model(job / "other").weights.read(MLP))
    assert other_student.losses[0] > 2 * run().losses[0]


def test_model_tokenizer(run, job, tmp_path_factory):
    """A tokenizer whose ids are another permutation of the bytes."""
    folder = tmp_path_factory.mktemp("tokenizer")
    content = json.loads((job / "teacher" / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {k: 255 - i if i < 256 else i for k, i in vocabulary.items()}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    tokens = run(f"model.tokenizer={folder}").store.tokens
    assert tokens.tolist() == [255 - i for i in run().store.tokens.tolist()]


def test_model_native_context(run):
    shorter = run("model.native_context=32", "rope.type=yarn")
    assert shorter.config["max_position_embeddings"] == 128
    assert shorter.config["rope_parameters"]["original_max_position_embeddings"] == 32
    assert run().config["max_position_embeddings"] == FACTOR * M


def test_model_compute_dtype(run):
    rounded, exact = run("model.compute_dtype=bfloat16").losses[0], run().losses[0]
    # bf16 has 8 bits: the loss is off by some 2^-9, and not by nothing.
    assert 1e-6 < abs(rounded / exact - 1) < 0.05


def test_rope_type(run):
    """The frequencies of every type, by formulas of this file."""
    assert same(frequencies(run()), [w / FACTOR for w in NATIVE])
    theta = THETA * FACTOR ** (HEAD_DIM / (HEAD_DIM - 2))
    abf = [theta ** (-2 * i / HEAD_DIM) for i in range(HEAD_DIM // 2)]
    assert same(frequencies(run("rope.type=abf")), abf)
    assert same(frequencies(run("rope.type=longrope")), [w / FACTOR for w in NATIVE])
    assert same(frequencies(run("rope.type=yarn")), yarn(M))
    assert same(frequencies(run("rope.type=llama3")), llama3(M))
    losses = {run(f"rope.type={kind}").losses[0] for kind in ("abf", "yarn", "llama3")}
    assert len(losses | {run().losses[0]}) == 4


def yarn(original: int) -> list[float]:
    """Return YaRN's frequencies (arXiv 2309.00071, equations 17 to 23), with its 32 and 1."""

    def place(rotations: float) -> float:
        wavelength = original / (rotations * 2 * math.pi)
        return HEAD_DIM * math.log(wavelength) / (2 * math.log(THETA))

    low, high = max(math.floor(place(32)), 0), min(math.ceil(place(1)), HEAD_DIM - 1)
    result = []
    for i, w in enumerate(NATIVE):
        share = min(1, max(0, (i - low) / max(high - low, 0.001)))
        result.append(share * w / FACTOR + (1 - share) * w)
    return result


def llama3(original: int) -> list[float]:
    """Return the frequencies of Llama 3.1: scaled if slow, kept if fast, between in between."""
    result = []
    for w in NATIVE:
        turns = original * w / (2 * math.pi)
        share = min(1, max(0, (turns - 1) / (4 - 1)))
        result.append((1 - share) * w / FACTOR + share * w)
    return result


def test_rope_factor(run):
    by_eight = run("rope.factor=8")
    assert by_eight.config["max_position_embeddings"] == 8 * M
    assert same(frequencies(by_eight), [w / 8 for w in NATIVE])
    assert by_eight.losses[0] != run().losses[0]


def test_rope_theta(run):
    given = run("rope.type=abf", "rope.theta=77777")
    assert same(frequencies(given), [77777 ** (-2 * i / HEAD_DIM) for i in range(HEAD_DIM // 2)])
    assert given.losses[0] != run("rope.type=abf").losses[0]


def test_rope_long_factors(run):
    factors = [1.0, 2.0, 3.0, 5.0]
    given = run("rope.type=longrope", f"rope.long_factors={factors}")
    expected = [w / f for w, f in zip(NATIVE, factors, strict=True)]
    assert same(frequencies(given), expected)
    assert given.losses[0] != run("rope.type=longrope").losses[0]


def test_rope_table(run, tmp_path_factory):
    table = tmp_path_factory.mktemp("table") / "table.json"
    table.write_text("[1.0, 0.3, 0.02, 0.0005]")
    given = run("rope.type=table", f"rope.table={table}")
    assert same(frequencies(given), [1.0, 0.3, 0.02, 0.0005])
    assert given.losses[0] != run().losses[0]


EVERYTHING = ("objective.logits_kl=1", "optimizer.learning_rate=1e-1")


def test_trainable_mode(run, job):
    """What is trained, by name. With the logits in the loss every weight is reached."""
    teacher = job / "teacher"
    lora = run(*EVERYTHING)
    pairs = {name.removesuffix(".lora_A").removesuffix(".lora_B") for name in lora.steps[0].after}
    assert pairs == {name.removesuffix(".weight") for name in projections("q", "k", "v")}
    assert len(lora.steps[0].after) == 12 and changed(lora, teacher) == projections("q", "k", "v")
    weights = run("trainable.mode=weights", *EVERYTHING)
    assert set(weights.steps[0].after) == projections("q", "k", "v") == changed(weights, teacher)
    every = run("trainable.mode=all", *EVERYTHING)
    names = projections("q", "k", "v", "o")
    for layer in range(2):
        stem = f"model.layers.{layer}"
        names |= {f"{stem}.mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")}
        names |= {f"{stem}.input_layernorm.weight", f"{stem}.post_attention_layernorm.weight"}
    names |= {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert set(every.steps[0].after) == names == changed(every, teacher)


def test_only_what_the_loss_reaches_is_trained(run):
    """Without a term on the last hidden state nothing behind the last q, k and v is trained.

    With Q K alone the last layer's q and k are, and its v is not.
    """
    no_relations = "objective.relations={q: 0, k: 0, v: 0, qk: 1}"
    names = set(run("trainable.mode=weights", no_relations).steps[0].after)
    assert names == projections("q", "k") | projections("v", layers=(0,))
    names = set(run("trainable.mode=all").steps[0].after)
    assert projections("q", "k", "v") <= names
    assert projections("o", layers=(0,)) <= names
    assert not projections("o", layers=(1,)) & names
    assert not {"lm_head.weight", "model.norm.weight"} & names


def test_trainable_lora_targets(run, job):
    one = run("trainable.lora={targets: [k], rank: 4, alpha: 8, dropout: 0}")
    assert changed(one, job / "teacher") == projections("k")


def test_trainable_lora_rank(run):
    narrow = run("trainable.lora={rank: 3, alpha: 8, dropout: 0}")
    shapes = {tuple(t.shape) for n, t in narrow.steps[0].after.items() if n.endswith("A")}
    assert shapes == {(3, 32)}


def test_trainable_lora_alpha(run, job):
    """The export is W + alpha / rank B A."""
    for alpha in (8, 20):
        trained = run(f"trainable.lora={{rank: 4, alpha: {alpha}, dropout: 0}}")
        name = "model.layers.1.self_attn.q_proj"
        pair = trained.steps[-1].after
        product = pair[f"{name}.lora_B"] @ pair[f"{name}.lora_A"]
        weight = open_model(job / "teacher").weights.read(f"{name}.weight")
        expected = weight + alpha / 4 * product
        torch.testing.assert_close(trained.student[f"{name}.weight"], expected, rtol=0, atol=1e-6)


def test_trainable_lora_dropout(run):
    """B is zero at first, so that the first loss has no mask; the gradient of B has."""
    dropped, kept = run("trainable.lora={rank: 4, alpha: 8, dropout: 0.5}"), run()
    assert dropped.losses[0] == kept.losses[0] and dropped.losses[2] != kept.losses[2]
    name = "model.layers.0.self_attn.q_proj.lora_B"
    assert not torch.equal(dropped.steps[0].gradients[name], kept.steps[0].gradients[name])


def test_trainable_weights(run, job):
    one = run("trainable.mode=weights", "trainable.weights=[o]", *EVERYTHING)
    assert changed(one, job / "teacher") == projections("o")
