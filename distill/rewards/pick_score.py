"""PickScore (Kirstain et al. 2305.01569) as a reward; the model is ``metrics.preference_models.pick_score``."""

from __future__ import annotations

from distill.rewards.contract import RewardFactory, RewardInfo
from distill.rewards.preference import PreferenceReward
from metrics.preference_models.pick_score import load

V1 = RewardFactory(
    # hinge: ours, above the best of Hyper-SD's table 2 (23.2); weight: eq. 13 has none
    RewardInfo("pick-score/v1", "PickScore", hinge=24.0, weight=1.0, trains=("pick-score/v1",)),
    lambda info, device: PreferenceReward(info, load(device)),
)
