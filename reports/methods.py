"""A paragraph on methods for a paper, with the run's real figures; English, to paste and to edit."""

from __future__ import annotations

from reports.data import ReportData
from reports.strings import counted, listed


def methods_paragraph(data: ReportData) -> str:
    """Say what was generated, scored and tested, and how, in plain text."""
    sets = dict.fromkeys(str(run.prompts.get("id", "own prompts")) for run in data.runs)
    said = [
        f"We compare {listed(model.label for model in data.rivals)} at {listed(map(str, data.shared_steps))} sampling "
        f"steps on {counted(data.num_prompts, 'prompt')} ({listed(sets)}), with "
        f"{counted(data.num_replicates, 'image')} for each prompt and the same initial noise for every model, each "
        "with the sampler it was made for.",
    ]
    if data.metrics:
        said.append(f"Metrics: {listed(f'{metric.label} ({metric.id})' for metric in data.metrics)}.")
        said.append(
            "Intervals are 95 % and clustered by prompt; differences are paired by prompt and noise and tested with "
            "Holm's correction at 5 %."
        )
    trained = [f"{model.label} on {listed(model.trained_on)}" for model in data.models if model.trained_on]
    if trained:
        said.append(f"Some models were trained on metrics reported here: {'; '.join(trained)}.")
    if data.latencies:
        first = data.latencies[0]
        said.append(f"Latency is the median per image at batch size {first.batch_size} on {first.device}.")
    if data.study is not None:
        counts = data.study.counts
        said.append(
            f"In a blind pairwise study (design {data.study.design_hash[:12]}), {counted(counts['voted'], 'rater')} "
            f"gave {counted(counts['votes'], 'vote')} on {counted(counts['pairs'], 'pair')}; rates count ties half, "
            "with 95 % intervals clustered by rater and by prompt."
        )
    return " ".join(said)
