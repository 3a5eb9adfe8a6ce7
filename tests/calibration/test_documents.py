"""Documents from files of every kind, in order, and one clear error for each way they can be unusable."""

import gzip
import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quantlib.calibration.corpus import read_documents
from quantlib.errors import CorpusError, StorageError, TransientStorageError

TEXTS = ["first\n\nwith a gap", "zweiter \u00e4\u00f6\u00fc", "third \u2028 line", " x "]


def write_parquet(path, columns, **how):
    pq.write_table(pa.table(columns), path, **how)


def json_lines(texts):
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def write_corpus(path, texts):
    name = path.name
    if name.endswith(".parquet"):
        write_parquet(path, {"id": list(range(len(texts))), "text": texts}, row_group_size=2)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(json_lines(texts)))
    else:
        path.write_bytes(json_lines(texts))


@pytest.mark.parametrize("name", ["c.parquet", "c.jsonl", "c.ndjson", "c.json", "c.jsonl.gz", "C.JSONL"])
@pytest.mark.parametrize("prefix", ["", "file://"])
def test_read_documents_gives_them_in_file_order(tmp_path, name, prefix):
    write_corpus(tmp_path / name, TEXTS)
    assert list(read_documents(f"{prefix}{tmp_path / name}", "text")) == TEXTS


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_read_documents_txt_splits_at_blank_lines(tmp_path, ending):
    lines = ["", "a line", "and another", "", " \t", "second", "", "", "third, no newline at the end"]
    (tmp_path / "c.txt").write_bytes(ending.join(lines).encode())
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(ending.join(lines).encode()))
    expected = ["a line\nand another", "second", "third, no newline at the end"]
    assert list(read_documents(str(tmp_path / "c.txt"))) == expected
    assert list(read_documents(str(tmp_path / "c.txt.gz"))) == expected


def test_read_documents_skips_empty_texts_nulls_and_byte_order_marks(tmp_path):
    rows = [{"text": ""}, {"text": None}, {"text": " \n"}, {"text": "kept"}]
    lines = "\n\n".join(json.dumps(row) for row in rows)
    (tmp_path / "c.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    write_parquet(tmp_path / "c.parquet", {"text": [row["text"] for row in rows]})
    assert list(read_documents(str(tmp_path / "c.jsonl"))) == ["kept"]
    assert list(read_documents(str(tmp_path / "c.parquet"))) == ["kept"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_read_documents_takes_every_arrow_text(tmp_path, kind):
    column = pa.array(["a", "b", "a"]).cast(kind)
    pq.write_table(pa.table({"body": column}), tmp_path / "c.parquet")
    assert list(read_documents(str(tmp_path / "c.parquet"), "body")) == ["a", "b", "a"]


def test_read_documents_folder_is_read_in_name_order(tmp_path):
    write_corpus(tmp_path / "part-2.jsonl", ["from 2"])
    (tmp_path / "deeper").mkdir()
    write_corpus(tmp_path / "deeper" / "part-0.jsonl", ["from deeper"])
    write_corpus(tmp_path / "part-10.parquet", ["from 10"])
    (tmp_path / "README.md").write_text("no text")
    (tmp_path / "_hidden.txt").write_text("no text")
    assert list(read_documents(str(tmp_path))) == ["from deeper", "from 10", "from 2"]


def test_read_documents_reads_only_as_far_as_asked(tmp_path):
    (tmp_path / "c.jsonl").write_bytes(json_lines(["one", "two"]) + b"this is no JSON\n")
    documents = read_documents(str(tmp_path / "c.jsonl"))
    assert list(itertools.islice(documents, 2)) == ["one", "two"]
    with pytest.raises(CorpusError, match="line 3"):
        next(documents)


FAULTY = {
    "line_without_json": ("c.jsonl", json_lines(["fine"]) + b"{'text': 1}\n", "line 2 of .* no JSON"),
    "line_without_object": ("c.jsonl", b'["text"]\n', "line 1 of .* JSON list"),
    "line_without_column": ("c.jsonl", b'{"id": 1, "body": ""}\n', "no column 'text', it has id, body"),
    "line_with_number": ("c.jsonl", b'\n{"text": 7}\n', "line 2 of .* JSON int"),
    "line_not_utf8": ("c.jsonl", b'{"text": "\xff"}\n', "damaged"),
    "only_empty_texts": ("c.jsonl", json_lines(["", " "]), "no usable text"),
    "empty_file": ("c.txt", b"", "no usable text"),
    "text_not_utf8": ("c.txt", b"\xff\xfe\xff", "damaged"),
    "no_parquet": ("c.parquet", b"PAR1 not really", "damaged"),
    "no_gzip": ("c.jsonl.gz", json_lines(["x"]), "damaged"),
    "cut_gzip": ("c.jsonl.gz", gzip.compress(json_lines(["x" * 500]))[:-12], "damaged"),
    "unknown_ending": ("c.csv", b"text\nx\n", r"unknown ending; .*\.parquet, \.jsonl"),
    "gzipped_parquet": ("c.parquet.gz", b"", "unknown ending"),
    "no_ending": ("corpus", b"x", "unknown ending"),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_read_documents_unusable_file_is_one_clear_error(tmp_path, fault):
    name, content, message = FAULTY[fault]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        list(read_documents(str(tmp_path / name), "text"))


def test_read_documents_parquet_column_is_checked_before_rows_are_read(tmp_path):
    path = tmp_path / "c.parquet"
    write_parquet(path, {"id": [1], "body": ["x"], "messages": [[{"role": "user", "content": "hi"}]]})
    with pytest.raises(CorpusError, match="no column 'text', it has id, body, messages"):
        list(read_documents(str(path), "text"))
    with pytest.raises(CorpusError, match="'id' .* holds int64"):
        list(read_documents(str(path), "id"))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("{}/nowhere.txt", "there is no text at"),
        ("{}", "folder .* holds no text"),
        ("gs://bucket/c.txt", "not from gs://"),
        ("simplecache::file://{}/c.txt", "not from simplecache"),
    ],
)
def test_read_documents_bad_address_is_told_before_reading(tmp_path, address, message):
    with pytest.raises(CorpusError, match=message):
        read_documents(address.format(tmp_path))


@pytest.mark.slow
def test_read_documents_from_s3(s3_environment, tmp_path):
    write_corpus(tmp_path / "b.parquet", TEXTS)
    write_corpus(tmp_path / "a.jsonl.gz", TEXTS)
    (tmp_path / "c.txt").write_text("one\n\ntwo\n")
    folder = s3_environment.put_folder(tmp_path, "corpus/wiki")
    assert list(read_documents(f"{folder}/b.parquet")) == TEXTS
    assert list(read_documents(f"{folder}/c.txt")) == ["one", "two"]
    assert list(read_documents(folder)) == [*TEXTS, *TEXTS, "one", "two"]


@pytest.mark.slow
@pytest.mark.parametrize("uri", ["s3://models/corpus/none.txt", "s3://no-such-bucket/c.txt"])
def test_read_documents_missing_on_s3_is_one_clear_error(s3_environment, uri):
    with pytest.raises(CorpusError, match="there is no text at"):
        read_documents(uri)


@pytest.mark.slow
def test_read_documents_with_a_wrong_s3_key_is_refused(s3_environment, monkeypatch):
    uri = s3_environment.put("corpus/c.txt", b"text")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match="refused") as caught:
        read_documents(uri)
    assert not isinstance(caught.value, TransientStorageError)


@pytest.mark.slow
def test_read_documents_without_a_server_may_be_retried(s3_environment, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(TransientStorageError):
        read_documents("s3://models/c.txt")
