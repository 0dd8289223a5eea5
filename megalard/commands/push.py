"""Upload the student of a finished run to the Hugging Face hub, with a model card.

  megalard push runs/x8 --repo you/Llama-2-7b-32k --base-model meta-llama/Llama-2-7b-hf

The card states the base model, the method, the training tokens, RoPE and what the run measured. If
RUN/student has a README.md, that file is uploaded instead. A repository that already holds a model
is changed only with --update, which adds a commit. Log in with `hf auth login`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

NAME, HELP = "push", "upload the student of a finished run to the Hugging Face hub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("run", type=Path, metavar="RUN", help="output directory of a finished run")
    parser.add_argument(
        "--repo", required=True, metavar="OWNER/NAME", help="the repository on the hub"
    )
    parser.add_argument(
        "--base-model",
        required=True,
        metavar="OWNER/NAME",
        help="the teacher's name on the hub, which the card states",
    )
    parser.add_argument(
        "--license", metavar="ID", help="the model's license, such as apache-2.0, for the card"
    )
    parser.add_argument(
        "--public",
        action="store_true",
        help="make a new repository public (default: private); an existing one stays as it is",
    )
    parser.add_argument(
        "--update", action="store_true", help="add a commit to a repository that holds a model"
    )
    parser.add_argument(
        "--card-only", action="store_true", help="print the card and upload nothing"
    )


def run(options: argparse.Namespace) -> int:
    """Make the card and upload."""
    from megalard.errors import UserError
    from megalard.training.model_card import model_card

    name = options.repo.rpartition("/")[2]
    student = options.run / "student"
    if not (student / "config.json").is_file():
        raise UserError(f"{options.run} holds no student: give the run.output of a finished run")
    card = model_card(options.run, options.base_model, options.license, name)
    if options.card_only:
        print(card, end="")
        return 0
    _upload(options, student, card)
    return 0


def _upload(options: argparse.Namespace, student: Path, card: str) -> None:
    """Upload the student's files and the card in one commit.

    Raises:
        UserError: the hub cannot be reached, refuses, or already holds a model of this name.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    from megalard.errors import UserError, reason_of
    from megalard.reporter import Reporter

    api = HfApi()
    names = sorted(path.relative_to(student) for path in student.rglob("*") if path.is_file())
    operations = [
        CommitOperationAdd(name.as_posix(), student / name)
        for name in names
        if not any(part.startswith(".") for part in name.parts)
    ]
    if not (student / "README.md").is_file():
        operations.append(CommitOperationAdd("README.md", card.encode()))
    try:
        if api.repo_exists(options.repo):
            is_model = "config.json" in api.list_repo_files(options.repo)
            if is_model and not options.update:
                raise UserError(
                    f"--repo {options.repo} already holds a model: give --update to add a commit, "
                    "or another name"
                )
        else:
            api.create_repo(options.repo, private=not options.public)
        commit = api.create_commit(
            options.repo, operations, commit_message="Upload the restored student"
        )
    except UserError:
        raise
    # The errors of the hub's client and of its network library are of many types.
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        fix = (
            "log in with hf auth login as someone who may write there"
            if status in (401, 403)
            else "check the network and HF_HUB_OFFLINE"
        )
        raise UserError(
            f"cannot upload to {options.repo} ({reason_of(error)}): {fix}, and give the same "
            "command again, with --update if the repository was made"
        ) from None
    Reporter(True).line(f"uploaded {len(operations)} files: {commit.commit_url}")
