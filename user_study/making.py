"""Making a design from a run: which configurations meet, on which images, with which checks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from random import Random
from typing import Any

from hypersd_bench.errors import InputError, unknown_name
from hypersd_bench.store import ImageRow, RunStore
from user_study.design import Arm, Configuration, Design, Pair, Rules, Session

SPOILS = ("blur", "blocks", "noise")  # what is done to the worse image of a gold or practice pair, in turn
PAIRS_EACH = 40
PAIRS_PER_RATER = 40

Comparison = tuple[Configuration, Configuration]
_Candidates = list[tuple[ImageRow, ImageRow]]


@dataclass(frozen=True)
class Plan:
    """What the researcher chose; None takes what fits the run."""

    comparisons: str | None = None  # "a@4:b@4,c@1:d@1"
    pairs_each: int = PAIRS_EACH
    pairs_per_rater: int = PAIRS_PER_RATER
    votes_per_pair: int | None = None
    planned_raters: int = 30
    planned_rate: float = 0.6
    seed: int = 0


def make_design(
    store: RunStore,
    plan: Plan,
    criteria: Sequence[str],
    wording: Mapping[str, Mapping[str, Any]],
    session: Mapping[str, Any],
    rules: Rules,
) -> Design:
    """Draw the pairs of a study, and gold and practice pairs with them; the same plan gives the same design.

    session: the fields of Session other than the two numbers that the plan decides. Images with a defect are left out.
    Raises InputError for comparisons that the run can't give.
    """
    images = {(row.model, row.steps, row.prompt_id, row.replicate): row for row in store.images() if not row.defect}
    known = sorted({(row.model, row.steps) for row in images.values()})
    configurations = {str(Configuration(*key)): Configuration(*key) for key in known}
    if len(configurations) < 2:
        raise InputError(f"{store.folder} has images of {len(configurations)} configuration(s); a study compares two")
    if plan.comparisons is None:
        comparisons = _with_baseline(store, list(configurations.values()))
    else:
        comparisons = parse_comparisons(plan.comparisons, configurations)
    candidates = {comparison: _candidates(images, comparison) for comparison in comparisons}
    for (a, b), found in candidates.items():
        if not found:
            raise InputError(f"{store.folder} has no usable image of {a} and {b} with the same prompt and noise")
    pairs = _draw(candidates, plan.pairs_each, plan.seed)
    per_rater = min(plan.pairs_per_rater, len(pairs))
    quota = plan.votes_per_pair or ceil(plan.planned_raters * per_rater / len(pairs))
    chosen = Session(pairs_per_rater=per_rater, votes_per_pair=quota, **session)
    known_answers = _known_answers(list(images.values()), pairs, plan.seed)
    num_gold = _most_gold(chosen)
    return Design(
        run=str(store.manifest["spec_hash"]),
        seed=plan.seed,
        criteria=tuple(criteria),
        wording={language: dict(words) for language, words in wording.items()},
        session=chosen,
        pairs=pairs,
        gold=tuple(_spoiled(row, f"g{i + 1:03d}", i) for i, row in _cycled(known_answers, num_gold)),
        practice=tuple(_spoiled(row, f"t{i + 1:03d}", i) for i, row in _cycled(known_answers[::-1], chosen.practice)),
        rules=rules,
        planned_rate=plan.planned_rate,
        planned_raters=plan.planned_raters,
    )


def parse_comparisons(text: str, configurations: Mapping[str, Configuration]) -> list[Comparison]:
    """Read ``a@4:b@4,c@1:d@1``; raises InputError naming the nearest known configuration for an unknown one."""
    comparisons = [_parse_comparison(part.strip(), configurations) for part in text.split(",")]
    counted = Counter(frozenset(comparison) for comparison in comparisons)
    for a, b in comparisons:
        if a == b:
            raise InputError(f"--pairs {a}:{b} compares a configuration with itself")
        if counted[frozenset((a, b))] > 1:
            raise InputError(f"--pairs names {a} against {b} twice; once is enough: sides are counterbalanced")
    return comparisons


def _parse_comparison(text: str, configurations: Mapping[str, Configuration]) -> Comparison:
    splits = [(text[:i], text[i + 1 :]) for i, letter in enumerate(text) if letter == ":"]  # names may hold a colon
    if not splits:
        raise InputError(f"--pairs {text!r}: write two configurations as hyper-sd@4:lightning@4")
    for a, b in splits:
        if a in configurations and b in configurations:
            return configurations[a], configurations[b]
    unknown = next(name for name in splits[0] if name not in configurations)
    raise unknown_name("configuration", unknown, list(configurations), "--pairs")


def _with_baseline(store: RunStore, configurations: Sequence[Configuration]) -> list[Comparison]:
    """The run's baseline against every other model at each step count both have."""
    baseline = str(store.manifest["baseline"])
    ours = {c.steps: c for c in configurations if c.model == baseline}
    comparisons = [(ours[c.steps], c) for c in configurations if c.model != baseline and c.steps in ours]
    if not comparisons:
        raise InputError(
            f"{store.folder}: no model shares a step count with the baseline {baseline!r}; "
            f"say what to compare with --pairs, such as {configurations[0]}:{configurations[-1]}"
        )
    return comparisons


def _candidates(images: Mapping[tuple[str, int, str, int], ImageRow], comparison: Comparison) -> _Candidates:
    a, b = comparison
    return [
        (row, other)
        for (model, steps, *rest), row in images.items()
        if (model, steps) == (a.model, a.steps) and (other := images.get((b.model, b.steps, *rest))) is not None  # type: ignore[arg-type]
    ]


def _draw(candidates: Mapping[Comparison, _Candidates], pairs_each: int, seed: int) -> tuple[Pair, ...]:
    """Draw from each comparison in turn, until each has enough, a pair with a prompt that it, then all, have least."""
    random = Random(f"pairs {seed}")
    left = {comparison: random.sample(found, len(found)) for comparison, found in candidates.items()}
    drawn: Counter[object] = Counter()  # of prompts, and of (comparison, prompt)
    pairs: list[Pair] = []
    for _ in range(pairs_each):
        for comparison, found in left.items():
            if not found:
                continue
            counts = [(drawn[comparison, a.prompt_id], drawn[a.prompt_id]) for a, _ in found]
            a, b = found.pop(counts.index(min(counts)))
            drawn.update([a.prompt_id, (comparison, a.prompt_id)])
            pairs.append(Pair(f"{len(pairs) + 1:04d}", a.prompt_id, a.prompt, a.replicate, _arm(a), _arm(b)))
    return tuple(pairs)


def _most_gold(session: Session) -> int:
    """Gold pairs that the longest sequence of a rater holds."""
    if not session.gold_every:
        return 0
    main_share = 1 - 1 / session.gold_every - (1 / session.repeat_every if session.repeat_every else 0)
    return ceil(session.pairs_per_rater / main_share / session.gold_every) + 1


def _known_answers(images: Sequence[ImageRow], pairs: Sequence[Pair], seed: int) -> list[ImageRow]:
    """Images to make gold and practice pairs of, in a random order: first those that no main pair shows."""
    used = {arm.file for pair in pairs for arm in (pair.a, pair.b)}
    order = Random(f"gold {seed}").sample(list(images), len(images))
    return sorted(order, key=lambda row: row.file in used)


def _cycled(rows: Sequence[ImageRow], num: int) -> list[tuple[int, ImageRow]]:
    return [(i, rows[i % len(rows)]) for i in range(num)]


def _spoiled(row: ImageRow, pair_id: str, index: int) -> Pair:
    """The image against the same image spoiled: anybody who looks prefers ``a``."""
    worse = Arm(Configuration(row.model, row.steps), row.file, row.sha256, SPOILS[index % len(SPOILS)])
    return Pair(pair_id, row.prompt_id, row.prompt, row.replicate, _arm(row), worse)


def _arm(row: ImageRow) -> Arm:
    return Arm(Configuration(row.model, row.steps), row.file, row.sha256)
