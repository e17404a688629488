"""Latents and prompt embeddings kept on disk, so that a long training encodes nothing twice.

A cache is a folder named by a hash of everything its content depends on: the models' weights, the preprocessing, the
samples. Its shards are safetensors files that appear whole or not at all, so a build that was stopped goes on where it
was. What belongs to another model or other data is never read by mistake: it is refused, with the reason.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from distill.sources.buckets import Bucket
from distill.sources.encoding import Embeddings, Encoder
from distill.sources.sizes import INDEX_BYTES, VALUE_BYTES, rows_per_shard
from hypersd_bench.errors import InputError, unknown_name
from hypersd_bench.store import write_bytes, write_json

FORMAT = 1  # raised whenever the same content would be stored in another way
OPEN_SHARDS = 64
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class CacheFolder:
    """Shards of one content.

    identity: what the content depends on, by the words a user would use; two caches with the same are the same.
    """

    def __init__(self, root: Path, kind: str, identity: Mapping[str, Any], beside_others: bool = False) -> None:
        self.identity = {"format": FORMAT, **json.loads(json.dumps(identity))}
        key = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]
        self.path = root / f"{kind}-{key}"
        manifest = self.path / "manifest.json"
        if manifest.exists():
            self._check(_read_manifest(manifest), manifest.parent)
        else:
            if not beside_others:
                self._refuse_others(root, kind)
            write_json(manifest, self.identity)
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._lock = Lock()

    def file(self, shard: str) -> Path:
        """Where a shard lies."""
        return self.path / f"{shard}.safetensors"

    def write(self, shard: str, tensors: Mapping[str, Tensor], notes: Any = None) -> None:
        """Add a shard, whole."""
        content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_bytes(self.file(shard), save(content, {"notes": json.dumps(notes)}))

    def notes(self, shard: str) -> Any:
        """What was noted beside a shard."""
        return json.loads(self._handle(shard).metadata()["notes"])

    def tensor(self, shard: str, name: str) -> Tensor:
        """A whole tensor of a shard."""
        tensor: Tensor = self._handle(shard).get_tensor(name)
        return tensor

    def row(self, shard: str, name: str, row: int) -> Tensor:
        """One row of a tensor of a shard, copied from the mapped file."""
        part: Tensor = self._handle(shard).get_slice(name)[row : row + 1]
        return part[0]

    def _handle(self, shard: str) -> Any:
        with self._lock:
            if shard not in self._open:
                try:
                    self._open[shard] = safe_open(self.file(shard), "pt")
                except (SafetensorError, OSError) as error:
                    raise InputError(f"cache shard {self.file(shard)} is damaged; delete it and start again") from error
                if len(self._open) > OPEN_SHARDS:
                    self._open.popitem(last=False)
            self._open.move_to_end(shard)
            return self._open[shard]

    def _check(self, stored: Mapping[str, Any], folder: Path) -> None:
        if stored != self.identity:
            raise InputError(f"cache {folder} is stale: {_difference(stored, self.identity)}; delete that folder")

    def _refuse_others(self, root: Path, kind: str) -> None:
        others = [_read_manifest(path) for path in sorted(root.glob(f"{kind}-*/manifest.json"))]
        if others:
            nearest = min(others, key=lambda stored: len(_differing(stored, self.identity)))
            raise InputError(
                f"the {kind} cache in {root} is stale: {_difference(nearest, self.identity)}; give another cache "
                f"folder, or delete {root / kind}-*"
            )


class Where(NamedTuple):
    """A row of a shard."""

    shard: str
    row: int


class Shard(NamedTuple):
    """A shard that a latent cache is to hold: some images of one bucket."""

    name: str
    bucket: Bucket
    indices: NDArray[np.int64]


class CachedLatent(NamedTuple):
    """A stored image. latent: (C, h, w) scaled, as stored. time_ids: (6,) int32."""

    latent: Tensor
    time_ids: Tensor


class Encoded(NamedTuple):
    """Some encoded images of a shard. indices: (n,). latents: (n, C, h, w). time_ids: (n, 6)."""

    indices: list[int]
    latents: Tensor
    time_ids: Tensor


class LatentCache:
    """The latents of a data set. Images that could not be used are noted with them, with the reason.

    groups: the images of each bucket. channels, factor: of a latent, and pixels to one of its sides.
    """

    def __init__(
        self,
        folder: CacheFolder,
        groups: Mapping[Bucket, NDArray[np.int64]],
        channels: int,
        factor: int,
        precision: str,
    ):
        self.folder, self._dtype = folder, dtype_of(precision)
        self._shards = list(_latent_shards(groups, channels, factor, precision))
        self._where: dict[int, Where] = {}
        self.unusable: dict[int, tuple[str, str]] = {}
        for shard in self._shards:
            if folder.file(shard.name).exists():
                self._learn(shard.name)

    def build(self, encode: Callable[[Shard], tuple[Iterator[Encoded], dict[int, tuple[str, str]]]]) -> None:
        """Encode the shards that are missing.

        ``encode`` gives a shard's images in parts, and fills a dictionary of those it had to leave out.
        """
        missing = [shard for shard in self._shards if not self.folder.file(shard.name).exists()]
        if not missing:
            return
        total = sum(len(shard.indices) for shard in self._shards)
        left = sum(len(shard.indices) for shard in missing)
        with tqdm(total=total, initial=total - left, desc="latents", unit="img") as bar:
            for shard in missing:
                encoded, unusable = encode(shard)
                parts = []
                for part in encoded:
                    parts.append(part._replace(latents=part.latents.to("cpu", self._dtype)))
                    bar.update(len(part.indices))
                bar.update(len(unusable))
                self._write(shard, parts, unusable)

    def __contains__(self, index: int) -> bool:
        return index in self._where

    def get(self, index: int) -> CachedLatent:
        """A stored image."""
        shard, row = self._where[index]
        return CachedLatent(self.folder.row(shard, "latents", row), self.folder.row(shard, "time_ids", row))

    def _write(self, shard: Shard, parts: Sequence[Encoded], unusable: dict[int, tuple[str, str]]) -> None:
        tensors = {"index": torch.tensor([i for part in parts for i in part.indices], dtype=torch.int64)}
        if parts:
            tensors["latents"] = torch.cat([part.latents for part in parts])
            tensors["time_ids"] = torch.cat([part.time_ids for part in parts]).to(torch.int32)
        self.folder.write(shard.name, tensors, [[i, *reason] for i, reason in sorted(unusable.items())])
        self._learn(shard.name)

    def _learn(self, shard: str) -> None:
        self._where |= {int(i): Where(shard, row) for row, i in enumerate(self.folder.tensor(shard, "index"))}
        self.unusable |= {i: (kind, reason) for i, kind, reason in self.folder.notes(shard)}


class PromptCache:
    """The embeddings of distinct prompts."""

    def __init__(self, folder: CacheFolder, prompts: Sequence[str], encoder: Encoder, precision: str) -> None:
        self.folder, self._dtype = folder, dtype_of(precision)
        self._pooled = encoder.sdxl
        width = encoder.empty.text.shape[1] * encoder.empty.text.shape[2]
        pooled = 0 if encoder.empty.pooled is None else encoder.empty.pooled.shape[1]
        self._per_shard = rows_per_shard((width + pooled) * VALUE_BYTES[precision])
        self._row = {prompt: i for i, prompt in enumerate(prompts)}
        self._build(prompts, encoder)

    def get(self, prompts: Sequence[str]) -> Embeddings:
        """Stored embeddings, as stored, on the CPU."""
        places = [divmod(self._row[prompt], self._per_shard) for prompt in prompts]
        text = torch.stack([self.folder.row(_prompt_shard(k), "text", row) for k, row in places])
        if not self._pooled:
            return Embeddings(text)
        return Embeddings(text, torch.stack([self.folder.row(_prompt_shard(k), "pooled", row) for k, row in places]))

    def _build(self, prompts: Sequence[str], encoder: Encoder) -> None:
        shards = {_prompt_shard(i // self._per_shard): prompts[i : i + self._per_shard]
                  for i in range(0, len(prompts), self._per_shard)}  # fmt: skip
        missing = {name: texts for name, texts in shards.items() if not self.folder.file(name).exists()}
        for name in shards.keys() - missing.keys():
            encoder.too_long.update(self.folder.notes(name))
        left = sum(map(len, missing.values()))
        with tqdm(
            total=len(prompts), initial=len(prompts) - left, desc="prompts", unit="prompt", disable=not left
        ) as bar:
            for name, texts in missing.items():
                parts = []
                for i in range(0, len(texts), encoder.prompt_batch):
                    part = encoder.prompts(texts[i : i + encoder.prompt_batch])
                    pooled = None if part.pooled is None else part.pooled.to("cpu", self._dtype)
                    parts.append(Embeddings(part.text.to("cpu", self._dtype), pooled))
                    bar.update(len(part.text))
                tensors = {"text": torch.cat([part.text for part in parts])}
                if self._pooled:
                    tensors["pooled"] = torch.cat([part.pooled for part in parts if part.pooled is not None])
                self.folder.write(name, tensors, [text for text in texts if text in encoder.too_long])


def dtype_of(precision: str) -> torch.dtype:
    """The stored type of a precision by name."""
    if precision not in DTYPES:
        raise unknown_name("cache precision", precision, DTYPES)
    return DTYPES[precision]


def _latent_shards(
    groups: Mapping[Bucket, NDArray[np.int64]], channels: int, factor: int, precision: str
) -> Iterator[Shard]:
    for bucket, indices in groups.items():
        values = channels * (bucket.width // factor) * (bucket.height // factor)
        count = rows_per_shard(values * VALUE_BYTES[precision] + INDEX_BYTES)
        ordered = np.sort(indices)
        for k, first in enumerate(range(0, len(ordered), count)):
            yield Shard(f"{bucket}-{k:05d}", bucket, ordered[first : first + count])


def _prompt_shard(k: int) -> str:
    return f"{k:05d}"


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        stored: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"cache {path.parent} has a damaged manifest; delete that folder") from error
    return stored


def _differing(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    return [name for name in {**wanted, **stored} if stored.get(name) != wanted.get(name)]


def _difference(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    def show(value: Any) -> str:
        if value is None:
            return "unset"
        return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else str(value)

    names = _differing(stored, wanted)
    return "; ".join(f"its {name} is {show(stored.get(name))}, not {show(wanted.get(name))}" for name in names)
