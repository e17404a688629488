"""RunSpec: what a benchmark run is asked to do, from a short YAML file, from flags, or from both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from hypersd_bench.errors import InputError, unknown_name
from hypersd_bench.yaml_file import read_yaml

Steps = Annotated[int, Field(ge=1, le=1000)]
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
Dtype = Literal["float32", "bfloat16", "float16"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Sampler(_Strict):
    """Another way to sample a model than its own contract: refused where it breaks the contract, unless forced."""

    scheduler: str | None = None
    spacing: str | None = (
        None  # timesteps by rule: trailing, skipping, or one of the scheduler's own (leading, linspace)
    )
    guidance_scale: float | None = None
    embedded_guidance: float | None = None
    eta: float | None = None
    lora_scale: float | None = None
    prediction_type: str | None = None
    negative_prompt: str | None = None


class ModelRef(_Strict):
    """A model to run: a family or a model of the catalogue by name, or a LoRA, a UNet or a ``distill`` folder by path.

    contract: how weights that carry no contract are sampled (``catalog.local.parse_contract``). revision: of the hub
    repository, a branch, tag or commit. dtype: another precision than the run's.
    """

    name: str
    path: Path | None = None
    steps: tuple[Steps, ...] | None = None  # None: the spec's own
    contract: str | None = None
    sampler: Sampler = Sampler()
    revision: str | None = None
    dtype: Dtype | None = None


class Timing(_Strict):
    """How cost is measured: ``repeats`` timed batches of ``batch_size`` after ``warmup`` untimed ones.

    rounds: the repeats are spread over this many passes through the models, every other one backwards, so that a
    machine that grows warm or busy slows all alike. throughput: whether larger batches are tried too, for images per
    second at the best. compile: time the UNet compiled by PyTorch.
    """

    batch_size: int = Field(1, ge=1)
    repeats: int = Field(10, ge=1)
    warmup: int = Field(3, ge=0)
    rounds: int = Field(2, ge=1)
    throughput: bool = True
    compile: bool = False


class Contrast(_Strict):
    """One line of an ablation: ``model`` minus ``against`` at the step counts named, by default all that both have."""

    name: str = Field(min_length=1)
    model: str
    against: str
    steps: Annotated[tuple[Steps, ...] | None, Field(min_length=1)] = None


def _read_model_ref(value: Any) -> Any:
    """Take ``teacher``, ``teacher@25``, ``teacher@25,50``, a path, or a mapping."""
    if not isinstance(value, str):
        return value
    name, at, steps = value.partition("@")
    if at and not steps.strip():
        raise InputError(f"model {value!r}: no step counts after @; write {name}@4, or {name} for the spec's own")
    ref: dict[str, Any] = {"name": name}
    if "/" in name or Path(name).suffix in WEIGHT_SUFFIXES:
        ref = {"name": Path(name).stem, "path": name}
    if steps:
        ref["steps"] = [part.strip() for part in steps.split(",")]
    return ref


class RunSpec(_Strict):
    """A whole run. Every field has a default but the models.

    base: whose models the catalogue gives: ``pocket``, ``sd15``, ``sd21``, ``sdxl``, a pipeline folder or a hub id.
    pipeline: a folder or hub id that stands in for that base's own pipeline: a copy on this disk, or a fine-tune.
    dtype: precision of UNet and text encoders; by default float32 on a CPU and for the miniature, else float16.
    prompts_file: the prompt set's file on this disk, instead of a download. selection: which prompts ``num_prompts``
    takes. batch_size: images made at once; by default as many as the free memory holds. force: run what breaks a
    model's contract, and record it. timing: how cost is measured; ``false``: not at all.
    """

    name: str = ""
    base: str = "pocket"
    pipeline: str | None = None
    dtype: Dtype | None = None
    models: tuple[Annotated[ModelRef, BeforeValidator(_read_model_ref)], ...] = Field(min_length=1)
    steps: tuple[Steps, ...] = Field((1, 2, 4, 8), min_length=1)
    prompts: str = "pocket/held-out"
    prompts_file: Path | None = None
    num_prompts: int | None = Field(None, ge=1)
    selection: Literal["first", "random"] = "first"
    replicates: int = Field(1, ge=1)
    seed: int = Field(0, ge=0)
    metrics: tuple[str, ...] = ()
    baseline: str | None = None  # what the others are compared with; None: the first model
    contrasts: tuple[Contrast, ...] = ()  # pairs of models that a page of results compares, beside the baseline
    reference: Path | None = None  # folder of images for set metrics; None: the metric's own, if it has one
    batch_size: int | None = Field(None, ge=1)
    force: bool = False
    timing: Annotated[Timing | None, BeforeValidator(lambda value: None if value is False else value)] = Timing()
    out: Path | None = None


def load_spec(path: Path | None, overrides: dict[str, Any]) -> RunSpec:
    """Read a YAML spec and lay the flags that were given over it; an unknown key raises InputError with the nearest."""
    raw = _read_yaml(path) if path else {}
    raw |= {key: value for key, value in overrides.items() if value is not None}
    where = str(path) if path else "the flags"
    if "models" not in raw:
        raise InputError(f"{where}: no models; give 'models:' in the spec or --models NAME,NAME")
    try:
        return RunSpec.model_validate(raw)
    except ValidationError as error:
        raise _first_problem(error, where) from None


def add_models(path: Path | None, flags: dict[str, Any], more: Sequence[str], contract: str | None) -> dict[str, Any]:
    """Flags with the models of ``--model`` after the others, and ``--contract`` for those that are paths.

    Beside a spec, whose paths are taken from where it lies, the flags' own, which are taken from here, become absolute.
    """
    refs = [_read_model_ref(model) for model in [*(flags.get("models") or ()), *more]]
    paths = [ref for ref in refs if "path" in ref]
    if contract and not paths:
        raise InputError("--contract is for a model given by its path (--model my.safetensors); there is none")
    for ref in paths:
        ref |= {"contract": contract} if contract else {}
        ref |= {"path": _absolute(ref["path"])} if path else {}
    if path:
        flags = flags | {name: _absolute(flags[name]) for name in ("prompts", "prompts_file", "pipeline", "reference")}
    if path and refs and not flags.get("models"):
        refs = [*_read_yaml(path).get("models", []), *refs]
    return flags | {"models": refs or None}


def _absolute(value: str | Path | None) -> str | None:
    """A path that is there as an absolute one; anything else as it is."""
    if value is None:
        return None
    return str(Path(value).resolve()) if Path(value).exists() else str(value)


def _read_yaml(path: Path) -> dict[str, Any]:
    raw = read_yaml(path, "spec")
    if not isinstance(raw, dict):
        raise InputError(f"spec {path} must be a mapping of settings (models:, steps:, prompts:, ...)")
    return {str(key): value for key, value in raw.items()}


def _first_problem(error: ValidationError, where: str) -> InputError:
    problems = error.errors()
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])  # a misspelt key is the cause
    location = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        owners: dict[str, type[BaseModel]] = {
            "models": ModelRef, "timing": Timing, "contrasts": Contrast, "sampler": Sampler,
        }  # fmt: skip
        owner = next((owners[part] for part in reversed(problem["loc"][:-1]) if part in owners), RunSpec)
        if owner is not RunSpec and problem["loc"][-1] in RunSpec.model_fields:
            return InputError(f"{where}: {location}: {problem['loc'][-1]!r} belongs at the top of the spec")
        return unknown_name("key", str(problem["loc"][-1]), owner.model_fields, where)
    given = problem["input"]
    said = f", not {given!r}" if isinstance(given, str | int | float) else ""
    return InputError(f"{where}: {location}: {problem['msg'][0].lower()}{problem['msg'][1:]}{said}")
