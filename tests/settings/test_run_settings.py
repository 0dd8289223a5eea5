"""parallel, evaluation, checkpoint and run: how a run is split, measured, saved and reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megalard.data.tokenizer import load_tokenizer
from megalard.parallel.divided_weights import is_divided_weight, kept_bytes
from megalard.training.masters.masters import Masters
from megalard.training.step import Distiller
from tests.command_line import megalard, refusal
from tests.ranks import run_ranks
from tests.settings.tiny_run import CONTEXT, LAYERS, STEPS, settings_of

Q = "model.layers.0.self_attn.q_proj.weight"


def _train_and_note(words: list[str], notes: str) -> None:
    """Train on this rank, and write what it holds of the tokens and of a weight."""
    update = Distiller.update

    def note(self, *arguments):
        rank = self.mesh.world.rank
        result = update(self, *arguments)
        names = dict(self.student.decoder.named_parameters())
        held = {
            "dp": self.mesh.dp.size,
            "rows": names[Q].shape[0],
            "loss": result.loss,
            "optimizer": sum(p.numel() for p in self.masters.parameters),
            "gradients": sorted({str(g.dtype) for _, g in self.masters.local_gradients()}),
            "kept": kept_bytes(p for n, p in names.items() if is_divided_weight(n)),
        }
        Path(notes, f"{rank}-{arguments[-1]}.json").write_text(json.dumps(held))
        return result

    accumulate = Distiller.accumulate

    def note_tokens(self, batches, number):
        shape = list(batches["main"][0].tokens_bs.shape)
        Path(notes, f"tokens-{self.mesh.world.rank}.json").write_text(json.dumps(shape))
        return accumulate(self, batches, number)

    Distiller.update, Distiller.accumulate = note, note_tokens
    assert megalard("train", *words) == 0


def on_two_ranks(job: Path, folder: Path, *overrides: str) -> tuple[list[dict], list[list[int]]]:
    """Return the notes of the first step of both ranks, and the shapes of their tokens."""
    folder.mkdir()
    words = settings_of(job, folder / "output", overrides)
    run_ranks(2, _train_and_note, words, str(folder))
    read = [json.loads((folder / f"{rank}-0.json").read_text()) for rank in range(2)]
    return read, [json.loads((folder / f"tokens-{rank}.json").read_text()) for rank in range(2)]


def test_parallel_tp(run, job, tmp_path):
    """Each of two ranks has half of the rows of q, and all tokens."""
    notes, tokens = on_two_ranks(job, tmp_path / "tp", "parallel.tp=2")
    assert [(note["rows"], note["dp"]) for note in notes] == [(16, 1), (16, 1)]
    assert tokens == [[1, CONTEXT]] * 2
    assert notes[0]["loss"] == pytest.approx(run().losses[0], rel=1e-5)


def test_parallel_cp(run, job, tmp_path):
    """Each of two ranks has half of the tokens of a block, and all rows of q."""
    notes, tokens = on_two_ranks(job, tmp_path / "cp", "parallel.cp=2")
    assert [(note["rows"], note["dp"]) for note in notes] == [(32, 1), (32, 1)]
    assert tokens == [[1, CONTEXT // 2]] * 2
    assert notes[0]["loss"] == pytest.approx(run().losses[0], rel=1e-5)


def test_parallel_activation_checkpointing(run):
    """A layer of the student is run once more in the backward pass of each of two micro-batches."""
    passes = 2 * STEPS
    assert run("parallel.activation_checkpointing=false").layers_run == passes * 2 * LAYERS
    assert run().layers_run == passes * 3 * LAYERS
    assert run("parallel.activation_checkpointing=false").losses == run().losses


def test_parallel_offload(run):
    offloaded = run("parallel.offload=true")
    assert offloaded.offloads == 2 * STEPS and run().offloads == 0
    assert offloaded.losses == run().losses


def test_parallel_shard_optimizer(run, job, tmp_path):
    """Each of two data-parallel ranks updates half of the LoRA pairs."""
    whole, _ = on_two_ranks(job, tmp_path / "whole", "parallel.shard_optimizer=false")
    divided, _ = on_two_ranks(job, tmp_path / "divided")
    total = sum(value.numel() for value in run().steps[0].after.values())
    assert [note["optimizer"] for note in whole] == [total] * 2
    assert [note["optimizer"] for note in divided] == [total // 2] * 2
    assert divided[0]["loss"] == whole[0]["loss"]


def test_parallel_shard_weights(job, tmp_path):
    """Each of two data-parallel ranks keeps half of the rows of every layer's weights."""
    whole, _ = on_two_ranks(job, tmp_path / "whole")
    divided, _ = on_two_ranks(job, tmp_path / "divided", "parallel.shard_weights=true")
    # q, k, v, o and the MLP of each layer in fp32.
    size = 4 * LAYERS * 32 * (32 + 16 + 16 + 32 + 3 * 48)
    assert [note["kept"] for note in whole] == [size] * 2
    assert [note["kept"] for note in divided] == [size // 2] * 2
    assert divided[0]["loss"] == whole[0]["loss"]


def test_parallel_gradient_dtype(job, tmp_path):
    for dtype in ("float32", "bfloat16"):
        notes, _ = on_two_ranks(job, tmp_path / dtype, f"parallel.gradient_dtype={dtype}")
        assert [note["gradients"] for note in notes] == [[f"torch.{dtype}"]] * 2


def test_parallel_offload_optimizer(run, monkeypatch):
    """On a CPU there is one memory; the state moves from the parameters into masters."""
    made = []
    monkeypatch.setattr(
        Masters, "publish", lambda self, f=Masters.publish: made.append(self) or f(self)
    )
    offloaded = run("parallel.offload_optimizer=true")
    assert len(made) == STEPS and all(part.is_sharded for part in made[0].parts.values())
    assert made[0].device == torch.device("cpu")
    for name, value in run().steps[-1].after.items():
        torch.testing.assert_close(offloaded.steps[-1].after[name], value, rtol=1e-6, atol=0)


HELD_OUT = "evaluation.lengths=[32, 64]"


def held_out_losses(run) -> dict[str, float]:
    return {n: m["loss"] for n, m in run.evaluation["models"][0]["by_length"].items()}


def test_evaluation_paths(run, job):
    measured = run(f"evaluation.paths={job / 'heldout.txt'}", HELD_OUT)
    other = run(f"evaluation.paths={job / 'text.txt'}", HELD_OUT)
    assert held_out_losses(measured) != held_out_losses(other)
    assert not (run().output / "evaluation.json").exists()


def test_evaluation_holdout(run, job):
    """At most a fiftieth of the text is taken from its end; the rest is trained on."""
    total = len((job / "text.txt").read_text())
    options = ("optimizer.steps=2", "optimizer.global_batch=150", "optimizer.micro_batch=150")
    taken = run("evaluation.holdout=100", "evaluation.lengths=[32]", *options)
    whole = run(*options)
    assert set(held_out_losses(taken)) == {"32"}
    blocks = [blocks_of(one) for one in (taken, whole)]
    assert blocks == [(total - 100) // CONTEXT, total // CONTEXT]


def blocks_of(run) -> int:
    """Return how many different blocks the steps read, which is more than an epoch."""
    return len({tuple(row) for batch in run.batches() for row in batch.tokens_bs.tolist()})


def test_evaluation_lengths(run, job):
    held_out = f"evaluation.paths={job / 'heldout.txt'}"
    assert set(held_out_losses(run(held_out, HELD_OUT))) == {"32", "64"}
    default = {"16", "32", "64", "128", "256"}
    assert set(held_out_losses(run(held_out))) == default


def test_evaluation_max_tokens(run, job):
    options = (f"evaluation.paths={job / 'heldout.txt'}", "evaluation.lengths=[32]")
    network = AutoModelForCausalLM.from_pretrained(job / "teacher", dtype=torch.float64)
    tokens = torch.tensor(load_tokenizer(job / "teacher").encode_batch([text_of(job)])[0])
    for count in (64, 1024):
        measured = run(*options, f"evaluation.max_tokens={count}")
        rows = tokens[:count].view(-1, 32)
        with torch.no_grad():
            expected = network(rows, labels=rows).loss
        assert held_out_losses(measured)["32"] == pytest.approx(float(expected), rel=1e-5)


def text_of(job: Path) -> str:
    return (job / "heldout.txt").read_text()


def validated(run) -> list[dict]:
    """Return the lines of the validations of a run."""
    return [line for line in run.metrics if "loss" not in line]


def validating(job: Path, *options: str) -> tuple[str, ...]:
    """Return the overrides of a run that validates after each of its steps."""
    return (f"evaluation.paths={job / 'heldout.txt'}", HELD_OUT, "evaluation.every=1", *options)


def test_evaluation_every(run, job):
    """The last of three steps is validated as well."""
    every = run(*validating(job)[:2], "evaluation.every=2")
    assert [line["step"] for line in validated(every)] == [2, 3]
    assert validated(run(*validating(job)[:2])) == []


def test_evaluation_validation_tokens(run, job):
    """With as many tokens as the evaluation reads, the last validation has its losses."""
    whole = run(*validating(job, "evaluation.validation_tokens=64K"))
    part = run(*validating(job, "evaluation.validation_tokens=64"))
    expected = whole.evaluation["models"][-1]["by_length"]["32"]["loss"]
    assert validated(whole)[-1]["validation_loss_32"] == pytest.approx(expected, abs=1e-6)
    assert abs(validated(part)[-1]["validation_loss_32"] - expected) > 1e-3


# Each of seven steps is too long.
WORSE = ("optimizer.learning_rate=1", "optimizer.clip=0", "optimizer.steps=7")


def best_step(run, *lengths: int) -> int:
    """Return the step whose validation has the lowest mean loss over some lengths."""
    lines = validated(run)
    return min(lines, key=lambda line: sum(line[f"validation_loss_{n}"] for n in lengths))["step"]


def exported_step(run) -> int:
    """Return the step of the exported student, by the tokens that it was restored with."""
    return run.evaluation["models"][-1]["tokens"] // (2 * CONTEXT)


def test_evaluation_patience(run, job):
    for rate in (1, 3, 10):
        worse = (*WORSE, f"optimizer.learning_rate={rate}")
        patient = run(*validating(job, *worse, "evaluation.patience=2"))
        if len(validated(patient)) < 7:
            break
    assert len(validated(patient)) == best_step(patient, 32, 64) + 2 < 7
    assert exported_step(patient) == best_step(patient, 32, 64)
    assert len(validated(run(*validating(job, *worse)))) == 7


def test_evaluation_best(run, job):
    """Short text is best after another step than short and long text together."""
    long = ("evaluation.lengths=[32, 256]", "checkpoint.keep_best=true", *WORSE[1:])
    # Which steps are best depends on rounding, so several rates are tried.
    for rate in (5, 3, 1, 10):
        options = [o for o in validating(job) if o != HELD_OUT]
        options += [*long, f"optimizer.learning_rate={rate}"]
        short = run(*options)
        if best_step(short, 32) != best_step(short, 32, 256):
            break
    both = run(*options, "evaluation.best=loss")
    assert best_step(short, 32) != best_step(both, 32, 256)
    assert exported_step(short) == best_step(short, 32)
    assert exported_step(both) == best_step(both, 32, 256)


LONG = ("optimizer.steps=7", "checkpoint.keep_last=9")


def test_checkpoint_save_every(run):
    """One more is saved after the last step."""
    saved = run(*LONG, "checkpoint.save_every=3")
    assert saved.folders("checkpoints") == ["step-000003", "step-000006", "step-000007"]
    assert run().folders("checkpoints") == []


def test_checkpoint_asynchronous(run):
    names = run(*LONG, "checkpoint.save_every=3").saving_threads
    assert len(names) == 3 and all(name.startswith("checkpoint") for name in names)
    at_once = run(*LONG, "checkpoint.save_every=3", "checkpoint.asynchronous=false")
    assert at_once.saving_threads == ["MainThread"] * 3


def test_checkpoint_keep_last(run):
    kept = run("optimizer.steps=7", "checkpoint.save_every=1", "checkpoint.keep_last=2")
    assert kept.folders("checkpoints") == ["step-000006", "step-000007"]


def test_checkpoint_keep_every(run):
    options = ("optimizer.steps=7", "checkpoint.save_every=1", "checkpoint.keep_last=1")
    kept = run(*options, "checkpoint.keep_every=3")
    assert kept.folders("checkpoints") == ["step-000003", "step-000006", "step-000007"]


def test_checkpoint_keep_best(run, job):
    """The best checkpoint is there and its student is exported; otherwise the last one is."""
    options = validating(job, *WORSE)
    kept, last = run(*options, "checkpoint.keep_best=true"), run(*options)
    best = best_step(kept, 32, 64)
    assert best < 7 and f"step-{best:06d}" in kept.folders("checkpoints")
    assert (exported_step(kept), exported_step(last)) == (best, 7)


def test_checkpoint_export_every(run):
    exported = run(*LONG, "checkpoint.export_every=3")
    names = {path.name for path in exported.output.iterdir() if path.is_dir()}
    assert {"step-000003", "step-000006", "student"} <= names and "step-000007" not in names


def test_checkpoint_export_dtype(run):
    """The student is written in another dtype than the teacher's files have."""
    dtypes = {tensor.dtype for tensor in run("checkpoint.export_dtype=bfloat16").student.values()}
    assert dtypes == {torch.bfloat16}
    assert {tensor.dtype for tensor in run().student.values()} == {torch.float32}


def test_checkpoint_export_rounding(run, job, tmp_path, capsys):
    """Changes below half a step stay in the mean; tensors that are not trained are the same."""
    words = ("checkpoint.export_dtype=bfloat16", "trainable.mode=weights")
    exact = run(words[1]).student
    nearest, stochastic = (
        run(*words, f"checkpoint.export_rounding={rounding}").student
        for rounding in ("nearest", "stochastic")
    )
    for name, value in exact.items():
        is_trained = any(f"{kind}_proj" in name for kind in "qkv")
        assert torch.equal(stochastic[name], nearest[name]) != is_trained, name
        step = (stochastic[name].float() - nearest[name].float()).abs()
        assert bool((step <= value.abs() * 2.0**-7).all())
    for more in ((), ("checkpoint.export_dtype=float32",)):
        overrides = ("checkpoint.export_rounding=stochastic", *more)
        sentence = refusal(capsys, "train", *settings_of(job, tmp_path / "output", overrides))
        assert "checkpoint.export_rounding stochastic rounds to 16 bits, and" in sentence


def test_run_output(run):
    assert run().folders("student") and (run().output / "finished.json").is_file()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_run_device(job, tmp_path, capsys, run):
    words = settings_of(job, tmp_path / "output", ("run.device=cuda",))
    assert "cuda" in refusal(capsys, "train", *words)
    assert run("run.device=auto").losses == run().losses


def test_run_seed(run):
    other = run("run.seed=7")
    assert not torch.equal(other.batches()[0].tokens_bs, run().batches()[0].tokens_bs)
    name = "model.layers.0.self_attn.q_proj.lora_A"
    assert not torch.equal(other.steps[0].before[name], run().steps[0].before[name])


def test_run_deterministic(run):
    assert all(step.is_deterministic for step in run("run.deterministic=true").steps)
    assert not any(step.is_deterministic for step in run().steps)


def test_run_log_every(run):
    """The last step is always reported."""
    assert [line["step"] for line in run("run.log_every=2").metrics] == [2, 3]


def test_run_trackers(run):
    assert run().folders("tensorboard") != []
    none = run("run.trackers=[]")
    assert none.folders("tensorboard") == [] and len(none.metrics) == STEPS


def test_run_profile(run, job, tmp_path, capsys):
    assert run("run.profile=[2]").folders("profile") == ["step-000002-rank-00000.json.gz"]
    assert run().folders("profile") == []
    words = settings_of(job, tmp_path / "output", ("run.profile=[4]",))
    assert "run.profile names step 4, but the run has 3 steps" in refusal(capsys, "train", *words)


def test_run_report(run):
    assert "<h2>Cost</h2>" in (run("run.report=true").output / "report.html").read_text()
    assert not (run().output / "report.html").exists()


def test_run_non_finite(run, job, tmp_path, capsys):
    """An update of 1e30 makes the second step overflow."""
    options = ("optimizer.learning_rate=1e25", "trainable.mode=weights")
    words = settings_of(job, tmp_path / "output", options)
    assert "step 2: the loss is nan" in refusal(capsys, "train", *words)
    skipped = run(*options, "run.non_finite=skip")
    assert [line["skipped"] is None for line in skipped.metrics] == [True, False, False]
    second = skipped.steps[1]
    assert all(torch.equal(second.before[n], second.after[n]) for n in second.before)
