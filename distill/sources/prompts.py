"""Prompts alone: feedback learning and score distillation need no images."""

from __future__ import annotations

from PIL.Image import Image

from distill.sources.contract import Catalogue, RawObject, Row, SampleError
from hypersd_bench.prompts import load_prompts


class PromptFile:
    """A registered prompt set, or a .txt, .tsv or .csv file."""

    has_images = False
    has_instances = False

    def __init__(self, name: str) -> None:
        found = load_prompts(name)
        self.name = name
        self.catalogue = Catalogue.of([Row(prompt.id, prompt.text) for prompt in found.prompts])
        self.fingerprint = found.sha256

    def image(self, index: int) -> Image:
        """There is none."""
        raise SampleError("no image")

    def objects(self, index: int) -> list[RawObject]:
        """There are none."""
        raise SampleError("no masks")
