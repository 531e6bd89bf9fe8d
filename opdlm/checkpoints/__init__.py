"""Checkpoint folders: loading, conversion, LoRA adapters, export."""
