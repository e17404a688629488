"""How many images fit the device at once: guessed from its free memory, halved where the guess was too bold."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hypersd_bench.errors import InputError, first_line
from hypersd_bench.pipelines import base_folder
from hypersd_bench.runner.plan import Configuration

MOST = 64  # more gain nothing, even for the miniature
SHARE = 0.8  # of the free memory
Key = tuple[str, str, bool]


class Batches:
    """Batch sizes by what they depend on: the pipeline, its precision, and whether guidance doubles the batch.

    A size that the spec names is where to start. Otherwise, on CUDA, the first image shows what one takes; on a CPU
    the size of the latents decides.
    """

    def __init__(self, wanted: int | None, device: str) -> None:
        self._wanted = wanted
        self._device = torch.device(device)
        self._sizes: dict[Key, int] = {}

    def size(self, configuration: Configuration) -> int:
        """The batch size to use now."""
        return self._sizes.get(key_of(configuration)) or self._first(configuration)

    def halve(self, configuration: Configuration, failed: int, error: Exception) -> None:
        """Take half of a size that did not fit; raises InputError when that was a single image."""
        if failed <= 1:
            raise InputError(
                f"out of memory making one image of {configuration} on {self._device} ({first_line(error)}); end "
                "what else uses the device, take a lower --dtype, or a device with more memory"
            ) from error
        self._sizes[key_of(configuration)] = max(1, failed // 2)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def watched(self, configuration: Configuration, count: int) -> Iterator[None]:
        """Watch what a batch takes; from the first one follows what the next may be."""
        key = key_of(configuration)
        if self._wanted or key in self._sizes or self._device.type != "cuda":
            yield
            return
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        yield
        taken = (torch.cuda.max_memory_allocated(self._device) - before) / count
        free = torch.cuda.mem_get_info(self._device)[0]
        free += torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        self._sizes[key] = power_of_two(int(SHARE * free / max(taken, 1)))

    def _first(self, configuration: Configuration) -> int:
        if self._wanted:
            return self._wanted
        if self._device.type == "cuda":
            return 1
        side = _latent_side(configuration.pipeline)
        return power_of_two(MOST * 16 * 16 // side**2)


def power_of_two(count: int) -> int:
    """The largest power of two up to ``count``, within 1 and ``MOST``."""
    return 1 << (max(1, min(count, MOST)).bit_length() - 1)


def key_of(configuration: Configuration) -> Key:
    """What memory and time of a batch depend on, apart from its size and the step count."""
    return (configuration.pipeline, configuration.dtype, configuration.model.contract.guidance_scale > 1)


def _latent_side(pipeline: str) -> int:
    config = json.loads((base_folder(pipeline) / "unet" / "config.json").read_text())
    return int(config.get("sample_size") or 64)
