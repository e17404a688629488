"""What a training step costs, told without doing it: FLOPs and live memory of code that runs on the meta device.

Everything runs as it will in training, the losses, the roles, the backward pass, but on tensors without data. A
``Meter`` sees every operation: it adds up their FLOPs (PyTorch's own formulas) and follows when each storage is made
and freed. A UNet's blocks are measured once for each way they are called, forward and backward, then replayed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.flop_counter import flop_registry

FLASH_HEAD = 256  # widest head of PyTorch's flash attention
META = torch.device("meta")


class Meter(TorchDispatchMode):
    """Counts FLOPs, live bytes and their peak, from the last ``reset`` on."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._run = 0
        self.reset(())

    def reset(self, resident: Iterable[Tensor]) -> None:
        """Start counting anew; the storages of ``resident`` are there already and count as nothing."""
        self._run += 1
        self.flops = self.live = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in resident}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, then count it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += int(formula(*args, **kwargs, out_val=result))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, self._run, key, storage.nbytes()).atexit = False

    def _freed(self, run: int, key: int, size: int) -> None:
        if run == self._run:
            self._known.discard(key)
            self.live -= size

    def touch(self, extra: int) -> None:
        """Let ``extra`` more bytes have been live for a moment."""
        self.peak = max(self.peak, self.live + extra)


class CudaRules(TorchFunctionMode):
    """What CUDA does differently from meta tensors: fused attention, and autocast to ``half`` where there is one.

    Autocast as on CUDA: convolutions and linear layers in half precision, normalisations in float32.
    """

    def __init__(self, half: torch.dtype | None) -> None:
        super().__init__()
        self.half = half

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Leave autocast inside the block."""
        half, self.half = self.half, None
        try:
            yield
        finally:
            self.half = half

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of PyTorch by these rules."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if self.half is not None and func in _IN_HALF:
            args, kwargs = _cast(args, self.half), dict(zip(kwargs, _cast(kwargs.values(), self.half), strict=True))
        if self.half is not None and func in _IN_FLOAT:
            args, kwargs = (
                _cast(args, torch.float32),
                dict(zip(kwargs, _cast(kwargs.values(), torch.float32), strict=True)),
            )
        return func(*args, **kwargs)


_IN_HALF = (F.linear, F.conv2d, torch.conv2d, torch.bmm, torch.baddbmm, torch.matmul, Tensor.matmul)
_IN_FLOAT = (F.group_norm, F.layer_norm)


def _cast(values: Iterable[Any], dtype: torch.dtype) -> tuple[Any, ...]:
    def one(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if floating else value

    return tuple(map(one, values))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, **_: Any,
) -> Tensor:  # fmt: skip
    """Flash attention where CUDA would choose it, else the memory-efficient kind; neither keeps a (S, S) matrix."""
    if query.dtype != torch.float32 and query.shape[-1] <= FLASH_HEAD and attn_mask is None:
        flash: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale
        )[0]
        return flash
    with_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    efficient: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, with_gradient, dropout_p, is_causal, scale=scale
    )[0]
    return efficient


@dataclass(frozen=True)
class Record:
    """What one call of a block takes: its FLOPs and the bytes beside what was there, forward, kept, backward."""

    outputs: list[tuple[torch.Size, torch.dtype]]
    structure: Any
    forward_flops: int
    forward_bytes: int
    kept_bytes: int = 0
    backward_flops: int = 0
    backward_bytes: int = 0


class Replayed:
    """A module's forward that is measured at its first call of each kind, and afterwards only accounted for.

    kind: tells calls apart that tensors do not: who is active, and whether its weights are trained.
    """

    def __init__(
        self, module: nn.Module, name: str, meter: Meter, records: dict[Hashable, Record],
        kind: Callable[[], tuple[Hashable, bool]] = lambda: (None, False),
    ) -> None:  # fmt: skip
        self._forward = module.forward
        self._name, self._meter, self._records, self._kind = name, meter, records, kind

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answer with tensors of the right shapes, which cost what the true ones would."""
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        who, trained = self._kind()
        grad = torch.is_grad_enabled() and (trained or any(x.requires_grad for x in tensors))
        shapes = tuple((x.shape, x.dtype, grad and x.requires_grad) for x in tensors)
        key = (self._name, who, trained and grad, grad, shapes)
        if key not in self._records:
            self._records[key] = self._measure(leaves, structure, grad)
        record = self._records[key]
        if not grad:
            with torch.no_grad():
                self._meter.flops += record.forward_flops
                self._meter.touch(record.forward_bytes)
                return tree_unflatten(_made(record), record.structure)
        anchor = torch.empty(0, device=META, requires_grad=True)  # as the weights would, lets the outputs have gradient
        outputs = _Call.apply(self._meter, record, anchor, *tensors)
        return tree_unflatten(list(outputs), record.structure)

    def _measure(self, leaves: list[Any], structure: Any, grad: bool) -> Record:
        meter = self._meter
        before = meter.flops, meter.peak
        inputs = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in leaves]
        args, kwargs = tree_unflatten(inputs, structure)
        start, meter.peak, meter.flops = meter.live, meter.live, 0
        with torch.set_grad_enabled(grad):
            outputs, out_structure = tree_flatten(self._forward(*args, **kwargs))
        made = [(x.shape, x.dtype) for x in outputs]
        record = Record(made, out_structure, meter.flops, meter.peak - start)
        if grad:
            kept = max(0, meter.live - start - sum(x.numel() * x.element_size() for x in outputs))
            wanted = [x for x in outputs if x.requires_grad]
            gradients = [torch.empty_like(x) for x in wanted]
            start, meter.peak, meter.flops = meter.live, meter.live, 0
            torch.autograd.backward(wanted, gradients)
            record = Record(
                made, out_structure, record.forward_flops, record.forward_bytes, kept, meter.flops, meter.peak - start
            )
            del wanted, gradients
        del outputs, inputs, args, kwargs
        meter.flops, meter.peak = before
        return record


def _made(record: Record) -> list[Tensor]:
    return [torch.empty(shape, dtype=dtype, device=META) for shape, dtype in record.outputs]


class _Call(torch.autograd.Function):
    """A block's forward and backward pass by its record."""

    @staticmethod
    def forward(ctx: Any, meter: Meter, record: Record, anchor: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Account for the forward pass; keep what the backward pass needs."""
        meter.flops += record.forward_flops
        meter.touch(record.forward_bytes)
        ctx.meter, ctx.record = meter, record
        ctx.save_for_backward(torch.empty(record.kept_bytes, dtype=torch.uint8, device=META), *inputs)
        return tuple(_made(record))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Account for the backward pass; the weights' own gradients are there already."""
        ctx.meter.flops += ctx.record.backward_flops
        ctx.meter.touch(ctx.record.backward_bytes)
        _, *inputs = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        return None, None, None, *(torch.empty_like(x) if w else None for x, w in zip(inputs, wanted, strict=True))
