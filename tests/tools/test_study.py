"""The restoration study: its numbers from made-up measurements, and one run of it, much shrunk."""

from __future__ import annotations

import json
import random

import pytest

from megalard.data.token_store_writer import write_store
from megalard.data.tokenizer import load_tokenizer
from tests.jobs import save_tokenizer
from tests.models import make_model
from tools.study.figures import IN, OUT, Results, spread
from tools.study.methods import CONFIGS, METHODS, SHORT_TOKENS, config_file
from tools.study.report import write_report
from tools.study.restoration import shown
from tools.study.worker import SHORT, TASKS, WINDOW, Run, Study, execute


def measured(loss: float, accuracy: float = 0.5) -> dict:
    one = {"loss": loss, "accuracy": accuracy, "kl": 0.1, "agreement": 0.9}
    return {
        "domains": {
            domain: {str(n): one for n in (*SHORT, WINDOW)} | {"by_position": [one]}
            for domain in ("python", "prose")
        },
        "tasks": {"passkey": {"512": {"exact": 1.0}, "1024": {"exact": 0.25}}},
    }


def run_of(method: str, seed: int, losses: list[float]) -> dict:
    return {
        "kind": "final",
        "method": method,
        "rope": "linear",
        "rate": 0.1,
        "seed": seed,
        "compared": measured(losses[-1], 0.4),
        "curve": [
            {"tokens": 1000 * 10**i, "domains": measured(loss)["domains"]}
            for i, loss in enumerate(losses)
        ],
    }


@pytest.fixture
def results():
    baselines = [
        {
            "kind": "baseline",
            "method": name,
            "rope": "linear",
            "compared": measured(loss),
            "curve": [{"tokens": 0, "domains": measured(loss)["domains"]}],
        }
        for name, loss in (("teacher", 2.0), ("scaled", 4.0))
    ]
    finals = [run_of("linearard", 1, [3.0, 2.5, 2.1]), run_of("linearard", 2, [3.0, 2.5, 2.3])]
    return Results([*baselines, *finals], "python")


def test_shares_are_of_the_gap_and_seeds_are_told(results):
    restored = results.over_seeds(
        "linearard", "linear", lambda m: results.restored(m, "linear", IN)
    )
    assert (restored.mean, restored.count) == (pytest.approx(0.9), 2)
    assert restored.text(2) == "0.90 ± 0.05"
    assert results.score_kept(measured(2.1, 0.4), OUT) == pytest.approx(0.8)
    assert results.exact(measured(2.1), "passkey", beyond=True) == 0.25
    assert spread([0.5]).text(1) == "0.5" and spread([]).text(1) == "-"


def test_tokens_needed_are_read_off_the_mean_curve(results):
    # the mean curve: 0.5 at 1000, 0.75 at 10000, 0.9 at 100000
    tokens = results.tokens_needed("linearard", "linear", OUT, 0.625)
    assert tokens == pytest.approx(10**3.5)
    assert results.tokens_needed("linearard", "linear", OUT, 0.5) == 1000
    assert results.tokens_needed("linearard", "linear", OUT, 0.95) is None


def test_every_method_has_a_recipe_and_short_ones_read_a_sixtieth():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*METHODS, "pretrain"}
    long = {method.compared_at for method in METHODS.values() if method.long}
    assert long == {60 * SHORT_TOKENS}
    for name, method in METHODS.items():
        assert config_file(name).exists() and method.compared_at in method.milestones()


def test_the_report_shows_each_method_at_the_best_rate_of_its_rope():
    def result(kind: str, method: str, rate: float, rope: str = "linear", loss: float = 1.0):
        validation = {"python": {"512": {"loss": loss}}}
        return dict(kind=kind, method=method, rope=rope, rate=rate, validation=validation)

    searches = [
        result("search", "cpt", 0.1, loss=2.0),
        result("search", "cpt", 0.2, loss=1.0),
        result("search", "cpt", 0.3, loss=float("nan")),
        result("search", "cpt", 0.1, "yarn", loss=1.0),
    ]
    kept = [
        result("final", "cpt", 0.2),
        result("final", "cpt", 0.1, "yarn"),
        result("timing", "cpt", 0.2),
        result("baseline", "teacher", 0.0),
    ]
    others = [
        result("final", "cpt", 0.1),
        result("final", "cpt", 0.2, "yarn"),
        result("final", "a recipe of before", 0.1),
        result("timing", "a recipe of before", 0.1),
    ]
    assert shown([*searches, *others, *kept]) == [*searches, *kept]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A study's folder with a random teacher of one layer, and three domains of words."""
    folder = tmp_path_factory.mktemp("study")
    make_model(
        "llama-mha",
        folder / "teacher",
        vocab_size=257,
        max_position_embeddings=512,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    save_tokenizer(folder / "teacher")
    tokenizer = load_tokenizer(str(folder / "teacher"))
    for number, domain in enumerate(("python", "prose")):
        for split in ("train", "validation", "test"):
            chosen = random.Random(f"{domain} {split}")
            words = [
                " ".join(chosen.choices(["row", "mask", "loss", "of"], k=400)) for _ in range(6)
            ]
            write_store(words, tokenizer, folder / "corpus" / domain / split, str(number))
    return folder


def test_a_run_is_measured_where_methods_are_compared_and_reported(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("tools.study.worker.TASK_LENGTHS", (512, 1024))
    monkeypatch.setattr("tools.study.report.TASK_LENGTHS", (512, 1024))
    # so much smaller that four steps are left, of which the first is where methods are compared
    study = Study(folder, "python", "cpu", shrink=61)
    runs = [
        Run("baseline", "teacher", "linear"),
        Run("baseline", "scaled", "linear"),
        Run("search", "linearard", "linear", 1e-3),
        Run("final", "linearard", "linear", 1e-3, 1),
    ]
    found = [execute(study, run) for run in runs]
    teacher, scaled, tried, final = found
    json.dumps(found)
    assert teacher["compared"]["domains"]["python"]["512"]["kl"] == pytest.approx(0, abs=1e-6)
    assert scaled["compared"]["domains"]["prose"]["512"]["kl"] > 0
    assert list(tried["validation"]) == ["python"]
    assert [point["tokens"] for point in final["curve"]][-1] == 4 * 4096
    assert set(final["compared"]["tasks"]) == set(TASKS)
    assert final["loss"] > 0 and final["peak_memory"] > 0

    write_report(tmp_path / "report", found, "python")
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert {"restoration-tables.md", "restoration-tokens.png", "restoration.json"} <= names
