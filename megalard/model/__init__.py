"""The decoder in plain torch on local shapes: layers, RoPE, LoRA. It contains no collectives."""
