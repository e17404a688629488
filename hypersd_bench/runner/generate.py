"""Plan to images: each missing image of each configuration, in batches, entered in the ledger as they are done."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from hypersd_bench.conditioning import Condition, join
from hypersd_bench.pipelines import (
    Pipeline,
    decode_latents,
    encode_empty,
    encode_prompts,
    load_base,
    sample_latents,
    to_uint8,
    with_model,
)
from hypersd_bench.prompts import Prompt
from hypersd_bench.runner.plan import Configuration, Plan
from hypersd_bench.seeding import image_seed
from hypersd_bench.store import ImageRow, RunStore, write_bytes


@dataclass(frozen=True)
class Embeddings:
    """What the UNet is told of each prompt, by id, one row each, and the unconditional input; encoded once for all."""

    by_prompt: dict[str, Condition]
    empty: Condition


def generate(plan: Plan, store: RunStore, device: str) -> None:
    """Make the images that the ledger does not have yet."""
    missing = _missing(plan, store)
    if not missing:
        return
    base = load_base(plan.spec.base, device)
    embeddings = encode_all(base, plan.prompts.prompts)
    done = plan.num_images - sum(len(jobs) for _, jobs in missing)
    with tqdm(total=plan.num_images, initial=done, desc="images", unit="image", smoothing=0.1) as bar:
        for configuration, jobs in missing:
            bar.set_postfix_str(f"{configuration.label}@{configuration.steps}")
            pipe = with_model(base, configuration.model)
            for i in range(0, len(jobs), plan.spec.batch_size):
                batch = jobs[i : i + plan.spec.batch_size]
                store.record_images(_make_batch(pipe, embeddings, plan, configuration, batch, store))
                bar.update(len(batch))


def encode_all(pipe: Pipeline, prompts: Sequence[Prompt], batch_size: int = 64) -> Embeddings:
    """Encode every prompt, and the empty one; batches are cut from the whole list, so a resumed run encodes alike."""
    encoded: dict[str, Condition] = {}
    with torch.no_grad():
        for i in range(0, len(prompts), batch_size):
            batch = prompts[i : i + batch_size]
            cond = encode_prompts(pipe, [prompt.text for prompt in batch])
            encoded |= {prompt.id: cond.rows(slice(row, row + 1)) for row, prompt in enumerate(batch)}
        return Embeddings(encoded, encode_empty(pipe))


Job = tuple[Prompt, int]  # a prompt and a replicate


def _missing(plan: Plan, store: RunStore) -> list[tuple[Configuration, list[Job]]]:
    done = {row.key for row in store.images() if (store.folder / row.file).exists()}
    jobs = [(prompt, replicate) for prompt in plan.prompts.prompts for replicate in range(plan.spec.replicates)]
    missing = [(c, [(p, r) for p, r in jobs if (c.label, c.steps, p.id, r) not in done]) for c in plan.configurations]
    return [(c, todo) for c, todo in missing if todo]


def _make_batch(
    pipe: Pipeline,
    embeddings: Embeddings,
    plan: Plan,
    configuration: Configuration,
    batch: Sequence[Job],
    store: RunStore,
) -> list[ImageRow]:
    seeds = [image_seed(plan.spec.seed, prompt.id, replicate) for prompt, replicate in batch]
    cond = join(*(embeddings.by_prompt[prompt.id] for prompt, _ in batch))
    contract, steps = configuration.model.contract, configuration.steps
    latents = sample_latents(pipe, contract, steps, cond, seeds, embeddings.empty)
    pixels = decode_latents(pipe, latents)
    rows = []
    for (prompt, replicate), seed, picture in zip(batch, seeds, pixels, strict=True):
        file = f"images/{configuration.label}/{steps}/{prompt.id}_{replicate}.png"
        png = _png(picture)
        write_bytes(store.folder / file, png)
        rows.append(
            ImageRow(
                model=configuration.label,
                steps=steps,
                prompt_id=prompt.id,
                prompt=prompt.text,
                replicate=replicate,
                seed=seed,
                file=file,
                sha256=hashlib.sha256(png).hexdigest(),
                checkpoint=configuration.model.name,
                defect=find_defect(picture),
            )
        )
    return rows


def find_defect(picture: Tensor) -> str:
    """Say why a picture (3, H, W) in [0, 1] can't be trusted: ``non-finite``, ``black``, ``constant``, or nothing."""
    if not bool(torch.isfinite(picture).all()):
        return "non-finite"
    pixels = to_uint8(picture)
    if int(pixels.max()) <= 2:
        return "black"
    return "constant" if int(pixels.max()) - int(pixels.min()) <= 2 else ""


def _png(picture: Tensor) -> bytes:
    pixels = to_uint8(torch.nan_to_num(picture)).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
