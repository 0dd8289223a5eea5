"""Retrieval samples: exact lengths and the answer in its place, for every kind of tokenizer."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer as Bpe
from tokenizers import decoders, models, pre_tokenizers, trainers

from megalard.data.tokenizer import Tokenizer, load_tokenizer
from megalard.errors import UserError
from megalard.evaluation import samples
from megalard.evaluation.samples import (
    Filler,
    TooShort,
    encode_lines,
    make_document,
    make_documents,
    make_sample,
    sentence_filler,
    text_filler,
)
from megalard.evaluation.tasks import TASKS, TASKS_WITH_DEPTH
from tests.small_tokenizers import save_byte_tokenizer

QUICKSTART = Path(__file__).parents[2] / "launch" / "quickstart_teacher"
# The small vocabularies are trained on numbers, so that some of their digits are joined.
CORPUS = [
    f"The pass key is {n}. One of the special magic numbers for x is: {n}.\nVAR ABCDE = {n}."
    for n in range(10_000, 99_999, 37)
]


def _save_bpe(folder: Path) -> None:
    bpe = Bpe(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))


def _save_sentencepiece(folder: Path, **options) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": False}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


MAKERS = {
    "bytes": save_byte_tokenizer,
    "bpe": _save_bpe,
    # Llama's settings: no normalization, and every digit is a token.
    "sentencepiece": lambda folder: _save_sentencepiece(
        folder,
        normalization_rule_name="identity",
        split_digits=True,
        remove_extra_whitespaces=False,
    ),
    # The defaults of sentencepiece, with which line breaks become spaces.
    "sentencepiece-nfkc": _save_sentencepiece,
}


@pytest.fixture(scope="module", params=[*MAKERS, "quickstart"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    """Tokenizers of every kind, and the quickstart's."""
    if request.param == "quickstart":
        return load_tokenizer(QUICKSTART)
    folder = tmp_path_factory.mktemp("tokenizer")
    MAKERS[request.param](folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def filler(tokenizer) -> Filler:
    """The neutral sentences."""
    return sentence_filler(tokenizer)


def flat(text: str) -> str:
    """Return a text with single spaces: tokenizers change white space."""
    return " ".join(text.split())


def text_of(tokenizer: Tokenizer, sample) -> tuple[str, str]:
    """Return a sample and its answer as text."""
    return flat(tokenizer.decode(sample.tokens.tolist())), flat(
        tokenizer.decode(sample.answer.tolist())
    )


@pytest.mark.parametrize("task", TASKS)
def test_samples_have_exactly_the_given_length(task, tokenizer, filler):
    rng = np.random.default_rng(0)
    for seed in range(30):
        length, depth = int(rng.integers(700, 2000)), float(rng.random())
        sample = make_sample(task, tokenizer, seed, length, depth, filler)
        assert sample.prompt.dtype == sample.answer.dtype == np.int64
        assert len(sample.tokens) == length and len(sample.answer) >= 1
        assert sample.depth == (depth if task in TASKS_WITH_DEPTH else None)
        again = make_sample(task, tokenizer, seed, length, depth, filler)
        np.testing.assert_array_equal(sample.tokens, again.tokens)
        other = make_sample(task, tokenizer, seed + 1, length, depth, filler)
        assert not np.array_equal(sample.tokens, other.tokens)


def test_the_question_is_for_the_passkey(tokenizer, filler):
    for seed in range(20):
        text, answer = text_of(tokenizer, make_sample("passkey", tokenizer, seed, 700, 0.5, filler))
        assert re.fullmatch(r"\d{5}", answer)
        assert f"The pass key is {answer}. Remember it. {answer} is the pass key." in text
        assert text.endswith(f"What is the pass key? The pass key is {answer}")


def test_the_question_is_for_one_of_several_keys(tokenizer, filler):
    for seed in range(20):
        sample = make_sample("multi_key", tokenizer, seed, 1000, 0.5, filler)
        text, answer = text_of(tokenizer, sample)
        numbers = dict(re.findall(r"magic numbers for (\w+ \w+) is: (\d{5})\.", text))
        assert len(numbers) == 4 == len(set(numbers.values()))
        key = re.search(r"Which number is it for (\w+ \w+)\?", text)[1]
        assert numbers[key] == answer


def test_the_question_is_for_all_values_of_a_key_in_order(tokenizer, filler):
    for seed in range(20):
        sample = make_sample("multi_value", tokenizer, seed, 1000, 0.5, filler)
        text, answer = text_of(tokenizer, sample)
        pairs = re.findall(r"magic numbers for (\w+ \w+) is: (\d{5})\.", text)
        assert len({key for key, _ in pairs}) == 1 and len(pairs) == 4
        assert answer == ", ".join(number for _, number in pairs)


def test_the_question_is_for_the_variables_of_a_value_in_order(tokenizer, filler):
    for seed in range(20):
        sample = make_sample("variable_tracking", tokenizer, seed, 1000, 0.5, filler)
        text, answer = text_of(tokenizer, sample)
        values = {}
        for name, value in re.findall(r"VAR ([A-Z]{5}) = (\d{5}|VAR [A-Z]{5})\.", text):
            # A variable is assigned before it is read.
            values[name] = values[value[4:]] if value.startswith("VAR") else value
        assert len(values) == 6 and len(set(values.values())) == 2
        number = re.search(r"have the value (\d{5})\?", text)[1]
        assert answer == ", ".join(name for name, value in values.items() if value == number)


@pytest.mark.parametrize("task", TASKS_WITH_DEPTH)
def test_the_statement_is_at_its_depth(task, tokenizer, filler):
    for depth in (0.0, 0.1, 0.5, 0.9, 1.0):
        sample = make_sample(task, tokenizer, 3, 4000, depth, filler)
        text, answer = text_of(tokenizer, sample)
        place = text.index(f" {answer}") / len(text)
        # Statements move to a line break up to a fiftieth of the text away, and the opening, the
        # other statements and the question are part of the text.
        assert place == pytest.approx(depth, abs=0.12)
        nearest = [flat("Find it and memorize it."), flat("Memorize them.")][task == "multi_key"]
        if depth == 0:
            assert re.search(re.escape(nearest) + r" (The pass key|One of)", text)


def test_the_statement_moves_to_the_nearest_line_break(tokenizer):
    """Where every word ends a line, it stays at its depth."""
    (row,) = encode_lines(tokenizer, ["zz\n" * 500])
    sample = make_sample("passkey", tokenizer, 0, 3000, 0.5, text_filler(tokenizer, np.array(row)))
    before, after = text_of(tokenizer, sample)[0].split("The pass key is", 1)
    words = [len(re.findall("zz", part)) for part in (before, after)]
    assert words[0] == pytest.approx(words[1], rel=0.01)


@pytest.mark.parametrize(
    "line", ["line {} of the text at hand, a long one\n", "    x = f({})\n", "{} "]
)
def test_statements_and_questions_begin_lines(line, tokenizer):
    """Even in text without a line break, or where a break and the next indent are one token."""
    (row,) = encode_lines(tokenizer, ["".join(map(line.format, range(300)))])
    filler = text_filler(tokenizer, np.array(row))
    for seed in range(5):
        sample = make_sample("multi_key", tokenizer, seed, 2500, 0.4, filler)
        text = tokenizer.decode(sample.prompt.tolist())
        assert len(sample.tokens) == 2500
        if "\n" in tokenizer.decode(list(filler.newline)):
            assert len(re.findall(r"^One of the .* is: \d{5}\.$", text, re.MULTILINE)) == 4
            assert re.search(r"^Which number is it for", text, re.MULTILINE)


def test_documents_and_samples_have_the_same_wording(tokenizer, filler):
    """The tokens of question and answer are the same, up to the numbers."""

    def question(tokens) -> str:
        text = flat(tokenizer.decode([int(token) for token in tokens]))
        return re.sub(r"\d{5}", "N", text[text.index("What is the pass key?") :])

    sample = make_sample("passkey", tokenizer, 0, 700, 0.5, filler)
    document = make_document("passkey", tokenizer, 0, 700, filler)
    assert len(document) == 700
    assert question(document) == question(sample.tokens) + "."


def test_a_document_answers_all_its_questions(tokenizer, filler):
    text = flat(tokenizer.decode(make_document("multi_key", tokenizer, 0, 1200, filler).tolist()))
    stated = dict(re.findall(r"One of the special magic numbers for (\w+ \w+) is: (\d{5})\.", text))
    answers = dict(re.findall(r"The special magic number for (\w+ \w+) is: (\d{5})\.", text))
    assert stated == answers and len(answers) == 4
    assert text.endswith(".")


def test_samples_and_documents_share_no_number_and_no_key(tokenizer, filler):
    def names(texts) -> tuple[set, set]:
        texts = list(texts)
        numbers = {n for text in texts for n in re.findall(r"\d{5}", text)}
        return numbers, {k for text in texts for k in re.findall(r"numbers for (\w+ \w+) is", text)}

    samples = (make_sample("multi_key", tokenizer, seed, 700, 0.5, filler) for seed in range(60))
    documents = make_documents(tokenizer, 0, 600, 1200, [filler])
    tested = names(text_of(tokenizer, sample)[0] for sample in samples)
    trained = names(
        flat(tokenizer.decode(document.tolist())) for document in itertools.islice(documents, 120)
    )
    assert all(tested) and all(trained)
    assert not tested[0] & trained[0] and not tested[1] & trained[1]


def test_documents_are_of_all_lengths_and_the_same_again(tokenizer, filler):
    def first(count: int) -> list[list[int]]:
        documents = make_documents(tokenizer, 7, 64, 1200, [filler])
        return [document.tolist() for document in itertools.islice(documents, count)]

    documents = first(40)
    assert documents == first(40) and len({tuple(row) for row in documents}) == 40
    lengths = [len(row) for row in documents]
    assert max(lengths) <= 1200 and min(lengths) < 500 and len(set(lengths)) > 10
    assert lengths.count(1200) <= 1, "a task that does not fit takes a little more, not the longest"
    of_one_length = make_documents(tokenizer, 7, 700, 700, [filler])
    assert {len(document) for document in itertools.islice(of_one_length, 8)} == {700}


def test_documents_are_of_all_tasks_in_turn(tokenizer, filler):
    documents = make_documents(tokenizer, 7, 400, 1200, [filler], ["passkey", "multi_key"])
    texts = [flat(tokenizer.decode(row.tolist())) for row in itertools.islice(documents, 6)]
    assert ["pass key" in text for text in texts] == [True, False] * 3


def test_a_length_that_does_not_hold_the_task_is_refused(tokenizer, filler):
    sentence = "20 tokens are too few for the task multi_value, whose"
    with pytest.raises(TooShort, match=sentence) as caught:
        make_sample("multi_value", tokenizer, 0, 20, 0.5, filler)
    needed = make_sample("multi_value", tokenizer, 0, caught.value.needed + 50, 0.5, filler)
    assert len(needed.tokens) == caught.value.needed + 50
    with pytest.raises(UserError, match="too few"):
        next(make_documents(tokenizer, 0, 8, 20, [filler]))


def test_prompts_may_begin_with_a_token(tokenizer, filler):
    sample = make_sample("passkey", tokenizer, 0, 500, 0.5, filler, start=[5])
    plain = make_sample("passkey", tokenizer, 0, 500, 0.5, filler)
    assert sample.prompt[0] == 5 and sample.prompt[1] == plain.prompt[0]
    assert len(sample.tokens) == 500
    np.testing.assert_array_equal(sample.answer, plain.answer)


def test_a_line_break_replaces_the_end_of_a_part_if_it_fits():
    """And if the part does not end with a line already."""
    for start, end, expected in ((0, 2, [7, 8]), (0, 3, [1, 2, 3]), (1, 2, [2]), (0, 0, [])):
        text = np.array([1, 2, 3, 4])
        line_end = np.array([False, False, True, False])
        assert samples._with_line_end(text, line_end, start, end, (7, 8)).tolist() == expected
        assert text[end:].tolist() == [1, 2, 3, 4][end:]
