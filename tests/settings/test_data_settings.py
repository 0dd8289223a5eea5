"""data: which tokens a step reads, in which blocks, and at which positions."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from megalard.data.token_store import TokenStore
from megalard.data.tokenizer import load_tokenizer
from tests.command_line import refusal
from tests.settings.tiny_run import CONTEXT, M, TinyRun, settings_of, tiny_run

WINDOW, EOS = 4 * M, 256
DOCUMENTS = [40, 10, 33, 70, 5, 64, 20, 50] * 3


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Documents of known lengths, each of one letter, with another text under another key."""
    path = tmp_path_factory.mktemp("data") / "documents.jsonl"
    letters = (chr(ord("a") + i % 26) for i in range(len(DOCUMENTS)))
    lines = [
        {"text": letter * length, "body": letter.upper() * (length + 1)}
        for letter, length in zip(letters, DOCUMENTS, strict=True)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def lengths(store: TokenStore) -> list[int]:
    """Return the number of tokens of each document."""
    return np.diff(store.documents).tolist()


def places(run: TinyRun) -> list[list[tuple[int, int]]]:
    """Return the documents of every row that was read, as intervals of its block."""
    rows = []
    for batch in run.batches():
        for row in range(len(batch.tokens_bs)):
            rows.append([(a, b) for r, a, b in batch.documents if r == row])
    return rows


def test_data_paths(run, job, documents):
    several = run(f"data.paths=[{job / 'heldout.txt'}, {documents}]")
    expected = [len((job / "heldout.txt").read_text()), *DOCUMENTS]
    assert lengths(several.store) == expected
    assert lengths(run().store) == [len((job / "text.txt").read_text())]


def test_data_weights(run, documents):
    """The short documents and twice as many characters of the others, until one is used up."""
    folder = documents.parent
    for name, texts in (("short", ["ab"] * 60), ("long", ["c" * 9] * 1000)):
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    paths = f"data.paths=[{folder / 'short.jsonl'}, {folder / 'long.jsonl'}]"
    mixed = lengths(run(paths, "data.weights=[1, 2]").store)
    assert mixed.count(2) == 60 and abs(mixed.count(9) * 9 - 2 * 60 * 2) <= 9
    assert len(lengths(run(paths).store)) == 1060


def test_data_text_key(run, documents):
    other = run(f"data.paths={documents}", "data.text_key=body")
    assert lengths(other.store) == [length + 1 for length in DOCUMENTS]


def test_data_format(run, job, tmp_path_factory):
    """The model's chat template makes the text; it is written out here."""
    folder = tmp_path_factory.mktemp("chat")
    shutil.copy(job / "teacher" / "tokenizer.json", folder)
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    settings = {"eos_token": "</s>", "chat_template": template}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    messages = [{"role": "user", "content": "hello " * 20}, {"role": "assistant", "content": "yes"}]
    lines = [json.dumps({"messages": messages}) for _ in range(9)]
    (folder / "chats.jsonl").write_text("\n".join(lines))
    given = f"model.tokenizer={folder}", f"data.paths={folder / 'chats.jsonl'}"
    store = run(*given, "data.format=chat").store
    text = load_tokenizer(folder).decode(store.read(0, int(store.documents[1])).tolist())
    assert text == f"[user] {'hello ' * 20}\n[assistant] yes\n"


def test_data_context_length(run):
    shorter = run("data.context_length=16")
    assert {batch.tokens_bs.shape[1] for batch in shorter.batches()} == {16}
    assert {batch.tokens_bs.shape[1] for batch in run().batches()} == {CONTEXT}


@pytest.mark.parametrize("kind", ["skip-gaussian", "skip-uniform"])
def test_data_positions(run, kind):
    """The student reads all over its window, elsewhere in every block and at every step."""
    skipped = run(f"data.positions={kind}")
    rows = torch.cat([batch.student_position_bs for batch in skipped.batches()])
    assert (rows[:, 0] == 0).all() and (rows[:, -1] == WINDOW - 1).all()
    assert (rows.diff() > 0).all()
    assert len({tuple(row.tolist()) for row in rows}) == len(rows)
    middles = rows[:, CONTEXT // 2]
    assert middles.min() > CONTEXT // 2 and middles.max() < WINDOW - 1
    for batch in skipped.batches():
        assert torch.equal(batch.position_bs, torch.arange(CONTEXT).expand_as(batch.position_bs))
    for batch in run().batches():
        assert torch.equal(batch.student_position_bs, batch.position_bs)
    assert skipped.losses[0] != run().losses[0]


def test_the_two_kinds_of_skipped_positions_differ(run):
    one, other = (
        [batch.student_position_bs.tolist() for batch in run(f"data.positions={kind}").batches()]
        for kind in ("skip-gaussian", "skip-uniform")
    )
    assert one != other


@pytest.fixture(scope="module")
def with_bos(job, tmp_path_factory):
    """A tokenizer that puts its BOS token, the letter A, before a text."""
    folder = tmp_path_factory.mktemp("bos")
    tokenizer = Tokenizer.from_file(str(job / "teacher" / "tokenizer.json"))
    bos = tokenizer.token_to_id("A")
    tokenizer.post_processor = TemplateProcessing(single="A $A", special_tokens=[("A", bos)])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "</s>", "bos_token": "A", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return bos, f"model.tokenizer={folder}"


def starts(run: TinyRun) -> set[int]:
    store = run.store
    return {int(store.tokens[a]) for a in store.documents[:-1]}


def ends(run: TinyRun) -> set[int]:
    store = run.store
    return {int(store.tokens[b - 1]) for b in store.documents[1:]}


def test_data_bos(run, documents, with_bos):
    bos, tokenizer = with_bos
    for choice, is_put in (("auto", True), ("yes", True), ("no", False)):
        one = run(f"data.paths={documents}", tokenizer, f"data.bos={choice}")
        assert lengths(one.store) == [length + is_put for length in DOCUMENTS]
        assert (starts(one) == {bos}) == is_put
    assert lengths(run(f"data.paths={documents}").store) == DOCUMENTS


def test_data_eos(run, documents):
    added = run(f"data.paths={documents}", "data.eos=yes")
    assert lengths(added.store) == [length + 1 for length in DOCUMENTS] and ends(added) == {EOS}
    assert EOS not in ends(run(f"data.paths={documents}", "data.eos=no"))


def test_data_end_token(run, job, documents):
    given = run(f"data.paths={documents}", "data.eos=yes", "data.end_token=!")
    assert lengths(given.store) == [length + 1 for length in DOCUMENTS]
    tokenizer = Tokenizer.from_file(str(job / "teacher" / "tokenizer.json"))
    assert ends(given) == {tokenizer.token_to_id("!")}
    assert not ends(given) & ends(run(f"data.paths={documents}"))


def test_data_packing(run, documents):
    """A row has one document, padded where it is short; packed rows have several."""
    apart = run(f"data.paths={documents}", "data.packing=false", "optimizer.global_batch=8")
    assert {len(row) for row in places(apart)} == {1}
    assert any(row[0][1] < CONTEXT for row in places(apart))
    packed = run(f"data.paths={documents}", "optimizer.global_batch=8")
    assert max(len(row) for row in places(packed)) > 1
    assert all(row[-1][1] == CONTEXT for row in places(packed))


def test_data_drop_tails(run, documents):
    options = (f"data.paths={documents}", "data.packing=false", "optimizer.global_batch=8")
    full = run(*options, "data.drop_tails=true")
    assert {tuple(row) for row in places(full)} == {((0, CONTEXT),)}


def test_data_cache(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "tokens"
    cached = run(f"data.cache={folder}")
    assert len(TokenStore.open(folder).tokens) == len(run().store.tokens)
    assert cached.folders("tokens") == [] and cached.losses == run().losses


def test_a_cache_of_other_text_is_refused(job, run, documents, tmp_path, capsys):
    folder = tmp_path / "cache"
    tiny_run(job, tmp_path / "one", (f"data.cache={folder}",))
    words = settings_of(job, tmp_path / "two", (f"data.cache={folder}", f"data.paths={documents}"))
    assert str(folder) in refusal(capsys, "train", *words)
