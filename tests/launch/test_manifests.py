"""The manifests for Kubernetes and SkyPilot, and the Dockerfiles, fit the scripts and schemas."""

from __future__ import annotations

import json
import re
import shlex
import subprocess

import pytest
import yaml

from megalard.config.file import load_config
from tests.processes import CHECKOUT

LAUNCH = CHECKOUT / "launch"


def kubernetes() -> dict:
    return yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())


def skypilot() -> dict:
    return yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())


def words_of(name: str) -> list[str]:
    """Return the words after ``train.sh`` in a manifest."""
    if name == "kubernetes":
        return kubernetes()["spec"]["trainer"]["args"]
    words = shlex.split(skypilot()["run"].replace("\\\n", ""))
    assert words[:2] == ["bash", "launch/train.sh"]
    return words[2:]


@pytest.mark.parametrize("name", ["kubernetes", "skypilot"])
def test_train_sh_takes_the_options(name):
    # The script checks every option before it comes to the last one.
    words = ["bash", str(LAUNCH / "train.sh"), *words_of(name), "--help"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    given = dict(re.findall(r"(--\w+)[ =](\S+)", " ".join(words_of(name))))
    assert set(given) == {"--config", "--model", "--data", "--output"}
    settings = {"model.teacher": "m", "data.paths": "d", "run.output": "o"}
    load_config(given["--config"], [f"--{key}={value}" for key, value in settings.items()])


def test_the_client_of_kubeflow_reads_every_key():
    models = pytest.importorskip("kubeflow_trainer_api.models")
    content = kubernetes()
    job = models.TrainerV1alpha1TrainJob.from_dict(content)
    # Quantities are strings to the client. Keys that it does not know would be lost.
    text = json.dumps(content, sort_keys=True).replace("64,", '"64",').replace(": 8}", ': "8"}')
    written = json.dumps(job.to_dict(), sort_keys=True)
    assert json.loads(re.sub(r'"(\d+)"', r"\1", written)) == json.loads(
        re.sub(r'"(\d+)"', r"\1", text)
    )


def test_skypilot_s_schema_accepts_the_task():
    schemas = pytest.importorskip("sky.utils.schemas")
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(skypilot(), schemas.get_task_schema())
    jsonschema.validate(skypilot()["resources"], schemas.get_resources_schema())


@pytest.mark.parametrize("file", [LAUNCH / "Dockerfile", LAUNCH / "gpu.Dockerfile"])
def test_dockerfiles_install_what_the_project_requires(file):
    text = file.read_text()
    environment = (LAUNCH / "environment.sh").read_text()
    (version,) = re.findall(r"torch==([\d.*]+)", text)
    assert version in environment
    assert "--editable '.[dev]'" in text and f"--file launch/{file.name} " in text
    for script in re.findall(r"bash (\S+\.sh)", text):
        assert (CHECKOUT / script).is_file(), script
