"""The miniature: a complete small text-to-image world in the layout of Stable Diffusion 1.5."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
"""Where the shipped miniature lies: ``base/`` (a pipeline folder), ``clip/``, ``aesthetic.safetensors``,
``checker.safetensors``, ``segmenter.safetensors``, ``lora/<method>/*.safetensors``, ``card.json`` and
``README.md``."""
