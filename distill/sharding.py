"""Full UNets spread over processes by FSDP2, and whole again where one process works alone or a file is written."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.distributed import get_world_size
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(unet: UNet2DConditionModel) -> None:
    """Leave each process its part of every weight; a block's are whole only while it runs."""
    mesh = init_device_mesh(unet.device.type, (get_world_size(),))
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(unet, mesh=mesh)


def whole(value: Any) -> Any:
    """A tensor, or a nest of dicts and lists of them, with every sharded one gathered: all processes must call it."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: whole(each) for key, each in value.items()}
    return [whole(each) for each in value] if isinstance(value, list) else value


def spread(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor sharded as ``like`` is, if it is."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def spread_state(state: dict[str, Any], parameters: list[torch.nn.Parameter]) -> dict[str, Any]:
    """An optimizer's gathered state, its moments sharded as its parameters are."""
    moments = {
        i: {k: spread(v, parameters[i]) if v.shape == parameters[i].shape else v for k, v in entry.items()}
        for i, entry in state["state"].items()
    }
    return {**state, "state": moments}
