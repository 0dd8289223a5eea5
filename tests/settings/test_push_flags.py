"""push: the effect of every flag, on a hub that notes what it is asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub.errors import HfHubHTTPError

from megalard.config.schema import Config, DataConfig, ModelConfig, RunConfig, to_dict
from tests.command_line import megalard, refusal

BASE = "--base-model=owner/teacher"


@pytest.fixture
def run(tmp_path) -> Path:
    """The directory of a finished run, with an evaluation."""
    folder = tmp_path / "run"
    (folder / "student").mkdir(parents=True)
    config = replace(
        Config(),
        model=ModelConfig("/secret/teacher"),
        data=DataConfig(["/secret/text"]),
        run=RunConfig(output=str(folder)),
    )
    (folder / "finished.json").write_text(json.dumps(to_dict(config)))
    student = {
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "yarn", "factor": 8.0},
    }
    (folder / "student" / "config.json").write_text(json.dumps(student))
    (folder / "student" / "model.safetensors").write_bytes(b"weights")
    models = [
        {"name": name, "by_length": {"512": {"perplexity": value}}, "gap_restored": gap}
        for name, value, gap in (("teacher", 5.25, 1.0), ("restored", 5.5, 0.98))
    ]
    (folder / "evaluation.json").write_text(json.dumps({"models": models}))
    return folder


@pytest.fixture
def hub(monkeypatch):
    """A hub with ``files`` by repository, and what was created and committed."""
    hub = SimpleNamespace(files={}, created={}, commits=[], error=None)

    class Api:
        def repo_exists(self, repo):
            if hub.error:
                raise hub.error
            return repo in hub.files

        def list_repo_files(self, repo):
            return hub.files[repo]

        def create_repo(self, repo, private):
            hub.created[repo] = private
            hub.files[repo] = []

        def create_commit(self, repo, operations, commit_message):
            contents = {}
            for operation in operations:
                with operation.as_file() as file:
                    contents[operation.path_in_repo] = file.read()
            hub.commits.append((repo, contents))
            return SimpleNamespace(commit_url=f"https://hub/{repo}/commit/1")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    return hub


def push(run: Path, *words: str, repo: str = "owner/student") -> int:
    return megalard("push", str(run), f"--repo={repo}", BASE, *words)


def card_of(text: str) -> tuple[dict, str]:
    """Return the metadata and the text of a card."""
    _, metadata, body = text.split("---\n", 2)
    return yaml.safe_load(metadata), body


def test_push_repo(run, hub, capsys):
    for name in ("LICENSE", ".hidden", ".cache/index.json", "folder/template.jinja"):
        (run / "student" / name).parent.mkdir(exist_ok=True)
        (run / "student" / name).write_text("text")
    assert push(run, repo="owner/name") == 0
    ((repo, contents),) = hub.commits
    assert repo == "owner/name" and set(contents) == {
        "README.md",
        "LICENSE",
        "config.json",
        "folder/template.jinja",
        "model.safetensors",
    }
    assert "\n# name\n" in contents["README.md"].decode()
    assert contents["model.safetensors"] == b"weights"
    assert "uploaded 5 files: https://hub/owner/name/commit/1" in capsys.readouterr().out


def test_push_base_model(run, hub):
    assert push(run) == 0
    metadata, body = card_of(hub.commits[0][1]["README.md"].decode())
    assert metadata["base_model"] == "owner/teacher" and "license" not in metadata
    for stated in (
        "a window of 32,768 tokens",
        "| LoRA of rank 1024 on q, k, v | 1 relation Q, 1 relation K, 1 relation V | 144 |",
        f"all stages: {144 * 8 * 4096:,}",
        "| rope_type | yarn |",
        "| factor | 8.0 |",
        "| restored | 5.5 | 98.0% |",
    ):
        assert stated in body, stated
    assert "/secret" not in body


def test_push_license(run, hub):
    assert push(run, "--license=apache-2.0") == 0
    metadata, _ = card_of(hub.commits[0][1]["README.md"].decode())
    assert metadata["license"] == "apache-2.0"


def test_push_public(run, hub):
    assert push(run, repo="owner/a") == 0 and push(run, "--public", repo="owner/b") == 0
    assert hub.created == {"owner/a": True, "owner/b": False}


def test_push_update(run, hub, capsys):
    hub.files["owner/student"] = ["config.json"]
    words = ("push", str(run), "--repo=owner/student", BASE)
    assert "already holds a model: give --update to add a commit" in refusal(capsys, *words)
    assert hub.commits == []
    assert push(run, "--update") == 0 and len(hub.commits) == 1
    hub.files["owner/student"] = [".gitattributes"]
    assert push(run) == 0, "an empty repository needs no --update"


def test_push_card_only(run, hub, capsys):
    assert push(run, "--card-only") == 0
    assert capsys.readouterr().out.startswith("---\nbase_model: owner/teacher\n")
    assert hub.commits == [] and hub.created == {}


def test_a_card_that_the_user_wrote_is_kept(run, hub):
    (run / "student" / "README.md").write_text("mine")
    assert push(run) == 0
    assert hub.commits[0][1]["README.md"] == b"mine"


UNAUTHORIZED = SimpleNamespace(headers={}, request=None, status_code=401)


@pytest.mark.parametrize(
    ("error", "reason", "fix"),
    [
        (OSError("no route\nto host"), "no route to host", "check the network"),
        (RuntimeError(), "RuntimeError", "check the network"),
        (HfHubHTTPError("401 no", response=UNAUTHORIZED), "401 no", "log in with"),
    ],
)
def test_a_hub_that_cannot_be_reached_is_one_sentence(error, reason, fix, run, hub, capsys):
    hub.error = error
    message = refusal(capsys, "push", str(run), "--repo=owner/student", BASE)
    assert f"cannot upload to owner/student ({reason}): {fix}" in message


def test_what_is_no_finished_run_is_refused(run, tmp_path, capsys):
    assert "holds no student" in refusal(capsys, "push", str(tmp_path), "--repo=a/b", BASE)
    (run / "finished.json").unlink()
    assert "holds no finished run" in refusal(capsys, "push", str(run), "--repo=a/b", BASE)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("finished.json", "[]"),
        ("finished.json", "{"),
        ("student/config.json", "{}"),
        ("student/config.json", '{"max_position_embeddings": "many"}'),
        ("evaluation.json", '{"models": []}'),
        ("evaluation.json", '{"models": [{"name": 3, "by_length": {"x": {}}}]}'),
    ],
)
def test_a_run_with_a_damaged_file_is_refused_in_one_sentence(run, file, content, capsys):
    (run / file).write_text(content)
    sentence = refusal(capsys, "push", run, "--repo=owner/name", BASE, "--card-only")
    assert f"a file of the run {run} is damaged (" in sentence
