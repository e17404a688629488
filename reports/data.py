"""What the page, the tables and the figures show: one frozen value, printable as JSON. ``reports.read`` makes it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from hypersd_bench.contracts import MetricInfo
from metrics.comparison import is_trained_on
from metrics.tradeoff import CostName
from reports.pictures import NoiseRow, PromptRow
from reports.study import StudyData
from reports.training import Curve, Made

Mark = Literal["best", "level", ""]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A weights file of a model and the step counts it was sampled at; file is empty for the base itself.

    kind: ``base``, ``lora`` or ``unet``; empty where the run does not say.
    """

    file: str
    sha256: str
    kind: str
    steps: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Published:
    """A row of a published table: of another protocol than the run, and so never beside its numbers as an equal."""

    source: str
    protocol: str
    steps: int
    values: dict[str, float]


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the report and how it is drawn, everywhere alike. run: which of the report's runs it is of.

    is_reference: it competes with nobody, as the many-step teacher does (``_references``).
    """

    name: str
    label: str
    family: str
    steps: tuple[int, ...]
    trained_on: tuple[str, ...]
    license: str
    checkpoints: tuple[Checkpoint, ...]
    sampler: str
    published: tuple[Published, ...]
    run: int
    is_reference: bool
    colour: str
    shape: str

    def was_trained_on(self, metric: str) -> bool:
        """Whether the model was optimised for this metric, named by its id or by its family."""
        return is_trained_on(self.trained_on, metric)


@dataclass(frozen=True, slots=True)
class Cell:
    """One metric of one model at one step count; value is None with a reason when there is none.

    low and high are None where one prompt, or a set metric without features on disk, gives no interval.

    mark: ``best`` of its step count, ``level`` when no difference from the best is shown, else empty.
    """

    metric: str
    model: str
    steps: int
    value: float | None
    low: float | None
    high: float | None
    n: int
    num_prompts: int
    missing: int
    reason: str
    mark: Mark


@dataclass(frozen=True, slots=True)
class Difference:
    """Model minus baseline at one step count, paired by prompt and noise; verdict is said of the model."""

    metric: str
    model: str
    steps: int
    baseline: str
    value: float
    low: float | None
    high: float | None
    n: int
    num_prompts: int
    p_value: float
    p_holm: float
    verdict: str
    detectable: float | None  # the smallest true difference that this n shows with 80 % power


@dataclass(frozen=True, slots=True)
class Contrast:
    """One line of an ablation: model minus against, corrected over all contrasts of the page."""

    name: str
    model: str
    against: str
    steps: tuple[int, ...]
    differences: tuple[Difference, ...]


@dataclass(frozen=True, slots=True)
class Accord:
    """How often two metrics order two models' images of one prompt, noise and step count alike; ties count half."""

    metric_a: str
    metric_b: str
    value: float
    low: float | None
    high: float | None
    num_prompts: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Peak memory at the smallest batch that was measured: the device's tensors', on a CPU the process's."""

    model: str
    steps: int
    peak_bytes: float
    batch_size: int
    device: str


@dataclass(frozen=True, slots=True)
class FrontPoint:
    """A configuration's place between quality and a cost; on_front: none that costs no more is shown to be better."""

    metric: str
    cost: CostName
    model: str
    steps: int
    on_front: bool


@dataclass(frozen=True, slots=True)
class Cheapest:
    """The cheapest configuration shown to be within ``delta`` of the best; model is empty where none is shown to be.

    is_usual: nobody asked for this delta; it is 1 % of the best.
    """

    metric: str
    delta: float
    is_usual: bool
    cost: CostName
    model: str
    steps: int
    num_within: int
    n: int


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds per image of a stage: median, quartiles and the 90th percentile over n timed repeats."""

    model: str
    steps: int
    stage: str
    median_ms: float
    q1_ms: float
    q3_ms: float
    p90_ms: float
    n: int
    batch_size: int
    device: str


@dataclass(frozen=True, slots=True)
class Run:
    """One of the report's runs, and all that it takes to repeat it. name: of its folder, unlike the others'."""

    name: str
    title: str
    base: str
    spec: dict[str, Any]
    spec_hash: str
    provenance: dict[str, Any]
    prompts: dict[str, Any]
    num_images: int
    num_expected: int


@dataclass(frozen=True, slots=True)
class ReportData:
    """Everything a report shows. baseline is empty when the run names none; runs, when it is about training alone."""

    title: str
    runs: tuple[Run, ...]
    baseline: str
    num_prompts: int
    num_replicates: int
    models: tuple[Model, ...]
    steps: tuple[int, ...]
    metrics: tuple[MetricInfo, ...]
    cells: tuple[Cell, ...]
    differences: tuple[Difference, ...]
    contrasts: tuple[Contrast, ...]
    latencies: tuple[Latency, ...]
    memories: tuple[Memory, ...]
    fronts: tuple[FrontPoint, ...]
    cheapest: Cheapest | None
    accords: tuple[Accord, ...]
    grid: tuple[PromptRow, ...]
    diversity: tuple[NoiseRow, ...]
    curves: tuple[Curve, ...]
    made: tuple[Made, ...]
    notes: tuple[str, ...]
    study: StudyData | None = None

    def model(self, name: str) -> Model:
        """The model of this name."""
        return next(model for model in self.models if model.name == name)

    def metric(self, metric_id: str) -> MetricInfo:
        """The metric of this id."""
        return next(metric for metric in self.metrics if metric.id == metric_id)

    def cell(self, metric: str, model: str, steps: int) -> Cell | None:
        """The cell of a metric, model and step count, when the run has it."""
        return next((c for c in self.cells if (c.metric, c.model, c.steps) == (metric, model, steps)), None)

    def latency(self, model: str, steps: int, stage: str = "total") -> Latency | None:
        """The latency of a stage, when it was timed."""
        wanted = (model, steps, stage)
        return next((x for x in self.latencies if (x.model, x.steps, x.stage) == wanted), None)

    def memory(self, model: str, steps: int) -> Memory | None:
        """The peak memory, when it was measured."""
        return next((x for x in self.memories if (x.model, x.steps) == (model, steps)), None)

    def on_front(self, metric: str, cost: CostName, model: str, steps: int) -> bool:
        """Whether a configuration is on the front of this metric and cost."""
        return any(
            p.on_front for p in self.fronts if (p.metric, p.cost, p.model, p.steps) == (metric, cost, model, steps)
        )

    @property
    def rivals(self) -> tuple[Model, ...]:
        """The models that compete."""
        return tuple(model for model in self.models if not model.is_reference)

    @property
    def references(self) -> tuple[Model, ...]:
        """The models that compete with nobody."""
        return tuple(model for model in self.models if model.is_reference)

    @property
    def shared_steps(self) -> list[int]:
        """The step counts of the models that compete."""
        return sorted({steps for model in self.rivals for steps in model.steps})

    @property
    def num_images(self) -> int:
        """The images of all runs."""
        return sum(run.num_images for run in self.runs)

    def configurations(self) -> list[tuple[int, Model]]:
        """All (steps, model), by step count, then in the order of the models."""
        return [(steps, model) for steps in self.steps for model in self.models if steps in model.steps]

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``data.json``."""
        return asdict(self)
