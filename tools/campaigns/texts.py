"""Cases of the campaign files: text files, tables, archives, mixtures and folders, changed."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from pathlib import Path

from tools.campaigns.material import Material
from tools.campaigns.mutations import change_bytes, changed, mutate, replace_kind, to_text
from tools.campaigns.trial import Trial, try_command

_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"


def make_texts(material: Material) -> None:
    """Write the text of the material once more in every format that can be read."""
    folder = material.folder / "texts"
    folder.mkdir()
    records = [json.loads(line) for line in _lines(material.folder / "text.jsonl")]
    texts = [record["text"] for record in records]
    (folder / "a.txt").write_text(texts[0])
    (folder / "b.md").write_text(texts[1])
    shutil.copyfile(material.folder / "text.jsonl", folder / "c.jsonl")
    chats = [{"messages": [{"role": "user", "content": text}]} for text in texts]
    (folder / "d.jsonl").write_text("\n".join(map(json.dumps, chats)))
    for name in ("a.txt", "c.jsonl"):
        content = (folder / name).read_bytes()
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    _make_tables(folder, texts)


def _make_tables(folder: Path, texts: list[str]) -> None:
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError:
        return
    table = pyarrow.table({"text": texts, "number": list(range(len(texts)))})
    parquet.write_table(table, folder / "e.parquet")
    with ipc.new_file(folder / "f.arrow", table.schema) as writer:
        writer.write_table(table)
    with ipc.new_stream(folder / "g.arrow", table.schema) as writer:
        writer.write_table(table)
    content = (folder / "c.jsonl").read_bytes()
    with pyarrow.CompressedOutputStream(str(folder / "h.jsonl.zst"), "zstd") as stream:
        stream.write(content)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def try_text(rng: random.Random, material: Material, scratch: Path) -> tuple[str, Trial]:
    """Change a text file, or a folder or a mixture of them, and tokenize it."""
    source = material.folder / "texts"
    folder = scratch / "texts"
    names = sorted(path.name for path in source.iterdir())
    chosen = rng.sample(names, rng.choice([1, 1, 1, 2, 3]))
    folder.mkdir()
    for name in chosen:
        shutil.copyfile(source / name, folder / name)
    path = folder / rng.choice(chosen)
    change = _change(rng, path)
    if rng.random() < 0.2:
        change += f", {_disturb_folder(rng, folder)}"
    model = material.folder / "model"
    words: list = ["--model", model, "--output", scratch / "tokens"]
    if rng.random() < 0.2 or "d.jsonl" in chosen:
        model = material.copy("model", scratch / "model")
        (model / "chat_template.jinja").write_text(_TEMPLATE)
        words[1] = model
        words += ["--format", "chat"] if rng.random() < 0.8 else ["--text-key", "messages"]
    paths = [folder] if rng.random() < 0.4 else [folder / name for name in chosen]
    if rng.random() < 0.3:
        weights = ["1", "0.25", "1e9", "1e-9", "0", "nan", "3"]
        words += [
            "--weights",
            *rng.choices(weights[:4] if rng.random() < 0.7 else weights, k=len(paths)),
        ]
    trial = try_command(["prepare", *paths, *words])
    if trial.kind == "done" and rng.random() < 0.3:  # the same command, and a run that reads it
        trial = try_command(["prepare", *paths, *words])
    if trial.kind == "done" and rng.random() < 0.3:
        data = scratch / "tokens" if rng.random() < 0.5 else folder
        trial = try_command(
            [*material.command(scratch / "out", f"data.paths={data}"), "--preflight"]
        )
    return f"text: {' '.join(map(str, chosen))}: {path.name} {change}", trial


def _change(rng: random.Random, path: Path) -> str:
    choice = rng.random()
    if choice < 0.1:
        return replace_kind(rng, path)
    if choice < 0.2:
        other = path.with_name(path.name + rng.choice([".gz", ".zst", ".txt", ".jsonl", ".x"]))
        path.rename(other)
        return f"as {other.name}"
    is_packed = path.suffix in (".gz", ".zst")
    if path.suffix == ".jsonl" and choice < 0.7:
        lines = _lines(path)
        number = rng.randrange(len(lines))
        content, change = changed(rng, json.loads(lines[number]))
        lines[number] = to_text(content)
        path.write_text("\n".join(lines))
        return f"line {number} {change}"
    if path.suffix == ".gz" and choice < 0.5:
        unpacked = path.with_suffix("")
        unpacked.write_bytes(gzip.decompress(path.read_bytes()))
        change = change_bytes(rng, unpacked)
        path.write_bytes(gzip.compress(unpacked.read_bytes()))
        unpacked.unlink()
        return f"{change} before it is packed"
    return change_bytes(rng, path) if is_packed else mutate(rng, path)


def _disturb_folder(rng: random.Random, folder: Path) -> str:
    choice = rng.randrange(7)
    if choice == 0:
        (folder / "loop").symlink_to(folder)
        return "a link to the folder itself"
    if choice == 1:
        (folder / "nowhere.txt").symlink_to("/nowhere")
        return "a link that leads nowhere"
    if choice == 2:
        (folder / "x.bin").write_bytes(bytes(100_000))
        return "a large other file"
    if choice == 3:
        (folder / "inner.txt").mkdir()
        return "a folder that is named like a text"
    if choice == 4:
        (folder / ".hidden.txt").write_text("x")
        return "a hidden file"
    if choice == 5:
        (folder / "a\n\x1b[31mb\udcff.txt").write_text("text")
        return "a strange name"
    (folder / "empty.jsonl").touch()
    return "an empty file"
