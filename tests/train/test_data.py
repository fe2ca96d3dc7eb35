"""From files to batches: nothing is lost, doubled, or attended across."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Inner
from tokenizers import processors

from isthmus.errors import ConfigError
from isthmus.model.text.tokenizer import END_OF_TEXT, Tokenizer
from isthmus.train.config import DataConfig
from isthmus.train.data import TokenFile, TrainingData, permute, prepare
from isthmus.train.documents import Document
from isthmus.train.examples import Pretraining

TOKENIZER = Tokenizer.train(["some text to learn a few merges from, some more text"] * 3, 280)
EOS = TOKENIZER.eos_id


def write_split(folder: Path, texts: list[str], name: str = "split") -> TokenFile:
    split = [Document(f"{i}", text) for i, text in enumerate(texts)]
    return TokenFile.write(folder / name, split, Pretraining(TOKENIZER), lambda size: None)


def make_data(folder: Path, texts: list[str], seq: int, seed: int = 0) -> TrainingData:
    return TrainingData(write_split(folder, texts, "train"), write_split(folder, texts, "heldout"), seq, seed)


TEXTS = [f"document {i} " + "word " * (3 * i) for i in range(12)]


# order


@given(st.integers(1, 3000), st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=4))
def test_permute_is_a_permutation(size: int, key: list[int]) -> None:
    """A window that came up twice or never would be learned by heart or not at all."""
    shuffled = permute(np.arange(size), size, np.array(key, np.int64))
    assert sorted(shuffled.tolist()) == list(range(size))


def test_permute_shuffles_and_needs_no_whole() -> None:
    """Resuming asks for any part of the order: it must be the same part."""
    key = np.array([1, 2, 3, 4], np.int64)
    whole = permute(np.arange(1000), 1000, key)
    np.testing.assert_array_equal(permute(np.array([998, 3, 500]), 1000, key), whole[[998, 3, 500]])
    assert (whole != np.arange(1000)).mean() > 0.9
    assert (whole != permute(np.arange(1000), 1000, key + 1)).mean() > 0.9
    assert abs(np.corrcoef(np.arange(1000), whole)[0, 1]) < 0.1
    assert permute(np.array([2**40]), 2**40 + 1, key)[0] <= 2**40


@pytest.mark.parametrize("sequences", [1, 4, 7])
@pytest.mark.parametrize("size", [9, 16, 17, 18, 203])
def test_an_epoch_visits_every_window_once(sequences: int, size: int) -> None:
    """An epoch that skips text wastes it; one that repeats text counts it twice."""
    split = TokenFile(np.arange(size, dtype=np.uint16), np.array([size]), 0)  # a token tells where its window began
    data = TrainingData(split, split, 8, seed=1)
    windows = (size - 1) // 8
    starts: list[int] = []
    for step in range(-(-3 * windows // sequences)):
        starts.extend(data.batch(step, sequences, 1).tokens[0, :, 0].tolist())
    epochs = [starts[epoch * windows : (epoch + 1) * windows] for epoch in range(3)]
    shifts = [min(epoch) for epoch in epochs]
    for epoch, shift in zip(epochs, shifts, strict=True):
        assert sorted(epoch) == [shift + 8 * i for i in range(windows)] and shift < 8
    if windows > 8:
        assert len(set(map(tuple, epochs))) == 3, "each epoch has an order of its own"
        assert len(set(shifts)) > 1, "each epoch cuts elsewhere"


def test_a_batch_depends_on_seed_and_step_alone(tmp_path: Path) -> None:
    """Resuming at a step must bring the batch that the step would have had."""
    data = make_data(tmp_path, TEXTS, seq=8, seed=3)
    later = [data.batch(step, 4, 2) for step in (9, 2, 5)]
    again = make_data(tmp_path, TEXTS, seq=8, seed=3)
    for step, batch in zip((9, 2, 5), later, strict=True):
        for got, want in zip(again.batch(step, 4, 2), batch, strict=True):
            np.testing.assert_array_equal(got, want)
    other = make_data(tmp_path, TEXTS, seq=8, seed=4)
    assert not all(np.array_equal(other.batch(s, 4, 2).tokens, data.batch(s, 4, 2).tokens) for s in range(3))


def test_accumulation_cuts_the_same_batch(tmp_path: Path) -> None:
    """--accumulate must not change which sequences a step sees."""
    data = make_data(tmp_path, TEXTS, seq=8)
    for whole, parts in zip(data.batch(3, 4, 1), data.batch(3, 4, 2), strict=True):
        assert parts.shape == (2, 2, 8)
        np.testing.assert_array_equal(parts.reshape(whole.shape), whole)


# windows


def test_documents_lie_end_to_end(tmp_path: Path) -> None:
    """The end-of-text token is what tells the model that a text begins, and that the one before has ended."""
    split = write_split(tmp_path, TEXTS)
    assert split.tokens.tolist() == [token for text in TEXTS for token in TOKENIZER.encode(text)]
    assert (split.tokens == EOS).sum() == len(TEXTS)
    assert split.text_bytes == sum(len(text.encode()) for text in TEXTS)
    lengths = np.diff(np.concatenate([[0], split.ends]))
    assert lengths.tolist() == [len(TOKENIZER.encode(text)) for text in TEXTS]


@given(st.lists(st.integers(-3, 250), min_size=1, max_size=5), st.integers(1, 40))
def test_segments_and_positions_start_anew_at_each_document(starts: list[int], seq: int) -> None:
    """A segment that ran on would let a document attend to another one."""
    tokens, ends = _tokens_and_ends()
    split = TokenFile(tokens, ends, 0)
    batch = split.batch(np.maximum(np.array(starts), 0), seq)
    for row, start in enumerate(np.maximum(starts, 0).tolist()):
        segment, position = 0, -1
        for column in range(seq):
            at = start + column
            if at >= len(tokens):
                assert batch.segments[row, column] == -1
                assert batch.weights[row, column] == 0
                continue
            position += 1
            if column and tokens[at] == EOS:
                segment, position = segment + 1, 0
            assert batch.tokens[row, column] == tokens[at]
            assert batch.segments[row, column] == segment
            assert batch.positions[row, column] == position
            has_target = at + 1 < len(tokens)
            assert batch.weights[row, column] == has_target
            if has_target:
                assert batch.targets[row, column] == tokens[at + 1]


def _tokens_and_ends() -> tuple[np.ndarray, np.ndarray]:
    encoded = [TOKENIZER.encode(text) for text in TEXTS[:6]]
    tokens = np.array([token for ids in encoded for token in ids], np.uint16)
    return tokens, np.cumsum([len(ids) for ids in encoded])


@pytest.mark.parametrize("sequences", [1, 3, 64])
@pytest.mark.parametrize("seq", [1, 7, 16, 500])
def test_heldout_counts_every_target_once(sequences: int, seq: int, tmp_path: Path) -> None:
    """The published loss is over all held-out text: no target left out, none counted twice, whatever the batch."""
    data = make_data(tmp_path, TEXTS[:4], seq)
    total = len(data.heldout.tokens) - 1
    batches = list(data.heldout_batches(sequences))
    assert {batch.tokens.shape for batch in batches} == {(1, sequences, seq)}
    assert sum(batch.weights.sum() for batch in batches) == total
    counted = [int(t) for b in batches for t, w in zip(b.targets.ravel(), b.weights.ravel(), strict=True) if w]
    assert counted == data.heldout.tokens[1:].tolist()


def test_text_shorter_than_a_sequence_trains(tmp_path: Path) -> None:
    """A first try with a line of text must train on it, padded, not fail."""
    data = make_data(tmp_path, ["short"], seq=64)
    batch = data.batch(0, 2, 1)
    size = len(TOKENIZER.encode("short"))
    assert batch.weights.sum() == 2 * (size - 1)
    np.testing.assert_array_equal(batch.tokens[0, 0], batch.tokens[0, 1])


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    """Nothing to train on must be said before the model is compiled."""
    with pytest.raises(ConfigError, match="no document"):
        write_split(tmp_path, [])


# splitting


def prepared(folder: Path, paths: list[Path], **options: float | int | Path) -> TrainingData:
    config = DataConfig(**{"vocab_size": 257, "seq": 16, **options})  # type: ignore[arg-type]
    return prepare(tuple(map(str, paths)), config, folder, seed=0)[0]


def texts_of(split: TokenFile) -> set[str]:
    tokenizer = Tokenizer.train([], 257)
    parts = np.split(np.asarray(split.tokens), split.ends[:-1])
    return {tokenizer.decode(part.tolist()) for part in parts}


def write_many(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i}.txt").write_text(f"text number {i}")
    return folder


def test_the_split_is_stable_and_whole(tmp_path: Path) -> None:
    """Every document is in one split and one only, also after the folder has grown."""
    corpus = write_many(tmp_path / "corpus", 40)
    before = prepared(tmp_path / "run1", [corpus], heldout_fraction=0.2)
    write_many(corpus, 60)
    after = prepared(tmp_path / "run2", [corpus], heldout_fraction=0.2)
    assert texts_of(before.heldout) <= texts_of(after.heldout)
    assert texts_of(before.train) <= texts_of(after.train)
    assert not texts_of(after.heldout) & texts_of(after.train)
    assert texts_of(after.heldout) | texts_of(after.train) == {f"text number {i}" for i in range(60)}


def test_one_document_still_holds_some_out(tmp_path: Path) -> None:
    """A single book is the commonest first try."""
    book = tmp_path / "book.txt"
    book.write_text("".join(f"sentence {i}. " for i in range(1000)))
    data = prepared(tmp_path / "run", [book], heldout_fraction=0.1)
    (held,), (kept,) = texts_of(data.heldout), texts_of(data.train)
    assert kept + held == book.read_text()
    assert len(held) / len(book.read_text()) == pytest.approx(0.1, abs=0.01)


def test_few_documents_still_hold_some_out(tmp_path: Path) -> None:
    """A run without a held-out loss says nothing; one that holds a third out where a fiftieth was asked learns less."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name in "abc":
        (corpus / name).write_text("".join(f"{name} says {i}. " for i in range(100)))
    data = prepared(tmp_path / "run", [corpus], heldout_fraction=0.05)
    held, total = data.heldout.text_bytes, sum(path.stat().st_size for path in corpus.iterdir())
    assert held + data.train.text_bytes == total and held / total == pytest.approx(0.05, rel=0.3)
    assert (len(data.train.ends), len(data.heldout.ends), data.heldout.tails) == (3, 1, 1)


def test_too_little_text_is_said(tmp_path: Path) -> None:
    """One character can't be split in two."""
    (tmp_path / "a.txt").write_text("ü")
    with pytest.raises(ConfigError, match="too little"):
        prepared(tmp_path / "run", [tmp_path / "a.txt"])


def test_a_folder_without_text_says_what_was_in_it(tmp_path: Path) -> None:
    """The commonest cause is the wrong folder, or files of another format."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "data.parquet").write_bytes(b"PAR1\0")
    with pytest.raises(ConfigError, match=r"no text in .*corpus: 0 files read, .* 1 binary \(corpus/data\.parquet\)"):
        prepared(tmp_path / "run", [tmp_path / "corpus"])


def write_byte_level(path: Path, *, around: str | None) -> Tokenizer:
    """A tokenizer as GPT-2's and Qwen's, whose post-processor adds nothing; or puts `around` ("$A" and tokens)."""
    fields = json.loads(TOKENIZER._inner.to_str())
    tokens = {END_OF_TEXT: EOS, "<s>": 1}
    fields["post_processor"] = None
    inner = Inner.from_str(json.dumps(fields))
    if around:
        inner.post_processor = processors.TemplateProcessing(single=around, special_tokens=list(tokens.items()))
    inner.save(str(path))
    return Tokenizer.load(path)


@pytest.mark.parametrize(
    ("around", "parted"),
    [
        (None, ["A", "E", "B", "E"]),
        (f"{END_OF_TEXT} $A", ["E", "A", "E", "B"]),
        (f"$A {END_OF_TEXT}", ["A", "E", "B", "E"]),
        ("<s> $A", ["s", "A", "E", "s", "B", "E"]),
    ],
)
def test_documents_are_parted_once_whatever_the_tokenizer_adds(
    around: str | None, parted: list[str], tmp_path: Path
) -> None:
    """Without an end between them nothing teaches a model to stop; two of them teach it to say nothing."""
    tokenizer = write_byte_level(tmp_path / "tokenizer.json", around=around)
    documents = [Document("1", "some text"), Document("2", "more text")]
    split = TokenFile.write(tmp_path / "split", documents, Pretraining(tokenizer), lambda size: None)
    first, second = (tokenizer.encode_chat(document.text) for document in documents)
    pieces = {"A": first, "B": second, "E": [EOS], "s": [1]}
    assert split.tokens.tolist() == [token for name in parted for token in pieces[name]]
    second_starts = sum(len(pieces[name]) for name in parted[: len(parted) // 2])
    assert split.ends.tolist() == [second_starts, len(split.tokens)]


def test_prepared_data_is_reused_only_for_the_same_text(tmp_path: Path) -> None:
    """Resuming must not tokenize for an hour again, and must not train on yesterday's text."""
    corpus = write_many(tmp_path / "corpus", 20)
    ticks: list[str] = []
    run: Callable[[], TrainingData] = lambda: prepare(  # noqa: E731
        (str(corpus),),
        DataConfig(vocab_size=257, seq=16),
        tmp_path / "run",
        0,
        lambda stage, _: ticks.append(stage),
    )[0]
    first = run()
    assert ticks
    ticks.clear()
    second = run()
    assert not ticks
    np.testing.assert_array_equal(first.train.tokens, second.train.tokens)
    (corpus / "3.txt").write_text("another text")
    assert "another text" in texts_of(run().train) | texts_of(run().heldout)
    assert ticks


def test_a_torn_write_is_not_reused(tmp_path: Path) -> None:
    """A run that was killed while it tokenized must tokenize again."""
    corpus = write_many(tmp_path / "corpus", 20)
    whole = np.array(prepared(tmp_path / "run", [corpus]).train.tokens)
    (tmp_path / "run" / "data" / "source.json").unlink()
    (tmp_path / "run" / "data" / "train.bin").write_bytes(b"\1\0")
    np.testing.assert_array_equal(prepared(tmp_path / "run", [corpus]).train.tokens, whole)


def test_a_tokenizer_of_ones_own(tmp_path: Path) -> None:
    """--text.tokenizer must be used as it is, and refused when it can't part documents."""
    corpus = write_many(tmp_path / "corpus", 20)
    TOKENIZER.save(tmp_path / "mine.json")
    data = prepared(tmp_path / "run", [corpus], tokenizer=tmp_path / "mine.json")
    assert max(data.train.tokens) > 256, "its merges were not used"
    text = (tmp_path / "mine.json").read_text().replace(END_OF_TEXT, "<|other|>")
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ConfigError, match=r"text\.tokenizer"):
        prepared(tmp_path / "run2", [corpus], tokenizer=tmp_path / "other.json")
