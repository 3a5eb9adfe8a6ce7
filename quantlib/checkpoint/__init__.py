"""Hugging Face checkpoints of safetensors shards: open, read, lay out, write, verify, describe."""
