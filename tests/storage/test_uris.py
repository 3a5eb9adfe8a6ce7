from pathlib import Path

import pytest

from quantlib.errors import StorageError
from quantlib.storage import join_uri, normalize_uri, open_store, uri_name
from quantlib.storage.uris import bucket_and_key, file_path


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("S3://bucket/Key/", "s3://bucket/Key"),
        ("file:///a/b/../c/", "file:///a/c"),
        ("/a//b/", "file:///a/b"),
        ("//a/b", "file:///a/b"),
        ("file:///", "file:///"),
    ],
)
def test_address_has_one_spelling(text, wanted):
    assert normalize_uri(text) == wanted
    assert normalize_uri(wanted) == wanted


def test_plain_path_is_taken_from_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert normalize_uri("models/x") == f"file://{Path.cwd()}/models/x"


@pytest.mark.parametrize("text", ["", "a\nb", "a\0b"])
def test_text_that_is_no_address_is_refused(text):
    with pytest.raises(StorageError, match="address"):
        normalize_uri(text)


@pytest.mark.parametrize("text", ["hf://org/model", "gs://bucket/x", "https://host/x", "hdfs://x"])
def test_other_scheme_is_named_with_what_is_supported(text):
    with pytest.raises(StorageError, match="s3://bucket/key, file:///path or a plain path") as caught:
        normalize_uri(text)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "text", ["s3://", "s3:///key", "s3://b//k", "s3://b/../c", "s3://b/./c", "file://host/x"]
)
def test_malformed_address_is_quoted(text):
    with pytest.raises(StorageError) as caught:
        normalize_uri(text)
    assert text in str(caught.value)


def test_join_adds_plain_names_only():
    assert join_uri("s3://b", "x", "y/z.json") == "s3://b/x/y/z.json"
    for name in ("../x", "/x", "", "a//b", "a/.."):
        with pytest.raises(StorageError):
            join_uri("s3://b/out", name)


def test_parts_of_an_address():
    assert uri_name("file:///a/b.json") == "b.json"
    assert bucket_and_key("s3://b") == ("b", "")
    assert bucket_and_key("s3://b/x/y") == ("b", "x/y")
    assert file_path("file:///a/b") == "/a/b"
    for wrong in ("s3://", "file:///a"):
        with pytest.raises(StorageError):
            bucket_and_key(wrong)
    with pytest.raises(StorageError):
        file_path("s3://b/x")


def test_unknown_engine_or_scheme_is_refused():
    with pytest.raises(StorageError, match="'rclone'"):
        open_store("s3://b/x", "rclone")
    with pytest.raises(StorageError, match="gs://b/x"):
        open_store("gs://b/x")
