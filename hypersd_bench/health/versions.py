"""Package versions: those this project asks for, and those known to spoil a result.

The metrics here take their own Fréchet distance from eigenvalues, feed networks uint8 pixels and check CLIP's
activation, so much of what spoils other tools does not touch them. Such a rule is ``ok`` where only the other tool's
numbers suffer and its package came with this project, and a ``note`` where somebody installed that tool beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from hypersd_bench.health.finding import Finding, State

Versions = Callable[[str], str | None]
"""The installed version of a package, or None."""


@dataclass(frozen=True, slots=True)
class VersionRule:
    """Packages that spoil a result when all of them are installed in these versions.

    name: what suffers. requires: as in ``pip install``. spoils: how. ours: what becomes of this project's own numbers.
    """

    name: str
    requires: tuple[str, ...]
    state: State
    spoils: str
    ours: str
    remedy: str
    source: str


_OWN_FRECHET = "the Fréchet distances here use eigenvalues"
_SQRTM_CALLERS = ("pytorch-fid", "clean-fid", "dgm-eval", "pyiqa", "monai")

RULES = (
    VersionRule(
        "FID of torchmetrics",
        ("torchmetrics>=1.8",),
        "ok",
        "resizes with antialias since 1.8, KID and Inception Score too: not comparable with older numbers",
        "fid/tf1 is the old filter, fid/torchmetrics the new one, whatever version is installed",
        "FrechetInceptionDistance(antialias=False) gives the old filter; KID and Inception Score offer none",
        "Lightning-AI/torchmetrics#3177",
    ),
    VersionRule(
        "CLIPScore of torchmetrics",
        ("torchmetrics<=1.9.0", "transformers>=5"),
        "ok",
        "takes the object that transformers 5 returns for a tensor",
        "clip-score goes through open_clip",
        "use clip-score of this project, or torchmetrics with transformers below 5 in an environment of its own",
        "Lightning-AI/torchmetrics#3407",
    ),
    VersionRule(
        "float images",
        ("transformers>=4.28",),
        "ok",
        "image processors rescale floats in [0, 1] again: nearly black images",
        "metrics here take uint8",
        "give image processors uint8 pixels",
        "huggingface/transformers#24857",
    ),
    VersionRule(
        "QuickGELU of open_clip",
        ("open_clip_torch",),
        "ok",
        "only warns when OpenAI's weights get plain GELU, and every score is wrong",
        "metrics here refuse such a model",
        "name a -quickgelu config in your own code",
        "PrunaAI/pruna#384",
    ),
    VersionRule(
        "sqrtm of scipy",
        ("scipy>=1.11.2,<1.13",),
        "note",
        "scipy.linalg.sqrtm returns garbage, and so does every FID that calls it",
        _OWN_FRECHET,
        "pip install 'scipy>=1.14'",
        "scipy/scipy#20178",
    ),
    *(
        VersionRule(
            f"FID of {tool}",
            ("scipy>=1.18", tool),
            "note",
            "calls sqrtm(disp=), which scipy 1.18 removed: TypeError",
            _OWN_FRECHET,
            f"give {tool} an environment of its own with scipy>=1.13,<1.18",
            "pytorch/ignite#3794",
        )
        for tool in _SQRTM_CALLERS
    ),
    VersionRule(
        "rewards of imscore",
        ("imscore", "transformers>=5"),
        "note",
        "asks for transformers below 5, and HPSv3 drifts with newer ones",
        "rewards here do not use it",
        "give imscore an environment of its own with transformers<5",
        "RE-N-Y/imscore#12",
    ),
    VersionRule(
        "FID of torcheval",
        ("torcheval",),
        "note",
        "uses torchvision's Inception, which is not the one of published FID",
        "every fid/ metric on Inception here uses the network of 2015-12-05",
        "don't set torcheval's FID beside published ones",
        "pytorch/torcheval#192",
    ),
)


def installed_version(package: str) -> str | None:
    """Look a package up; None when it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def examine_requirements(requirements: Iterable[str], versions: Versions = installed_version) -> Iterator[Finding]:
    """Compare what is installed with what a project requires (as its metadata says it), leaving out its extras."""
    needed = [Requirement(text) for text in requirements]
    needed = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    unmet = [one for one in needed if not _met(one, versions)]
    for one in unmet:
        found = versions(one.name) or "missing"
        remedy = f"run `make setup` again, or: pip install '{one.name}{one.specifier}'"
        yield Finding(one.name, "bad", f"{found}, but this project needs {one.specifier}", remedy)
    if needed and not unmet:
        yield Finding("packages", "ok", f"all {len(needed)} required ones in the versions asked for")


def own_requirements() -> list[str]:
    """What this project's metadata requires; empty when it is not installed."""
    try:
        return requires("hypersd-bench") or []
    except PackageNotFoundError:
        return []


def examine_rules(rules: Iterable[VersionRule] = RULES, versions: Versions = installed_version) -> Iterator[Finding]:
    """Report each rule whose packages are all installed in the versions that it names."""
    for rule in rules:
        packages = [Requirement(text) for text in rule.requires]
        if all(_met(package, versions) for package in packages):
            found = ", ".join(f"{package.name} {versions(package.name)}" for package in packages)
            yield Finding(
                rule.name, rule.state, f"{found}: {rule.spoils} ({rule.source}); {rule.ours}", rule.remedy
            )  # fmt: skip


def _met(requirement: Requirement, versions: Versions) -> bool:
    found = versions(requirement.name)
    return found is not None and requirement.specifier.contains(found, prereleases=True)
