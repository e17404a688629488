"""The miniature's tokenizer: CLIP's own format (byte-pair merges), with a vocabulary just for scene captions."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from hypersd_bench.pocket.scenes import BACKGROUND_NAMES, CONCEPT_NAMES, Scene
from hypersd_bench.store import write_json

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MAX_LENGTH = 16  # tokens, start and end included; the longest caption has 13
START, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write a tokenizer folder (``vocab.json``, ``merges.txt``) whose words are single tokens, and load it."""
    from transformers import CLIPTokenizer

    merges = _merges(sorted(_words()))
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    symbols = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocab = {symbol: i for i, symbol in enumerate([*dict.fromkeys(symbols), START, END])}
    tokenizer = CLIPTokenizer(
        vocab=vocab, merges=merges, model_max_length=MAX_LENGTH, bos_token=START, eos_token=END,
        unk_token=END, pad_token=END,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    write_json(folder / "vocab.json", vocab)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return tokenizer


def _words() -> set[str]:
    captions = [Scene((a, b), background, 0).caption
                for a, b, background in product(CONCEPT_NAMES, CONCEPT_NAMES, BACKGROUND_NAMES)]  # fmt: skip
    return {word for caption in captions for word in caption.split()}


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Merges that build every word letter by letter from its left end."""
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        for i in range(1, len(pieces)):
            merges["".join(pieces[:i]), pieces[i]] = None
    return list(merges)
