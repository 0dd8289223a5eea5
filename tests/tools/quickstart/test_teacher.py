"""The quickstart's teacher, which is kept in the repository: its files and what it can do."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megalard.data.tokenizer import load_tokenizer
from tests.processes import CHECKOUT

TEACHER = CHECKOUT / "launch" / "quickstart_teacher"


def test_folder_is_small_and_spells_rope_both_ways():
    assert sum(file.stat().st_size for file in TEACHER.iterdir()) <= 4_000_000
    config = json.loads((TEACHER / "config.json").read_text())
    assert config["max_position_embeddings"] == 256 and config["head_dim"] == 32
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["rope_scaling"] is None and config["dtype"] == config["torch_dtype"]
    tokenizer = load_tokenizer(TEACHER)
    assert tokenizer.vocab_size == config["vocab_size"] == 512
    assert tokenizer.eos_id == config["eos_token_id"]


@torch.no_grad()
def heldout_loss(length, **changes):
    """Return the mean loss on rows of ``length`` tokens of a held-out file, each read alone."""
    config = LlamaConfig.from_pretrained(TEACHER, **changes)
    model = LlamaForCausalLM.from_pretrained(TEACHER, config=config).float().eval()
    text = Path(statistics.__file__).read_text(encoding="utf-8")[:20_000]
    [ids] = load_tokenizer(TEACHER).encode_batch([text])
    rows = torch.tensor(ids[: len(ids) // 256 * 256]).view(-1, length)
    return model(input_ids=rows, labels=rows).loss.item()


def test_teacher_uses_its_context_and_scaled_positions_cost_it_dearly():
    short, native = heldout_loss(64), heldout_loss(256)
    scaled = heldout_loss(
        256, rope_parameters={"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}
    )
    assert native < short - 0.05
    assert scaled > native + 0.3
