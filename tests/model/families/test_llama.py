"""Llama's flags: biases as ``config.json`` says, no windows."""

from __future__ import annotations

from tests.model.families.configs import flags_of, spec_of


def test_biases_are_what_the_file_says():
    assert flags_of("llama") == (False, False, False, None, "before")
    assert flags_of("llama", attention_bias=True) == (True, True, False, None, "before")
    assert flags_of("llama", mlp_bias=True) == (False, False, True, None, "before")


def test_llama_has_no_windows():
    """Llama's class does not know sliding_window, which a file may have all the same."""
    assert spec_of("llama", sliding_window=5).windows == (None,) * 4
