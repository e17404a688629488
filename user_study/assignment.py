"""Who sees which pair next, and on which side: pure functions of the state, so that they can be tested and repeated.

Every rater has a fixed sequence of kinds (practice, main, gold, repeat) drawn from the design's seed. A main pair is
chosen among those the rater has not seen and whose quota has room; the least covered first, or, by the adaptive
policy, of the comparison that is drawn with a probability that rises with its uncertainty.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from random import Random

from user_study.design import Design, Kind, Pair, Session, Side

REPEAT_GAP = 5  # items at least between a pair and its repetition, where the session is long enough
GOLD = "gold"  # the name under which the sides of gold and practice pairs are evened out


@dataclass(frozen=True, slots=True)
class Given:
    """A pair that a rater was given: what the next choice depends on."""

    pair_id: str
    kind: Kind
    a_side: Side
    position: int
    released: bool = False  # its lease ended and the pair went to others


@dataclass(frozen=True, slots=True)
class Item:
    """What a rater is to see next. propensity: the probability with which its comparison was drawn, 1 if not drawn."""

    pair: Pair
    kind: Kind
    a_side: Side
    propensity: float = 1.0


@dataclass(frozen=True, slots=True)
class Tally:
    """Votes on a comparison so far: for a, for b, and neither (tie or both bad)."""

    a: int = 0
    b: int = 0
    neither: int = 0

    @property
    def uncertainty(self) -> float:
        """Standard deviation of the preference rate under a uniform prior, ties half (a Beta posterior)."""
        a, b = self.a + self.neither / 2 + 1, self.b + self.neither / 2 + 1
        return sqrt(a * b / ((a + b) ** 2 * (a + b + 1)))


@lru_cache(maxsize=4096)
def sequence_of_kinds(session: Session, num_pairs: int, num_practice: int, seed: int, rater: str) -> tuple[Kind, ...]:
    """The kinds of all of a rater's items: practice, then blocks in which gold and repeats have a random place.

    Of every ``gold_every`` items exactly one is gold, of every ``repeat_every`` exactly one is a repeat, in the second
    half of its block; the sequence ends with the rater's last main pair.
    """
    random = Random(f"kinds {seed} {rater}")
    left = min(session.pairs_per_rater, num_pairs)
    practice: list[Kind] = ["practice"] * min(session.practice, num_practice)
    kinds: list[Kind] = []
    gold: set[int] = set()
    repeats: set[int] = set()
    while left > 0:
        at = len(kinds)
        if session.gold_every and at % session.gold_every == 0:
            gold.add(at + random.randrange(session.gold_every))
        if session.repeat_every and at % session.repeat_every == 0:
            repeats.add(at + random.randrange(session.repeat_every // 2, session.repeat_every))
        if at in gold:
            kinds.append("gold")
            if at in repeats:  # the next place that is no gold's
                repeats.add(at + 1)
        elif at in repeats:
            kinds.append("repeat")
        else:
            kinds.append("main")
            left -= 1
    return (*practice, *kinds)


def kinds_of(design: Design, rater: str) -> tuple[Kind, ...]:
    """The rater's sequence of kinds under this design."""
    return sequence_of_kinds(design.session, len(design.pairs), len(design.practice), design.seed, rater)


def next_item(
    design: Design,
    rater: str,
    given: Sequence[Given],
    load: Mapping[str, int],
    tallies: Mapping[str, Tally] | None = None,
) -> Item | None:
    """Choose the rater's next item; None when the session is over, or no pair has room.

    given: what the rater was given so far, oldest first. load: votes and live leases of each main pair. tallies: by
    comparison, for the adaptive policy.
    """
    position = len(given)
    kinds = kinds_of(design, rater)
    if position >= len(kinds):
        return None
    kind = kinds[position]
    item = None
    if kind in ("gold", "practice"):
        item = _checked_pair(design, rater, given, kind)
    elif kind == "repeat":
        item = _repeated(design, rater, given)
    return item or _main(design, rater, given, load, tallies or {})


def side_balance(design: Design, given: Sequence[Given]) -> Counter[str]:
    """How often ``a`` was left minus how often it was right, by comparison, over main pairs; GOLD for known answers."""
    balance: Counter[str] = Counter()
    for item in given:
        if item.kind != "repeat":
            name = design.pair(item.pair_id).comparison if item.kind == "main" else GOLD
            balance[name] += 1 if item.a_side == "left" else -1
    return balance


def _main(
    design: Design, rater: str, given: Sequence[Given], load: Mapping[str, int], tallies: Mapping[str, Tally]
) -> Item | None:
    seen = [item.pair_id for item in given if item.kind == "main"]
    known, quota = set(seen), design.session.votes_per_pair
    order = _order(design.seed, rater, len(design.pairs))
    open_pairs = [
        (index, pair)
        for index, pair in enumerate(design.pairs)
        if pair.id not in known and (quota is None or load.get(pair.id, 0) < quota)
    ]
    if not open_pairs:
        return None
    propensity = 1.0
    if design.session.policy == "adaptive":
        comparison, propensity = _drawn(design, rater, len(given), {p.comparison for _, p in open_pairs}, tallies)
        open_pairs = [entry for entry in open_pairs if entry[1].comparison == comparison]
    shown = [design.pair(pair_id) for pair_id in seen]
    met = Counter(pair.comparison for pair in shown)
    prompts = Counter(pair.prompt_id for pair in shown)
    _, pair = min(
        open_pairs,
        key=lambda entry: (
            load.get(entry[1].id, 0), met[entry[1].comparison], prompts[entry[1].prompt_id], order[entry[0]],
        ),
    )  # fmt: skip
    return Item(pair, "main", _side(design, rater, given, pair.comparison), propensity)


def _drawn(
    design: Design, rater: str, position: int, comparisons: set[str], tallies: Mapping[str, Tally]
) -> tuple[str, float]:
    """Draw a comparison: a share ``uniform_floor`` of the probability is uniform, the rest goes by uncertainty."""
    names = sorted(comparisons)
    weights = [tallies.get(name, Tally()).uncertainty for name in names]
    floor = design.session.uniform_floor
    probabilities = [floor / len(names) + (1 - floor) * weight / sum(weights) for weight in weights]
    drawn = Random(f"comparison {design.seed} {rater} {position}").choices(range(len(names)), probabilities)[0]
    return names[drawn], probabilities[drawn]


def _checked_pair(design: Design, rater: str, given: Sequence[Given], kind: Kind) -> Item | None:
    """A gold or practice pair the rater has not seen; None where there is none left (a design makes enough)."""
    pairs = design.gold if kind == "gold" else design.practice
    seen = {item.pair_id for item in given if item.kind == kind}
    order = _order(design.seed, f"{kind} {rater}", len(pairs))
    left = [(order[index], pair) for index, pair in enumerate(pairs) if pair.id not in seen]
    if not left:
        return None
    return Item(min(left, key=lambda entry: entry[0])[1], kind, _side(design, rater, given, GOLD))


def _repeated(design: Design, rater: str, given: Sequence[Given]) -> Item | None:
    """One of the rater's main pairs again, sides swapped; the first of them where all are recent."""
    position = len(given)
    again = {item.pair_id for item in given if item.kind == "repeat"}
    able = [item for item in given if item.kind == "main" and not item.released and item.pair_id not in again]
    if not able:
        return None
    old = [item for item in able if item.position <= position - REPEAT_GAP] or able[:1]
    chosen = Random(f"repeat {design.seed} {rater} {position}").choice(old)
    return Item(design.pair(chosen.pair_id), "repeat", "right" if chosen.a_side == "left" else "left")


def _side(design: Design, rater: str, given: Sequence[Given], name: str) -> Side:
    """Even out the sides of this rater and comparison; where they are even, a lot decides (blocks of two)."""
    balance = side_balance(design, given)[name]
    if balance == 0:
        return Random(f"side {design.seed} {rater} {len(given)}").choice(("left", "right"))
    return "left" if balance < 0 else "right"


@lru_cache(maxsize=1024)
def _order(seed: int, who: str, n: int) -> tuple[int, ...]:
    """A random rank for each of n pairs, the same whenever it is asked for."""
    return tuple(Random(f"order {seed} {who}").sample(range(n), n))
