"""Put code where a loader might run it, and read it with every program; none of it may run.

  python -m tools.campaigns.payloads --count 400 --seed 0

A case puts one kind of code into a copy of a model, a checkpoint, a run, a text or a
configuration: pickles under the names of weights and arrays, Python files that auto_map names,
templates, YAML tags, and names that a shell would run. Each program then reads the copy. The code
writes a file; a case in which the file appears is printed and gives status 1, and so is a command
that neither succeeds nor refuses in one sentence.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tools.campaigns.campaign import Campaign
from tools.campaigns.material import Material, make_material
from tools.campaigns.mutations import sign_manifest, sign_store
from tools.campaigns.tally import Outcome
from tools.campaigns.trial import Trial, judge, try_command

_TRAIN = Path(__file__).parents[2] / "launch" / "train.sh"


class _Bait:
    """An object whose pickle runs a command of the shell."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def _pickle(command: str) -> bytes:
    return pickle.dumps(_Bait(command))


def _torch_archive(command: str) -> bytes:
    """Return a file as torch.save writes it, which torch.load would unpickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", _pickle(command))
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def _object_array(command: str) -> bytes:
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + _pickle(command)


def _write_in(folder: Path, names: tuple[str, ...], content: bytes) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _weights(folder: Path, command: str) -> None:
    names = ("model.safetensors", "adapter_model.safetensors")
    _write_in(folder, tuple(n for n in names if (folder / n).exists()) or names, _pickle(command))


def _bin_files(folder: Path, command: str) -> None:
    names = ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt")
    _write_in(folder, names, _torch_archive(command))
    for path in folder.glob("*.safetensors"):
        path.unlink()


def _torch_load(folder: Path, command: str) -> None:
    names = ("pytorch_model.bin", "model.pt", ".metadata", "__0_0.distcp", "rng_state.pth")
    _write_in(folder, names, _torch_archive(command))


def _arrays(folder: Path, command: str) -> None:
    for path in [*folder.rglob("*.npy"), folder / "documents.npy"]:
        path.write_bytes(_object_array(command))
    for path in folder.rglob("meta.json"):
        sign_store(path.parent)


def _code_of(command: str) -> str:
    return f"import os\nos.system({command!r})\nclass X:\n    pass\nXConfig = XTokenizer = X\n"


def _auto_map(folder: Path, command: str) -> None:
    for name in ("modeling_x.py", "configuration_x.py", "tokenization_x.py", "__init__.py"):
        (folder / name).write_text(_code_of(command))
    classes = {"AutoConfig": "configuration_x.XConfig", "AutoTokenizer": ["tokenization_x.X", None]}
    classes |= {"AutoModelForCausalLM": "modeling_x.X", "AutoModel": "modeling_x.X"}
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        _edit(
            folder / name, {"auto_map": classes, "custom_generate": "x", "trust_remote_code": True}
        )


def _foreign_class(folder: Path, command: str) -> None:
    _auto_map(folder, command)
    _edit(folder / "config.json", {"model_type": "x"})
    _edit(folder / "tokenizer_config.json", {"tokenizer_class": "XTokenizer"})


def _templates(folder: Path, command: str) -> None:
    template = "{{ cycler.__init__.__globals__.os.system('" + command + "') }}"
    (folder / "chat_template.jinja").write_text(template)
    _edit(folder / "tokenizer_config.json", {"chat_template": template, "bos_token": template})


def _names(folder: Path, command: str) -> None:
    """Names of files in the manifest and in the index, for whoever hands them to a shell."""
    for path in folder.rglob("manifest.json"):
        text = path.read_text().replace("weights-00000-000", f"$({command})")
        path.write_text(text)
        sign_manifest(path)
    index = {"weight_map": {"lm_head.weight": f"| {command}", "x": f"$({command})"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _edit(path: Path, changes: dict) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))


KINDS: tuple[Callable[[Path, str], None], ...] = (
    _weights,
    _bin_files,
    _torch_load,
    _arrays,
    _auto_map,
    _foreign_class,
    _templates,
    _names,
)
_TAGS = (
    "!!python/object/apply:os.system ['{command}']",
    "!!python/object/new:os.system ['{command}']",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/object:tools.campaigns.payloads._Bait {{command: '{command}'}}",
)


def _try_folder(
    rng: random.Random, material: Material, scratch: Path, command: str
) -> tuple[str, list[Trial]]:
    target = rng.choice(["model", "indexed", "sharded", "adapter", "run"])
    folder = scratch / target
    material.unfinished_run(folder) if target == "run" else material.copy(target, folder)
    kind = rng.choice(KINDS)
    for place in [folder, *(folder.glob("checkpoints/*") if target == "run" else ())]:
        kind(place, command)
    text, model = material.folder / "text.txt", material.folder / "model"
    evaluation = ["--lengths", "32", "--max-tokens", "64", "--tasks"]
    commands: list[list] = [
        ["inspect", folder],
        ["verify", folder, model, "--logits", text, "--tokens", "16"],
        ["convert", "import", folder, scratch / "a"],
        ["convert", "export", folder, scratch / "b"],
        ["convert", "export", folder, scratch / "c", "--format", "peft"],
        ["prepare", text, "--model", folder, "--output", scratch / "d"],
        ["evaluate", folder, "--text", text, *evaluation, "--output", scratch / "e"],
        [*material.command(scratch / "f", f"model.teacher={folder}"), "--preflight"],
        material.command(scratch / "g", f"model.tokenizer={folder}", "optimizer.steps=1"),
        material.command(scratch / "h", f"data.paths={folder / 'tokens'}", "optimizer.steps=1"),
    ]
    if target == "run":
        commands = [["inspect", folder], material.command(folder), commands[-1]]
    chosen = rng.sample(commands, min(3, len(commands)))
    trials = [try_command(words) for words in chosen]
    return f"{target} {kind.__name__.strip('_')}", trials


def _try_table(
    rng: random.Random, material: Material, scratch: Path, command: str
) -> tuple[str, list[Trial]]:
    table = scratch / rng.choice(["t.npy", "t.json", "t.txt"])
    make = rng.choice([_pickle, _torch_archive, _object_array])
    table.write_bytes(make(command))
    words = material.command(scratch / "f", "rope.type=table", f"rope.table={table}")
    return f"table {table.suffix} {make.__name__.strip('_')}", [try_command(words)]


def _try_configuration(
    rng: random.Random, material: Material, scratch: Path, command: str
) -> tuple[str, list[Trial]]:
    tag = rng.choice(_TAGS).format(command=command)
    path = scratch / "config.yaml"
    path.write_text(f"run:\n  seed: {tag}\n")
    words = material.command(scratch / "f")
    trials = [try_command([words[0], "--config", path, *words[1:]])]
    trials.append(try_command([*words, f"--run.seed={tag}"]))
    return f"configuration {tag[:30]}", trials


def _try_script(
    rng: random.Random, material: Material, scratch: Path, command: str
) -> tuple[str, list[Trial]]:
    """Give launch/train.sh values that a shell would run if it were asked to."""
    value = rng.choice(["$({c})", "`{c}`", "'; {c}; '", '"; {c}; "', "a[$({c})]", "x\n{c}"])
    value = value.format(c=command)
    option = rng.choice(
        ["--model", "--data", "--output", "--config", "--tp", "--gpus", "--id", "--max-restarts"]
    )
    given = {"--model": material.folder / "model", "--data": material.folder / "text.txt"}
    given |= {"--output": scratch / "out", "--gpus": "3", "--tp": "2", option: value}
    words = [str(word) for pair in given.items() for word in pair]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", str(_TRAIN), *words], capture_output=True, text=True, env=environment, timeout=120
    )
    lines = [line for line in done.stderr.splitlines() if "error: " in line]
    is_refused = done.returncode != 0 and len(lines) == 1
    kind = "refused" if is_refused else judge(done.returncode, done.stdout, done.stderr).kind
    return f"script {option} {value[:20]!r}", [Trial(kind, done.returncode, done.stderr[-300:], "")]


def _prepare_material(folder: Path, options: argparse.Namespace) -> Material:
    return make_material(folder)


def _outcomes(
    seed: int, material: Material, scratch: Path, options: argparse.Namespace
) -> Iterator[Outcome]:
    rng = random.Random(seed)
    canary = scratch.with_name("ran")
    ways = (*[_try_folder] * 6, _try_table, _try_configuration, _try_script)
    case, trials = rng.choice(ways)(rng, material, scratch, f"touch {canary}")
    if canary.exists():
        canary.unlink()
        yield Outcome("CODE RAN", False, case)
    for trial in trials:
        yield Outcome(trial.kind, trial.is_good, case, trial.detail)


CAMPAIGN = Campaign(__doc__, 400, _outcomes, _prepare_material)


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; return the exit status."""
    return CAMPAIGN.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
