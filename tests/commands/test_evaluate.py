"""``megalard evaluate`` on every kind of model, on ranks, and with bad input."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megalard.commands import evaluate as command
from megalard.data.token_store_writer import build_store
from megalard.data.tokenizer import load_tokenizer
from megalard.evaluation.tasks import TASKS
from megalard.training.run_folder import checkpoint_path
from tests.command_line import megalard, megalard_on_ranks, refusal
from tests.conversions import to_adapter, to_sharded
from tests.jobs import NATIVE, arguments, flip_bit, make_job, train

# Long enough for a passkey in a vocabulary of bytes.
LENGTHS = ("--lengths", 64, 512)
QUICK = ("--tasks", "passkey", "--depths", 0, 1, "--samples", 2, "--max-tokens", 1024, *LENGTHS)


def evaluate(*words: object) -> int:
    """Run the command in this process."""
    return megalard("evaluate", *words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A job whose run is finished: its student in four forms, and the model it started from."""
    folder = make_job(tmp_path_factory.mktemp("evaluate"))
    options = ("optimizer.steps=2", "checkpoint.save_every=2")
    train(arguments(folder, folder / "run", *options))
    (folder / "state").symlink_to(checkpoint_path(folder / "run" / "checkpoints", 2))
    to_adapter(folder / "state", folder / "adapter")
    to_sharded(folder / "run" / "student", folder / "sharded")
    return folder


def read(output: Path) -> dict:
    """Return the JSON of a report, which has a picture next to it."""
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(output.with_suffix(".json").read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def compared(folder):
    """The report on the student in every form, and on the model it started from."""
    models = (folder / "run" / "student", folder / "sharded", folder / "state", folder / "adapter")
    output = folder / "results" / "all"
    teacher = ("--teacher", folder / "model")
    text = ("--text", folder / "heldout.txt")
    assert evaluate(*models, folder / "model", *text, *teacher, *QUICK, "--output", output) == 0
    return read(output)


def test_a_student_is_the_same_however_it_is_stored(compared):
    first, *others, teacher = compared["models"]
    assert [model["kind"] for model in compared["models"]] == [
        "huggingface",
        "sharded",
        "training",
        "adapter",
        "huggingface",
    ]
    for other in others:
        for part in ("by_length", "by_position", "tasks", "window"):
            assert other[part] == first[part]
    assert teacher["by_length"]["64"]["kl"] == 0 and first["by_length"]["64"]["kl"] > 1e-3
    assert teacher["window"] == NATIVE and first["window"] == 4 * NATIVE
    # Beyond its window the teacher is not compared with.
    assert first["by_length"]["512"]["kl"] is None


def test_the_figures_are_those_of_transformers(compared, folder):
    student = AutoModelForCausalLM.from_pretrained(folder / "run" / "student", dtype=torch.float64)
    ids = load_tokenizer(folder / "model").encode_batch([(folder / "heldout.txt").read_text()])[0]
    tokens = torch.tensor(ids[:1024]).view(-1, 64)
    with torch.no_grad():
        loss = student(tokens, labels=tokens).loss
    measured = compared["models"][0]["by_length"]["64"]
    # The decoder computes in fp32, transformers in float64.
    assert measured["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert measured["perplexity"] == pytest.approx(math.exp(measured["loss"]))
    assert compared["settings"]["text_tokens"] == {"64": 1024, "512": 1024}
    positions = compared["models"][0]["by_position"]
    assert [(p["first"], p["last"]) for p in positions][-2:] == [(128, 255), (256, 511)]
    result = compared["models"][0]["tasks"]["passkey"]["512"]
    assert result["samples"] == 4 and set(result["by_depth"]) == {"0.0", "1.0"}


def test_ranks_measure_what_one_process_measures(compared, folder):
    """Two processes as tp 2, with a token store in place of the text."""
    tokenizer = load_tokenizer(folder / "model")
    build_store([folder / "heldout.txt"], tokenizer, folder / "tokens")
    text = ("--text", folder / "tokens", "--teacher", folder / "model")
    output = folder / "results" / "ranks"
    options = ("--tp", 2, "--device", "cpu", *text, *QUICK)
    megalard_on_ranks(2, "evaluate", folder / "state", *options, "--output", output)
    actual, expected = read(output)["models"][0], compared["models"][2]
    assert read(output)["settings"]["layout"] == {"dp": 1, "cp": 1, "tp": 2}
    for length, measured in expected["by_length"].items():
        # The order of summation differs.
        assert actual["by_length"][length]["loss"] == pytest.approx(measured["loss"], rel=1e-5)
    task, same = (model["tasks"]["passkey"]["512"] for model in (actual, expected))
    assert task["loss"] == pytest.approx(same["loss"], rel=1e-5)
    assert task["exact"] == same["exact"]


def test_it_warns_of_what_it_leaves_out_and_measures_beyond(folder, tmp_path, capsys):
    options = ("--lengths", 64, 512, "--samples", 1, "--depths", 0.5, "--filler", "text")
    text = ("--text", folder / "heldout.txt", "--max-tokens", 512)
    assert evaluate(folder / "model", *text, *options, "--output", tmp_path / "a.json") == 0
    printed = capsys.readouterr()
    warnings = [line for line in printed.out.splitlines() if line.startswith("warning: ")]
    assert "has a window of 64 tokens and is measured beyond it, at 512" in warnings[0]
    assert warnings[1:] == [
        f"warning: 64 tokens are too few for the task {task}, left out there"
        for task in ("multi_key", "multi_value", "passkey", "variable_tracking")
    ]
    assert "warning" not in printed.err
    for words in ("Perplexity by length", "Loss by position", "Exact answers"):
        assert words in printed.out
    assert printed.out.splitlines()[-2:] == [str(tmp_path / "a.json"), str(tmp_path / "a.png")]
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "a.png"}


def test_windows_and_tasks_begin_with_the_bos_token_if_asked(folder, tmp_path):
    """Measured against transformers, on windows that begin with id 65."""
    model = shutil.copytree(folder / "model", tmp_path / "model")
    config = json.loads((model / "tokenizer_config.json").read_text())
    letter = load_tokenizer(model).encode_batch(["b"])[0]
    bos = {"bos_token": "b", "tokenizer_class": "PreTrainedTokenizerFast"}
    (model / "tokenizer_config.json").write_text(json.dumps(config | bos))
    text = ("--text", folder / "heldout.txt", "--lengths", 32, "--max-tokens", 640, "--tasks")
    assert evaluate(model, *text, "--bos", "yes", "--output", tmp_path / "bos") == 0
    assert evaluate(model, *text, "--bos", "no", "--output", tmp_path / "plain") == 0
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    ids = load_tokenizer(folder / "model").encode_batch([(folder / "heldout.txt").read_text()])[0]
    # A window of 32 has 31 tokens of text; the text itself begins with the BOS token.
    stream = torch.tensor([*letter, *ids])[:640]
    windows = [torch.cat([torch.tensor(letter), part]) for part in stream[1:].split(31)]
    windows = torch.stack([window for window in windows if len(window) == 32])
    with torch.no_grad():
        loss = reference(windows, labels=windows).loss
    results = [read(tmp_path / name) for name in ("bos", "plain")]
    losses = [result["models"][0]["by_length"]["32"]["loss"] for result in results]
    assert losses[0] == pytest.approx(float(loss), rel=1e-5) and losses[0] != losses[1]
    assert [result["settings"]["bos"] for result in results] == ["yes", "no"]


def test_tasks_alone_need_no_text(folder, tmp_path):
    output = ("--output", tmp_path / "a")
    assert evaluate(folder / "sharded", *QUICK, "--task-lengths", "512", *output) == 0
    (model,) = read(tmp_path / "a")["models"]
    assert model["by_length"] == {} and list(model["tasks"]["passkey"]) == ["512"]


def test_nothing_is_overwritten(folder, tmp_path, capsys):
    (tmp_path / "a.png").write_text("precious")
    assert evaluate(folder / "model", *QUICK, "--output", tmp_path / "a") == 1
    assert f"{tmp_path / 'a.png'} exists and is not overwritten" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_student_is_compared_with_the_teacher_up_to_the_native_window(folder, tmp_path):
    """Its loss is measured beyond the native window too, where there is no KL."""
    student, output = folder / "run" / "student", tmp_path / "a"
    text = ("--text", folder / "heldout.txt", "--max-tokens", 512)
    options = ("--teacher", folder / "model", "--lengths", NATIVE, 2 * NATIVE)
    assert evaluate(student, *text, *options, "--output", output) == 0
    by_length = read(output)["models"][0]["by_length"]
    assert by_length[str(NATIVE)]["kl"] > 0 and by_length[str(2 * NATIVE)]["kl"] is None


def test_a_damaged_checkpoint_is_not_measured(folder, tmp_path, capsys):
    shutil.copytree(folder / "sharded", tmp_path / "copy")
    (shard,) = (tmp_path / "copy").glob("weights-*")
    flip_bit(shard)
    models = (folder / "model", tmp_path / "copy")
    assert evaluate(*models, *QUICK, "--output", tmp_path / "out" / "a") == 1
    assert f"{shard} is damaged" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("/nowhere",), "no model directory at /nowhere"),
        (("MODEL", "--text", "/nowhere.txt"), "data path /nowhere.txt does not exist"),
        (("MODEL", "--text", "TEXT", "--lengths", "1M"), "'1M' is not a length"),
        (("MODEL", "--text", "TEXT", "--lengths", "64K"), "but the longest length is 65536"),
        (("MODEL", "--teacher", "MODEL"), "models are compared with --teacher on text"),
        (("MODEL", "--teacher", "/nowhere", "--text", "TEXT"), "no model directory at /nowhere"),
        (("MODEL", "--tasks"), "there is nothing to measure"),
        (("MODEL", "--lengths", "64"), "there is nothing to measure"),
        (("MODEL", "--tasks", "ruler"), "there is no task 'ruler': choose from passkey, multi_key"),
        (("MODEL", "--filler", "text"), "--filler text hides statements in the text"),
        (("MODEL", "--depths", "0.5", "2"), "--depths has 2"),
        (("MODEL", "--samples", "0"), "--samples is 0"),
        (("MODEL", "--seed", "-1"), "--seed is -1"),
        (("MODEL", "--bos", "yes"), "has no BOS token"),
        (("MODEL", "--tp", "2"), "parallel.tp 2 times parallel.cp 1 is 2 but 1 processes"),
        (("MODEL", "OTHER"), "has another tokenizer than"),
        (("MODEL", "--tokenizer", "OTHER"), "has only 257 rows of embedding"),
        (("ADAPTER", "--base", "/nowhere"), "the base model of"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(words, sentence, folder, tmp_path, capsys):
    other = Path(__file__).parents[2] / "launch" / "quickstart_teacher"
    places = {
        "MODEL": folder / "model",
        "TEXT": folder / "heldout.txt",
        "ADAPTER": folder / "adapter",
        "OTHER": other,
    }
    lengths = () if "--lengths" in words else LENGTHS
    words = [places.get(word, word) for word in words]
    output = tmp_path / "out" / "a"
    assert sentence in refusal(capsys, "evaluate", *words, *lengths, "--output", output)
    assert not list(tmp_path.glob("out/*"))


def test_the_tasks_of_the_help_are_the_tasks():
    assert tuple(TASKS) == command.TASKS
