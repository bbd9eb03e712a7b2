"""Layouts of published models on 8 to 512 GPUs: ``preset=NAME`` (docs/presets.md)."""
