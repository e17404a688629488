"""Jobs to finished images on one device: what the local engine and every remote worker run.

The device denoises and decodes; PNG coding, hashing and writing happen in threads beside it, and the next batch does
not wait for them.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hypersd_bench.bench import Bench
from hypersd_bench.conditioning import Condition, join
from hypersd_bench.errors import is_out_of_memory
from hypersd_bench.pipelines import Pipeline, decode_latents, encode_empty, encode_prompts, sample_latents, to_uint8
from hypersd_bench.prompts import Prompt
from hypersd_bench.runner.memory import Batches
from hypersd_bench.runner.plan import Configuration, Plan
from hypersd_bench.seeding import image_seed
from hypersd_bench.store import ImageRow, folder_name

T = TypeVar("T")
ENCODE_BATCH = 64
WRITERS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True, slots=True)
class Job:
    """One image to make: a prompt, and which of its replicates."""

    prompt: Prompt
    replicate: int


@dataclass(frozen=True, slots=True)
class Finished:
    """An image's row for the ledger, and its file's content."""

    row: ImageRow
    png: bytes


class Embeddings:
    """Prompts as a pipeline's text encoders give them: encoded when first asked for, then kept on the CPU.

    Always in the same blocks of the whole list, so that a run that goes on, or another worker, encodes alike.
    """

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._prompts = prompts
        self._places = {prompt.id: place for place, prompt in enumerate(prompts)}
        self._blocks: dict[int, Condition] = {}
        self._led_away_from: dict[str, Condition] = {}

    def of(self, pipe: Pipeline, prompts: Sequence[Prompt]) -> Condition:
        """What the UNet is told of prompts of the list, a row each, on the pipeline's device."""
        return join(*(self._row(pipe, self._places[prompt.id]) for prompt in prompts)).to(pipe.device)

    @torch.no_grad()
    def unconditional(self, pipe: Pipeline, negative_prompt: str) -> Condition:
        """What guidance leads away from, one row, on the pipeline's device: nothing, or a negative prompt."""
        if negative_prompt not in self._led_away_from:
            encoded = encode_prompts(pipe, [negative_prompt]) if negative_prompt else encode_empty(pipe)
            self._led_away_from[negative_prompt] = encoded
        return self._led_away_from[negative_prompt]

    @torch.no_grad()
    def _row(self, pipe: Pipeline, place: int) -> Condition:
        block, row = divmod(place, ENCODE_BATCH)
        if block not in self._blocks:
            texts = [prompt.text for prompt in self._prompts[block * ENCODE_BATCH : (block + 1) * ENCODE_BATCH]]
            self._blocks[block] = encode_prompts(pipe, texts).to("cpu")
        return self._blocks[block].rows(slice(row, row + 1))


class Maker:
    """A device at work on a plan. Close it, or use it as a context, to have its threads end."""

    def __init__(self, plan: Plan, device: str) -> None:
        self.plan = plan
        self.bench = Bench(device)
        self.batches = Batches(plan.spec.batch_size, device)
        self._embeddings = ("", "", Embeddings(()))  # of the pipeline and precision that were last asked for
        self._threads = ThreadPoolExecutor(WRITERS, thread_name_prefix="png")

    def __enter__(self) -> Maker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for the threads, and free the device."""
        self._threads.shutdown()
        self.bench.clear()

    def embeddings(self, pipeline: str, dtype: str) -> Embeddings:
        """The plan's prompts as a pipeline encodes them: once for all of its models and step counts."""
        if self._embeddings[:2] != (pipeline, dtype):
            self._embeddings = (pipeline, dtype, Embeddings(self.plan.prompts.prompts))
        return self._embeddings[2]

    def batch_size(self, configuration: Configuration) -> int:
        """How many images of a configuration are made at once, as far as is known now."""
        return self.batches.size(configuration)

    def make(self, configuration: Configuration, jobs: Sequence[Job], then: Callable[[Finished], T]) -> list[Future[T]]:
        """Make images, in as many batches as memory asks for; ``then`` is called with each in a thread."""
        futures: list[Future[T]] = []
        for batch, pixels in self.pixels(configuration, jobs):
            arrive = _to_cpu(pixels)
            for i, job in enumerate(batch):
                futures.append(self._threads.submit(self._deliver, configuration, job, partial(arrive, i), then))
        return futures

    def pixels(self, configuration: Configuration, jobs: Sequence[Job]) -> list[tuple[Sequence[Job], Tensor]]:
        """Denoise and decode; each part's pixels (n, 3, H, W) in [0, 1] are on the device.

        A batch that does not fit the memory is halved, for this configuration's later ones too.
        """
        embeddings = self.embeddings(configuration.pipeline, configuration.dtype)
        pipe = self.bench.seat(configuration.model, configuration.pipeline, configuration.dtype)
        done: list[tuple[Sequence[Job], Tensor]] = []
        rest = jobs
        while rest:
            batch = rest[: self.batches.size(configuration)]
            try:
                done.append((batch, self._batch(pipe, configuration, batch, embeddings)))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self.batches.halve(configuration, len(batch), error)
                continue
            rest = rest[len(batch) :]
        return done

    def _batch(
        self, pipe: Pipeline, configuration: Configuration, batch: Sequence[Job], embeddings: Embeddings
    ) -> Tensor:
        seeds = [image_seed(self.plan.spec.seed, job.prompt.id, job.replicate) for job in batch]
        contract = configuration.model.contract
        cond = embeddings.of(pipe, [job.prompt for job in batch])
        uncond = embeddings.unconditional(pipe, contract.negative_prompt)
        with self.batches.watched(configuration, len(batch)):
            latents = sample_latents(pipe, contract, configuration.steps, cond, seeds, uncond)
        return decode_latents(pipe, latents)

    def _deliver(
        self,
        configuration: Configuration,
        job: Job,
        arrive: Callable[[], tuple[NDArray[np.uint8], bool]],
        then: Callable[[Finished], T],
    ) -> T:
        return then(self._finish(configuration, job, *arrive()))

    def _finish(self, configuration: Configuration, job: Job, pixels: NDArray[np.uint8], finite: bool) -> Finished:
        png = to_png(pixels)
        label, steps, prompt = configuration.label, configuration.steps, job.prompt
        row = ImageRow(
            model=label,
            steps=steps,
            prompt_id=prompt.id,
            prompt=prompt.text,
            replicate=job.replicate,
            seed=image_seed(self.plan.spec.seed, prompt.id, job.replicate),
            file=f"images/{folder_name(label)}/{steps}/{prompt.id}_{job.replicate}.png",
            sha256=hashlib.sha256(png).hexdigest(),
            checkpoint=configuration.model.name,
            defect=find_defect(pixels, finite),
        )
        return Finished(row, png)


def find_defect(pixels: NDArray[np.uint8], finite: bool = True) -> str:
    """Say why a picture (H, W, 3) can't be trusted: ``non-finite``, ``black``, ``constant``, or nothing."""
    if not finite:
        return "non-finite"
    if int(pixels.max()) <= 2:
        return "black"
    return "constant" if int(pixels.max()) - int(pixels.min()) <= 2 else ""


def to_png(pixels: NDArray[np.uint8]) -> bytes:
    """Code a picture (H, W, 3) as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _to_cpu(pixels: Tensor) -> Callable[[int], tuple[NDArray[np.uint8], bool]]:
    """Start bringing pixels to the CPU; what is returned gives picture i (H, W, 3), and whether it is finite.

    On CUDA the copy runs beside the next batch, and only a thread that asks for a picture waits for it.
    """
    finite = torch.isfinite(pixels).flatten(1).all(1)
    pictures = to_uint8(torch.nan_to_num(pixels)).permute(0, 2, 3, 1).contiguous()
    if not pixels.is_cuda:
        return lambda i: (pictures[i].numpy(), bool(finite[i]))
    event = torch.cuda.Event()
    here = torch.empty(pictures.shape, dtype=torch.uint8, pin_memory=True).copy_(pictures, non_blocking=True)
    finite_here = torch.empty(finite.shape, dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
    event.record()

    def arrived(i: int) -> tuple[NDArray[np.uint8], bool]:
        event.synchronize()
        return here[i].numpy(), bool(finite_here[i])

    return arrived
