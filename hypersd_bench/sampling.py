"""How a few-step model must be sampled, as a value that travels with its weights.

Published checkpoints carry their contract in the catalogue; every LoRA exported by ``distill`` carries it inside the
safetensors metadata, so that nobody has to be told the scheduler, the timesteps or the guidance.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypersd_bench.errors import InputError, unknown_name

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

METADATA_KEY = "hypersd_bench.sampler"
CARD_KEY = "hypersd_bench.card"  # metadata of files that ``distill`` wrote
NUM_TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class SamplerContract:
    """The one right way to sample a model.

    scheduler: a diffusers class name. settings: its config, over the base's own. timesteps: for each supported step
    count the timesteps from noisy to clean; a step count that is not a key is refused. guidance_scale: the usual form
    (0 and 1 mean none). eta: what the scheduler's step takes, or None. lora_scale: how strongly a LoRA is applied.
    embedded_guidance: for a UNet that is told w, the g = 1 + w it is sampled with, instead of guidance proper.
    shifted_timestep: for a UNet that is told t * shifted_timestep / 1000 instead of the scheduler's t (NitroFusion,
    arXiv 2412.02030); its eps, too, belongs to the timestep that it is told. negative_prompt: what guidance leads away
    from; empty: the base's unconditional input.
    """

    scheduler: str
    timesteps: Mapping[int, tuple[int, ...]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    guidance_scale: float = 0.0
    eta: float | None = None
    lora_scale: float = 1.0
    prediction_type: str = "epsilon"
    embedded_guidance: float | None = None
    shifted_timestep: int | None = None
    negative_prompt: str = ""

    def __post_init__(self) -> None:
        if self.embedded_guidance is not None and self.guidance_scale > 1:
            raise InputError(f"a sampler contract can't have both guidance_scale {self.guidance_scale:g} and "
                             f"embedded_guidance {self.embedded_guidance:g}; drop one of them")  # fmt: skip
        if self.negative_prompt and self.guidance_scale <= 1:
            raise InputError(f"a negative prompt needs guidance_scale above 1, not {self.guidance_scale:g}: without "
                             "guidance nothing reads it")  # fmt: skip

    def require_steps(self, steps: int, model: str) -> None:
        """Raise InputError naming the supported step counts unless ``steps`` is one of them."""
        if steps not in self.timesteps:
            supported = ", ".join(str(count) for count in sorted(self.timesteps))
            raise InputError(f"{model} can't be sampled in {steps} steps: its weights were made for {supported}")

    def make_scheduler(self, base_config: Mapping[str, Any]) -> SchedulerMixin:
        """Build the scheduler on the base's noise schedule (``pipe.scheduler.config``)."""
        kept = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
        config = {key: base_config[key] for key in kept if key in base_config}
        scheduler: SchedulerMixin = scheduler_class(self.scheduler)(
            **config, **{"prediction_type": self.prediction_type, **self.settings}
        )
        return scheduler

    def told_timestep(self, t: Any) -> Any:
        """What the UNet is told at the scheduler's timestep ``t``."""
        return t if self.shifted_timestep is None else t * self.shifted_timestep // NUM_TRAIN_TIMESTEPS

    @property
    def spacing(self) -> str:
        """The rule that all of its timesteps follow (``trailing``, ``skipping``); empty when they follow none."""
        fits = (n for n, rule in SPACINGS.items() if all(ts == rule(count) for count, ts in self.timesteps.items()))
        return next(fits, "")

    def stretched(self, steps: int) -> SamplerContract:
        """The contract with a step count that the weights were not made for, by its own rule of spacing."""
        if steps in self.timesteps:
            return self
        if not self.spacing:
            raise InputError(f"timesteps {list(self.timesteps.values())} follow no rule that gives {steps} steps; "
                             "say them in the contract")  # fmt: skip
        return replace(self, timesteps={**self.timesteps, steps: SPACINGS[self.spacing](steps)})

    def set_timesteps(self, scheduler: Any, steps: int, model: str = "this model") -> None:
        """Set exactly the contract's timesteps; a scheduler that disagrees is an error, not a surprise."""
        self.require_steps(steps, model)
        wanted = list(self.timesteps[steps])
        if self.takes_timesteps:
            scheduler.set_timesteps(timesteps=wanted)
        else:
            scheduler.set_timesteps(steps)
        got = [round(float(t)) for t in scheduler.timesteps]
        if got != wanted:
            raise InputError(f"{model}: {self.scheduler} gives timesteps {got}, its contract says {wanted}")
        if self.shifted_timestep is not None:
            scheduler.set_begin_index(0)  # it steps from timesteps told, which are none of its own

    @property
    def takes_timesteps(self) -> bool:
        """Whether the scheduler is told timesteps, and not only how many there are."""
        return self.scheduler in ("LCMScheduler", "TCDScheduler")

    def to_json(self) -> str:
        """One line of JSON, for safetensors metadata and manifests.

        Without a negative prompt it does not name one: so runs made before there was such a field go on.
        """
        fields = asdict(self)
        if not self.negative_prompt:
            del fields["negative_prompt"]
        return json.dumps(fields, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> SamplerContract:
        """Read a contract back; raises InputError when it is none."""
        try:
            raw = json.loads(text)
            timesteps = {int(steps): tuple(int(t) for t in ts) for steps, ts in raw.pop("timesteps").items()}
            return cls(timesteps=timesteps, **raw)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"not a sampler contract: {error}") from error


def trailing(steps: int) -> tuple[int, ...]:
    """DDIM "trailing" timesteps: round(1000 - i 1000/N) - 1 for i = 0 .. N-1."""
    return tuple(round(NUM_TRAIN_TIMESTEPS - i * NUM_TRAIN_TIMESTEPS / steps) - 1 for i in range(steps))


def skipping(steps: int, grid: int = 50) -> tuple[int, ...]:
    """The timesteps LCMScheduler and TCDScheduler choose: evenly spaced indices of a ``grid``-point solver grid."""
    skip = NUM_TRAIN_TIMESTEPS // grid
    points = [skip * (i + 1) - 1 for i in range(grid)][::-1]
    return tuple(points[int(i * grid / steps)] for i in range(steps))


SPACINGS: dict[str, Callable[[int], tuple[int, ...]]] = {"trailing": trailing, "skipping": skipping}


def ddim_trailing(steps: tuple[int, ...], guidance_scale: float = 0.0) -> SamplerContract:
    """DDIM, eta 0, trailing timesteps, last step to abar_0: Hyper-SD's per-step LoRAs and multi-step teachers."""
    return SamplerContract(
        scheduler="DDIMScheduler",
        settings={"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": False},
        timesteps={count: trailing(count) for count in steps},
        guidance_scale=guidance_scale,
        eta=0.0,
    )


def euler_trailing(steps: tuple[int, ...]) -> SamplerContract:
    """Euler, trailing timesteps: SDXL-Lightning."""
    return SamplerContract(
        scheduler="EulerDiscreteScheduler",
        settings={"timestep_spacing": "trailing"},
        timesteps={count: trailing(count) for count in steps},
    )


def lcm(steps: tuple[int, ...], embedded_guidance: float | None = None) -> SamplerContract:
    """LCMScheduler on its 50-point grid: consistency prediction, then re-noising; full UNets are told w = g - 1."""
    return SamplerContract(
        scheduler="LCMScheduler",
        timesteps={count: skipping(count) for count in steps},
        embedded_guidance=embedded_guidance,
    )


def tcd(steps: tuple[int, ...], eta: float = 0.3) -> SamplerContract:
    """TCDScheduler on its 50-point grid with the stochastic parameter gamma = ``eta``."""
    return SamplerContract(scheduler="TCDScheduler", timesteps={count: skipping(count) for count in steps}, eta=eta)


def timesteps_of(contract: SamplerContract, steps: int) -> tuple[int, ...]:
    """The timesteps that a contract's scheduler chooses by its own settings."""
    scheduler: Any = contract.make_scheduler({})
    try:
        scheduler.set_timesteps(steps)
    except ValueError as error:
        raise InputError(f"{contract.scheduler} can't take {steps} steps: {error}") from error
    return tuple(round(float(t)) for t in scheduler.timesteps)


def scheduler_class(name: str) -> type[SchedulerMixin]:
    """The scheduler class of a name: one of diffusers', or PeRFlow's, which diffusers lacks."""
    import diffusers

    if name == "PeRFlowScheduler":
        from hypersd_bench.perflow import PeRFlowScheduler

        own: type[SchedulerMixin] = PeRFlowScheduler
        return own
    found = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if found is None:
        known = [known for known in dir(diffusers) if known.endswith("Scheduler") and not known.startswith("Flax")]
        raise unknown_name("scheduler", name, [*known, "PeRFlowScheduler"])
    scheduler: type[SchedulerMixin] = found
    return scheduler


def read_contract(path: Path) -> SamplerContract:
    """Read the contract inside a safetensors file; raises InputError for a broken file or one without a contract."""
    metadata = read_safetensors_metadata(path)
    if METADATA_KEY not in metadata:
        raise InputError(f"{path} carries no sampler contract; say how to sample it with --contract")
    return SamplerContract.from_json(metadata[METADATA_KEY])


def read_card(file: Path) -> dict[str, Any]:
    """What ``distill`` wrote into a file about its making; empty for a file from elsewhere."""
    try:
        card = json.loads(read_safetensors_metadata(file).get(CARD_KEY, "{}"))
    except ValueError:
        card = None
    if not isinstance(card, dict):
        raise InputError(f"{file}: its {CARD_KEY} is no JSON object; export it again")
    return card


def read_safetensors_metadata(path: Path) -> dict[str, str]:
    """Read a safetensors header's metadata; a missing, truncated or foreign file raises InputError."""
    return dict(read_safetensors_header(path).get("__metadata__") or {})


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """Read a safetensors file's header, by tensor name; a missing, truncated or foreign file raises InputError."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header_length = int.from_bytes(file.read(8), "little")
            if not 0 < header_length <= size - 8:
                raise ValueError("header length does not fit the file")
            header: dict[str, Any] = json.loads(file.read(header_length))
        end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
        if 8 + header_length + end != size:
            raise ValueError(f"{size} bytes where its header announces {8 + header_length + end}: truncated?")
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a whole safetensors file ({error}); download or export it again") from error
    return header
