"""The manifest: it describes the checkpoint, and one that cannot be true is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from megalard.checkpoint.inspection import describe_checkpoint
from megalard.checkpoint.open import open_model
from megalard.checkpoint.sharded.manifest import MANIFEST, is_checkpoint, read_manifest
from tests.checkpoint.sharded.damage import rewrite_manifest
from tests.command_line import user_error
from tests.conversions import shard_models
from tests.models import make_model
from tests.ranks import run_ranks

SPLIT, FULL = "model.embed_tokens.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A model in two slices."""
    folder = tmp_path_factory.mktemp("manifest")
    make_model("llama", folder / "model")
    run_ranks(2, shard_models, str(folder), ("model",), 2)
    return folder / "sharded-model"


def with_manifest(sharded: Path, folder: Path, change) -> Path:
    """Return a copy whose manifest is changed, with a checksum that holds."""
    copy = shutil.copytree(sharded, folder / "copy")
    rewrite_manifest(copy, change)
    return copy


def chunks(body: dict, name: str = SPLIT) -> list[dict]:
    """Return the slices of a tensor."""
    return body["tensors"][name]["chunks"]


BAD_MANIFESTS = {
    "a slice is missing": (lambda b: chunks(b).pop(), "overlap or leave gaps"),
    "no slices": (lambda b: chunks(b, FULL).clear(), "overlap or leave gaps"),
    "a slice twice": (lambda b: chunks(b).append(chunks(b)[0]), "overlap or leave gaps"),
    "overlap": (lambda b: chunks(b)[1].update(chunks(b)[0]), "overlap or leave gaps"),
    "one row up": (
        lambda b: max(chunks(b), key=lambda c: c["offsets"]).update(offsets=[33, 0]),
        "overlap or leave gaps",
    ),
    "out of bounds": (lambda b: chunks(b)[0].update(offsets=[60, 0]), "outside its shape"),
    "below 0": (lambda b: chunks(b)[0].update(offsets=[-1, 0]), "is not a shape or an offset"),
    "another dim": (lambda b: chunks(b)[0].update(offsets=[0]), "is not as megalard writes it"),
    "a file elsewhere": (
        lambda b: chunks(b)[0].update(file="../../x"),
        "'../../x', which is not among its files",
    ),
    "an unknown file": (lambda b: chunks(b)[0].update(file="x"), "which is not among its files"),
    "the parent": (lambda b: b["files"].update({"..": {"size": 1}}), "'..' outside its directory"),
    "a path": (
        lambda b: b["files"].update({"../secret": {"size": 1, "sha256": "0"}}),
        "'../secret' outside its directory",
    ),
    "dtype": (lambda b: b["tensors"][FULL].update(dtype="F4"), f"{FULL} of dtype F4, which"),
    "no dtype": (lambda b: b["tensors"][FULL].pop("dtype"), "it has no 'dtype'"),
    "kind": (lambda b: b.update(kind="x"), "its kind is 'x'"),
    "no base": (lambda b: b.update(kind="training"), "its section base is not a JSON object"),
    "no id": (lambda b: b.update(id=3), "its id is not text"),
    "no sha256": (
        lambda b: b["files"]["config.json"].update(sha256=3),
        "the sha256 of config.json is not text",
    ),
    "a control character": (
        lambda b: chunks(b)[0].update(file="\x1b[2J"),
        "'\\x1b[2J', which is not among its files",
    ),
}


@pytest.mark.parametrize("case", BAD_MANIFESTS)
def test_a_manifest_that_does_not_make_up_its_tensors_is_refused(case, sharded, tmp_path):
    """Although its own checksum holds."""
    change, sentence = BAD_MANIFESTS[case]
    copy = with_manifest(sharded, tmp_path, change)
    message = user_error(open_model, copy)
    assert sentence in message and str(copy / MANIFEST) in message
    assert message.endswith("use another checkpoint") and message.isprintable()


def test_a_config_without_a_family_is_refused(sharded, tmp_path):
    copy = with_manifest(sharded, tmp_path, lambda body: body["config"].pop("model_type"))
    assert "it has no 'model_type'" in user_error(describe_checkpoint, read_manifest(copy))


def test_slices_over_columns_and_rows_may_make_up_a_tensor(sharded, tmp_path):
    """Boxes that touch do not overlap; boxes that cross in both dims do."""

    def change(body, third=(16, 0)):
        file = chunks(body)[0]["file"]
        places = (((0, 0), (16, 32)), (third, (51, 8)), ((16, 8), (51, 24)))
        boxes = [{"file": file, "offsets": list(at), "shape": list(n)} for at, n in places]
        body["tensors"][SPLIT]["chunks"] = boxes

    read_manifest(with_manifest(sharded, tmp_path / "good", change))
    crossing = with_manifest(sharded, tmp_path / "bad", lambda body: change(body, (15, 0)))
    assert "overlap" in user_error(read_manifest, crossing)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "is damaged: it is not JSON"),
        ("{ cut", "is damaged: it is not JSON"),
        ("[" * 100_000, "is damaged: it is not JSON"),
        ("[]", "does not describe a megalard checkpoint"),
        ('{"format": "another"}', "does not describe a megalard checkpoint"),
    ],
)
def test_a_file_that_is_not_a_manifest_is_refused(content, sentence, sharded, tmp_path):
    copy = shutil.copytree(sharded, tmp_path / "copy")
    (copy / MANIFEST).write_text(content)
    assert user_error(read_manifest, copy).startswith(f"{copy / MANIFEST} {sentence}")


def test_a_manifest_whose_checksum_does_not_hold_is_refused(sharded, tmp_path):
    copy = shutil.copytree(sharded, tmp_path / "copy")
    body = json.loads((copy / MANIFEST).read_text())
    body["written_by"]["ranks"] = 3
    (copy / MANIFEST).write_text(json.dumps(body))
    assert "is damaged: its checksum does not hold" in user_error(read_manifest, copy)


def test_a_directory_without_a_manifest_is_not_a_checkpoint(tmp_path):
    assert not is_checkpoint(tmp_path) and not is_checkpoint(tmp_path / "nowhere")
    assert user_error(read_manifest, tmp_path) == (
        f"{tmp_path} has no {MANIFEST}, so it is not a sharded checkpoint: check the path"
    )
    os.mkfifo(tmp_path / MANIFEST)
    assert not is_checkpoint(tmp_path)
    assert "is not a regular file" in user_error(read_manifest, tmp_path)
