"""megalard evaluate: what every flag changes in the windows and samples that models read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import megalard.evaluation.comparison
from megalard.data.tokenizer import load_tokenizer
from megalard.evaluation.suite import Suite
from tests.command_line import megalard as command
from tests.command_line import refusal
from tests.conversions import make_adapter
from tests.models import make_model
from tests.ranks import run_ranks
from tests.small_tokenizers import save_byte_tokenizer

WINDOW = 512
NO_TASKS = ("--tasks",)
ONE_TASK = ("--tasks", "passkey", "--depths", 0.5, "--samples", 1, "--task-lengths", 256)


@dataclass
class Evaluation:
    """What one model was asked, and the report."""

    suite: Suite
    dtype: torch.dtype
    has_teacher: bool
    layout: tuple[int, int]
    report: dict[str, Any]

    @property
    def result(self) -> dict[str, Any]:
        return self.report["models"][0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two models, held-out text in two forms, and a run's adapter in ``adapter``."""
    folder = tmp_path_factory.mktemp("evaluate")
    for seed, name in enumerate(("model", "other")):
        sizes = {"vocab_size": 257, "num_hidden_layers": 1, "max_position_embeddings": WINDOW}
        make_model("llama", folder / name, seed, **sizes)
        save_byte_tokenizer(folder / name)
    lines = [{"text": f"line {n}. " * 9, "body": f"BODY {n}! " * 9} for n in range(60)]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture
def evaluate(folder, tmp_path, monkeypatch):
    """A function that evaluates ``model`` on the text with some more words."""
    notes = []
    run_suite = megalard.evaluation.comparison.run_suite

    def note(decoder, suite, mesh, dtype, teacher=None, *rest, **options):
        notes.append((suite, dtype, teacher is not None, (mesh.tp.size, mesh.cp.size)))
        return run_suite(decoder, suite, mesh, dtype, teacher, *rest, **options)

    monkeypatch.setattr(megalard.evaluation.comparison, "run_suite", note)

    def run(*words: object, text: bool = True, model: Path | None = None) -> Evaluation:
        notes.clear()
        output = tmp_path / f"result-{len(list(tmp_path.glob('*.json')))}"
        given = ["--text", folder / "text.jsonl", "--lengths", 128] if text else []
        models = [model or folder / "model"]
        assert command("evaluate", *models, *given, "--output", output, *words) == 0
        return Evaluation(*notes[0], json.loads(output.with_suffix(".json").read_text()))

    return run


def text_read(evaluation: Evaluation) -> str:
    """Return the beginning of the text that was read."""
    windows = next(iter(evaluation.suite.windows.values()))
    return load_tokenizer(evaluation.result["directory"]).decode(windows.flatten()[:60].tolist())


def test_evaluate_output(folder, tmp_path, evaluate, capsys):
    evaluate(*NO_TASKS)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"result-0.json", "result-0.png"}
    words = ("--tasks", "--output", tmp_path / "result-0", "--text", folder / "text.jsonl")
    assert "result-0" in refusal(capsys, "evaluate", folder / "model", *words)


def test_evaluate_text(evaluate):
    assert text_read(evaluate(*NO_TASKS)).startswith("line 0. line 0.")
    assert evaluate(*ONE_TASK, text=False).suite.windows == {}


def test_evaluate_text_key(evaluate):
    assert text_read(evaluate(*NO_TASKS, "--text-key", "body")).startswith("BODY 0! BODY 0!")


def test_evaluate_max_tokens(evaluate):
    read = evaluate(*NO_TASKS, "--max-tokens", 512)
    assert read.suite.windows[128].shape == (4, 128)
    assert evaluate(*NO_TASKS).suite.windows[128].size > 512


def test_evaluate_lengths(evaluate):
    read = evaluate(*NO_TASKS, "--lengths", 64, "1K")
    assert set(read.suite.windows) == set(map(int, read.result["by_length"])) == {64, 1024}


def test_evaluate_teacher(evaluate, folder):
    same = evaluate(*NO_TASKS, "--teacher", folder / "model")
    other = evaluate(*NO_TASKS, "--teacher", folder / "other")
    assert same.has_teacher and not evaluate(*NO_TASKS).has_teacher
    values = [read.result["by_length"]["128"]["kl"] for read in (same, other)]
    assert values[0] == pytest.approx(0, abs=1e-6) and values[1] > 0.1


def test_evaluate_tasks(evaluate):
    assert set(evaluate(*ONE_TASK).suite.samples) == {"passkey"}
    two = evaluate(*ONE_TASK, "--tasks", "multi_key", "passkey", "--task-lengths", 700)
    assert set(two.suite.samples) == {"multi_key", "passkey"}
    assert evaluate(*NO_TASKS).suite.samples == {}


def test_evaluate_task_lengths(evaluate):
    longer = evaluate(*ONE_TASK, "--task-lengths", 300, 400)
    assert set(longer.suite.samples["passkey"]) == {300, 400}
    for length, samples in longer.suite.samples["passkey"].items():
        assert all(len(sample.tokens) == length for sample in samples)


def samples_of(evaluation: Evaluation) -> list:
    return evaluation.suite.samples["passkey"][256]


def test_evaluate_depths(evaluate):
    both = evaluate(*ONE_TASK, "--depths", 0, 1)
    assert [sample.depth for sample in samples_of(both)] == [0, 1]
    assert [sample.depth for sample in samples_of(evaluate(*ONE_TASK))] == [0.5]


def test_evaluate_samples(evaluate):
    assert len(samples_of(evaluate(*ONE_TASK, "--samples", 3))) == 3


def test_evaluate_filler(evaluate, folder):
    decode = load_tokenizer(folder / "model").decode
    prompts = [
        decode(samples_of(evaluate(*ONE_TASK, "--filler", kind))[0].prompt.tolist())
        for kind in ("sentences", "text")
    ]
    assert "line " in prompts[1] and "line " not in prompts[0]


def test_evaluate_seed(evaluate):
    answers = [samples_of(evaluate(*ONE_TASK, "--seed", s))[0].answer.tolist() for s in (0, 0, 1)]
    assert answers[0] == answers[1] != answers[2]


@pytest.fixture
def with_bos(folder, tmp_path) -> Path:
    """A tokenizer whose BOS token is the letter A, which it puts before no text."""
    target = tmp_path / "bos"
    target.mkdir()
    content = (folder / "model" / "tokenizer.json").read_bytes()
    (target / "tokenizer.json").write_bytes(content)
    names = {"eos_token": "</s>", "bos_token": "A", "tokenizer_class": "PreTrainedTokenizerFast"}
    (target / "tokenizer_config.json").write_text(json.dumps(names))
    return target


def test_evaluate_bos(evaluate, with_bos):
    words = (*ONE_TASK, "--tokenizer", with_bos)
    yes, no = (evaluate(*words, "--bos", choice) for choice in ("yes", "no"))
    content = json.loads((with_bos / "tokenizer.json").read_text())
    bos = {content["model"]["vocab"]["A"]}
    assert set(yes.suite.windows[128][:, 0].tolist()) == bos
    assert samples_of(yes)[0].prompt[0] in bos and samples_of(no)[0].prompt[0] not in bos
    assert not bos & set(no.suite.windows[128][:, 0].tolist())


def test_evaluate_eos(evaluate):
    yes, no = (evaluate(*NO_TASKS, "--eos", choice) for choice in ("yes", "no"))
    assert (yes.suite.windows[128] == 256).sum() > 20 and (no.suite.windows[128] == 256).sum() == 0


def test_evaluate_tokenizer(evaluate, folder, tmp_path):
    """Another tokenizer, with other ids for the same letters."""
    content = json.loads((folder / "model" / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {k: 255 - i if i < 256 else i for k, i in vocabulary.items()}
    (tmp_path / "turned").mkdir()
    (tmp_path / "turned" / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "turned" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    turned = evaluate(*NO_TASKS, "--tokenizer", tmp_path / "turned").suite.windows[128]
    assert (turned == 255 - evaluate(*NO_TASKS).suite.windows[128]).all()


def test_evaluate_base(evaluate, folder, tmp_path, capsys):
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "moved")
    words = ("--output", tmp_path / "x", "--text", folder / "text.jsonl")
    assert "moved" in refusal(capsys, "evaluate", adapter, *words)
    given = evaluate(*NO_TASKS, "--base", folder / "model", model=adapter)
    plain = evaluate(*NO_TASKS)
    assert given.result["by_length"] != plain.result["by_length"]


def _evaluate_on_ranks(words: list[str], note: str) -> None:
    """Evaluate on this rank, and write how it shares the model and the windows."""
    run_suite = megalard.evaluation.comparison.run_suite

    def noted(decoder, suite, mesh, *rest, **options):
        Path(f"{note}-{mesh.world.rank}").write_text(f"tp {mesh.tp.size} cp {mesh.cp.size}")
        return run_suite(decoder, suite, mesh, *rest, **options)

    megalard.evaluation.comparison.run_suite = noted
    assert command("evaluate", *words) == 0


def check_layout(flag: str, layout: str, folder: Path, tmp_path: Path, evaluate) -> None:
    """Evaluate on two ranks; the figures are those of one."""
    text = ("--text", folder / "text.jsonl", "--lengths", 128)
    words = [folder / "model", *text, "--tasks", flag, 2, "--output", tmp_path / "split"]
    run_ranks(2, _evaluate_on_ranks, [str(word) for word in words], str(tmp_path / "note"))
    assert [(tmp_path / f"note-{rank}").read_text() for rank in range(2)] == [layout] * 2
    report = json.loads((tmp_path / "split.json").read_text())
    alone = evaluate(*NO_TASKS)
    assert alone.layout == (1, 1)
    loss = report["models"][0]["by_length"]["128"]["loss"]
    assert loss == pytest.approx(alone.result["by_length"]["128"]["loss"], rel=1e-5)


def test_evaluate_tp(folder, tmp_path, evaluate):
    check_layout("--tp", "tp 2 cp 1", folder, tmp_path, evaluate)


def test_evaluate_cp(folder, tmp_path, evaluate):
    check_layout("--cp", "tp 1 cp 2", folder, tmp_path, evaluate)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_evaluate_device(folder, tmp_path, capsys):
    words = ("--text", folder / "text.jsonl", "--tasks", "--output", tmp_path / "x")
    assert "cuda" in refusal(capsys, "evaluate", folder / "model", *words, "--device", "cuda")


def test_evaluate_dtype(evaluate):
    rounded = evaluate(*NO_TASKS, "--dtype", "bfloat16")
    exact = evaluate(*NO_TASKS, "--dtype", "float32")
    assert (rounded.dtype, exact.dtype) == (torch.bfloat16, torch.float32)
    losses = [read.result["by_length"]["128"]["loss"] for read in (rounded, exact)]
    assert 0 < abs(losses[0] - losses[1]) < 0.05 * losses[1]
