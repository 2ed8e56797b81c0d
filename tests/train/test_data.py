"""Corpora, packing and the loader."""

import gzip
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.core.errors import ConfigError, DataError
from attnlab.data.corpus import load_corpus
from attnlab.data.packing import PackedRows, first_fit_decreasing
from attnlab.data.readers import Document
from attnlab.data.tokenizer import ByteTokenizer
from attnlab.train.data import DataConfig, build_rows, eval_batches, make_loader

BOS = 256


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


def texts(docs):
    return {d.name: d.text for d in docs}


# ---- corpora


def test_stdlib_corpus():
    corpus = load_corpus()
    names = [d.name for d in corpus.train + corpus.val]
    assert "stdlib/argparse.py" in names and len(names) == len(set(names))
    assert not any(part in n.split("/") for n in names for part in ("test", "idlelib", "encodings"))
    assert 2e6 < sum(len(d) for d in corpus.train) < 5e7
    assert 0.005 < len(corpus.val) / len(names) < 0.2
    assert corpus.fingerprint == load_corpus().fingerprint and len(corpus.fingerprint) == 16
    assert "train" in corpus.description
    assert [d.name for d in corpus.train] == sorted(d.name for d in corpus.train)


def test_packages_extend_stdlib(monkeypatch, tmp_path):
    import sysconfig

    lib = write(tmp_path / "lib", {"a.py": "x = 1\n", "test/b.py": "no", "config-3/c.py": "no"})
    site = write(tmp_path / "site", {"p/q.py": "y = 2\n", "p/tests/r.py": "no", "p/data.txt": "no"})
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": lib, "purelib": site}.__getitem__)
    corpus = load_corpus(["stdlib+packages"], val_fraction=0)
    assert texts(corpus.train) == {"packages/p/q.py": b"y = 2\n", "stdlib/a.py": b"x = 1\n"}


def test_folder_split_does_not_depend_on_place_or_order(tmp_path):
    files = {f"sub{i % 3}/f{i}.txt": f"text {i}\r\n" for i in range(60)}
    a = load_corpus([write(tmp_path / "a", files)], val_fraction=0.2)
    b = load_corpus([write(tmp_path / "b" / "c", dict(reversed(files.items())))], val_fraction=0.2)
    assert a.fingerprint == b.fingerprint and texts(a.val) == texts(b.val)
    assert {**texts(a.train), **texts(a.val)} == {k: v.encode() for k, v in files.items()}
    assert 3 <= len(a.val) <= 24
    c = load_corpus([write(tmp_path / "c", dict.fromkeys(files, "same"))], val_fraction=0.2)
    assert texts(c.val).keys() == texts(a.val).keys() and c.fingerprint != a.fingerprint
    (tmp_path / "a/sub0/f0.txt").write_text("other")
    assert load_corpus([str(tmp_path / "a")], val_fraction=0.2).fingerprint != a.fingerprint
    assert load_corpus([str(tmp_path / "b/c")], val_fraction=0.3).fingerprint != b.fingerprint


def test_item_order_does_not_matter(tmp_path):
    x, y = write(tmp_path / "x", {"a.txt": "1"}), write(tmp_path / "y", {"a.txt": "2"})
    one, two = load_corpus([x, y]), load_corpus([y, x])
    assert one.fingerprint == two.fingerprint and texts(one.train) == texts(two.train)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_tiny_corpus_gets_both_splits(tmp_path, count):
    folder = write(tmp_path, {f"{i}.txt": f"doc {i}" for i in range(count)})
    for fraction in (0.001, 0.999):
        corpus = load_corpus([folder], val_fraction=fraction)
        assert corpus.train and corpus.val and len(corpus.train) + len(corpus.val) == count
        assert 1 in (len(corpus.train), len(corpus.val))


def test_single_text_is_cut_at_a_newline(tmp_path):
    text = "".join(f"line {i} é\n" for i in range(100)).encode()
    corpus = load_corpus([write(tmp_path, {"a.txt": text, "empty.txt": ""}) + "/*.txt"])
    (train,), (val,) = [d for d in corpus.train if len(d)], corpus.val
    assert train.text + val.text == text and train.text.endswith(b"\n")
    assert 0.03 < len(val.text) / len(text) < 0.08
    for text in ("é" * 9, "中" * 5, "ab", "a\nb", "\n\n", "long line\nx" * 2):
        one = load_corpus([write(tmp_path / "one", {"b": text}) + "/b"], val_fraction=0.3)
        parts = one.train[0].text.decode(), one.val[0].text.decode()
        assert "".join(parts) == text and all(parts)
    with pytest.raises(DataError, match=r"b, 1 long: is too small to be cut"):
        load_corpus([write(tmp_path / "one", {"b": "a"}) + "/b"])


def test_val_data(tmp_path):
    folder = write(tmp_path, {"t/a.txt": "a", "t/b.txt": "b", "v/c.md": "c"})
    corpus = load_corpus([f"{folder}/t"], val_data=[f"{folder}/v"])
    assert texts(corpus.train) == {"a.txt": b"a", "b.txt": b"b"}
    assert texts(corpus.val) == {"c.md": b"c"}
    with pytest.raises(DataError, match=r"a.txt: comes from both .*name each file once"):
        load_corpus([f"{folder}/t"], val_data=[f"{folder}/t/a.txt"])


def test_glob_and_relative_paths(tmp_path, monkeypatch):
    write(tmp_path, {"d/x/a.log": "a", "d/b.log": "b", "d/c.txt": "c"})
    monkeypatch.chdir(tmp_path)
    for pattern in ("d/**/*.log", str(tmp_path / "d/**/*.log")):
        corpus = load_corpus([pattern])
        assert texts(corpus.train + corpus.val) == {"x/a.log": b"a", "b.log": b"b"}
    np.array([1, 2, 3], "<u2").tofile("ids.bin")
    assert load_corpus(["ids.bin"], token_dtype="uint16", val_fraction=0).train[0].name == "ids.bin"


def test_jsonl(tmp_path):
    lines = "".join(json.dumps({"text": f"t{i}\u2028\r\n", "id": i}) + "\n" for i in range(30))
    write(tmp_path, {"a.jsonl": lines + "\n", "b.jsonl.gz": gzip.compress(lines.encode())})
    plain = load_corpus([str(tmp_path / "a.jsonl")])
    zipped = load_corpus([str(tmp_path / "b.jsonl.gz")])
    docs = {**texts(plain.train), **texts(plain.val)}
    assert docs == {f"a.jsonl:{i + 1}": f"t{i}\u2028\r\n".encode() for i in range(30)}
    assert plain.train and plain.val and len(zipped.train + zipped.val) == 30
    both = load_corpus([str(tmp_path)], val_fraction=0)
    assert [d.name for d in both.train[:3]] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]


def test_token_arrays(tmp_path):
    ids = np.arange(100, dtype=np.int64)
    np.save(tmp_path / "a.npy", ids)
    ids.astype("<u2").tofile(tmp_path / "b.bin")
    corpus = load_corpus([str(tmp_path)], token_dtype="uint16", val_fraction=0)
    assert [d.tokens.tolist() for d in corpus.train] == [ids.tolist()] * 2
    assert all(isinstance(d.tokens, np.memmap) for d in corpus.train)
    one = load_corpus([str(tmp_path / "a.npy")])
    assert [len(one.train[0]), len(one.val[0])] == [95, 5]
    rows = build_rows(corpus.train, ByteTokenizer(), 16)
    assert rows.doc_starts.tolist() == [0, 101] and rows.bytes_per_token is None


def test_remote(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    files = {"a.txt": b"a\r\n", "s/b.jsonl": b'{"text": "b"}\n', "s/c.bin": b"\1\0\2\0"}
    for name, content in files.items():
        with fsspec.open(f"memory://corpus/{name}", "wb") as f:
            f.write(content)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    far = load_corpus(["memory://corpus"], token_dtype="uint16")
    near = load_corpus([str(tmp_path)], token_dtype="uint16")
    assert far.fingerprint == near.fingerprint
    names = sorted(d.name for d in far.train + far.val)
    assert names == ["a.txt", "s/b.jsonl:1", "s/c.bin"]
    assert load_corpus(["memory://corpus/**/*.txt"], val_fraction=0).train[0].text == b"a\r\n"
    assert load_corpus(["memory://corpus/a.txt"], val_fraction=0).train[0].name == "a.txt"
    with pytest.warns(UserWarning, match=r"left out of memory://corpus/\*: 1 folder"):
        load_corpus(["memory://corpus/*"])
    with pytest.raises(DataError, match=r"memory://corpus/none.*does not exist"):
        load_corpus(["memory://corpus/none"])
    with pytest.raises(DataError, match="no file system serves it"):
        load_corpus(["nosuchscheme://x"])


BAD_FILES = [
    (
        {"a.txt": b"ok\nab\xffc"},
        "a.txt",
        r"a\.txt, line 2: byte 5 \(0xff\) is not valid UTF-8.*Fix",
    ),
    ({"a.jsonl": b'{"text": "x"}\n\n{"text": '}, "", r"a\.jsonl, line 3: is not JSON .*column"),
    (
        {"a.jsonl": b'{"text": "x"}\n{"body": "y"}'},
        "",
        r"line 2: has no field 'text', only \['body'",
    ),
    ({"a.jsonl": b'{"text": 7}\n'}, "", r"line 1: field 'text' must be a string, is int 7"),
    ({"a.jsonl": b"[1]\n"}, "", r"line 1: must be a JSON object, is a list"),
    ({"a.jsonl": b'{"text": "x"}\n{"text": "\xff"}'}, "", r"a\.jsonl, line 2: byte 10"),
    ({"a.jsonl": b'{"text": "\\ud800"}'}, "", r"line 1: field 'text' holds half a surrogate"),
    ({"a.jsonl.gz": b"nonsense"}, "", r"a\.jsonl\.gz: is not whole gzip"),
    ({"a.bin": b"\1\0\2"}, "", r"a\.bin: raw token ids do not say their dtype.*token_dtype"),
    ({"a.npy": b"nonsense"}, "", r"a\.npy: is not a whole \.npy"),
    ({"a.png": b"x", "b.pdf": b"x"}, "", r"a folder is read for \.txt .*holds 1 \.pdf, 1 \.png"),
    ({"a.parquet": b"x"}, "a.parquet", r"a\.parquet: is not text, JSON lines or a token array"),
    ({"a.txt": b"x"}, "b.txt", r"b\.txt': does not exist. Fix: name a file"),
    ({"a.txt": b"x"}, "*.md", r"glob .*\*\.md: matches no file. Fix"),
    ({"a.txt": b"", "b.txt": b""}, "", r"holds no text at all"),
    ({".hidden/a.txt": b"x"}, "", r"folder .*matches no file"),
]


@pytest.mark.parametrize("files,item,message", BAD_FILES)
def test_bad_files(tmp_path, files, item, message):
    with pytest.raises(DataError, match=message) as e:
        load_corpus([f"{write(tmp_path, files)}/{item}".rstrip("/")])
    assert str(tmp_path) in str(e.value) and "Fix: " in str(e.value)


def test_bad_arguments_and_arrays(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\1\0\2")
    with pytest.raises(DataError, match=r"3 bytes are not a whole number of ids of uint16"):
        load_corpus([str(tmp_path)], token_dtype="uint16")
    with pytest.raises(DataError, match="token_dtype = 'float32': must be an integer"):
        load_corpus([str(tmp_path)], token_dtype="float32")
    np.array([3, -1], "<i4").tofile(tmp_path / "a.bin")
    with pytest.raises(DataError, match=r"a\.bin: id 1 is -1, ids must be >= 0"):
        load_corpus([str(tmp_path)], token_dtype="int32")
    for array in (np.ones(3), np.ones((2, 2), int)):
        np.save(tmp_path / "f.npy", array)
        with pytest.raises(DataError, match=r"f\.npy: must hold integers \[T\]"):
            load_corpus([str(tmp_path / "f.npy")])
    with pytest.raises(DataError, match="list of items"):
        load_corpus("stdlib")
    with pytest.raises(DataError, match="val_fraction = 1"):
        load_corpus(val_fraction=1)


def test_left_out_files_are_reported(tmp_path):
    with pytest.warns(UserWarning, match=r"left out of .*: 1 \.png"):
        corpus = load_corpus([write(tmp_path, {"a.txt": "a\nb\n", "b.png": "x"})])
    assert "1 .png" in corpus.description


def test_hidden_files_and_folders_of_a_glob_are_reported(tmp_path):
    folder = write(tmp_path, {"a.txt": "a\nb\n", ".h.txt": "x", ".g/b.txt": "x", "s/c.txt": "c"})
    with pytest.warns(UserWarning, match=r"left out of .*: 2 hidden$"):
        corpus = load_corpus([folder])
    assert corpus.description.endswith(f"left out of {folder}: 2 hidden")
    with pytest.warns(UserWarning, match=r"left out of .*\*: 1 folder \(\*\* reads folders\)$"):
        corpus = load_corpus([f"{folder}/*"])
    assert "1 folder" in corpus.description
    (tmp_path / "empty").mkdir()
    assert "left out" not in load_corpus([f"{folder}/**"]).description
    with pytest.raises(DataError, match=r"matches no file, only 1 folder"):
        load_corpus([f"{folder}/s*"])


# ---- packing

lengths = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any)


def rows_of(sizes, seq_len, **kw):
    """Rows whose non-BOS ids are all different, so that each can be counted."""
    stream, starts, next_id = [], [], 1000
    for n in sizes:
        starts.append(len(stream))
        stream += [BOS, *range(next_id, next_id + n)]
        next_id += n
    return PackedRows(np.array(stream, np.int32), np.array(starts), seq_len, BOS, **kw)


@settings(max_examples=150, deadline=None)
@given(lengths, st.integers(1, 8), st.sampled_from(["concat", "fit"]), st.booleans())
def test_packing(sizes, seq_len, packing, document_mask):
    rows = rows_of(sizes, seq_len, packing=packing, document_mask=document_mask)
    stream, real, doc_of, seen, ends = rows.tokens, 0, {}, [], 0
    for d, (lo, hi) in enumerate(itertools.pairwise([*rows.doc_starts, len(stream)])):
        doc_of.update({int(t): (d, j) for j, t in enumerate(stream[lo:hi]) if t != BOS})
    after = {int(a): int(b) for a, b in itertools.pairwise([*stream, BOS]) if a != BOS}
    for row in (rows[i] for i in range(len(rows))):
        assert {k: (v.dtype.name, v.shape) for k, v in row.items()} == {
            k: ("float32" if k == "loss_mask" else "int32", (seq_len,)) for k in row
        }
        on = row["segments"] > 0
        n = int(on.sum())
        real += n
        assert on[:n].all() and n  # padding only at the end
        for key in ("tokens", "targets", "positions", "loss_mask"):
            assert not row[key][~on].any()
        assert (row["loss_mask"][on] == 1).all()
        targets = row["targets"][on]
        seen += targets[targets != BOS].tolist()
        ends += int((targets == BOS).sum())
        for t, y in zip(row["tokens"][on], targets):
            assert t == BOS or y == after[int(t)]
        if document_mask:
            seg = row["segments"][on]
            assert seg[0] == 1 and set(np.diff(seg)) <= {0, 1}
            for s in range(1, seg[-1] + 1):
                place = seg == s
                assert (row["positions"][on][place] == np.arange(place.sum())).all()
                docs = {doc_of[int(t)][0] for t in row["tokens"][on][place] if t != BOS}
                assert len(docs) <= 1 and (row["tokens"][on][place][1:] != BOS).all()
        else:
            assert (row["segments"][on] == 1).all()
            assert (row["positions"][on] == np.arange(n)).all()
    assert sorted(seen) == sorted(doc_of) and ends == len(sizes), "all tokens and all ends, once"
    assert rows.num_targets == sum(sizes) + len(sizes)
    assert rows.fill == real / (len(rows) * seq_len)
    with pytest.raises(IndexError):
        rows[len(rows)]


@settings(max_examples=50, deadline=None)
@given(lengths, st.integers(1, 8))
def test_concat_is_the_stream(sizes, seq_len):
    rows = rows_of(sizes, seq_len)
    n = len(rows.tokens)
    assert len(rows) == -(-n // seq_len)
    tokens = np.concatenate([r["tokens"] for r in (rows[i] for i in range(len(rows)))])
    targets = np.concatenate([r["targets"] for r in (rows[i] for i in range(len(rows)))])
    np.testing.assert_array_equal(tokens[:n], rows.tokens)
    np.testing.assert_array_equal(targets[:n], [*rows.tokens[1:], BOS])
    assert not tokens[n:].any() and not targets[n:].any()


def test_fit_by_hand():
    """T = 4: pieces of 4, 3 | 2 | 1 (BOS alone) | 4 tokens, BOS included."""
    rows = rows_of([6, 1, 0, 3], 4, packing="fit")
    assert len(rows) == 4 and rows.fill == 14 / 16
    assert [rows[i]["tokens"].tolist() for i in range(4)] == [
        [BOS, 1000, 1001, 1002],
        [BOS, 1007, 1008, 1009],
        [1003, 1004, 1005, BOS],
        [BOS, 1006, 0, 0],
    ]
    assert [rows[i]["targets"].tolist() for i in range(4)] == [
        [1000, 1001, 1002, 1003],
        [1007, 1008, 1009, BOS],
        [1004, 1005, BOS, BOS],  # the empty document ends at once
        [1006, BOS, 0, 0],
    ]
    assert rows[3]["loss_mask"].tolist() == [1, 1, 0, 0]
    assert rows[2]["segments"].tolist() == [1, 1, 1, 2]
    assert rows[2]["positions"].tolist() == [0, 1, 2, 0]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=30), st.integers(12, 15))
def test_first_fit_decreasing_is_first_fit(sizes, capacity):
    sizes = np.array(sizes)
    room, expected = [], np.zeros(len(sizes), int)
    for i in np.argsort(-sizes, kind="stable"):
        row = next((r for r, free in enumerate(room) if free >= sizes[i]), len(room))
        room += [capacity] if row == len(room) else []
        room[row] -= sizes[i]
        expected[i] = row
    np.testing.assert_array_equal(first_fit_decreasing(sizes, capacity), expected)


def test_packed_rows_errors():
    good = dict(seq_len=4, bos=BOS)
    ids = np.array([BOS, 1, 2, BOS, 3])
    for starts in ([1], [0, 2], [0, 9], [0, 0], []):
        with pytest.raises(DataError, match="doc_starts"):
            PackedRows(ids, np.array(starts), **good)
    with pytest.raises(DataError, match="no token but 1 BOS"):
        PackedRows(np.array([BOS]), np.array([0]), **good)
    with pytest.raises(ConfigError, match="seq_len = 0"):
        PackedRows(ids, np.array([0, 3]), 0, BOS)
    with pytest.raises(ConfigError, match="packing = 'best'"):
        PackedRows(ids, np.array([0, 3]), 4, BOS, "best")


def test_build_rows(tmp_path):
    docs = [Document("a", b"hello", None), Document("b", b"", None), Document("c", b"xy", None)]
    rows = build_rows(docs, ByteTokenizer(), 4)
    assert rows.tokens.dtype == np.uint16 and rows.bytes_per_token == 7 / 10
    assert rows.tokens.tolist() == [BOS, *b"hello", BOS, BOS, *b"xy"]
    mixed = [*docs, Document("d", None, np.array([BOS, 7, BOS, 8], np.uint64))]
    mixed.append(Document("e", None, np.array([200, 9], np.uint8)))
    rows = build_rows(mixed, ByteTokenizer(), 4)
    assert rows.tokens.tolist()[10:] == [BOS, 7, BOS, 8, BOS, 200, 9]
    assert rows.doc_starts.tolist() == [0, 6, 7, 10, 12, 14] and rows.bytes_per_token is None
    assert build_rows(docs[:1], ByteTokenizer(), 4).tokens.dtype == np.uint16
    with pytest.raises(DataError, match=r"file bad: id 1 is 257, the vocabulary has 257"):
        build_rows([Document("bad", None, np.array([1, 257]))], ByteTokenizer(), 4)
    message = r"10 tokens: make 3 rows of seq_len = 4, one batch takes 8. Fix: use batch <= 3"
    with pytest.raises(DataError, match=message):
        build_rows(docs, ByteTokenizer(), 4, batch=8)
    with pytest.raises(DataError, match=message):
        make_loader(build_rows(docs, ByteTokenizer(), 4), batch=8, seed=0)
    with pytest.raises(DataError, match="holds no document"):
        build_rows([], ByteTokenizer(), 4)


# ---- loader


def take(loader, n):
    return [next(loader) for _ in range(n)]


def ids(batch):
    """The rows of a batch, by their last token."""
    return [tuple(row) for row in batch["tokens"]]


@pytest.fixture(scope="module")
def rows():
    return rows_of([50, 0, 3, 61, 1, 30], 4)  # 37 rows: no multiple of a batch


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_loader_shards_and_epochs(rows, shards):
    n, batch, steps = len(rows), 8, 20
    assert n % batch
    loaders = [make_loader(rows, batch=batch, seed=5, shard_index=s, shard_count=shards)
               for s in range(shards)]  # fmt: skip
    stream = []
    for _ in range(steps):
        local = [ids(next(loader)) for loader in loaders]
        assert all(len(rows_) == batch // shards for rows_ in local)
        stream += [row for group in zip(*local) for row in group]
    whole = [tuple(rows[i]["tokens"]) for i in range(n)]
    epochs = [stream[e * n : e * n + n] for e in range(steps * batch // n)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(whole) and epoch != whole
    assert epochs[0] != epochs[1]
    one = [r for b in take(make_loader(rows, batch=batch, seed=5), steps) for r in ids(b)]
    assert one == stream
    assert one != [r for b in take(make_loader(rows, batch=batch, seed=6), steps) for r in ids(b)]


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_loader_state(rows, threads):
    loader = make_loader(rows, batch=4, seed=1, threads=threads)
    batches = take(loader, 30)
    state = json.loads(json.dumps(loader.get_state()))
    assert state == {"step": 30}
    tail = take(loader, 5)
    loader.set_state(state)
    again = take(loader, 5)
    for step in (0, 7, 9, 29):  # 9: the batch across the epoch border
        fresh = next(make_loader(rows, batch=4, seed=1, start_step=step))
        again.append(fresh)
        tail.append(batches[step])
    for a, b in zip(tail, again, strict=True):
        assert a.keys() == b.keys() == rows[0].keys()
        for key in a:
            assert a[key].dtype == rows[0][key].dtype
            np.testing.assert_array_equal(a[key], b[key])
    for bad in ({}, {"step": -1}, {"step": "3"}):
        with pytest.raises(DataError, match="loader state"):
            loader.set_state(bad)


def test_loader_in_order(rows):
    got = [r for b in take(make_loader(rows, batch=4, seed=0, shuffle=False), 3) for r in ids(b)]
    assert got == [tuple(rows[i]["tokens"]) for i in range(12)]


@pytest.mark.parametrize("shards", [1, 2])
def test_eval_batches(rows, shards):
    parts = [list(eval_batches(rows, 8, s, shards)) for s in range(shards)]
    got = [r for group in zip(*parts) for rs in zip(*map(ids, group)) for r in rs]
    assert got[: len(rows)] == [tuple(rows[i]["tokens"]) for i in range(len(rows))]
    assert len(got) == 40 and all(b["tokens"].shape == (8 // shards, 4) for b in parts[0])
    assert sum(b["loss_mask"].sum() for part in parts for b in part) == rows.num_targets
    assert not any(any(r) for r in got[len(rows) :])
    assert len(list(eval_batches(rows, 8, limit=16))) == 2
    assert len(list(eval_batches(rows, 64))) == 1


def test_loader_errors(rows):
    with pytest.raises(ConfigError, match="batch = 6: must be a positive multiple of shard_count"):
        make_loader(rows, batch=6, seed=0, shard_count=4)
    with pytest.raises(ConfigError, match="shard_index = 2"):
        next(eval_batches(rows, 6, 2, 2))
    with pytest.raises(ConfigError, match="seed = -1"):
        make_loader(rows, batch=4, seed=-1)


def test_data_config():
    assert DataConfig(data=["a", "b"]).data == ("a", "b")
    bad = dict(data=(), packing="x", seed=-1, tokenizer="", token_dtype="float32", bos_token="<s>")
    for field, value in {**bad, "document_mask": 1, "val_data": "a", "text_field": ""}.items():
        with pytest.raises(ConfigError, match=field):
            DataConfig(**{field: value})
    with pytest.raises(ConfigError, match=r"data = 'stdlib': must be a tuple"):
        DataConfig(data="stdlib")
