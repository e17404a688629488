"""The verb ``distill export``: a run's students in the form somebody needs, each loaded again before it counts.

diffusers   the LoRA under diffusers' keys, cast
kohya       the LoRA under kohya's and ComfyUI's keys, cast
fuse        the base's UNet with the LoRA fused in, as a diffusers UNet folder with ``sampler.json`` beside the weights

Every file carries its sampler contract and card in its metadata. What was written is loaded into a fresh pipeline and
has to see the same noise as the run's own file in another one; only then it gets its name.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

from distill.formats import is_sdxl, kohya_metadata, model_spec, tensors_sha256, to_kohya
from distill.settings import MANIFEST
from distill.unet_folder import MAX_SHARD_SIZE, SAMPLER_FILE, move, unfinished, write_unet
from hypersd_bench.catalog.local import weight_files
from hypersd_bench.errors import HypersdBenchError, InputError, first_line, unknown_name
from hypersd_bench.pipelines import base_folder, load_base, load_unet
from hypersd_bench.provenance import sha256
from hypersd_bench.sampling import CARD_KEY, METADATA_KEY, SamplerContract, read_contract, read_safetensors_metadata
from hypersd_bench.store import write_bytes

FORMS = ("diffusers", "kohya")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_TORCH_NAMES = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}  # float16 means fp16
# Of the largest predicted noise. On the miniature, rounding its fused weights moves that by 1e-4, 3e-3 and 4e-7;
# the margin is for deeper UNets, and in fp32 for a GPU's faster convolutions.
TOLERANCES = {"fp16": 0.01, "bf16": 0.05, "fp32": 1e-3}
PROBED_TIMESTEPS = (999, 749, 499, 249, 19)
TOKENS = 77  # of the probe's random text; no text encoder is asked


@dataclass(frozen=True)
class Exported:
    """One exported student.

    source: the run's file it was made from. form: ``diffusers``, ``kohya`` or ``unet``. size: bytes of weights.
    largest_difference: of the predicted noise from the source's, relative to the largest noise.
    """

    source: Path
    path: Path
    form: str
    dtype: str
    steps: tuple[int, ...]
    size: int
    largest_difference: float


@dataclass(frozen=True)
class _Student:
    """A student as the run left it: a LoRA file, or the folder of a whole UNet."""

    path: Path
    contract: SamplerContract
    card: Mapping[str, Any]

    @property
    def is_unet(self) -> bool:
        return self.path.is_dir()

    @classmethod
    def read(cls, path: Path, recorded_sha256: str) -> _Student:
        """Read what a student says of itself; raises InputError when it is gone, broken or not what was trained."""
        if not path.exists():
            raise InputError(f"{path} is gone though {MANIFEST} names it; restore it, or train its stage again")
        files = weight_files(path)
        if not files:
            raise InputError(f"{path} holds no safetensors weights; train its stage again")
        file = files[0]
        if recorded_sha256 and sha256(file) != recorded_sha256:
            raise InputError(f"{file} is not the file this run wrote (its SHA-256 differs); restore or retrain it")
        metadata = read_safetensors_metadata(file)
        return cls(path, read_contract(file), json.loads(metadata.get(CARD_KEY, "{}")))


def export_run(
    folder: Path,
    *,
    form: str = "diffusers",
    dtype: str = "fp16",
    fuse: bool = False,
    files: Sequence[str] = (),
    out: Path | None = None,
    device: str | torch.device = "cpu",
) -> list[Exported]:
    """Export a run's finished students, or those named in ``files``, to ``out`` (default: the run's ``export``).

    Raises InputError for bad input, before anything is written, and HypersdBenchError when an exported file does not
    behave as what was trained; that file is removed.
    """
    dtype = _TORCH_NAMES.get(dtype, dtype)
    _check_options(form, dtype, fuse)
    manifest = _read_manifest(folder)
    students = _choose(folder, manifest, files)
    for student in students:
        if student.is_unet and form == "kohya":
            raise InputError(f"{student.path} is a whole UNet, which no LoRA format can hold; use --format diffusers")
    base = manifest["settings"]["base"]
    _check_base(base, manifest, students)
    target = out or folder / "export"
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file; give a folder with --out")
    created = str(manifest.get("provenance", {}).get("created", ""))
    references = _references(base, students, device)
    writer = _Writer(base, form, dtype, fuse, target, created, device)
    return [writer.export(student, reference) for student, reference in zip(students, references, strict=True)]


class _Writer:
    """Writes students in one form and dtype; what does not hold never gets its name."""

    def __init__(
        self, base: str, form: str, dtype: str, fuse: bool, out: Path, created: str, device: str | torch.device
    ) -> None:
        self._base, self._form, self._dtype, self._fuse = base, form, dtype, fuse
        self._out, self._created, self._device = out, created, device

    def export(self, student: _Student, reference: Tensor) -> Exported:
        whole = student.is_unet or self._fuse
        name = student.path.name if student.is_unet else student.path.stem
        if whole:
            target = self._out / f"{name.removesuffix('-unet')}-unet-{self._dtype}"
            if target.exists() and not (target / SAMPLER_FILE).is_file():
                raise InputError(f"{target} exists and is no exported UNet; choose another --out")
        else:
            target = self._out / f"{name}-{self._form}-{self._dtype}.safetensors"
        with unfinished(target) as partial:
            written = partial / target.name
            if whole:
                self._write_unet(written, student)
                found = _predict_unet(written, self._device)
            else:
                self._write_lora(written, student)
                found = _predict_lora(self._base, written, student.contract, self._device)
            difference = float((found - reference).abs().max() / reference.abs().max())
            if not difference <= TOLERANCES[self._dtype]:  # not >, which lets NaN through
                raise HypersdBenchError(
                    f"{target} was removed: loaded again it is off from {student.path.name} by {difference:.1%}; "
                    f"try --dtype fp32"
                )
            size = sum(f.stat().st_size for f in [written, *written.glob("*")] if f.suffix == ".safetensors")
            move(written, target)
        return Exported(
            source=student.path, path=target, form="unet" if whole else self._form, dtype=self._dtype,
            steps=tuple(sorted(student.contract.timesteps)), size=size, largest_difference=difference,
        )  # fmt: skip

    def _write_lora(self, path: Path, student: _Student) -> None:
        lora = {key: value.to(DTYPES[self._dtype]) for key, value in load_file(student.path).items()}
        config = _unet_config(self._base)
        tensors = to_kohya(lora, config) if self._form == "kohya" else lora
        metadata = self._metadata(path.stem, student, student.contract, self._form, config)
        if self._form == "kohya":
            metadata |= kohya_metadata(path.stem, lora, config)
        metadata["modelspec.hash_sha256"] = tensors_sha256(tensors)
        write_bytes(path, to_safetensors(tensors, metadata=metadata))

    def _write_unet(self, folder: Path, student: _Student) -> None:
        """Write a diffusers UNet folder; fused at the contract's scale, after which there is none left to set."""
        contract = student.contract
        if student.is_unet:
            unet = load_unet(student.path, self._device)
        else:
            pipe = _with_lora(self._base, student.path, 1.0, self._device)
            pipe.fuse_lora(lora_scale=contract.lora_scale)
            pipe.unload_lora_weights()
            unet, contract = pipe.unet, replace(contract, lora_scale=1.0)
        metadata = self._metadata(folder.name, student, contract, "unet", unet.config)
        write_unet(folder, unet, unet.state_dict(), DTYPES[self._dtype], contract, metadata, MAX_SHARD_SIZE)

    def _metadata(
        self, title: str, student: _Student, contract: SamplerContract, form: str, unet_config: Mapping[str, Any]
    ) -> dict[str, str]:
        card = {**student.card, "exported_from": student.path.name, "format": form, "dtype": self._dtype}
        if form == "unet" and not student.is_unet:
            card["fused_lora_scale"] = student.contract.lora_scale
        vae = json.loads((base_folder(self._base) / "vae" / "config.json").read_text())
        side = unet_config["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
        return {
            "format": "pt",
            METADATA_KEY: contract.to_json(),
            CARD_KEY: json.dumps(card, sort_keys=True),
            **model_spec(title, unet_config, contract, form, side, self._created),
        }


def _check_options(form: str, dtype: str, fuse: bool) -> None:
    if form not in FORMS:
        raise unknown_name("format", form, FORMS)
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    if fuse and form == "kohya":
        raise InputError("--fuse writes a diffusers UNet folder, not kohya's format; leave out one of the two")


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        if not isinstance(manifest["settings"]["base"], str) or not all(s["file"] for s in manifest["stages"]):
            raise ValueError("it names no base, or a stage without a file")
        return manifest
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{folder} is no distillation (no {MANIFEST}); give the folder a distill run wrote") from None
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no whole manifest of a distillation ({error}); restore it") from error


def _choose(folder: Path, manifest: Mapping[str, Any], files: Sequence[str]) -> list[_Student]:
    """The finished stages' students: those named, or all but the intermediate ones (in folders of their own)."""
    finished = {stage["file"].rstrip("/"): str(stage.get("sha256", "")) for stage in manifest["stages"]}
    if not finished:
        raise InputError(f"{folder}: no stage of this run is finished yet; let it go on, then export")
    by_name = {alias: file for file in finished for alias in (file, file.removesuffix(".safetensors"))}
    for name in files:
        if name.rstrip("/") not in by_name:
            running = "" if manifest.get("state") == "done" else " (the run is not finished)"
            raise unknown_name("file", name, finished, f"{folder}{running}")
    chosen = [by_name[name.rstrip("/")] for name in files] or [file for file in finished if "/" not in file]
    if not chosen:
        raise InputError(
            f"{folder}: only intermediate stages are finished: {', '.join(finished)}; name one to export it"
        )
    return [_Student.read(folder / file, finished[file]) for file in dict.fromkeys(chosen)]


def _check_base(base: str, manifest: Mapping[str, Any], students: Sequence[_Student]) -> None:
    """The base has to be the very one that was trained on."""
    weights = sorted((base_folder(base) / "unet").glob("*.safetensors"))
    if not weights:
        raise InputError(f"base {base!r}: its unet folder holds no safetensors weights")
    found = sha256(weights[0])
    trained = {student.card.get("base_unet_sha256") for student in students}
    for wanted in {manifest["settings"].get("base_unet_sha256"), *trained} - {None}:
        if wanted != found:
            raise InputError(
                f"base {base!r} is not the one trained on: its UNet's SHA-256 is {found[:12]}..., not "
                f"{str(wanted)[:12]}...; restore that base"
            )


def _references(base: str, students: Sequence[_Student], device: str | torch.device) -> list[Tensor]:
    """What each student sees, its own file loaded into a fresh pipeline; one at a time, SDXL's are large."""
    return [
        _predict_unet(student.path, device)
        if student.is_unet
        else _predict_lora(base, student.path, student.contract, device)
        for student in students
    ]


def _predict_lora(base: str, path: Path, contract: SamplerContract, device: str | torch.device) -> Tensor:
    return _freeing(lambda: probe(_with_lora(base, path, contract.lora_scale, device).unet))


def _predict_unet(folder: Path, device: str | torch.device) -> Tensor:
    return _freeing(lambda: probe(load_unet(folder, device)))


def _freeing(predict: Callable[[], Tensor]) -> Tensor:
    result = predict()
    gc.collect()  # pipelines hold reference cycles, and the next one needs the memory
    return result


@torch.no_grad()
def probe(unet: UNet2DConditionModel) -> Tensor:
    """A UNet's outputs at several timesteps, on noise, text and sizes that depend on its config alone: (T, C, h, w)."""
    config, device = unet.config, unet.device
    rng = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(device)

    x = noise(1, config.in_channels, config.sample_size, config.sample_size)
    arguments: dict[str, Any] = {"encoder_hidden_states": noise(1, TOKENS, config.cross_attention_dim)}
    if is_sdxl(config):
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        sizes = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]], device=device)
        arguments["added_cond_kwargs"] = {"text_embeds": noise(1, pooled), "time_ids": sizes}
    if config.time_cond_proj_dim is not None:  # the guidance embedding of LCM's full UNets
        arguments["timestep_cond"] = noise(1, config.time_cond_proj_dim)
    outputs = [unet(x, torch.tensor([t], device=device), return_dict=False, **arguments)[0] for t in PROBED_TIMESTEPS]
    return torch.cat(outputs).float().cpu()


def _with_lora(base: str, path: Path, scale: float, device: str | torch.device) -> Any:
    """A fresh pipeline with a LoRA file loaded, not fused."""
    pipe: Any = load_base(base, device)
    try:
        pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name="student")
        pipe.set_adapters(["student"], [scale])
    except (OSError, ValueError, KeyError, IndexError, RuntimeError) as error:
        raise InputError(f"{path.name} does not load on base {base!r}: {first_line(error)}") from error
    return pipe


def _unet_config(base: str) -> dict[str, Any]:
    config: dict[str, Any] = UNet2DConditionModel.load_config(base_folder(base) / "unet", local_files_only=True)
    return config
