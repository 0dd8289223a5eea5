"""A fast share of every campaign, and proof that each of them can fail."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import pytest

from megalard.checkpoint.sharded import read
from megalard.model import spec
from tools.campaigns import (
    arguments,
    damage,
    directories,
    files,
    kills,
    mutations,
    payloads,
    settings,
)
from tools.campaigns.trial import TooLate

# A few seconds each; the whole campaigns are run by hand (tools/campaigns/README.md). The campaign
# of settings is in test_settings.py.
SHARES = {
    "directories": (directories, 6),
    "files": (files, 10),
    "arguments": (arguments, 20),
    "payloads": (payloads, 3),
    "damage": (damage, 4),
    "kills": (kills, 1),
}


@pytest.fixture(autouse=True)
def patient(monkeypatch, no_drawing):
    """Other tests may keep the cores busy. Drawing takes four fifths of the time of a run."""
    monkeypatch.setattr(settings, "SLOWEST_S", 30.0)


@pytest.mark.parametrize("name", SHARES)
def test_a_share_of_the_campaign_finds_nothing(name, capsys):
    campaign, count = SHARES[name]
    # Seeds that the documented runs do not have.
    assert campaign.main(["--count", str(count), "--seed", "900000"]) == 0, capsys.readouterr().out


def test_a_reader_with_a_fault_is_found(capsys, monkeypatch):
    finish = files.make_piece_tokenizer

    def broken(path, limit=0):
        raise RecursionError

    def finish_and_break(folder):
        finish(folder)  # the last step of making the material
        monkeypatch.setattr(spec, "read_json", broken)

    monkeypatch.setattr(files, "make_piece_tokenizer", finish_and_break)
    assert files.main(["--count", "6", "--seed", "0"]) == 1
    assert "traceback: seed " in capsys.readouterr().out


def test_a_checksum_that_is_not_compared_is_found(capsys, monkeypatch):
    monkeypatch.setattr(read, "check_checksums", lambda *arguments, **options: None)
    # The case of this seed flips a bit of a weight.
    assert damage.main(["--count", "1", "--seed", "5"]) == 1
    assert "silently different: seed 5: sharded/weights-00000-000" in capsys.readouterr().out


def test_the_code_of_a_payload_can_run(tmp_path):
    """Where it is unpickled, which megalard never does."""
    for make in (payloads._pickle,):
        pickle.loads(make(f"touch {tmp_path / 'ran'}"))
    assert (tmp_path / "ran").exists()
    scope: dict = {}
    exec(payloads._code_of(f"touch {tmp_path / 'ran-too'}"), scope)
    assert (tmp_path / "ran-too").exists()


def test_code_that_runs_is_found(capsys, monkeypatch):
    monkeypatch.setattr(payloads, "try_command", _unpickle_everything)
    assert payloads.main(["--count", "6", "--seed", "0"]) == 1
    assert "CODE RAN: seed " in capsys.readouterr().out


def _unpickle_everything(words):
    for word in words:
        paths = Path(str(word)).rglob("*") if Path(str(word)).is_dir() else [Path(str(word))]
        for path in paths:
            if path.suffix in (".safetensors", ".npy") and path.is_file():
                content = path.read_bytes()
                start = content.find(b"\x80\x04")
                try:
                    pickle.loads(content[max(start, 0) :])
                except Exception:
                    continue
    return payloads.Trial("done", 0, "", "")


def test_mutations_are_the_same_for_the_same_seed(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.json").write_text('{"a": [1, 2, {"b": "c"}], "d": null}')
    for seed in range(40):
        hows = []
        for name in ("a", "b"):
            path = tmp_path / name / f"{seed}.json"
            path.write_text((tmp_path / name / "x.json").read_text())
            hows.append(mutations.change_json(random.Random(seed), path))
        assert hows[0] == hows[1]
        assert (tmp_path / "a" / f"{seed}.json").read_bytes() == (
            tmp_path / "b" / f"{seed}.json"
        ).read_bytes()


def test_time_limits_do_not_look_like_errors():
    assert not issubclass(TooLate, Exception)
