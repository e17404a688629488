"""Presets: published results as data, with their whole protocol and the run that measures the same.

A preset is a YAML file of ``presets/``, called by the file's name. It is a table of a paper (``Preset``), or a user
study's rates (``Study``).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hypersd_bench import registry
from hypersd_bench.catalog.spec import ModelSpec
from hypersd_bench.errors import InputError, unknown_name
from hypersd_bench.runner.spec import RunSpec
from hypersd_bench.yaml_file import read_yaml

FOLDER = Path(__file__).parent / "presets"
CONTRACTS = Path(__file__).parent / "contracts"  # sampler contracts that a preset's spec names

Steps = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Strict):
    """Where the numbers are published; arxiv is empty for what is no paper."""

    paper: str = Field(min_length=1)
    arxiv: str
    table: str = Field(min_length=1)

    def __str__(self) -> str:
        return ", ".join(part for part in (self.paper, f"arXiv {self.arxiv}" if self.arxiv else "", self.table) if part)


class Protocol(_Strict):
    """How the published numbers were measured, in words.

    prompts_listed: whether the very list of prompts is published, and is the run's. prompts_file: how to get that list
    where it has to be given with ``--prompts``. prompts_sha256: of its ids and texts (``PromptSet.sha256``). count:
    images of each model; None: unknown. pixels: width and height of the images. reference_count: images of the
    reference; None: unknown, or the reference is statistics. reference_features: what the source's statistics of its
    reference, a .npz file, are of. unstated: what the source does not say. differs: what the source does and our run
    does not.
    """

    prompts: str
    prompts_listed: bool
    prompts_file: str = ""
    prompts_sha256: str = ""
    count: int | None = Field(ge=1)
    resolution: str
    pixels: int = Field(ge=1)
    sampler: str
    guidance: str
    reference: str = ""
    reference_count: int | None = Field(None, ge=1)
    reference_features: str = ""
    unstated: tuple[str, ...]
    differs: tuple[str, ...] = ()


class Column(_Strict):
    """A column of the table.

    metric: the protocol of ours that measures the same, or None, with the reason. assumption: what is taken for granted
    in saying so. digits: decimals that are printed. scale: a published number times it is in our unit. confirmed:
    whether a primary source was read.
    """

    metric: str | None
    reason: str = ""
    assumption: str = ""
    digits: int = Field(ge=0)
    scale: float = Field(1.0, gt=0)
    confirmed: bool = True

    @model_validator(mode="after")
    def _has_a_reason(self) -> Column:
        if (self.metric is None) != bool(self.reason):
            raise ValueError("a column has either a metric of ours, or the reason why it has none")
        return self


class Row(_Strict):
    """A model of the table, by our catalogue's name, and its values by column.

    windows: the lowest and highest value that the source accepts, where it says so. forced: the step count or sampler
    is none that the catalogue's entry was made for. pixels: sizes that its images may have, where they are not the
    protocol's; several where the source does not say which of them it took.
    """

    model: str
    steps: Steps
    values: Mapping[str, float] = Field(min_length=1)
    windows: Mapping[str, tuple[float, float]] = Field(default_factory=dict)
    forced: bool = False
    confirmed: bool = True
    pixels: tuple[Annotated[int, Field(ge=1)], ...] = ()

    @property
    def label(self) -> str:
        """``model@steps``, as a run calls it."""
        return f"{self.model}@{self.steps}"


class Preset(_Strict):
    """A published table, and the run that measures the same: ``spec`` has the keys of a spec file."""

    id: str
    title: str
    source: Source
    protocol: Protocol
    spec: RunSpec
    columns: Mapping[str, Column] = Field(min_length=1)
    rows: tuple[Row, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _agrees_with_its_spec(self) -> Preset:
        run = [f"{ref.name}@{steps}" for ref in self.spec.models for steps in ref.steps or self.spec.steps]
        if sorted(run) != sorted(row.label for row in self.rows):
            raise ValueError("rows and spec.models are not the same models and step counts")
        if set(self.spec.metrics) != {column.metric for column in self.columns.values() if column.metric}:
            raise ValueError("columns and spec.metrics are not the same metrics")
        unknown = {name for row in self.rows for name in (*row.values, *row.windows)} - set(self.columns)
        if unknown:
            raise ValueError(f"rows have values of no column: {', '.join(sorted(unknown))}")
        return self

    @property
    def labels(self) -> list[str]:
        """The models' names, in the table's order."""
        return list(dict.fromkeys(row.model for row in self.rows))


class StudyRow(_Strict):
    """How often people preferred the first model, in percent. base_b: the second's base, where it is another."""

    model_a: str
    steps_a: Steps
    model_b: str
    steps_b: Steps
    preferred: float = Field(ge=0, le=100)
    base_b: str = ""
    forced: bool = False


class Study(_Strict):
    """A published user study. unstated: what the source does not say of it. digits: decimals of a percentage."""

    id: str
    title: str
    source: Source
    base: str
    confirmed: bool = True
    note: str = ""
    unstated: tuple[str, ...]
    digits: int = Field(ge=0)
    rows: tuple[StudyRow, ...] = Field(min_length=1)


def preset_ids() -> list[str]:
    """The names of all presets."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


@cache
def load_preset(name: str) -> Preset | Study:
    """Read a preset by name; InputError names the nearest for an unknown one, and what is wrong with a broken one."""
    if name not in preset_ids():
        raise unknown_name("preset", name, preset_ids())
    path = FOLDER / f"{name}.yaml"
    raw = read_yaml(path, "preset")
    kind: type[Preset] | type[Study] = Preset if isinstance(raw, dict) and "spec" in raw else Study
    try:
        return kind.model_validate({**raw, "id": name})
    except (ValidationError, TypeError) as error:
        raise InputError(f"preset {path.name}: {_first_line(error)}") from error


def run_name(preset: Preset) -> str:
    """The name of a preset's run, in its manifest and as its folder."""
    return f"reproduce-{preset.id}"


def catalogue_entries(base: str, label: str, steps: int, forced: bool = False) -> list[ModelSpec]:
    """The catalogue's checkpoints of a family for a step count; forced: of the family, whatever their step counts."""
    return [
        model
        for model in _catalogue()
        if model.base == base and label in (model.family, model.name) and (forced or steps in model.contract.timesteps)
    ]


@cache
def _catalogue() -> tuple[ModelSpec, ...]:
    return tuple(model for row in registry.rows("family") for model in registry.resolve("family", row)())


def _first_line(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    problem: Any = error.errors()[0]
    return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}".lstrip(": ")
