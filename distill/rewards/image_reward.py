"""ImageReward v1.0 (Xu et al. 2304.05977) as a reward; the model is ``metrics.preference_models.image_reward``."""

from __future__ import annotations

from distill.rewards.contract import RewardFactory, RewardInfo
from distill.rewards.preference import PreferenceReward
from metrics.preference_models.image_reward import load

V1 = RewardFactory(
    # hinge: ReFL's code; weight: eq. 13 has none (ReFL's 1e-3 stands beside a pretraining loss that we don't have)
    RewardInfo("image-reward/v1", "ImageReward", hinge=2.0, weight=1.0, trains=("image-reward/v1",)),
    lambda info, device: PreferenceReward(info, load(device)),
)
