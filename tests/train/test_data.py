"""From files to batches: nothing is lost, doubled, or attended across."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import ConfigError
from model.tokenizer import END_OF_TEXT, Tokenizer
from train import documents
from train.config import DataConfig
from train.data import TokenFile, TrainingData, permute, prepare
from train.documents import Document, is_heldout, read_documents
from train.examples import Pretraining

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


# reading


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder with what folders have in them."""
    root = tmp_path / "corpus"
    files: dict[str, bytes] = {
        "a.txt": b"first",
        "sub/b.md": "zweitens, größer".encode(),
        "sub/deep/c": b"third",
        "empty.txt": b"",
        "image.png": b"\x89PNG\0\0",
        "latin.txt": b"caf\xe9",
        ".git/config": b"hidden",
        "node_modules/x.js": b"not ours",
    }
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    (root / "link.txt").symlink_to(root / "a.txt")
    return root


def read(*paths: Path) -> dict[str, str]:
    return {document.name: document.text for document in read_documents([str(path) for path in paths])}


def test_a_folder_gives_its_text_files(corpus: Path) -> None:
    """A user points at a folder: text in, images, hidden files and other people's packages out."""
    want = {"corpus/a.txt": "first", "corpus/sub/b.md": "zweitens, größer", "corpus/sub/deep/c": "third"}
    assert read(corpus) == want
    assert list(read(corpus)) == sorted(want)


def test_a_file_that_is_too_large_for_a_folder_can_be_named(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large dump in a folder is left out; naming it takes it."""
    monkeypatch.setattr(documents, "MAX_FILE_BYTES", 5)
    assert set(read(corpus)) == {"corpus/a.txt", "corpus/sub/deep/c"}
    assert read(corpus / "sub" / "b.md") == {"b.md": "zweitens, größer"}


def test_jsonl_gives_a_document_a_line(tmp_path: Path) -> None:
    """The usual format of text collections."""
    path = tmp_path / "c.jsonl"
    lines = [
        json.dumps({"text": "one\ntwo", "id": 3}),
        "",
        json.dumps({"text": ""}),
        json.dumps({"text": "drei ü"}),
    ]
    path.write_text("\n".join(lines) + "\n")
    assert read(path) == {"c.jsonl:1": "one\ntwo", "c.jsonl:4": "drei ü"}


@pytest.mark.parametrize(
    "line",
    [
        *("{", "[1]", '"text"', '{"body": 1}', '{"text": 3}', '{"text": null}', "7", r'{"text": "\ud800"}'),
        *('{"messages": []}', '{"messages": "hi"}', '{"messages": ["hi"]}', '{"messages": [{"content": "hi"}]}'),
        *('{"messages": [{"role": "user"}]}', '{"messages": [{"role": "user", "content": 3}]}'),
        r'{"messages": [{"role": "user", "content": "\udc00"}]}',
        '{"text": "a", "messages": [{"role": "user", "content": "hi"}]}',
    ],
)
def test_a_wrong_line_is_named(line: str, tmp_path: Path) -> None:
    """In a file of a million lines the number is the message."""
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=r"c\.jsonl:2"):
        read(path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("absent.txt", None, "does not exist"),
        ("absent.jsonl", None, "does not exist"),
        ("empty.txt", b"", "is empty"),
        ("binary.bin", b"a\0b", "not UTF-8"),
        ("latin.txt", b"caf\xe9", "not UTF-8"),
        ("latin.jsonl", b'{"text": "caf\xe9"}\n', "UTF-8"),
    ],
)
def test_a_path_that_cannot_be_read_is_named(name: str, data: bytes | None, message: str, tmp_path: Path) -> None:
    """A path that was named must be read or refused, never skipped."""
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ConfigError, match=message) as error:
        read(path)
    assert name in str(error.value)


# splitting


def test_adding_a_document_moves_none() -> None:
    """A text that was held out must stay so, or the model is tested on what it was trained on."""
    names = [f"corpus/{i}.txt" for i in range(2000)]
    held = {name for name in names if is_heldout(name, 0.1)}
    assert 0.07 < len(held) / len(names) < 0.13
    assert held < {name for name in names if is_heldout(name, 0.2)}


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


def test_few_documents_still_hold_one_out(tmp_path: Path) -> None:
    """With three documents and 2 % no name may fall into the split; a run without a held-out loss says nothing."""
    data = prepared(tmp_path / "run", [write_many(tmp_path / "corpus", 3)], heldout_fraction=1e-9)
    assert len(texts_of(data.heldout)) == 1 and len(texts_of(data.train)) == 2


def test_too_little_text_is_said(tmp_path: Path) -> None:
    """One character can't be split in two."""
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ConfigError, match="too little"):
        prepared(tmp_path / "run", [tmp_path / "a.txt"])


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
