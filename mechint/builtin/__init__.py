"""The built-in world: generated tales with known concepts, and a small language model trained on them."""

from pathlib import Path

PYTHIA_TINY: Path = Path(__file__).parent / "pythia-tiny"
"""Folder of the shipped model: config, weights, tokenizer, card."""
