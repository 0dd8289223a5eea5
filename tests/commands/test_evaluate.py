"""tools/evaluate.py from the command line, on every kind of model and with bad input."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megalard.checkpoint.convert import export_adapter, import_model
from megalard.checkpoint.open import open_model
from megalard.data.token_store_writer import build_store
from megalard.data.tokenizer import load_tokenizer
from megalard.errors import UserError
from megalard.evaluation.command import choose_lengths, parse_length
from megalard.parallel.mesh import SINGLE, build_mesh
from megalard.train import main as train
from megalard.training.run_folder import checkpoint_path
from tests.jobs import NATIVE, arguments, make_job
from tests.tools.test_checkpoint_tools import launch, tool

evaluate = tool("evaluate")
# long enough for a passkey in a vocabulary of bytes
LENGTHS = ("--lengths", 64, 512)
QUICK = ("--tasks", "passkey", "--depths", 0, 1, "--samples", 2, "--max-tokens", 1024, *LENGTHS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A job whose run is finished: its student in four forms, and what it started from."""
    folder = make_job(tmp_path_factory.mktemp("evaluate"))
    options = ("optimizer.steps=2", "checkpoint.save_every=2")
    train(arguments(folder, folder / "run", *options))
    (folder / "state").symlink_to(checkpoint_path(folder / "run" / "checkpoints", 2))
    export_adapter(open_model(folder / "state"), folder / "adapter")
    student = open_model(folder / "run" / "student")
    import_model(student, folder / "sharded", build_mesh("cpu", 1), SINGLE)
    return folder


def read(output: Path) -> dict:
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(output.with_suffix(".json").read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def compared(folder):
    """The student however it is stored, beside the model it started from."""
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
    # the teacher has nothing to say beyond its window
    assert first["by_length"]["512"]["kl"] is None


def test_the_figures_are_transformers(compared, folder):
    student = AutoModelForCausalLM.from_pretrained(folder / "run" / "student", dtype=torch.float64)
    ids = load_tokenizer(folder / "model").encode_batch([(folder / "heldout.txt").read_text()])[0]
    tokens = torch.tensor(ids[:1024]).view(-1, 64)
    with torch.no_grad():
        loss = student(tokens, labels=tokens).loss
    found = compared["models"][0]["by_length"]["64"]
    # fp32 against float64
    assert found["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert compared["settings"]["text_tokens"] == {"64": 1024, "512": 1024}
    positions = compared["models"][0]["by_position"]
    assert [(p["first"], p["last"]) for p in positions][-2:] == [(128, 255), (256, 511)]
    result = compared["models"][0]["tasks"]["passkey"]["512"]
    assert result["samples"] == 4 and set(result["by_depth"]) == {"0.0", "1.0"}


def test_ranks_measure_what_one_process_does(compared, folder):
    """Two processes as tp 2; a token store in place of the text."""
    tokenizer = load_tokenizer(folder / "model")
    build_store([folder / "heldout.txt"], tokenizer, folder / "tokens", progress=False)
    text = ("--text", folder / "tokens", "--teacher", folder / "model")
    output = folder / "results" / "ranks"
    options = ("--tp", 2, "--device", "cpu", *text, *QUICK)
    launch(2, "tools/evaluate.py", folder / "state", *options, "--output", output)
    found, expected = read(output)["models"][0], compared["models"][2]
    assert read(output)["settings"]["layout"] == {"dp": 1, "cp": 1, "tp": 2}
    for length, measured in expected["by_length"].items():
        # fp32 sums in another order
        assert found["by_length"][length]["loss"] == pytest.approx(measured["loss"], rel=1e-5)
    task, same = (model["tasks"]["passkey"]["512"] for model in (found, expected))
    assert task["loss"] == pytest.approx(same["loss"], rel=1e-5)
    assert task["exact"] == same["exact"]


def test_it_says_what_it_leaves_out_and_measures_beyond(folder, tmp_path, capsys):
    options = ("--lengths", 64, 512, "--samples", 1, "--depths", 0.5, "--filler", "text", "--bos")
    text = ("--text", folder / "heldout.txt", "--max-tokens", 512)
    model = shutil.copytree(folder / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "bos_token_id": 65}))
    assert evaluate(model, *text, *options, "--output", tmp_path / "a.json") == 0
    printed = capsys.readouterr()
    warnings = printed.err.splitlines()
    assert all(line.startswith("megalard: warning: ") for line in warnings)
    assert "has a window of 64 tokens and is measured beyond it, at 512" in warnings[0]
    assert "64 tokens are too few for the task passkey" in printed.err
    for words in ("Perplexity by length", "Loss by position", "Exact answers", "a.png"):
        assert words in printed.out
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "a.png", "model"}


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


def test_a_damaged_checkpoint_is_not_measured(folder, tmp_path, capsys):
    shutil.copytree(folder / "sharded", tmp_path / "copy")
    (shard,) = (tmp_path / "copy").glob("weights-*")
    content = bytearray(shard.read_bytes())
    content[-9] ^= 4
    shard.write_bytes(content)
    models = (folder / "model", tmp_path / "copy")
    assert evaluate(*models, *QUICK, "--output", tmp_path / "out" / "a") == 1
    assert f"{shard} is damaged" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("/nowhere",), "no model directory at /nowhere"),
        (("MODEL", "--text", "/nowhere.txt"), "data path /nowhere.txt does not exist"),
        (("MODEL", "--text", "TEXT", "--lengths", "1M"), '"1M" is no length'),
        (("MODEL", "--text", "TEXT", "--lengths", "64K"), "but the longest length is 65536"),
        (("MODEL", "--teacher", "MODEL"), "--teacher is compared with on text"),
        (("MODEL", "--teacher", "/nowhere", "--text", "TEXT"), "no model directory at /nowhere"),
        (("MODEL", "--tasks"), "there is nothing to measure"),
        (("MODEL", "--lengths", "64"), "there is nothing to measure"),
        (("MODEL", "--tasks", "ruler"), "there is no task ruler: choose from passkey, multi_key"),
        (("MODEL", "--filler", "text"), "--filler text hides statements in the text"),
        (("MODEL", "--depths", "0.5", "2"), "--depths has 2"),
        (("MODEL", "--samples", "0"), "--samples is 0"),
        (("MODEL", "--seed", "-1"), "--seed is -1"),
        (("OTHER", "--bos"), "names no bos_token_id"),
        (("MODEL", "--tp", "2"), "parallel.tp 2 times parallel.cp 1 is 2 but 1 processes"),
        (("MODEL", "OTHER"), "has another tokenizer than"),
        (("MODEL", "--tokenizer", "OTHER"), "has only 257 rows of embedding"),
        (("ADAPTER", "--base", "/nowhere"), "the base model of"),
    ],
)
def test_bad_input_is_told_in_one_sentence(arguments, sentence, folder, tmp_path, capsys):
    other = Path(__file__).parents[2] / "launch" / "quickstart_teacher"
    places = {
        "MODEL": folder / "model",
        "TEXT": folder / "heldout.txt",
        "ADAPTER": folder / "adapter",
        "OTHER": other,
    }
    lengths = () if "--lengths" in arguments else LENGTHS
    words = [places.get(word, word) for word in arguments]
    assert evaluate(*words, *lengths, "--output", tmp_path / "out" / "a") == 1
    printed = capsys.readouterr().err
    assert printed.startswith("megalard: error: ") and printed.count("\n") == 1
    assert sentence in printed
    assert not list(tmp_path.glob("out/*"))


def test_a_length_that_the_ranks_do_not_divide_is_refused():
    with pytest.raises(UserError, match="length 100 is not a multiple of 8, into which --tp"):
        choose_lengths(["100"], [], 8)


def test_lengths_are_tokens_or_thousands():
    assert [parse_length(text) for text in ("4096", "4K", "128k")] == [4096, 4096, 131072]
