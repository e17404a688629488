"""Rates of preference from votes; numpy and scipy only, for the study."""

from __future__ import annotations

from metrics.stats import Estimate, clustered_rate, wilson

__all__ = ["clustered_rate", "preference_rate"]  # clustered_rate: votes (1 won, 0.5 tie, 0 lost) of raters or prompts


def preference_rate(wins: int, losses: int, ties: int) -> Estimate:
    """Share of votes for a model, a tie counting half, with Wilson's interval; votes are taken as independent."""
    return wilson(wins + ties / 2, wins + losses + ties)
