"""What is held out: the share that was asked for, the same text whatever is added, and nothing that is trained on."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.train.documents import Document, read_documents
from isthmus.train.heldout import TAIL_BYTES, part, split

WORDS = ["the", "a", "of", "größer", "and", "😀", "to", "in", "is", "it", "for", "that", "on", "with", "as"]


def document(seed: int, size: int, kind: str = "text") -> Document:
    """About `size` bytes that no other seed gives."""
    dice = random.Random(seed)
    text = f"{seed} " + " ".join(dice.choices(WORDS, k=size // 5))
    if kind == "messages":
        text = json.dumps({"messages": [{"role": "user", "content": text}]})
        return Document(str(seed), text, "messages")
    return Document(str(seed), text)


SIZES = st.one_of(st.integers(1, 400), st.integers(1000, 30_000), st.integers(50_000, 400_000))
CORPORA = st.lists(st.tuples(st.integers(0, 10**6), SIZES), min_size=1, max_size=30)
FRACTIONS = st.sampled_from([0.005, 0.02, 0.1, 0.5, 0.9])


def held(documents: list[Document], fraction: float) -> int:
    return sum(d.size for d in split(documents, fraction).heldout)


@given(CORPORA, FRACTIONS)
def test_every_byte_is_on_one_side(sizes: list[tuple[int, int]], fraction: float) -> None:
    """Text in both is a loss that was learnt by heart; text in neither is lost."""
    documents = list({seed: document(seed, size) for seed, size in sizes}.values())
    train, heldout = ({d.name: d.text for d in side} for side in split(documents, fraction))
    for d in documents:
        assert train.get(d.name, "") + heldout.get(d.name, "") == d.text
    assert not set(train.values()) & set(heldout.values())


@given(CORPORA, FRACTIONS)
def test_the_share_is_what_was_asked_for(sizes: list[tuple[int, int]], fraction: float) -> None:
    """1,230 of 1,280 kB were once held out where 2% was asked. At least half of it where text can be cut, and at most
    what chance does: each text's part is at most max(TAIL_BYTES, its share), Bernstein's bound at odds of 1e-6."""
    documents = list({seed: document(seed, size) for seed, size in sizes}.values())
    total, got = sum(d.size for d in documents), held(documents, fraction)
    chance = math.sqrt(2 * 14 * TAIL_BYTES * fraction * total) + 10 * TAIL_BYTES
    assert got <= min(fraction * total + chance, total)
    if total > 200:
        assert got >= 0.35 * fraction * total
        assert got < total


def test_the_corpora_that_went_wrong() -> None:
    """A few documents that dominate: books beside notes, five files, one file."""
    for fraction in 0.02, 0.1:
        for sizes in ([1_230_000, *[1000] * 50], [20_000] * 5, [300_000] * 3, [1_000_000], [64_000] * 20):
            for salt in range(20):
                documents = [document(1000 * salt + index, size) for index, size in enumerate(sizes)]
                total = sum(d.size for d in documents)
                share = held(documents, fraction) / total
                assert fraction / 3 <= share <= 3 * fraction + 2 * TAIL_BYTES / total, (sizes, salt, share)


def test_in_the_mean_the_share_is_exact() -> None:
    """Each size has a rule of its own: they must meet."""
    for size in 500, TAIL_BYTES - 300, TAIL_BYTES + 300, 40_000, 300_000:
        documents = [document(seed, size) for seed in range(3000 if size < 40_000 else 300)]
        parts = [part(d, 0.1).heldout for d in documents]
        share = sum(p.size for p in parts if p) / sum(d.size for d in documents)
        assert share == pytest.approx(0.1, rel=0.2 if size < 300_000 else 1e-3), size


@given(CORPORA, CORPORA, FRACTIONS, st.randoms(use_true_random=False))
def test_adding_moving_and_renaming_move_nothing(
    first: list[tuple[int, int]], second: list[tuple[int, int]], fraction: float, dice: random.Random
) -> None:
    """A text that was held out must stay so, or the next model is tested on what it was trained on."""
    before = [document(seed, size) for seed, size in first]
    after = before + [Document(f"new/{d.name}", d.text) for d in (document(seed, size) for seed, size in second)]
    dice.shuffle(after)
    for d in before:
        assert part(Document(f"moved/{d.name}", d.text), fraction)[1] == (
            None if (old := part(d, fraction).heldout) is None else Document(f"moved/{d.name}", old.text, tail=old.tail)
        )
    if fraction * sum(d.size for d in after) > 10 * TAIL_BYTES:  # enough that the rule alone decides
        pure = {held.text for d in before if (held := part(d, fraction).heldout)}
        assert pure <= {d.text for d in split(after, fraction).heldout}


@given(CORPORA)
def test_a_greater_fraction_holds_out_more_of_the_same(sizes: list[tuple[int, int]]) -> None:
    for d in (document(seed, size) for seed, size in sizes):
        texts = [held.text if (held := part(d, fraction).heldout) else "" for fraction in (0.005, 0.02, 0.1, 0.5)]
        assert all(more.endswith(less) for less, more in itertools.pairwise(texts))


def test_a_line_more_in_a_jsonl_moves_no_other(tmp_path: Path) -> None:
    """Lines were known by their numbers: one at the top moved all that follow."""
    lines = [json.dumps({"text": f"document {i} " + "word " * 50}) for i in range(600)]
    sides = []
    for name, content in ("a.jsonl", lines), ("b.jsonl", ['{"text": "a new one"}', *lines]):
        (tmp_path / name).write_text("\n".join(content))
        documents = list(read_documents([str(tmp_path / name)]))
        sides.append({d.text for d in documents if part(d, 0.1).heldout})
    assert 30 < len(sides[0]) < 90 and sides[0] == sides[1] - {"a new one"}


@given(st.integers(2, 40), st.integers(50, 20_000), FRACTIONS)
def test_conversations_stay_whole(count: int, size: int, fraction: float) -> None:
    """Half of one has no question, or no answer."""
    documents = [document(seed, size, "messages") for seed in range(count)]
    train, heldout = split(documents, fraction)
    assert sorted(d.text for d in [*train, *heldout]) == sorted(d.text for d in documents)
    assert train and heldout and not any(d.tail for d in heldout)


def test_equal_documents_go_together() -> None:
    """Many sets hold a document twice: one to learn and one to be tested on is no test."""
    for copies in 2, 7:
        documents = [document(seed, 3000, kind) for seed in range(4) for kind in ("text", "messages")] * copies
        train, heldout = split(documents, 0.3)
        assert train and heldout and not {d.text for d in train} & {d.text for d in heldout}
        assert set(Counter(d.text for d in heldout).values()) == {copies}
    assert split([document(1, 100, "messages")] * 3, 0.3).heldout == []


@pytest.mark.parametrize("text", ["x", "é", "😀"])
def test_a_character_is_not_cut(text: str) -> None:
    assert split([Document("a", text)], 0.5) == ([Document("a", text)], [])


@given(st.text(st.characters(codec="utf-8"), min_size=2), FRACTIONS)
def test_one_text_is_cut_between_characters(text: str, fraction: float) -> None:
    """A single book is the commonest first try."""
    (kept,), (end,) = split([Document("a", text)], fraction)
    assert kept.text + end.text == text and end.tail and not kept.tail
