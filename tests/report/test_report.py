"""The report of a run: what is collected, what is drawn, and that the page needs nothing else."""

from __future__ import annotations

import base64
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from matplotlib import pyplot

from megalard.evaluation.measure import Measurement
from megalard.evaluation.report import Entry, Restoration
from megalard.evaluation.suite import Results
from megalard.report.collect import RunRecord, collect
from megalard.report.figures import curves, heat_map, rope_curves, validation_curves
from megalard.report.page import DAMAGED, render, write_report
from tests.command_line import megalard, refusal
from tests.evaluation.results import RESTORATION, entry, restoration_entries
from tests.jobs import NATIVE, STEPS, arguments, make_job, metrics, train


@pytest.fixture(scope="module", autouse=True)
def plain_figures():
    """Figures without the arrangement of their panels, which takes half of the time of a report."""
    make = pyplot.subplots
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyplot, "subplots", lambda *sizes, layout, **rest: make(*sizes, **rest))
        yield


@pytest.fixture(scope="module")
def small_job(tmp_path_factory):
    return make_job(tmp_path_factory.mktemp("report-job"), layers=3)


@pytest.fixture(scope="module")
def output(small_job, tmp_path_factory):
    """A run with an evaluation, validations and a report."""
    output = tmp_path_factory.mktemp("report") / "run <1>"
    options = ("evaluation.lengths=[64, 128]", "evaluation.every=2", "run.report=true")
    text = f"evaluation.paths={small_job / 'heldout.txt'}"
    train(arguments(small_job, output, text, *options, "objective.layers=[0, 2]"))
    return output


@pytest.fixture(scope="module")
def page(output) -> str:
    return (output / "report.html").read_text()


class Reader(HTMLParser):
    """Collects headings, cells and images, and checks that tags are closed."""

    def __init__(self):
        super().__init__()
        self.open, self.headings, self.cells, self.images = [], [], [], []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        elif tag != "meta":
            self.open.append(tag)
            if tag in ("td", "th"):
                self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)
        elif self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def cell_after(reader: Reader, name: str) -> str:
    return reader.cells[reader.cells.index(name) + 1]


def test_a_run_writes_all_sections(page):
    assert read(page).headings == [
        "run <1>",
        "Result",
        "Configuration",
        "Evaluation",
        "Validation during the run",
        "Training",
        "Loss by layer",
        "RoPE",
        "Cost",
    ]
    assert "The run has taken all of its 8 steps." in page


def test_the_page_needs_no_other_file(page):
    """Nothing is loaded: no script, no style sheet, and images are in the page."""
    assert not re.search(r"<(script|link|iframe|object|base)\b|@import|url\(", page)
    images = read(page).images
    assert len(images) == 5 and all(image.startswith("data:image/") for image in images)
    for image in images:
        content = base64.b64decode(image.partition(",")[2])
        if image.startswith("data:image/svg+xml"):
            references = re.findall(rb'(?:xlink:)?href="([^"]*)"', content)
            assert all(reference.startswith((b"#", b"data:")) for reference in references)
            ElementTree.fromstring(content)
        else:
            assert content.startswith(b"\x89PNG")


def test_the_tables_have_the_numbers_of_the_files(output, page):
    reader = read(page)
    report = json.loads((output / "evaluation.json").read_text())
    for model in report["models"]:
        for length in ("64", "128"):
            assert f"{model['by_length'][length]['perplexity']:.3f}" in reader.cells
    assert f"{report['models'][2]['gap_restored']:.3f}" in reader.cells
    assert cell_after(reader, "rope.factor") == "4.0"
    assert cell_after(reader, "window") == f"{NATIVE} to {4 * NATIVE} tokens"
    assert cell_after(reader, "tokens per second") != "0"
    assert cell_after(reader, "ranks") == "1 x cpu (dp 1 x cp 1 x tp 1)"
    # The frequencies of the first pair, which linear scaling divides by the factor.
    assert "4.0000" in reader.cells


def test_settings_are_those_of_stages_and_streams_where_there_are_any(output):
    """The run's own learning rate has no effect when every stage has one."""
    record = collect(output)
    stage = {"optimizer": {"learning_rate": 0.25}, "data": {"context_length": 16}}
    stream = {"global_batch": 7, "data": {"context_length": 32}}
    record.settings["stages"] = {"one": stage, "two": {**stage, "streams": {"chat": stream}}}
    record.settings["streams"] = {"of the run": stream}
    cells = read(render(record)).cells
    start = cells.index("stages.one.data.context_length")
    assert cells[start : start + 4] == [
        *("stages.one.data.context_length", "16"),
        *("stages.one.optimizer.learning_rate", "0.25"),
    ]
    start = cells.index("stages.two.optimizer.learning_rate")
    assert cells[start : start + 6] == [
        *("stages.two.optimizer.learning_rate", "0.25"),
        *("stages.two.streams.chat.data.context_length", "32"),
        *("stages.two.streams.chat.global_batch", "7"),
    ]
    assert "rope.factor" in cells
    absent = {"optimizer.learning_rate", "data.context_length", "stages.two.data.context_length"}
    assert not absent & set(cells)
    assert not any(cell.startswith("streams.") for cell in cells), "every stage has its streams"


def test_the_cost_is_the_sum_over_the_steps(output):
    cost = collect(output).cost()
    lines = [line for line in metrics(output) if "loss" in line]
    assert cost.tokens == STEPS * 128 and cost.ranks == 1
    assert cost.seconds == pytest.approx(sum(128 / line["tokens_per_second"] for line in lines))
    assert cost.peak_gib == max(line["memory_gib"] for line in lines)


def test_layers_are_compared_between_the_first_and_the_last_report(output):
    losses = {part.part: part for part in collect(output).layer_losses()}
    assert list(losses) == ["q", "k", "v"]
    lines = [line for line in metrics(output) if "loss" in line]
    assert (losses["v"].first_step, losses["v"].last_step) == (1, STEPS)
    assert list(losses["v"].first) == lines[0]["layers"]["v"]
    assert list(losses["v"].last) == lines[-1]["layers"]["v"]
    assert losses["v"].first[1] is None


def test_tensorboard_has_the_picture(output):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(output / "tensorboard"))
    shown.Reload()
    (picture,) = shown.Images("loss by layer")
    assert picture.step == STEPS and picture.encoded_image_string.startswith(b"\x89PNG")
    assert picture.width > 300 and picture.height > 100


def test_the_command_writes_the_same_page_again(output, page, tmp_path, capsys):
    copy = tmp_path / output.name
    shutil.copytree(output, copy)
    (copy / "report.html").write_text("old")
    assert megalard("report", copy) == 0
    assert capsys.readouterr().out == f"{copy / 'report.html'}\n"
    assert (copy / "report.html").read_text() == page


def test_a_run_without_evaluation_has_a_report(small_job, tmp_path, no_drawing):
    train(arguments(small_job, tmp_path / "run", "run.report=true", "optimizer.steps=2"))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Nothing was evaluated: the run had no held-out text." in page
    assert {"Training", "Loss by layer", "Cost"} <= set(read(page).headings)
    assert "Validation during the run" not in page


def test_a_run_that_has_not_ended_has_a_report(output, tmp_path, no_drawing):
    """The last line of its metrics is being written."""
    copy = tmp_path / "run"
    copy.mkdir()
    shutil.copy(output / "run.json", copy)
    lines = (output / "metrics.jsonl").read_text().splitlines()
    text = "\n".join(lines[:4]) + '\n{"step": 7, "lo'
    (copy / "metrics.jsonl").write_bytes(text.encode() + b"\xff")
    page = write_report(copy).read_text()
    assert "The run has not ended. Its last report is of step 3." in page
    read(page)
    (copy / "metrics.jsonl").unlink()
    assert "Its last report is of step 0." in write_report(copy).read_text()


def test_a_directory_without_a_run_is_refused(tmp_path, capsys):
    sentence = refusal(capsys, "report", tmp_path)
    assert f"{tmp_path} is not the output directory of a run: it has no run.json" in sentence


@pytest.mark.parametrize(
    ("file", "damage", "headings"),
    [
        ("metrics.jsonl", {"tokens": "many"}, {"Cost"}),
        ("metrics.jsonl", {"layers": {"q": 3}}, {"Loss by layer"}),
        ("summary.json", {"rope": {"teacher": [1, 0], "student": []}}, {"RoPE"}),
        ("summary.json", {"rope": 3, "ranks": 2}, {"Configuration", "RoPE", "Cost"}),
    ],
)
def test_a_section_that_damaged_files_do_not_fill_has_a_note(
    output, page, file, damage, headings, tmp_path, no_drawing
):
    assert DAMAGED not in page
    copy = tmp_path / output.name
    shutil.copytree(output, copy)
    lines = (copy / file).read_text().splitlines()
    if file == "metrics.jsonl":
        number = max(n for n, line in enumerate(lines) if "loss" in json.loads(line))
        lines[number] = json.dumps({**json.loads(lines[number]), **damage})
    else:
        lines = [json.dumps({**json.loads("\n".join(lines)), "device": None, **damage})]
        lines[0] = lines[0].replace('"dp"', '"no dp"')
    (copy / file).write_text("\n".join(lines) + "\n")
    damaged = write_report(copy).read_text()
    read(damaged)
    parts = [part for part in damaged.split("<h2>") if DAMAGED in part]
    assert {part.partition("</h2>")[0] for part in parts} >= headings
    assert "<h2>Evaluation</h2>" in damaged


def test_text_of_the_configuration_is_escaped(tmp_path):
    record = RunRecord(tmp_path, {"model": {"teacher": "<script>alert(1)</script>"}})
    page = render(record)
    assert "<script" not in page and "&lt;script&gt;" in page
    read(page)


def test_an_early_end_and_the_best_student_are_reported(tmp_path):
    summary = {"steps": 9, "last_step": 6, "early_stop": True, "exported_step": 4, "skipped": 2}
    page = render(RunRecord(tmp_path, summary=summary))
    assert "The run ended early, after step 6 of 9. The student of step 4 is exported" in page
    assert "2 steps changed nothing." in page
    page = render(RunRecord(tmp_path, summary={**summary, "exported_step": 6}))
    assert "is exported" not in page, "the last student needs no explanation"


def test_the_share_that_was_restored_is_that_of_the_last_student(tmp_path):
    entries = [*restoration_entries(), entry("later", 1.1, 3.0, 8192)]
    page = render(RunRecord(tmp_path, entries=entries, restoration=RESTORATION))
    assert "95.0% of the short-text gap was restored with 8,192 tokens." in page


def test_a_failing_report_does_not_fail_the_run(small_job, tmp_path, capsys, monkeypatch):
    def fail(directory):
        raise RuntimeError("no fonts")

    monkeypatch.setattr("megalard.training.summary.write_report", fail)
    train(arguments(small_job, tmp_path / "run", "run.report=true", "optimizer.steps=1"))
    assert "warning: the report was not written (RuntimeError: no fonts)" in capsys.readouterr().out
    assert (tmp_path / "run" / "finished.json").exists()


def lines(count: int) -> list[dict]:
    return [
        {"step": n, "tokens": n, "loss": 2.0, "loss_q": 0.0, "gradient_norm": 1.0, "mfu": None}
        for n in range(1, count + 1)
    ]


def test_long_runs_and_strange_values_are_drawn(tmp_path):
    record = RunRecord(tmp_path, steps=lines(5000))
    assert len(curves(record)) < 400_000
    empty = RunRecord(tmp_path)
    assert curves(empty) is None and validation_curves(empty) is None
    assert heat_map([]) is None and rope_curves([], []) is None
    zeros = {"step": 1, "loss": 0.0, "layers": {"q": [0.0, None], "lm": [None, None]}}
    assert heat_map(RunRecord(tmp_path, steps=[zeros]).layer_losses()).startswith(b"<?xml")


def test_values_that_are_null_are_left_out_of_a_curve(tmp_path):
    steps = [{"step": 1, "loss": None}, {"step": 2, "loss": 3.0}]
    assert RunRecord(tmp_path, steps=steps).curve("loss") == ([2], [3.0])


def test_rows_and_columns_of_the_tables_are_those_of_their_headings(tmp_path):
    """The layer with the largest first loss, KL before agreement, and hours of all devices."""
    layers = [{"q": [1.0, 4.0, None]}, {"q": [3.0, 2.0, None]}]
    steps = [
        {"step": n, "loss": 1.0, "tokens": n * 3600, "tokens_per_second": 1.0, "layers": by_part}
        for n, by_part in zip((1, 2), layers, strict=True)
    ]
    by_length = {64: Measurement(1.0, 0.25, 0.5, 0.75)}
    entries = [Entry(name, Results(by_length)) for name in ("teacher", "scaled", "restored")]
    record = RunRecord(
        tmp_path,
        steps=steps,
        entries=entries,
        restoration=Restoration(64, 4.0),
        summary={"ranks": 4, "dp": 2, "cp": 1, "tp": 2, "device": "cpu"},
    )
    reader = Reader()
    reader.feed(render(record))
    cells = " | ".join(reader.cells)
    assert "q | 1 | 4 | 2" in cells
    assert "gap restored | KL to teacher | same top-1" in cells and "0.250 | 0.500" in cells
    assert "time of the steps | 2:00:00" in cells and "device hours | 8.00" in cells
