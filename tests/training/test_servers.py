"""What vLLM and llama.cpp's converter read from exported students.

Both are installed apart by ``bash tests/install_servers.sh``. Without it these tests are skipped.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.command_line import megalard
from tests.jobs import arguments, make_job
from tests.models import change_config, make_model
from tests.small_tokenizers import save_byte_tokenizer

SERVERS = Path(__file__).parents[1] / ".servers"
pytestmark = pytest.mark.skipif(
    not SERVERS.is_dir(), reason="needs vLLM and llama.cpp: bash tests/install_servers.sh"
)
STILL = ("optimizer.learning_rate=1e-30", "optimizer.steps=1", "optimizer.warmup_steps=0")
NATIVE, STUDENT, THETA = 64, 256, 10000.0
KINDS = ("linear", "abf", "yarn", "llama3", "longrope")
STUDENTS = [
    *(("llama", kind) for kind in KINDS),
    *(("qwen2", kind) for kind in KINDS),
    ("qwen3", "yarn"),
    ("mistral", "yarn"),
    ("ministral", "linear"),
    ("olmo2", "abf"),
    ("phi3", "longrope"),
]


@pytest.fixture(scope="module")
def students(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """Students that a run exported, by family and RoPE type."""
    folder = tmp_path_factory.mktemp("servers")
    job, teachers, exported = make_job(folder), {}, {}
    for family, kind in STUDENTS:
        if family not in teachers:
            teacher = folder / family
            make_model("mistral" if family == "ministral" else family, teacher, vocab_size=257)
            save_byte_tokenizer(teacher)
            if family == "ministral":
                types = ["full_attention", "sliding_attention", "full_attention"]
                change_config(teacher, sliding_window=8, layer_types=types)
            teachers[family] = teacher
        output = folder / f"{family}-{kind}"
        overrides = (*STILL, f"model.teacher={teachers[family]}", f"rope.type={kind}")
        assert megalard("train", *arguments(job, output, *overrides)) == 0
        exported[family, kind] = output / "student"
    return exported


VLLM = """
import json, sys
sys.path.append(sys.argv[1])
from vllm.config import model
from vllm.transformers_utils.config import get_config
from vllm.transformers_utils import model_arch_config_convertor as convertor

for folder in sys.argv[2:]:
    config = get_config(folder, trust_remote_code=False)
    kind = convertor.MODEL_ARCH_CONFIG_CONVERTORS.get(
        config.model_type, convertor.ModelArchConfigConvertorBase
    )
    with open(folder + "/tokenizer_config.json") as file:
        tokenizer = json.load(file)
    windows = [
        model._get_and_verify_max_len(
            hf_config=config,
            model_arch_config=kind(config, config).convert(),
            tokenizer_config=tokenizer,
            max_model_len=given,
            disable_sliding_window=False,
            sliding_window=None,
        )
        for given in (None, int(%d))
    ]
    print("READ", json.dumps([windows, config.rope_parameters]))
"""


@pytest.fixture(scope="module")
def read_by_vllm(students) -> dict[tuple[str, str], tuple[list[int], dict]]:
    """The windows without and with ``--max-model-len``, and the RoPE parameters."""
    words = [sys.executable, "-c", VLLM % STUDENT, SERVERS / "vllm", *students.values()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line[5:] for line in done.stdout.splitlines() if line.startswith("READ ")]
    return dict(zip(students, map(json.loads, lines), strict=True))


@pytest.mark.parametrize(("family", "kind"), STUDENTS)
def test_vllm_serves_the_window_that_was_trained(family, kind, read_by_vllm, students):
    windows, parameters = read_by_vllm[family, kind]
    # docs/evaluation.md says why the option is needed.
    derived = {"linear": 4 * STUDENT, "longrope": NATIVE}.get(kind, STUDENT)
    assert windows == [derived, STUDENT]
    config = json.loads((students[family, kind] / "config.json").read_text())
    written = config["rope_parameters"]
    if family == "phi3":
        written.pop("factor")  # Phi-3 derives it from the two windows
    assert {key: parameters[key] for key in written} == written


@pytest.fixture(scope="module")
def converted(students, tmp_path_factory) -> dict[tuple[str, str], tuple[dict, dict]]:
    """The values and the RoPE tensors of GGUF files, for families of llama.cpp's tokenizers."""
    folder = tmp_path_factory.mktemp("gguf")
    # The converter knows tokenizers by name, and reads every sentencepiece model.
    model = io.BytesIO()
    sentences = (" ".join(f"{a}{b}{c}" for c in "abcdef") for a in "ghijklmn" for b in "opqrstuv")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences,
        model_writer=model,
        vocab_size=60,
        model_type="bpe",
        minloglevel=2,
    )
    library = SERVERS / "llama.cpp" / "gguf-py"
    sys.path.insert(0, str(library))
    try:
        import gguf
    finally:
        sys.path.remove(str(library))
    results = {}
    for (family, kind), student in students.items():
        if family not in ("llama", "qwen2", "mistral", "ministral", "qwen3"):
            continue
        copy, file = folder / f"{family}-{kind}", folder / f"{family}-{kind}.gguf"
        shutil.copytree(student, copy)
        (copy / "tokenizer.model").write_bytes(model.getvalue())
        script = SERVERS / "llama.cpp" / "convert_hf_to_gguf.py"
        words = [sys.executable, script, copy, "--outfile", file, "--outtype", "f32"]
        environment = {**os.environ, "PYTHONPATH": str(library)}
        done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        reader = gguf.GGUFReader(file)
        values = {name.split(".", 1)[1]: field for name, field in reader.fields.items()}
        values = {name: field.contents() for name, field in values.items() if "." in name}
        values["context_length"] = next(
            field.contents() for name, field in reader.fields.items() if "context_len" in name
        )
        tensors = {
            tensor.name: torch.tensor(tensor.data)
            for tensor in reader.tensors
            if "rope" in tensor.name
        }
        results[family, kind] = values, tensors
    return results


CARRIED = [
    (family, kind)
    for family, kind in STUDENTS
    if family in ("llama", "qwen2", "mistral", "ministral", "qwen3")
    and kind != "longrope"
    and (family == "llama" or kind != "llama3")
]


@pytest.mark.parametrize(("family", "kind"), CARRIED)
def test_llama_cpp_gets_the_frequencies_that_were_trained(family, kind, converted, students):
    values, tensors = converted[family, kind]
    assert values["context_length"] == STUDENT
    config = AutoConfig.from_pretrained(students[family, kind])
    base = values["rope.freq_base"]
    dim = config.head_dim if hasattr(config, "head_dim") else config.hidden_size // 4
    plain = base ** -(torch.arange(0, dim, 2) / dim)
    scaling = values.get("rope.scaling.type")
    if kind == "yarn":
        assert (scaling, base) == ("yarn", THETA)
        assert values["rope.scaling.factor"] == STUDENT / NATIVE
        assert values["rope.scaling.original_context_length"] == NATIVE
        return
    if kind == "abf":
        assert scaling is None and not tensors
        expected, _ = plain, None
        assert (
            base == pytest.approx(config.rope_parameters["rope_theta"], rel=1e-6) and base > THETA
        )
    else:
        expected, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    ours = plain / values.get("rope.scaling.factor", 1.0)
    if "rope_freqs.weight" in tensors:
        ours = ours / tensors["rope_freqs.weight"]
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "longrope"), ("qwen2", "longrope"), ("qwen2", "llama3")]
)
def test_llama_cpp_does_not_get_the_frequencies_of_the_other_types(family, kind, converted):
    """docs/evaluation.md warns of these. If this fails, the converter has learned them."""
    _, tensors = converted[family, kind]
    assert not tensors
