"""A student that is a whole UNet, as a diffusers UNet folder that says itself how it must be sampled.

config.json, diffusion_pytorch_model.safetensors (or its shards and their index)   what diffusers loads
sampler.json                                                                       the contract, for people to read

Every weights file carries the contract and more in its metadata, whichever is looked at.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save as to_safetensors
from torch import Tensor

from hypersd_bench.errors import InputError
from hypersd_bench.sampling import SamplerContract
from hypersd_bench.store import write_bytes, write_json

SAMPLER_FILE = "sampler.json"
WEIGHTS = "diffusion_pytorch_model{suffix}.safetensors"
MAX_SHARD_SIZE = "5GB"


def write_unet(
    folder: Path, unet: UNet2DConditionModel, weights: Mapping[str, Tensor], dtype: torch.dtype,
    contract: SamplerContract, metadata: Mapping[str, str], max_shard_size: str = MAX_SHARD_SIZE,
) -> None:  # fmt: skip
    """Write weights, cast, beside the config of ``unet``, whose they are, without the path it was loaded from."""
    config = json.loads(unet.to_json_string())
    write_json(folder / "config.json", {key: value for key, value in config.items() if key != "_name_or_path"})
    tensors = {key: value.detach().to("cpu", dtype).contiguous() for key, value in weights.items()}
    split = split_torch_state_dict_into_shards(tensors, filename_pattern=WEIGHTS, max_shard_size=max_shard_size)
    for file, keys in split.filename_to_tensors.items():
        write_bytes(folder / file, to_safetensors({key: tensors[key] for key in keys}, metadata=dict(metadata)))
    if split.is_sharded:
        index: dict[str, Any] = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / f"{WEIGHTS.format(suffix='')}.index.json", index)
    write_json(folder / SAMPLER_FILE, json.loads(contract.to_json()))


@contextmanager
def unfinished(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` for what is not whole yet; gone afterwards, whatever happens."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
    except OSError as error:
        raise InputError(f"can't write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def move(written: Path, target: Path) -> None:
    """Give what is whole its name, in place of what had it."""
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(written, target)
