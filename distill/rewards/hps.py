"""HPSv2.1 (Wu et al. 2306.09341) as a reward; the model is ``metrics.preference_models.hps``."""

from __future__ import annotations

from distill.rewards.contract import RewardFactory, RewardInfo
from distill.rewards.preference import PreferenceReward
from metrics.preference_models.hps import load

V2_1 = RewardFactory(
    # hinge and weight: ours; the first above what good pictures get, the second so that a point of either counts alike
    RewardInfo("hps/v2.1", "HPSv2.1", hinge=34.0, weight=0.5, trains=("hps/v2.1",)),
    lambda info, device: PreferenceReward(info, load(device), fit="pad"),  # its authors letterbox where CLIP crops
)
