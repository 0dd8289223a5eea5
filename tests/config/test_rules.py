"""Ranges of every setting by its key, and rules between settings."""

from __future__ import annotations

import pytest

from tests.config.loading import load, refusal


@pytest.mark.parametrize(
    ("key", "value", "must_be"),
    [
        ("model.compute_dtype", "float16", "one of bfloat16, float32"),
        ("model.native_context", "0", "at least 1"),
        ("rope.type", "ntk", "one of linear, abf, yarn, llama3, longrope, table, checkpoint"),
        ("rope.factor", "1", "greater than 1"),
        ("rope.factor", "nan", "a finite number"),
        ("rope.factor", ".inf", "a finite number"),
        ("trainable.mode", "none", "one of lora, weights, all"),
        ("trainable.weights", "[]", "one or more items"),
        ("trainable.weights", "[q, q]", "an item twice"),
        ("trainable.lora.targets", "[q, x]", "one of q, k, v, o"),
        ("trainable.lora.rank", "0", "at least 1"),
        ("trainable.lora.dropout", "1", "less than 1"),
        ("trainable.lora.alpha", "0", "greater than 0"),
        ("objective.relations.q", "-1", "at least 0"),
        ("objective.attention_output", "-1", "at least 0"),
        ("objective.logits_kl", "-1", "at least 0"),
        ("objective.hidden_depths", "[0, 1]", "greater than 0"),
        ("objective.hidden_depths", "[1.5]", "at most 1"),
        ("objective.layers", "[]", "one or more items"),
        ("objective.layers", "[1, 1]", "an item twice"),
        ("objective.layers", "[-1]", "at least 0"),
        ("objective.logits_positions", "0", "at least 1"),
        ("data.context_length", "1", "at least 2"),
        ("data.positions", "skip", "one of contiguous, skip-gaussian, skip-uniform"),
        ("optimizer.steps", "0", "at least 1"),
        ("optimizer.global_batch", "0", "at least 1"),
        ("optimizer.micro_batch", "-3", "at least 1"),
        ("optimizer.warmup_steps", "-1", "at least 0"),
        ("optimizer.weight_decay", "-0.1", "at least 0"),
        ("optimizer.clip", "-1", "at least 0"),
        ("optimizer.eps", "-1", "at least 0"),
        ("optimizer.learning_rate", "0", "greater than 0"),
        ("optimizer.learning_rate", "nan", "a finite number"),
        ("optimizer.learning_rate", "inf", "a finite number"),
        ("optimizer.min_ratio", "1.5", "at most 1"),
        ("optimizer.betas", "[0.9]", "2 items"),
        ("optimizer.betas", "[0.9, 1.0]", "less than 1"),
        ("parallel.tp", "0", "at least 1"),
        ("parallel.cp", "0", "at least 1"),
        ("evaluation.lengths", "[]", "one or more items"),
        ("evaluation.lengths", "[1]", "at least 2"),
        ("evaluation.max_tokens", "1", "at least 2"),
        ("run.device", "tpu", "one of auto, cpu, cuda"),
        ("run.non_finite", "ignore", "one of stop, skip"),
        ("run.log_every", "0", "at least 1"),
        ("run.seed", "-1", "at least 0"),
        ("checkpoint.save_every", "-1", "at least 0"),
        ("checkpoint.keep_last", "0", "at least 1"),
        ("checkpoint.export_every", "-1", "at least 0"),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_key(key, value, must_be):
    sentence = refusal(f"--{key}", value)
    assert sentence.startswith(f"{key} must ") and must_be in sentence and "; got " in sentence


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            (
                "--trainable.mode=all",
                "--parallel.shard_weights=true",
                "--parallel.shard_optimizer=false",
            ),
            "parallel.shard_optimizer is false: leave one of them out",
        ),
        (
            (
                "--stages={a: {}, b: {trainable: {mode: all}}}",
                "--parallel.shard_weights=true",
                "--parallel.shard_optimizer=false",
            ),
            "parallel.shard_optimizer is false: leave one of them out",
        ),
        (
            ("--stages={a: {}, b: {}}", "--optimizer.steps=3", "--run.profile=[2, 7]"),
            "run.profile names step 7, but the run has 6 steps: leave it out",
        ),
        (["--rope.type", "dynamic"], "'dynamic' equals the teacher's RoPE at up to M tokens"),
        (["--rope.theta", "5e5"], "rope.theta only applies to rope.type abf, not to linear"),
        (["--rope.type", "abf", "--rope.theta", "0"], "rope.theta must be greater than 0; got 0.0"),
        (["--rope.long_factors", "[1]"], "rope.long_factors only applies to rope.type longrope"),
        (["--rope.table", "x"], "rope.table only applies to rope.type table"),
        (["--rope.type", "table"], "rope.type table needs rope.table FILE"),
        (["--rope.type", "checkpoint"], "rope.type checkpoint needs model.student"),
        (
            ["--checkpoint.save_every", "4", "--checkpoint.keep_every", "6"],
            "checkpoint.keep_every 6 must be a multiple of checkpoint.save_every 4",
        ),
        (
            ["--checkpoint.save_every", "0", "--checkpoint.keep_every", "6"],
            "checkpoint.keep_every 6 must be a multiple of checkpoint.save_every 0",
        ),
        (
            ["--evaluation.patience", "2"],
            "evaluation.patience 2 compares validations, and evaluation.every is 0: give the",
        ),
        (
            ["--checkpoint.keep_best", "true"],
            "checkpoint.keep_best true compares validations, and evaluation.every is 0",
        ),
        (
            [f"--objective.relations.{name}=0" for name in "qkv"],
            "objective is empty: give relations, attention_output, hidden_cosine, logits_kl or "
            "language_modelling a weight",
        ),
    ],
)
def test_values_that_do_not_go_together_are_refused(overrides, sentence):
    assert sentence in refusal(*overrides)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["--data.end_token=<|end|>"],
            "data.end_token is given, so data.eos must be yes, not auto",
        ),
        (["--data.drop_tails=true"], "data.drop_tails is true, so data.packing must be false"),
        (
            ["--streams={a: {objective: {logits_kl: 1}, data: {drop_tails: true}}}"],
            "streams.a.data.drop_tails is true, so streams.a.data.packing must be false",
        ),
        (
            ["--stages={a: {}, b: {data: {eos: no, end_token: x}}}"],
            "stages.b.data.end_token is given, so stages.b.data.eos must be yes, not no",
        ),
        (
            ["--stages={a: {keep_optimizer: true}}"],
            "stages.a.keep_optimizer is true, so the stage must come after a stage with the same "
            "trainable section",
        ),
        (
            ["--stages={a: {trainable: {mode: all}}, b: {keep_optimizer: true}}"],
            "stages.b.keep_optimizer is true, so the stage must come after",
        ),
        (
            [
                "--stages={a: {}, b: {trainable: {mode: all}}, c: {trainable: {mode: lora}, "
                "keep_optimizer: true}}"
            ],
            "stages.c.keep_optimizer is true, so the stage must come after",
        ),
    ],
)
def test_rules_hold_for_every_stream_and_stage(overrides, sentence):
    assert sentence in refusal(*overrides)


def test_values_that_go_together_are_accepted():
    load("--stages={a: {}, b: {keep_optimizer: true}}")
    load(
        "--stages={a: {}, b: {trainable: {mode: all}}, c: {trainable: {mode: all}, "
        "keep_optimizer: true}}"
    )
    load("--parallel.shard_weights=true", "--parallel.shard_optimizer=false")
    load("--optimizer.steps=3", "--run.profile=[1, 3]")
    load("--data.eos=yes", "--data.end_token=<|end|>")
    load("--data.packing=false", "--data.drop_tails=true")
    load("--checkpoint.save_every", "4", "--checkpoint.keep_every", "8")
    load("--rope.type", "abf", "--rope.theta", "5e5")
    load("--rope.type", "checkpoint", "--model.student", "s")
