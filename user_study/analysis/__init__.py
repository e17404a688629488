"""What the votes of a study say: rates, a ranking, agreement, rater quality, sensitivity, people against metrics."""

from user_study.analysis.analyse import analyse
from user_study.analysis.card import card_markdown
from user_study.analysis.result import Analysis
from user_study.analysis.text import lines

__all__ = ["Analysis", "analyse", "card_markdown", "lines"]
