"""Retrieval samples of an exact length: a task's lines hidden in filler text.

Statements and questions are encoded line by line, and the filler is cut to fit.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megalard.data.tokenizer import Tokenizer
from megalard.errors import UserError
from megalard.evaluation.tasks import TASKS, TASKS_WITH_DEPTH, Draw, Story

SENTENCES = (
    "The grass is green.\nThe sky is blue.\nThe sun is yellow.\nHere we go.\n"
    "There and back again.\n"
)
# A statement moves to the nearest line break if that is at most this share of the text away, or at
# most this many tokens.
_REACH, _REACH_TOKENS = 1 / 50, 8


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        task: the name of the task.
        prompt: int64 [p], the text and the question.
        answer: int64 [a], the expected continuation.
        depth: the share of the filler that precedes the statement asked for, from 0 to 1; None if
            the statements are spread over the text.
    """

    task: str
    prompt: np.ndarray
    answer: np.ndarray
    depth: float | None

    @property
    def tokens(self) -> np.ndarray:
        """Prompt and answer, int64 [p + a]."""
        return np.concatenate((self.prompt, self.answer))


@dataclass(frozen=True)
class Filler:
    """Text in which statements are hidden. It is read from a random place and around its end.

    Attributes:
        tokens: int64 [n].
        line_end: bool [n], whether a line ends with this token.
        newline: the tokens that end a line; empty if the tokenizer turns line breaks into spaces.
    """

    tokens: np.ndarray
    line_end: np.ndarray
    newline: tuple[int, ...]

    def take(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return a copy of ``count`` consecutive tokens that end a line, and where lines end."""
        last = rng.integers(len(self.tokens))
        ends = np.flatnonzero(self.line_end)
        if len(ends):
            last = ends[np.searchsorted(ends, last) % len(ends)]
        index = (last + 1 - count + np.arange(count)) % len(self.tokens)
        return self.tokens[index], self.line_end[index]


def text_filler(tokenizer: Tokenizer, tokens: np.ndarray) -> Filler:
    """Return a filler of given text.

    Args:
        tokens: int64 [n]; a million tokens are enough.
    """
    letter, line = tokenizer.encode_batch(["a", "a\n"])
    newline = line[len(letter) :] if line[: len(letter)] == letter else []
    ends = [i for i in np.unique(tokens) if tokenizer.decode([int(i)]).endswith("\n")]
    return Filler(tokens, np.isin(tokens, ends), tuple(newline))


def sentence_filler(tokenizer: Tokenizer) -> Filler:
    """Return a filler that repeats the neutral sentences of the passkey papers."""
    (line,) = encode_lines(tokenizer, [SENTENCES])
    return text_filler(tokenizer, np.asarray(line, dtype=np.int64))


def encode_lines(tokenizer: Tokenizer, lines: Sequence[str]) -> list[list[int]]:
    """Return the tokens that each line has in the middle of a text.

    By itself a line would begin with the space that sentencepiece puts before every text. Therefore
    each line is encoded after another line, whose tokens are then removed.
    """
    preceding = "a\n"
    head, *encoded = tokenizer.encode_batch([preceding, *(preceding + line for line in lines)])
    rows = []
    for line, ids in zip(lines, encoded, strict=True):
        is_joined = ids[: len(head)] != head
        rows.append(tokenizer.encode_batch([line])[0] if is_joined else ids[len(head) :])
    return rows


def make_sample(
    task: str,
    tokenizer: Tokenizer,
    seed: int,
    length: int,
    depth: float,
    filler: Filler,
    start: Sequence[int] = (),
) -> Sample:
    """Return a sample of ``length`` tokens with its answer; the same for the same arguments.

    Args:
        task: a name in ``TASKS``.
        depth: the place of the statement asked for, from 0 (first) to 1 (last). It moves to a line
            break nearby. Tasks that are not in ``TASKS_WITH_DEPTH`` ignore it.
        filler: ``sentence_filler`` or ``text_filler``.
        start: tokens to begin with, such as the BOS token that a model expects.

    Raises:
        TooShort: the statements and the question do not fit into the length.
    """
    rng = np.random.default_rng([zlib.crc32(task.encode()), seed, length, round(1000 * depth)])
    story = TASKS[task](Draw(rng, True, set()), depth)
    prompt, answer = _compose(task, story, tokenizer, length, filler, rng, start, questions=1)
    return Sample(task, prompt, answer, depth if task in TASKS_WITH_DEPTH else None)


def make_document(
    task: str, tokenizer: Tokenizer, seed: int, length: int, filler: Filler
) -> np.ndarray:
    """Return a document for training, int64 [length]: a text with all of its questions answered.

    Questions and answers are worded and encoded as in ``make_sample``. Numbers, keys and variables
    come from the other set, and the depth is random. With four keys, for example, four questions
    are asked in random order. No end token is added.

    Raises:
        TooShort: the statements and the questions do not fit into the length.
    """
    rng = np.random.default_rng([zlib.crc32(task.encode()), seed, length, 1001])
    story = TASKS[task](Draw(rng, False, set()), float(rng.random()))
    rng.shuffle(story.questions)
    count = len(story.questions)
    return np.concatenate(
        _compose(task, story, tokenizer, length, filler, rng, (), questions=count, ending=".\n")
    )


def make_documents(
    tokenizer: Tokenizer,
    seed: int,
    shortest: int,
    longest: int,
    fillers: Sequence[Filler],
    tasks: Sequence[str] = tuple(TASKS),
) -> Iterator[np.ndarray]:
    """Yield documents without end, of all tasks in turn, with lengths uniform on a log scale.

    A document whose task does not fit into its length gets the smallest length that fits.

    Args:
        shortest, longest: the range of lengths in tokens.
        fillers: used in turn.

    Raises:
        TooShort: at the first document, if a task does not fit into ``longest``.
    """
    for task in tasks:
        make_document(task, tokenizer, 0, longest, fillers[0])
    number = 0
    while True:
        rng = np.random.default_rng([seed, number])
        task, filler = tasks[number % len(tasks)], fillers[number // len(tasks) % len(fillers)]
        length = round(float(np.exp(rng.uniform(np.log(shortest), np.log(longest + 1)) - 1e-9)))
        length = min(length, longest)
        document_seed = int(rng.integers(2**31))
        try:
            document = make_document(task, tokenizer, document_seed, length, filler)
        except TooShort as error:
            # Another length draws other words, which may take a few more tokens.
            length = min(longest, error.needed + 16)
            try:
                document = make_document(task, tokenizer, document_seed, length, filler)
            except TooShort:
                number += 1
                continue
        number += 1
        yield document


class TooShort(UserError):
    """A task does not fit into a length.

    Attributes:
        needed: a number of tokens that would be enough.
    """

    def __init__(self, task: str, length: int, needed: int):
        super().__init__(
            f"{length} tokens are too few for the task {task}, whose lines take {needed} with this "
            "tokenizer: choose longer lengths"
        )
        self.needed = needed


def _compose(
    task: str,
    story: Story,
    tokenizer: Tokenizer,
    length: int,
    filler: Filler,
    rng: np.random.Generator,
    start: Sequence[int],
    questions: int,
    ending: str = "",
) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens before the last answer, and the tokens of the last answer.

    Together they are ``length`` tokens.
    """
    statements = sorted(story.statements, key=lambda pair: pair[0])
    pairs = story.questions[:questions]
    # The answer begins where the tokens of the question end. If the tokenizer joins the two, it
    # begins at the first token that differs.
    encoded = encode_lines(
        tokenizer,
        [
            story.opening,
            pairs[-1][0],
            pairs[-1][0] + pairs[-1][1] + ending,
            *(question + answer + ending for question, answer in pairs[:-1]),
            *(line for _, line in statements),
        ],
    )
    opening, question, answered, *others = encoded
    earlier, lines = others[: questions - 1], others[questions - 1 :]
    split = 0
    while split < len(question) and question[split] == answered[split]:
        split += 1
    opening = [*start, *opening]
    needed = len(opening) + len(answered) + sum(map(len, others))
    count = length - needed
    if count < 0:
        raise TooShort(task, length, needed)
    text, line_end = filler.take(count, rng)
    pieces: list[Sequence[int] | np.ndarray] = [opening]
    used = 0
    for (depth, _), line in zip(statements, lines, strict=True):
        place = max(used, _near_line_end(line_end, round(depth * count)))
        pieces += [_with_line_end(text, line_end, used, place, filler.newline), line]
        used = place
    last_part = _with_line_end(text, line_end, used, count, filler.newline)
    pieces += [last_part, *earlier, answered[:split]]
    prompt = np.concatenate([np.asarray(piece, dtype=np.int64) for piece in pieces])
    return prompt, np.asarray(answered[split:], dtype=np.int64)


def _near_line_end(line_end: np.ndarray, place: int) -> int:
    """Return the nearest place after the end of a line, if it is near; otherwise ``place``.

    The start and the end of the text stay where they are.
    """
    reach = max(_REACH_TOKENS, round(len(line_end) * _REACH))
    low, high = max(0, place - 1 - reach), min(len(line_end), place + reach)
    near = low + np.flatnonzero(line_end[low:high]) + 1
    if place in (0, len(line_end)) or not len(near):
        return place
    return int(near[np.abs(near - place).argmin()])


def _with_line_end(
    text: np.ndarray, line_end: np.ndarray, start: int, end: int, newline: tuple[int, ...]
) -> np.ndarray:
    """Return a part of the text that ends with a line, so that what follows begins a line.

    If need be, a line break replaces the last tokens of the part. The length does not change.
    """
    if len(newline) <= end - start and end and not line_end[end - 1]:
        text[end - len(newline) : end] = newline
    return text[start:end]
