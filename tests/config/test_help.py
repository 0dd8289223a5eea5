"""``--help`` lists every key, section by section, with its meaning, range and default."""

from __future__ import annotations

import dataclasses

import pytest

from megalard.cli import main
from megalard.config.help import describe_keys
from megalard.config.schema import Config

REQUIRED = ("model.teacher", "run.output")


def keys_of(cls, prefix: str = "") -> list[str]:
    """Return the dotted keys of a section, without the entries of streams and stages."""
    keys = []
    for field in dataclasses.fields(cls):
        factory = field.default_factory
        if dataclasses.is_dataclass(factory):
            keys += keys_of(factory, f"{prefix}{field.name}.")
        elif field.name not in ("streams", "stages"):
            keys.append(prefix + field.name)
    return keys


def test_every_key_has_its_default_or_is_required():
    text, keys = describe_keys(), keys_of(Config)
    assert len(keys) > 40
    for key in keys:
        start = "(required)" if key in REQUIRED else "(default: "
        assert f"  --{key}  {start}" in text, key


@pytest.mark.parametrize(
    "line",
    [
        "  --rope.factor  (default: 8.0; greater than 1)",
        "  --optimizer.betas  (default: [0.9, 0.95]; a list; at least 0 and less than 1)",
        "  --data.packing  (default: true)",
        "  --model.native_context  (default: none; at least 1)",
        "  --run.device  (default: auto; auto | cpu | cuda)",
        "  --checkpoint.save_every  (default: 50; at least 0)",
        "  --objective.attention_output  (default: 0.0; at least 0)",
        "  --streams.NAME.weight  (default: 1.0; greater than 0)",
        "  --streams.NAME.micro_batch  (default: the value of --optimizer.micro_batch; at least 1)",
        "  --streams.NAME.objective.KEY, --streams.NAME.data.KEY  (the keys of those sections)",
        "  --stages.NAME.streams.NAME.KEY  (the keys of a stream)",
        "  --stages.NAME.keep_optimizer  (default: false)",
        "  --data.eos  (default: auto; auto | yes | no)",
    ],
)
def test_a_key_has_its_range_and_choices(line):
    assert line in describe_keys().splitlines()


def test_sections_have_headings_and_keys_their_meaning():
    lines = describe_keys().splitlines()
    headings = [line.split(":")[0] for line in lines if line and not line.startswith(" ")]
    sections = [field.name for field in dataclasses.fields(Config)]
    assert {"streams", "stages"} < set(sections)
    assert [heading for heading in headings if heading in sections] == sections
    place = next(i for i, line in enumerate(lines) if line.startswith("  --data.text_key"))
    text = "Key of the text in .jsonl files, or its column in .parquet and .arrow files."
    assert lines[place + 1] == f"        {text}"
    keys = lines[: lines.index("recipes, which --config takes by name:")]
    assert max(map(len, keys)) <= 110 and "``" not in "\n".join(lines)


def test_recipes_are_listed_with_their_title():
    lines = describe_keys().splitlines()
    start = lines.index("recipes, which --config takes by name:")
    names = [line.split()[0] for line in lines[start + 1 :]]
    assert "linearard-llama2-7b-x8" in names and names == sorted(names)
    line = next(line for line in lines[start:] if "linearard-llama2-7b-x8" in line)
    assert line.endswith(" LinearARD for LLaMA2-7B from 4K to 32K: both stages as published")


@pytest.mark.parametrize("command", ["train", "plan", "preflight"])
def test_the_help_of_a_command_contains_the_keys(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert describe_keys() in text and "--config FILE" in text
