"""A share of the drawn model directories: each equals transformers or is refused."""

from __future__ import annotations

import json

import pytest

from tests.models import make_model
from tests.small_tokenizers import save_byte_tokenizer
from tools.campaigns import directories
from tools.campaigns.drawn_tokenizers import make_stock

# Seeds whose directories take part in every run of the tests; docs/exactness.md has a long one.
SEEDS = range(5000, 5040)


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock") / "tokenizers"
    make_stock(folder)
    return folder


@pytest.fixture(scope="module")
def outcomes(stock):
    return [directories.try_directory(seed, stock) for seed in SEEDS]


def test_no_directory_is_read_as_another_model(outcomes):
    bad = [outcome for outcome in outcomes if outcome.kind not in directories.GOOD]
    assert [outcome for outcome in bad if outcome.kind != "read by us alone"] == []


def test_many_directories_are_read_and_some_are_refused(outcomes):
    kinds = [outcome.kind for outcome in outcomes]
    assert kinds.count("equal") > len(kinds) / 4
    assert kinds.count("refused by us") < len(kinds) / 4
    cases = [outcome.case for outcome in outcomes]
    for family in ("llama", "mistral", "ministral", "qwen2", "qwen3", "olmo2", "phi3"):
        assert any(case.startswith(f"{family}, ") for case in cases)


def test_a_seed_draws_the_same_directory_again(stock, outcomes):
    for seed, before in list(zip(SEEDS, outcomes, strict=True))[:3]:
        again = directories.try_directory(seed, stock)
        # A sentence may name the temporary directory.
        assert (again.kind, again.case) == (before.kind, before.case)


@pytest.mark.parametrize("part", ["ids", "logits"])
def test_a_difference_is_found(stock, outcomes, monkeypatch, part, capsys):
    """What we read is changed a little; the directory then counts as different."""
    seed = next(s for s, outcome in zip(SEEDS, outcomes, strict=True) if outcome.kind == "equal")
    read = directories._by_us

    def wrong(folder):
        ids, logits = read(folder)
        return ([*ids[:-1], [1]], logits) if part == "ids" else (ids, logits * 1.001)

    monkeypatch.setattr(directories, "_by_us", wrong)
    assert directories.try_directory(seed, stock).kind == "different"
    assert directories.main(["--count", "1", "--seed", str(seed)]) == 1
    assert "different: seed" in capsys.readouterr().out


def test_weights_that_transformers_makes_up_are_not_read(tmp_path):
    folder = make_model("llama", tmp_path / "model", vocab_size=257)
    save_byte_tokenizer(folder)
    (read, made_up) = directories._by_transformers(folder)
    assert read is not None and not made_up
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    assert directories._by_transformers(folder)[1]
