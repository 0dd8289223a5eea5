"""Conversations are tokenized as transformers does it with the model's chat template."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from megalard.data.chat import boundaries_of_format, column_of
from megalard.data.token_store import TokenStore
from megalard.data.token_store_writer import build_store
from megalard.data.tokenizer import load_tokenizer
from tests.command_line import megalard, user_error
from tests.small_tokenizers import save_byte_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>"
    "{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}"
)
CHATS = [
    [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}],
    [{"role": "user", "content": "é"}],
]


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_byte_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("key", ["messages", "turns"])
def test_a_store_has_the_ids_of_the_chat_template(key, model, tmp_path):
    lines = [json.dumps({key: chat, "id": 1}) for chat in CHATS]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    store = tmp_path / "store"
    options = [] if key == "messages" else ["--text-key", key]
    arguments = ["--model", model, "--output", store, "--format", "chat", *options]
    assert megalard("prepare", *arguments, tmp_path / "chats.jsonl") == 0
    expected = AutoTokenizer.from_pretrained(model).apply_chat_template(CHATS)["input_ids"]
    opened = TokenStore.open(store)
    assert opened.read(0, len(opened.tokens)).tolist() == [*expected[0], *expected[1]]
    assert opened.documents.tolist() == [0, len(expected[0]), sum(map(len, expected))]


def test_bad_conversations_are_refused_in_one_sentence(model):
    column = column_of("chat", "text", load_tokenizer(model))
    for value, words in (
        ("hello", "has a str: it must be a list of messages"),
        ([1], "has a list: it must be a list of messages, each with role and content"),
        ([{"role": "tool", "content": "x"}], "does not fit the chat template (no tools)"),
    ):
        record = {"messages": value}
        assert words in user_error(column.of_record, record, "a.jsonl line 1")


def test_a_tokenizer_without_template_is_refused(tmp_path):
    save_byte_tokenizer(tmp_path)
    sentence = user_error(column_of, "chat", "messages", load_tokenizer(tmp_path))
    assert sentence.startswith("data.format is chat, but the tokenizer in")


def test_only_a_text_gets_the_tokens_of_the_tokenizer(model):
    tokenizer = load_tokenizer(model)
    chosen = boundaries_of_format("chat", tokenizer, "auto", "yes", None)
    assert (chosen.before, chosen.after) == ((), (tokenizer.eos_id,))
    # Llama's tokenizer puts BOS before every text. A chat has it from the chat template already.
    with_both_ends = replace(
        tokenizer, starts_with=(tokenizer.bos_id,), ends_with=(tokenizer.eos_id,)
    )
    bos_id, eos_id = with_both_ends.bos_id, with_both_ends.eos_id
    assert bos_id is not None
    for kind, expected in (("chat", ((), ())), ("text", ((bos_id,), (eos_id,)))):
        chosen = boundaries_of_format(kind, with_both_ends, "auto", "auto", None)
        assert (chosen.before, chosen.after) == expected


def test_a_store_of_another_chat_template_is_refused(model, tmp_path):
    """The tokenizer's fingerprint does not contain the template, which changes the ids."""
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": CHATS[0]}))
    tokenizer = load_tokenizer(model)
    with_other_template = replace(
        tokenizer, chat_template="other", render_chat=lambda chat: f"{chat[0]['content']}!"
    )

    def build(tokenizer):
        column = column_of("chat", "text", tokenizer)
        return build_store([tmp_path / "chats.jsonl"], tokenizer, tmp_path / "store", column=column)

    count = len(build(tokenizer).tokens)
    assert len(build(tokenizer).tokens) == count
    assert "was made from other text" in user_error(build, with_other_template)


def test_a_template_reaches_nothing_but_the_messages(model, tmp_path):
    """transformers renders templates in a sandbox."""
    reach = "{{ cycler.__init__.__globals__.os.system('touch " + str(tmp_path / "ran") + "') }}"
    (model / "chat_template.jinja").write_text(reach)
    column = column_of("chat", "messages", load_tokenizer(model))
    assert "does not fit the chat template" in user_error(column.document, CHATS[0], "line 1")
    assert not (tmp_path / "ran").exists()
