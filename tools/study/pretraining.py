"""The teacher of the study: a small Llama, trained from a random start by megalard itself."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megalard.checkpoint.companions import tokenizer_companions
from megalard.config.file import load_config
from megalard.data.token_store import TokenStore
from megalard.errors import UserError
from megalard.quiet import quiet_transformers
from megalard.train import train
from megalard.training.stop_signals import StopSignals
from tools.study.folder import as_list
from tools.study.lengths import NATIVE_WINDOW
from tools.study.methods import recipe

# 23.5M parameters with the corpus's vocabulary of 8192.
TEACHER = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": NATIVE_WINDOW,
    "tie_word_embeddings": True,
}
# Small files are easier to keep.
_FILE_SIZE = "15MB"


def pretrain(folder: Path, steps: int, device: str) -> None:
    """Write ``start/``, the random start, and ``teacher/``; a run that was stopped is resumed.

    Args:
        folder: the directory of the study, which holds ``corpus/``.
        steps: steps of 64 blocks of M tokens.

    Raises:
        UserError: there is no corpus, or the run cannot be made or resumed.
    """
    corpus, start, output = folder / "corpus", folder / "start", folder / "pretraining"
    text = corpus / "mixed" / "train"
    if not text.is_dir():
        raise UserError(
            f"{corpus} has no mixed/train: make it with python -m tools.study.corpus --output "
            f"{corpus}"
        )
    store = TokenStore.open(text)
    torch.manual_seed(0)
    ids = {"bos_token_id": None, "eos_token_id": store.eos_id}
    config = LlamaConfig(vocab_size=store.vocab_size, **ids, **TEACHER)
    with quiet_transformers():
        LlamaForCausalLM(config).save_pretrained(start)
    _copy_tokenizer(corpus / "tokenizer", start)
    settings = {
        "model.teacher": start,
        "model.student": start,
        "data.paths": as_list(text),
        "optimizer.steps": steps,
        "run.device": device,
        "run.output": output,
    }
    overrides = [f"--{key}={value}" for key, value in settings.items()]
    with StopSignals() as stop:
        train(load_config(str(recipe("pretrain")), overrides), stop)
    if not (output / "student").is_dir():
        raise UserError("the training was stopped: the same command resumes it")
    # The runs hold the teacher in bf16. The saved teacher is in bf16 too, so that teacher and
    # student start from equal numbers.
    teacher = folder / "teacher"
    with quiet_transformers():
        model = LlamaForCausalLM.from_pretrained(output / "student", dtype=torch.bfloat16)
        model.save_pretrained(teacher, max_shard_size=_FILE_SIZE)
    _copy_tokenizer(start, teacher)


def _copy_tokenizer(source: Path, target: Path) -> None:
    for companion in tokenizer_companions(source):
        companion.write(target)
