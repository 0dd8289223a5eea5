"""The sharded checkpoint format: safetensors shards and a JSON manifest."""
