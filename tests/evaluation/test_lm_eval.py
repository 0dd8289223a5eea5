"""lm-evaluation-harness on an exported student, as docs/evaluation.md says, without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megalard.checkpoint.companions import tokenizer_companions
from megalard.checkpoint.compare import logits_of
from megalard.checkpoint.open import open_model
from megalard.data.tokenizer import load_tokenizer
from megalard.parallel.mesh import build_mesh
from tests.students import StudentCase, make_config, make_student, pretend_to_train

CHECKOUT = Path(__file__).parents[2]
HARNESS = CHECKOUT / "tests" / ".lm-eval"
TASKS = CHECKOUT / "tests" / "evaluation" / "local_task"
TEACHER = CHECKOUT / "launch" / "quickstart_teacher"

needs_harness = pytest.mark.skipif(
    not HARNESS.is_dir(), reason="needs lm-evaluation-harness in tests/.lm-eval (tests/run.sh)"
)

# The command ``lm_eval`` without the fourteen thousand tasks that the harness brings. Reading their
# files takes longer than everything else.
COMMAND = """
from functools import partial
import lm_eval.tasks
from lm_eval.__main__ import cli_evaluate
lm_eval.tasks.TaskManager = partial(lm_eval.tasks.TaskManager, include_defaults=False)
cli_evaluate()
"""


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    """The quickstart's teacher with scaled RoPE and LoRA pairs, exported as by a run."""
    folder = tmp_path_factory.mktemp("lm-eval")
    case = StudentCase("llama", "lora", "linear")
    made = make_student(make_config(case, TEACHER, folder / "none"), build_mesh("cpu", 1))
    pretend_to_train(made.student)
    made.save(folder / "student", tokenizer_companions(TEACHER))
    return folder / "student"


def log_likelihood(student: Path, text: str, choice: str) -> float:
    """Return log p(choice | text) by the trainer's decoder."""
    encode = load_tokenizer(student).encode_batch
    given, full = encode([text, f"{text} {choice}"])
    model, tokens = open_model(student), torch.tensor(full)
    log_p = logits_of(model, tokens, torch.float32).double().log_softmax(-1)
    return float(log_p[:-1].gather(1, tokens[1:, None])[len(given) - 1 :].sum())


@needs_harness
def test_the_harness_scores_the_student_as_the_trainer_does(student, tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": str(HARNESS),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "cache"),
    }
    command = [sys.executable, "-c", COMMAND, "run", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={student},dtype=float32", "--batch_size", "4"]
    command += ["--include_path", TASKS, "--tasks", "python_next"]
    command += ["--output_path", tmp_path / "results", "--log_samples"]
    done = subprocess.run(
        [str(word) for word in command],
        env=environment,
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = tmp_path.glob("results/*/results_*.json")
    (samples,) = tmp_path.glob("results/*/samples_python_next_*.jsonl")
    theirs = {
        sample["doc"]["text"]: [float(answer[0]) for answer in sample["filtered_resps"]]
        for sample in map(json.loads, samples.read_text().splitlines())
    }
    correct = []
    for line in (TASKS / "python_next.jsonl").read_text().splitlines():
        doc = json.loads(line)
        ours = [log_likelihood(student, doc["text"], choice) for choice in doc["choices"]]
        # The harness rounds to fp32 after each step, and its batches are padded.
        assert theirs[doc["text"]] == pytest.approx(ours, abs=1e-3)
        correct.append(ours.index(max(ours)) == doc["answer"])
    accuracy = json.loads(results.read_text())["results"]["python_next"]["acc,none"]
    assert accuracy == pytest.approx(sum(correct) / len(correct))
    assert 0.3 < accuracy < 1, "a score at chance or without error shows little"
