"""Retrieval tasks on synthetic text: something is hidden in a long text and then asked for.

    passkey             one number in neutral text (Mohtashami and Jaggi, 2305.16300)
    multi_key           several keys with a number each, one of them is asked for
    multi_value         several numbers of one key, all are asked for
    variable_tracking   two chains of assignments; the variables of one value are asked for

The last three follow RULER (Hsieh et al., 2404.06654). Samples are tokens and exactly as long as
asked for: the statements and the question are encoded line by line and the filler is cut to fit.
Numbers, keys and variables fall into two halves that share nothing: ``make_sample`` draws from one,
``make_document``, whose documents teach a model the tasks, from the other.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megalard.data.tokenizer import Tokenizer
from megalard.errors import UserError
from megalard.evaluation.words import ADJECTIVES, NOUNS

KEYS, VALUES, VARIABLES = 4, 4, 3
SENTENCES = (
    "The grass is green.\nThe sky is blue.\nThe sun is yellow.\nHere we go.\n"
    "There and back again.\n"
)
# a statement moves to the nearest line break if that is no farther than this part of the text, or
# these tokens
_REACH, _REACH_TOKENS = 1 / 50, 8
# every fourth number, key and variable by its checksum is kept for the tests
_HELD_OUT = 4


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        task: which task it is of.
        prompt: int64 [p], the text and the question.
        answer: int64 [a], what has to follow.
        depth: the part of the filler before the statement asked for, 0 to 1; None where the
            statements are spread over the text.
    """

    task: str
    prompt: np.ndarray
    answer: np.ndarray
    depth: float | None

    @property
    def tokens(self) -> np.ndarray:
        """int64 [p + a]."""
        return np.concatenate((self.prompt, self.answer))


@dataclass(frozen=True)
class Filler:
    """Text to hide statements in, read in a circle from a random place on.

    Attributes:
        tokens: int64 [n].
        line_end: bool [n], whether a line ends with this token.
        newline: the tokens that end a line; none where the tokenizer makes spaces of line breaks.
    """

    tokens: np.ndarray
    line_end: np.ndarray
    newline: tuple[int, ...]

    def take(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A copy of ``count`` tokens in a row, to the end of a line, and where in it lines end."""
        last = rng.integers(len(self.tokens))
        ends = np.flatnonzero(self.line_end)
        if len(ends):
            last = ends[np.searchsorted(ends, last) % len(ends)]
        index = (last + 1 - count + np.arange(count)) % len(self.tokens)
        return self.tokens[index], self.line_end[index]


def text_filler(tokenizer: Tokenizer, tokens: np.ndarray) -> Filler:
    """Text that is at hand.

    Args:
        tokens: int64 [n]; a million are plenty.
    """
    letter, line = tokenizer.encode_batch(["a", "a\n"])
    newline = line[len(letter) :] if line[: len(letter)] == letter else []
    ends = [i for i in np.unique(tokens) if tokenizer.decode([int(i)]).endswith("\n")]
    return Filler(tokens, np.isin(tokens, ends), tuple(newline))


def sentence_filler(tokenizer: Tokenizer) -> Filler:
    """The neutral sentences of the passkey papers, over and over."""
    (line,) = encode_lines(tokenizer, [SENTENCES])
    return text_filler(tokenizer, np.asarray(line, dtype=np.int64))


def encode_lines(tokenizer: Tokenizer, lines: Sequence[str]) -> list[list[int]]:
    """Each line's tokens as they are in the middle of a text.

    On its own a line would begin with the space that sentencepiece puts before every text. A line
    is encoded behind another, whose tokens are then taken off.
    """
    before = "a\n"
    head, *whole = tokenizer.encode_batch([before, *(before + line for line in lines)])
    rows = []
    for line, ids in zip(lines, whole, strict=True):
        joined = ids[: len(head)] != head
        rows.append(tokenizer.encode_batch([line])[0] if joined else ids[len(head) :])
    return rows


@dataclass(frozen=True)
class _Draw:
    """Random names from the half for tests or the one for documents, each at most once."""

    rng: np.random.Generator
    held_out: bool
    used: set

    def _new(self, make: Callable[[], str]) -> str:
        while True:
            name = make()
            if name in self.used:
                continue
            if (zlib.crc32(name.encode()) % _HELD_OUT == 0) == self.held_out:
                self.used.add(name)
                return name

    def number(self) -> str:
        return self._new(lambda: str(self.rng.integers(10_000, 100_000)))

    def key(self) -> str:
        return self._new(lambda: f"{self._one_of(ADJECTIVES)} {self._one_of(NOUNS)}")

    def _one_of(self, words: Sequence[str]) -> str:
        return words[self.rng.integers(len(words))]

    def variable(self) -> str:
        return self._new(lambda: "".join(map(chr, self.rng.integers(ord("A"), ord("Z") + 1, 5))))


@dataclass(frozen=True)
class _Story:
    """A sample's lines: statements with their depths, and questions with answers, one a line."""

    opening: str
    statements: list[tuple[float, str]]
    questions: list[tuple[str, str]]


def _passkey(draw: _Draw, depth: float) -> _Story:
    number = draw.number()
    return _Story(
        "There is an important fact hidden in the following text. Find it and memorize it.\n",
        [(depth, f"The pass key is {number}. Remember it. {number} is the pass key.\n")],
        [("What is the pass key? The pass key is", f" {number}")],
    )


_MAGIC = "Special magic numbers are hidden in the following text. Memorize them.\n"


def _magic(key: str, number: str) -> str:
    return f"One of the special magic numbers for {key} is: {number}.\n"


def _multi_key(draw: _Draw, depth: float) -> _Story:
    keys = [(draw.key(), draw.number()) for _ in range(KEYS)]
    depths = [depth, *draw.rng.random(KEYS - 1)]
    return _Story(
        _MAGIC,
        [(place, _magic(*key)) for place, key in zip(depths, keys, strict=True)],
        [
            (f"Which number is it for {key}? The special magic number for {key} is:", f" {number}")
            for key, number in keys
        ],
    )


def _multi_value(draw: _Draw, depth: float) -> _Story:
    key, numbers = draw.key(), [draw.number() for _ in range(VALUES)]
    depths = np.sort(draw.rng.random(VALUES))
    question = f"Which numbers are for {key}? In order, the special magic numbers for {key} are:"
    return _Story(
        _MAGIC,
        [(place, _magic(key, number)) for place, number in zip(depths, numbers, strict=True)],
        [(question, " " + ", ".join(numbers))],
    )


def _variable_tracking(draw: _Draw, depth: float) -> _Story:
    statements, questions = [], []
    for _ in range(2):
        number, names = draw.number(), [draw.variable() for _ in range(VARIABLES)]
        values = [number, *(f"VAR {name}" for name in names)]
        lines = [f"VAR {name} = {value}.\n" for name, value in zip(names, values, strict=False)]
        statements += zip(np.sort(draw.rng.random(VARIABLES)), lines, strict=True)
        question = f"Which variables have the value {number}? In order, the variables are:"
        questions.append((question, " " + ", ".join(names)))
    opening = "Assignments to variables are hidden in the following text. Track their values.\n"
    return _Story(opening, statements, questions)


TASKS: dict[str, Callable[[_Draw, float], _Story]] = {
    "passkey": _passkey,
    "multi_key": _multi_key,
    "multi_value": _multi_value,
    "variable_tracking": _variable_tracking,
}
# in the others the statements asked for are spread over the text
TASKS_WITH_DEPTH = ("passkey", "multi_key")


def make_sample(
    task: str,
    tokenizer: Tokenizer,
    seed: int,
    length: int,
    depth: float,
    filler: Filler,
    start: Sequence[int] = (),
) -> Sample:
    """A sample of a task, ``length`` tokens with its answer; the same for the same arguments.

    Args:
        task: of ``TASKS``.
        depth: where the statement asked for stands, 0 (first) to 1 (last); moved to a line break
            near by. Without effect on tasks that are not in ``TASKS_WITH_DEPTH``.
        filler: ``sentence_filler`` or ``text_filler``.
        start: tokens to begin with, such as the BOS that a model expects.

    Raises:
        UserError: the length does not hold the statements and the question.
    """
    rng = np.random.default_rng([zlib.crc32(task.encode()), seed, length, round(1000 * depth)])
    story = TASKS[task](_Draw(rng, True, set()), depth)
    prompt, answer = _compose(task, story, tokenizer, length, filler, rng, start, questions=1)
    return Sample(task, prompt, answer, depth if task in TASKS_WITH_DEPTH else None)


def make_document(
    task: str, tokenizer: Tokenizer, seed: int, length: int, filler: Filler
) -> np.ndarray:
    """A document for training, int64 [length]: a sample's text, and all of its questions answered.

    Questions and answers are worded and encoded as in ``make_sample``; numbers, keys and variables
    are of the other half, and the depth is random. With four keys, for example, four questions are
    asked, in random order. No end token is added.

    Raises:
        UserError: the length does not hold the statements and the questions.
    """
    rng = np.random.default_rng([zlib.crc32(task.encode()), seed, length, 1001])
    story = TASKS[task](_Draw(rng, False, set()), float(rng.random()))
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
    """Documents without end, of all tasks in turn, their lengths uniform on a log scale.

    A document whose length does not hold its task gets the length that just does.

    Args:
        shortest, longest: tokens of a document.
        fillers: used in turn.

    Raises:
        UserError: at the first document, when a task does not fit into ``longest``.
    """
    for task in tasks:
        make_document(task, tokenizer, 0, longest, fillers[0])
    number = 0
    while True:
        rng = np.random.default_rng([seed, number])
        task, filler = tasks[number % len(tasks)], fillers[number // len(tasks) % len(fillers)]
        length = round(float(np.exp(rng.uniform(np.log(shortest), np.log(longest + 1)) - 1e-9)))
        length = min(length, longest)
        own = int(rng.integers(2**31))
        try:
            document = make_document(task, tokenizer, own, length, filler)
        except TooShort as error:
            # the words of another length are other words, which may be a few tokens longer
            length = min(longest, error.needed + 16)
            try:
                document = make_document(task, tokenizer, own, length, filler)
            except TooShort:
                number += 1
                continue
        number += 1
        yield document


class TooShort(UserError):
    """A length that does not hold a task; ``needed`` tokens would."""

    def __init__(self, task: str, length: int, needed: int):
        super().__init__(
            f"{length} tokens are too few for the task {task}, whose lines take {needed} with this "
            "tokenizer: choose longer lengths"
        )
        self.needed = needed


def _compose(
    task: str,
    story: _Story,
    tokenizer: Tokenizer,
    length: int,
    filler: Filler,
    rng: np.random.Generator,
    start: Sequence[int],
    questions: int,
    ending: str = "",
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens before the last answer, and those of it; together ``length``."""
    statements = sorted(story.statements, key=lambda pair: pair[0])
    asked = story.questions[:questions]
    # an answer begins where the question's own tokens end; where a tokenizer joins the two, at the
    # first token that differs
    last = encode_lines(
        tokenizer,
        [
            story.opening,
            asked[-1][0],
            asked[-1][0] + asked[-1][1] + ending,
            *(question + answer + ending for question, answer in asked[:-1]),
            *(line for _, line in statements),
        ],
    )
    opening, question, answered, *others = last
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
    pieces, done = [opening], 0
    for (depth, _), line in zip(statements, lines, strict=True):
        place = max(done, _near_line_end(line_end, round(depth * count)))
        pieces += [_closed(text, line_end, done, place, filler.newline), line]
        done = place
    pieces += [_closed(text, line_end, done, count, filler.newline), *earlier, answered[:split]]
    prompt = np.concatenate([np.asarray(piece, dtype=np.int64) for piece in pieces])
    return prompt, np.asarray(answered[split:], dtype=np.int64)


def _near_line_end(line_end: np.ndarray, place: int) -> int:
    """The place behind a line's end that is nearest, if it is near; the text's ends stay."""
    reach = max(_REACH_TOKENS, round(len(line_end) * _REACH))
    low, high = max(0, place - 1 - reach), min(len(line_end), place + reach)
    near = low + np.flatnonzero(line_end[low:high]) + 1
    if place in (0, len(line_end)) or not len(near):
        return place
    return int(near[np.abs(near - place).argmin()])


def _closed(
    text: np.ndarray, line_end: np.ndarray, start: int, end: int, newline: tuple[int, ...]
) -> np.ndarray:
    """A part of the text that ends its line: its last tokens give way to a line break if need be.

    What follows begins a line, and the length stays.
    """
    if len(newline) <= end - start and end and not line_end[end - 1]:
        text[end - len(newline) : end] = newline
    return text[start:end]
