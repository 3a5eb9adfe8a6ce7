"""Both S3 engines against a real server: what only S3 has, and what it refuses."""

import random
import subprocess
import sys
import uuid

import pytest

from quantlib.errors import ObjectNotFoundError, QuantError, StorageError, TransientStorageError
from quantlib.storage import obstore_engine, open_store, s3fs_writer

pytestmark = pytest.mark.slow
ENGINES = {"obstore": obstore_engine, "s3fs": s3fs_writer}
# The least that S3 takes as a part which is not the last.
PART = 5 << 20


@pytest.fixture(params=sorted(ENGINES))
def engine(request, s3_environment):
    return request.param


@pytest.fixture
def small_parts(engine, monkeypatch):
    monkeypatch.setattr(ENGINES[engine], "PART_BYTES", PART)


def _calls(store, uri):
    """Every method that sends a request, by name."""
    return {
        "head": lambda: store.head(uri),
        "list": lambda: store.list(uri.rpartition("/")[0]),
        "read": lambda: store.read(uri),
        "write": lambda: store.write(uri, b"x"),
        "read_with_info": lambda: store.read_with_info(uri),
        "replace_if_match": lambda: store.replace_if_match(uri, b"x", '"0123"'),
        "abort_uploads": lambda: store.abort_uploads(uri.rpartition("/")[0]),
        "put_if_absent": lambda: store.put_if_absent(uri, b"x"),
        "open_writer": lambda: _stream(store, uri, b"x"),
    }


def _stream(store, uri, content):
    with store.open_writer(uri) as writer:
        writer.write(content)
    return writer.info


def test_large_object_goes_up_in_parts_and_down_in_ranges(engine, small_parts, s3_server):
    key = f"parts/{uuid.uuid4().hex}"
    store = open_store(s3_server.uri(key), engine)
    content = random.Random(5).randbytes(3 * PART + 7)
    info = _stream(store, s3_server.uri(key), content)
    assert info.etag.endswith('-4"'), "a multipart etag says how many parts there were"
    assert info == store.head(info.uri)
    assert info in store.list(s3_server.uri("parts"))
    assert s3_server.get(key) == content
    asked = [(2 * PART - 3, 2 * PART + 3), (0, len(content))]
    assert [bytes(v) for v in store.read_ranges(info, asked)] == [content[a:b] for a, b in asked]
    assert s3_server.open_uploads("parts") == []


def test_writer_that_fails_aborts_its_upload(engine, small_parts, s3_server):
    prefix = f"abort-{uuid.uuid4().hex}"
    store = open_store(s3_server.uri(prefix), engine)
    with pytest.raises(KeyError), store.open_writer(s3_server.uri(f"{prefix}/x")) as writer:
        for _ in range(3):
            writer.write(b"x" * PART)
        writer.write(b"rest")
        assert s3_server.keys(prefix) == []
        raise KeyError("stop")
    assert s3_server.open_uploads(prefix) == []
    assert s3_server.keys(prefix) == []


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("AWS_ACCESS_KEY_ID", "nobody", "does not know the access key id"),
        ("AWS_SECRET_ACCESS_KEY", "wrong-secret", "secret key .* does not belong"),
    ],
)
def test_wrong_credentials_are_told_apart_by_every_method(
    engine, s3_server, monkeypatch, variable, value, words
):
    monkeypatch.setenv(variable, value)
    uri = s3_server.uri("creds/x")
    for name, call in _calls(open_store(uri, engine), uri).items():
        with pytest.raises(StorageError, match=words) as caught:
            call()
        assert not isinstance(caught.value, ObjectNotFoundError | TransientStorageError), name
        assert value not in str(caught.value) or variable == "AWS_ACCESS_KEY_ID"
    assert s3_server.keys("creds") == []


def test_missing_bucket_is_named_by_every_method(engine, s3_server):
    uri = "s3://no-such-bucket/folder/x"
    for call in _calls(open_store(uri, engine), uri).values():
        with pytest.raises(ObjectNotFoundError, match="bucket 'no-such-bucket' does not exist"):
            call()


def test_missing_object_in_a_present_bucket_is_not_called_a_missing_bucket(engine, s3_server):
    uri = s3_server.uri("nothing/here.json")
    store = open_store(uri, engine)
    for call in (store.head, store.read):
        with pytest.raises(ObjectNotFoundError, match=r"nothing/here\.json does not exist"):
            call(uri)


def test_endpoint_where_nobody_listens_is_named_and_may_be_tried_again(engine, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    store = open_store("s3://models/x", engine)
    with pytest.raises(TransientStorageError, match=r"http://127\.0\.0\.1:1 could not be reached"):
        store.head("s3://models/x")


def test_no_credentials_anywhere_says_how_to_give_them(engine, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match="AWS_ACCESS_KEY_ID"):
        open_store("s3://models/x", engine).head("s3://models/x")


def test_profile_gives_endpoint_and_credentials(engine, s3_server, monkeypatch, tmp_path):
    for name in s3_server.environment:
        monkeypatch.delenv(name)
    config = tmp_path / "config"
    config.write_text(
        f"[profile mill]\nregion = eu-west-1\nendpoint_url = {s3_server.endpoint}\n"
        f"aws_access_key_id = {s3_server.access_key}\naws_secret_access_key = {s3_server.secret_key}\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_PROFILE", "mill")
    uri = s3_server.put(f"profile/{engine}", b"found")
    assert open_store(uri, engine).read(uri) == b"found"


def test_unknown_profile_is_one_of_our_errors(engine, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "no-such-profile")
    with pytest.raises(StorageError, match="no-such-profile"):
        open_store("s3://models/x", engine)


def test_object_replaced_between_requests_of_one_read_is_refused(engine, s3_server):
    key = f"pinned/{uuid.uuid4().hex}"
    uri = s3_server.put(key, b"a" * 100)
    store = open_store(uri, engine)
    info = store.head(uri)
    assert bytes(store.read_ranges(info, [(0, 2)])[0]) == b"aa"
    s3_server.put(key, b"b" * 100)
    with pytest.raises(QuantError, match="replaced"):
        store.read_ranges(info, [(0, 2)])


def test_folder_marker_of_a_console_is_not_an_object(engine, s3_server):
    prefix = f"marker-{uuid.uuid4().hex}"
    s3_server.put(f"{prefix}/", b"")
    s3_server.put(f"{prefix}/config.json", b"{}")
    listed = open_store(s3_server.uri(prefix), engine).list(s3_server.uri(prefix))
    assert [i.uri for i in listed] == [s3_server.uri(f"{prefix}/config.json")]


def test_whole_bucket_can_be_listed(engine, s3_server):
    uri = s3_server.put(f"top-{engine}.txt", b"x")
    store = open_store(uri, engine)
    flat = [i.uri for i in store.list(f"s3://{s3_server.bucket}", recursive=False)]
    assert uri in flat
    assert all(u.count("/") == 3 for u in flat)


def test_unsigned_requests_reach_the_server(engine, s3_server, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    uri = s3_server.put("private", b"x")
    with pytest.raises(StorageError, match="may not read"):
        open_store(uri, engine).read(uri)


def test_process_that_used_a_store_ends_by_itself(engine, s3_server):
    uri = s3_server.put("ends", b"0123456789")
    code = (
        "from quantlib.storage import open_store\n"
        f"store = open_store({uri!r}, {engine!r})\n"
        f"print(bytes(store.read_ranges(store.head({uri!r}), [(2, 5)])[0]).decode())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "234"), done.stderr
