"""The bench: one base pipeline on the device, on which the models of a run take turns.

A LoRA is fused into the base's UNet, so that it costs nothing per step, and taken out again by writing back the very
weights that were there: unfusing would leave rounding behind, and the pictures would depend on which models came
before.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hypersd_bench.catalog.spec import ModelSpec
from hypersd_bench.errors import InputError, first_line, is_out_of_memory
from hypersd_bench.pipelines import (
    DTYPES,
    SHARED_CONFIG,
    Pipeline,
    load_base,
    load_unet,
    load_unet_file,
    weights_path,
    with_unet,
)
from hypersd_bench.sampling import read_safetensors_header


class Bench:
    """A device, and the pipeline that is on it. Seating a model of another pipeline or precision loads that first."""

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = device
        if torch.device(device).index is not None:  # cuda:1: events and streams are the current device's
            torch.cuda.set_device(torch.device(device))
        self._base: Pipeline | None = None
        self._base_key = ("", "")
        self._pristine: dict[str, Tensor] = {}  # the base's own weights wherever a LoRA has been, on the CPU
        self._seated: tuple[ModelSpec, Pipeline] | None = None

    def base(self, pipeline: str, dtype: str = "float32") -> Pipeline:
        """The pipeline itself, without any model; loaded when another one was on the device."""
        self._rise()
        if self._base is None or self._base_key != (pipeline, dtype):
            self.clear()
            self._base = load_base(pipeline, self.device, DTYPES[dtype])
            self._base_key = (pipeline, dtype)
        return self._base

    def seat(self, model: ModelSpec, pipeline: str, dtype: str = "float32") -> Pipeline:
        """A pipeline that samples as ``model``, until the next call; raises InputError for weights that don't fit."""
        if self._seated and self._seated[0] == model and self._base_key == (pipeline, dtype):
            return self._seated[1]
        base = self.base(pipeline, dtype)
        _require_prediction(model, pipeline, base)
        match model.kind:
            case "base":
                pipe = base
            case "unet":
                base.unet.to("cpu")  # makes room for the other one
                pipe = with_unet(base, self._own_unet(model, base, DTYPES[dtype]))
            case "lora":
                self._fuse(model, base)
                pipe = base
        self._seated = (model, pipe)
        return pipe

    def clear(self) -> None:
        """Free the device."""
        self._base, self._seated, self._pristine = None, None, {}
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _rise(self) -> None:
        """Take the seated model off: the base is to the bit as it was loaded."""
        kind = self._seated[0].kind if self._seated else ""
        self._seated = None
        if kind == "lora":
            assert self._base
            _write_back(self._base.unet, self._pristine)
        if self._base:
            self._base.unet.to(self.device)  # after a model with its own

    def _own_unet(self, model: ModelSpec, base: Pipeline, dtype: torch.dtype) -> UNet2DConditionModel:
        path = weights_path(model)
        if path.is_dir():
            unet = load_unet(path, self.device, dtype)
        else:
            unet = load_unet_file(path, base.unet.config, self.device, dtype)
        unlike = [name for name in SHARED_CONFIG if unet.config.get(name) != base.unet.config.get(name)]
        if unlike:
            raise InputError(f"{model.name}: {path} does not fit base {model.base!r}: its {unlike[0]} is "
                             f"{unet.config.get(unlike[0])}, the base's {base.unet.config.get(unlike[0])}")  # fmt: skip
        return unet

    def _fuse(self, model: ModelSpec, base: Any) -> None:
        """Add a LoRA's deltas to the UNet's weights, which are kept aside the first time."""
        path = weights_path(model)
        names = read_safetensors_header(path) if path.suffix == ".safetensors" else ()
        if any(name.startswith(("lora_te", "text_encoder")) for name in names):
            raise InputError(f"{model.name}: {path} changes the text encoder too, whose embeddings all models of a run "
                             "share; only LoRAs of the UNet can be compared")  # fmt: skip
        try:
            _load_lora(base, path)
            layers = {name: module for name, module in base.unet.named_modules() if isinstance(module, BaseTunerLayer)}
            if not layers:
                raise ValueError("none of its tensors belongs to a layer of this UNet")
            for name, layer in layers.items():
                if f"{name}.weight" not in self._pristine:
                    weight = layer.get_base_layer().weight
                    self._pristine[f"{name}.weight"] = weight.detach().to("cpu", copy=True)
            base.fuse_lora(lora_scale=model.contract.lora_scale)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            base.unload_lora_weights()
            _write_back(base.unet, self._pristine)
            if is_out_of_memory(error):
                raise
            raise InputError(f"{model.name}: {path} does not fit base {model.base!r}: {first_line(error)}") from error
        base.unload_lora_weights()


def _require_prediction(model: ModelSpec, pipeline: str, base: Pipeline) -> None:
    """Raise InputError for a pipeline whose UNet predicts v under a contract that takes it for eps."""
    if model.kind != "unet" and base.scheduler.config.get("prediction_type") == "v_prediction" != (
        model.contract.prediction_type
    ):
        raise InputError(
            f"{model.name}: the UNet of {pipeline} predicts v, and the contract says {model.contract.prediction_type}; "
            "if these weights are for such a base, say sampler: {prediction_type: v_prediction} and force: true"
        )


def _load_lora(base: Any, path: Path) -> None:
    """Load a LoRA from safetensors, whose metadata may hold its alphas, or from a pickle of plain tensors."""
    if path.suffix == ".safetensors":
        base.load_lora_weights(path.parent, weight_name=path.name, local_files_only=True)
        return
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling can raise anything
        raise ValueError(f"not a pickle of plain tensors ({first_line(error)})") from error
    base.load_lora_weights(tensors)


@torch.no_grad()
def _write_back(unet: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        unet.get_parameter(name).copy_(weight)
