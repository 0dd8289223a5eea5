"""The retrieval tasks: what is hidden in a text, and what is asked for.

    passkey             one number in neutral text (Mohtashami and Jaggi, arXiv 2305.16300)
    multi_key           several keys with a number each, one of which is asked for
    multi_value         several numbers of one key, all of which are asked for
    variable_tracking   two chains of assignments; the variables with one value are asked for

The last three follow RULER (Hsieh et al., arXiv 2404.06654). Numbers, keys and variables are
divided into two sets without a common element: samples draw from one set, and documents that teach
a model the tasks draw from the other.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

KEYS, VALUES, VARIABLES = 4, 4, 3
# Every fourth number, key and variable, by its checksum, is reserved for samples.
_RESERVED = 4

# The words of keys, which make about 11,000 pairs.
# fmt: off
ADJECTIVES = (
    "amber", "ancient", "arctic", "autumn", "bitter", "blue", "bold", "brave", "bright", "broken",
    "calm", "careful", "clever", "cold", "crimson", "crystal", "daring", "distant", "dusty",
    "early", "eager", "empty", "fancy", "fierce", "frozen", "gentle", "giant", "golden", "grand",
    "green", "happy", "hidden", "hollow", "humble", "icy", "iron", "jolly", "keen", "large",
    "lively", "lonely", "lucky", "mellow", "mighty", "misty", "modern", "noble", "northern",
    "pale", "patient", "plain", "polite", "proud", "purple", "quick", "quiet", "rapid", "rough",
    "royal", "rusty", "scarlet", "secret", "sharp", "shiny", "silent", "silver", "simple",
    "sleepy", "small", "smooth", "snowy", "solid", "southern", "spare", "steady", "stormy",
    "strong", "sudden", "summer", "sunny", "tall", "tender", "thick", "tidy", "tiny", "vast",
    "velvet", "violet", "warm", "western", "white", "wild", "windy", "winter", "wise", "wooden",
    "yellow", "young",
)
NOUNS = (
    "anchor", "apple", "arrow", "badger", "banner", "barrel", "basket", "beacon", "bear",
    "beetle", "blossom", "boat", "bottle", "branch", "bridge", "brook", "bucket", "button",
    "camel", "candle", "canyon", "carpet", "castle", "cedar", "circle", "cloud", "comet", "coral",
    "cradle", "crane", "dolphin", "dragon", "eagle", "engine", "falcon", "feather", "ferry",
    "fiddle", "forest", "fountain", "fox", "garden", "garnet", "glacier", "goose", "hammer",
    "harbor", "hazel", "heron", "hill", "horse", "island", "ivory", "jacket", "jungle", "kettle",
    "kite", "ladder", "lake", "lantern", "lemon", "lion", "lizard", "magnet", "maple", "marble",
    "meadow", "mirror", "monkey", "mountain", "needle", "ocean", "olive", "orchid", "otter",
    "owl", "paddle", "panther", "paper", "parrot", "pebble", "pepper", "piano", "pigeon",
    "pillow", "planet", "pocket", "prairie", "puzzle", "rabbit", "raven", "ribbon", "river",
    "rocket", "saddle", "salmon", "shadow", "shell", "spider", "stone", "sunset", "table",
    "temple", "thunder", "tiger", "tower", "trumpet", "tulip", "turtle", "valley", "violin",
    "walnut", "whale", "willow", "window", "wolf", "zebra",
)
# fmt: on


@dataclass(frozen=True)
class Draw:
    """Draws random names from one of the two sets, each name at most once.

    Attributes:
        rng: the source of randomness.
        for_samples: whether to draw from the set for samples or from the set for documents.
        used: the names that have been drawn.
    """

    rng: np.random.Generator
    for_samples: bool
    used: set

    def _new(self, make: Callable[[], str]) -> str:
        while True:
            name = make()
            if name in self.used:
                continue
            if (zlib.crc32(name.encode()) % _RESERVED == 0) == self.for_samples:
                self.used.add(name)
                return name

    def number(self) -> str:
        """Return a number of five digits."""
        return self._new(lambda: str(self.rng.integers(10_000, 100_000)))

    def key(self) -> str:
        """Return a key of two words."""
        return self._new(lambda: f"{self._one_of(ADJECTIVES)} {self._one_of(NOUNS)}")

    def _one_of(self, words: Sequence[str]) -> str:
        return words[int(self.rng.integers(len(words)))]

    def variable(self) -> str:
        """Return the name of a variable, five capital letters."""
        return self._new(lambda: "".join(map(chr, self.rng.integers(ord("A"), ord("Z") + 1, 5))))


@dataclass(frozen=True)
class Story:
    """The lines of one sample.

    Attributes:
        opening: the first line.
        statements: the hidden lines, each with its depth from 0 to 1.
        questions: pairs of a question and its answer, one line each.
    """

    opening: str
    statements: list[tuple[float, str]]
    questions: list[tuple[str, str]]


def _passkey(draw: Draw, depth: float) -> Story:
    number = draw.number()
    return Story(
        "There is an important fact hidden in the following text. Find it and memorize it.\n",
        [(depth, f"The pass key is {number}. Remember it. {number} is the pass key.\n")],
        [("What is the pass key? The pass key is", f" {number}")],
    )


_MAGIC = "Special magic numbers are hidden in the following text. Memorize them.\n"


def _magic(key: str, number: str) -> str:
    return f"One of the special magic numbers for {key} is: {number}.\n"


def _multi_key(draw: Draw, depth: float) -> Story:
    keys = [(draw.key(), draw.number()) for _ in range(KEYS)]
    depths = [depth, *draw.rng.random(KEYS - 1)]
    return Story(
        _MAGIC,
        [(place, _magic(*key)) for place, key in zip(depths, keys, strict=True)],
        [
            (f"Which number is it for {key}? The special magic number for {key} is:", f" {number}")
            for key, number in keys
        ],
    )


def _multi_value(draw: Draw, depth: float) -> Story:
    key, numbers = draw.key(), [draw.number() for _ in range(VALUES)]
    depths = np.sort(draw.rng.random(VALUES))
    question = f"Which numbers are for {key}? In order, the special magic numbers for {key} are:"
    return Story(
        _MAGIC,
        [(place, _magic(key, number)) for place, number in zip(depths, numbers, strict=True)],
        [(question, " " + ", ".join(numbers))],
    )


def _variable_tracking(draw: Draw, depth: float) -> Story:
    statements, questions = [], []
    for _ in range(2):
        number, names = draw.number(), [draw.variable() for _ in range(VARIABLES)]
        values = [number, *(f"VAR {name}" for name in names)]
        lines = [f"VAR {name} = {value}.\n" for name, value in zip(names, values, strict=False)]
        statements += zip(np.sort(draw.rng.random(VARIABLES)), lines, strict=True)
        question = f"Which variables have the value {number}? In order, the variables are:"
        questions.append((question, " " + ", ".join(names)))
    opening = "Assignments to variables are hidden in the following text. Track their values.\n"
    return Story(opening, statements, questions)


TASKS: dict[str, Callable[[Draw, float], Story]] = {
    "passkey": _passkey,
    "multi_key": _multi_key,
    "multi_value": _multi_value,
    "variable_tracking": _variable_tracking,
}
# In the other tasks the statements that are asked for are spread over the text.
TASKS_WITH_DEPTH = ("passkey", "multi_key")
