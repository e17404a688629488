"""One Markdown page of results, written from run directories alone: the same runs give the same bytes.

A person's remarks stand between two marks at the top and are carried over to the letter; all else is written anew.
"""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from hypersd_bench.errors import InputError
from hypersd_bench.store import RunStore, write_bytes
from metrics.comparison import View, contrasts, corrected
from reports import tables, verdict
from reports.caveats import caveats, span
from reports.data import Contrast, Difference, ReportData
from reports.numbers import decimals, fixed
from reports.read import contrast_pairs, fill_contrasts, read_report, spec_contrasts
from reports.strings import counted, listed
from reports.tables import markdown_escape

OPEN, CLOSE = "<!-- remarks -->", "<!-- /remarks -->"
WARNING = "<!-- Generated: what is written outside the remarks is lost when the command below runs again. -->"


@dataclass(frozen=True, slots=True)
class Section:
    """What the page says about one run."""

    folder: Path
    data: ReportData
    contrasts: tuple[Contrast, ...]

    def to_json(self) -> dict[str, Any]:
        """The run, its title and its contrasts as plain values."""
        contrasts = [asdict(contrast) for contrast in self.contrasts]
        return {"run": str(self.folder), "title": self.data.title, "contrasts": contrasts}


def write_results(runs: Sequence[Path], page: Path) -> tuple[Section, ...]:
    """Write the page about these runs, keeping the remarks of an older one."""
    remarks = read_remarks(page)
    sections = read_sections(runs)
    write_bytes(page, render(sections, _command(runs, page), remarks).encode())
    return sections


def read_remarks(page: Path) -> str:
    """What a person wrote on the page; raises InputError for a file without the two marks: it may be all theirs."""
    try:
        text = page.read_bytes().decode()
    except FileNotFoundError:
        return "\n"
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"can't read {page}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from error
    before, opened, rest = text.partition(OPEN)
    remarks, closed, after = rest.partition(CLOSE)
    if not (opened and closed) or any(mark in part for mark in (OPEN, CLOSE) for part in (before, remarks, after)):
        raise InputError(
            f"{page} would be written anew, but doesn't mark once what to keep; put {OPEN} and {CLOSE} around it, "
            "or choose another page"
        )
    return remarks


def read_sections(runs: Sequence[Path]) -> tuple[Section, ...]:
    """Read the runs; their contrasts are corrected together."""
    if len({run.resolve() for run in runs}) < len(runs):
        raise InputError("a run is named twice; name each once")
    views = [View([RunStore.open(run)]) for run in runs]
    reports = [read_report(view) for view in views]
    asked = [spec_contrasts(view) for view in views]
    found = [contrasts(view, contrast_pairs(entries)) for view, entries in zip(views, asked, strict=True)]
    infos = {metric.id: metric for data in reports for metric in data.metrics}
    judged = iter(corrected([c for of_run in found for c in of_run], infos))
    return tuple(
        Section(run, data, fill_contrasts(entries, [next(judged) for _ in of_run]))
        for run, data, entries, of_run in zip(runs, reports, asked, found, strict=True)
    )


def _command(runs: Sequence[Path], page: Path) -> str:
    """The command that writes the page again, with the paths as seen from here."""
    paths = [_from_here(run) for run in runs]
    return shlex.join(["hypersd-bench", "report", *paths, "--results", _from_here(page)])


def _from_here(path: Path) -> str:
    """A path below the working folder relative to it; of one elsewhere the name alone, which is nobody's secret."""
    if not path.is_absolute():
        return path.as_posix()
    return path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else path.name


def render(sections: Sequence[Section], command: str, remarks: str) -> str:
    """Write the page."""
    titles = _titles(sections)
    contrasted = [replace(section.data, contrasts=section.contrasts) for section in sections]
    num_comparisons = sum(map(tables.num_contrasted, contrasted))
    blocks = [
        f"# Results of {markdown_escape(listed(titles))}",
        WARNING,
        f"{OPEN}{remarks}{CLOSE}",
        f"Written by {_code(command)} from the run directories alone. Each part ends with the spec of its run, which "
        "`hypersd-bench run` repeats.",
    ]
    for title, section in zip(titles, sections, strict=True):
        blocks += _section(title, section, num_comparisons)
    return "\n\n".join(block.rstrip("\n") for block in blocks) + "\n"


def _titles(sections: Sequence[Section]) -> list[str]:
    titles = [section.data.title for section in sections]
    return [
        title if titles.count(title) == 1 else f"{title} ({_from_here(section.folder)})"
        for title, section in zip(titles, sections, strict=True)
    ]


def _section(title: str, section: Section, num_comparisons: int) -> Iterator[str]:
    data = section.data
    yield f"## {markdown_escape(title)}"
    yield markdown_escape(verdict.summary(data))
    judged = verdict.budgets(data)
    if judged:
        yield "### Verdicts"
        if overall := verdict.overall(data, judged):
            yield markdown_escape(overall)
        yield "\n".join(line for budget in judged for line in _verdict(budget))
    if data.cells:
        yield "### Levels"
        yield tables.to_markdown(tables.results(data))
    if data.differences:
        yield f"### Differences to {markdown_escape(data.model(data.baseline).label)}"
        yield tables.to_markdown(tables.differences(data))
    if section.contrasts:
        yield "### Contrasts"
        for contrast in section.contrasts:
            yield f"#### {markdown_escape(contrast.name)}"
            yield from _contrast(data, contrast, num_comparisons)
    yield "### How the models were made"
    yield from _how_made(section)
    yield "### What this run can't say"
    yield _bullets([*caveats(data), *_limits(section)])
    yield "### Provenance"
    yield _provenance(data)
    yield f"<details><summary>Spec</summary>\n\n```yaml\n{_spec(section)}```\n\n</details>"


def _verdict(budget: verdict.Budget) -> list[str]:
    return [
        f"- **{markdown_escape(budget.headline)}**",
        *(f"  - {markdown_escape(finding.text)}" for finding in budget.findings),
    ]


def _contrast(data: ReportData, contrast: Contrast, num_comparisons: int) -> Iterator[str]:
    """What a contrast shows in a sentence, and its table."""
    yield markdown_escape(verdict.contrast_outcome(data, contrast))
    if contrast.differences:
        yield tables.to_markdown(tables.contrast(data, contrast, num_comparisons))


def _how_made(section: Section) -> Iterator[str]:
    """A row for each weights file, and under them the commands."""
    if not section.data.made:
        yield "No weights but the base's own."
        return
    header = ["Model", "File", "Steps", "Method, stage", "Rank", "Seed", "Images seen", "Seconds", "SHA-256"]
    lines = [_row(header), _row([":--", ":--", ":--", ":--", "--:", "--:", "--:", "--:", ":--"])]
    for made in section.data.made:
        method = ", ".join(str(made.card[key]) for key in ("method", "stage") if key in made.card)
        numbers = [_figure(made.card.get(key)) for key in ("rank", "seed", "images_seen", "seconds")]
        file = _code(made.file).replace("|", r"\|")
        steps = ", ".join(map(str, made.steps))
        lines.append(_row([markdown_escape(made.label), file, steps, markdown_escape(method) or "\u2013", *numbers,
                           f"`{made.sha256[:12]}`"]))  # fmt: skip
    yield "\n".join(lines)
    yield "Images and seconds of training count from the start of the run that made the file, with its stages before."
    labels: dict[str, list[str]] = defaultdict(list)
    for made in section.data.made:
        command = str(made.card.get("command", ""))
        if made.label not in labels[command]:
            labels[command].append(made.label)
    yield "\n".join(
        f"- {markdown_escape(listed(names))}: {_code(command) if command else 'the file does not say by which command'}"
        for command, names in labels.items()
    )


def _figure(value: Any) -> str:
    """A number of a card; a dash where there is none."""
    return f"{value:,.0f}" if isinstance(value, int | float) else "\u2013"


def _limits(section: Section) -> Iterator[str]:
    """What the figures can't bear, beside what would spoil them: derived from n, cards and provenance."""
    data = section.data
    yield from _resolution([*data.differences, *(d for c in section.contrasts for d in c.differences)], data)
    for metric in data.metrics:
        sizes = sorted({cell.n for cell in data.cells if cell.metric == metric.id and cell.value is not None})
        if metric.statistic == "frechet" and sizes:
            n = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
            yield f"{metric.label} of {n} images lies above that of many: compare it only where n is the same."
    if str(data.runs[0].provenance.get("git", "")).endswith("+changes"):
        yield "The program had changes that were not committed: the revision below is not quite what ran."


def _resolution(differences: Sequence[Difference], data: ReportData) -> Iterator[str]:
    """How small a difference these n can't show: the typical half interval of each metric."""
    parts = []
    for metric in data.metrics:
        mine = [d for d in differences if d.metric == metric.id]
        halves = [(d.high - d.low) / 2 for d in mine if d.low is not None and d.high is not None]
        if halves:
            parts.append(f"\u00b1{fixed(median(halves), decimals(mine))} in {metric.label}")
    if parts:
        yield f"A difference's interval is typically {listed(parts)}: what is smaller doesn't show with this n."


def _provenance(data: ReportData) -> str:
    run = data.runs[0]
    made = run.provenance
    packages = ", ".join(f"{name} {version}" for name, version in sorted(made.get("packages", {}).items()))
    lines = [
        f"Run begun {made.get('created', '')}, {_revision(str(made.get('git', '')))}, spec {run.spec_hash[:12]}",
        f"Machine: {made.get('machine', '')}, device {made.get('device', '')}",
        f"Software: Python {made.get('python', '')}, {packages}",
        f"Prompts: {run.prompts.get('count', 0):,} of {run.prompts.get('id', '')} "
        f"({str(run.prompts.get('sha256', ''))[:12]}), {counted(data.num_replicates, 'noise')} each, "
        f"seed {run.spec.get('seed', 0)}",
        *(f"{metric.label}: {tables.protocol(metric)}" for metric in data.metrics),
    ]
    totals = [x for x in data.latencies if x.stage == "total"]
    for device, batch_size in sorted({(x.device, x.batch_size) for x in totals}):
        repeats = [x.n for x in totals if (x.device, x.batch_size) == (device, batch_size)]
        lines.append(f"Latency: median of {span(repeats)} repeats, batch size {batch_size}, on {device}")
    return _bullets(f"{line}." for line in lines)


def _revision(git: str) -> str:
    return f"revision {git[:12]}{' with changes' if git.endswith('+changes') else ''}" if git else "no revision"


def _spec(section: Section) -> str:
    """The run's spec as YAML that ``run`` takes, with the metrics and contrasts that it came to have."""
    metrics = [metric.id for metric in section.data.metrics]
    contrasts = [
        {"name": contrast.name, "model": contrast.model, "against": contrast.against, "steps": contrast.steps}
        for contrast in section.contrasts
    ]
    spec = {**section.data.runs[0].spec, "metrics": metrics, "contrasts": contrasts}
    text: str = yaml.safe_dump(_plain(spec), width=float("inf"), allow_unicode=True)
    return text


def _plain(value: Any) -> Any:
    """A value as YAML writes it best: no tuples, and no key that says nothing."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None and item != () and item != []}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {markdown_escape(line)}" for line in lines)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _code(text: str) -> str:
    """A code span, whatever is in it."""
    text = " ".join(text.split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if len(fence) > 1 else f"{fence}{text}{fence}"
