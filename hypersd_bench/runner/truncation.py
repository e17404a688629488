"""Prompts longer than a text encoder reads: what it does not see, no model can draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

from hypersd_bench.errors import InputError, first_line
from hypersd_bench.pipelines import base_folder
from hypersd_bench.runner.plan import Plan


def count_truncated(plan: Plan) -> dict[str, Any]:
    """Count the prompts that a pipeline of the plan cuts, and name them: ``{"count": 1, "ids": [..], "limit": 77}``."""
    texts = [prompt.text for prompt in plan.prompts.prompts]
    cut: set[str] = set()
    limit = 0
    for pipeline in dict.fromkeys(c.pipeline for c in plan.configurations):
        for folder in sorted(base_folder(pipeline).glob("tokenizer*")):
            tokenizer = _tokenizer(folder)
            limit = tokenizer.model_max_length
            lengths = [len(ids) for ids in tokenizer(texts, truncation=False, verbose=False).input_ids]
            cut |= {p.id for p, length in zip(plan.prompts.prompts, lengths, strict=True) if length > limit}
    return {"count": len(cut), "ids": sorted(cut), "limit": limit}


def _tokenizer(folder: Path) -> CLIPTokenizer:
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises Exception itself
        raise InputError(f"{folder} holds no whole CLIP tokenizer ({first_line(error)}); delete it and download the "
                         "pipeline again, or copy it anew") from error  # fmt: skip
