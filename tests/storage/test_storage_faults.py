"""Both S3 engines against a real server behind a proxy that spoils requests.

Every call ends with the right bytes or with one of our errors, and nothing half done is left.
"""

import random
import subprocess
import sys
import threading
import time

import pytest

from quantlib.errors import ChecksumError, NoSpaceError, TransientStorageError
from quantlib.storage import open_store, s3_settings, s3fs_engine
from tests.support.fault_proxy import Fault
from tests.support.s3_server import running_s3_server

pytestmark = pytest.mark.slow
# As in the fixture `setting`.
PART = 5 << 20
CONTENT = random.Random(7).randbytes(2 * PART + 1000)
SMALL = CONTENT[:5000]
HOURS = 3600.0


def _stream(setting, name, content=CONTENT):
    with setting.store.open_writer(setting.uri(name)) as writer:
        writer.write(content)
    return writer.info


def _short_retries(monkeypatch):
    """A budget of retries that a permanent fault uses up soon."""
    monkeypatch.setattr(s3_settings, "MAX_RETRIES", 2)
    monkeypatch.setattr(s3_settings, "RETRY_TIMEOUT_S", 0.5)


READ_FAULTS = {
    "throttle": Fault(kind="throttle"),
    "500": Fault(kind="throttle", status=500, code="InternalError"),
    "delay": Fault(kind="delay", seconds=0.1),
    "cut": Fault(kind="cut_response", at=40),
    "cut before the first byte": Fault(kind="cut_response", at=0),
    "lost": Fault(kind="lose_answer"),
}


@pytest.mark.parametrize("fault", READ_FAULTS.values(), ids=READ_FAULTS)
def test_reads_that_meet_a_fault_bring_the_right_bytes(setting, fault):
    uri = setting.put("x", SMALL)
    info = setting.store.head(uri)
    calls = {
        "read": lambda: setting.store.read(uri) == SMALL,
        "read_with_info": lambda: setting.store.read_with_info(uri) == (SMALL, info),
        "read_ranges": lambda: bytes(setting.store.read_ranges(info, [(10, 4000)])[0]) == SMALL[10:4000],
        "list": lambda: list(setting.store.list(setting.uri("x").rpartition("/")[0])) == [info],
        "head": lambda: setting.store.head(uri) == info,
    }
    for name, call in calls.items():
        before = setting.proxy.faults.total()
        setting.spoil("HEAD" if name == "head" else "GET", fault)
        assert call(), name
        # A HEAD has no body to cut.
        assert setting.proxy.faults.total() == before + (name != "head" or not fault.kind.startswith("cut"))


def test_range_cut_in_mid_object_again_and_again_is_whole_in_the_end(setting):
    uri = setting.put("x", CONTENT)
    info = setting.store.head(uri)
    setting.spoil("GET", *(Fault(kind="cut_response", at=n) for n in (1 << 20, 2 << 20, 100)))
    (view,) = setting.store.read_ranges(info, [(5, len(CONTENT))])
    assert bytes(view) == CONTENT[5:]
    assert setting.proxy.faults == {"cut_response": 3}


def test_small_object_damaged_on_its_way_down_is_read_again(setting):
    for name, content in {"one": SMALL, "two": b"{}"}.items():
        uri = setting.store.write(setting.uri(name), content).uri
        setting.spoil("GET", Fault(kind="corrupt_response", at=1))
        assert setting.store.read(uri) == content
    assert setting.proxy.faults == {"corrupt_response": 2}


def test_small_object_damaged_otherwise_each_time_is_refused(setting, monkeypatch):
    _short_retries(monkeypatch)
    uri = setting.store.write(setting.uri("x"), SMALL).uri

    def rule(request, draw):
        return Fault(kind="corrupt_response", at=request.number) if request.method == "GET" else None

    setting.proxy.rule = rule
    with pytest.raises(ChecksumError, match="x "):
        setting.store.read(uri)


WRITE_FAULTS = {
    "throttle": Fault(kind="throttle"),
    "conflict": Fault(kind="throttle", status=409, code="ConditionalRequestConflict"),
    "delay": Fault(kind="delay", seconds=0.1),
    "cut": Fault(kind="cut_request", at=3),
    "lost": Fault(kind="lose_answer"),
    "damaged": Fault(kind="corrupt_request", at=3),
}


@pytest.mark.parametrize("fault", WRITE_FAULTS.values(), ids=WRITE_FAULTS)
def test_small_writes_that_meet_a_fault_are_stored_once_and_say_so(setting, fault):
    etag = setting.store.write(setting.uri("replaced"), b"former").etag
    calls = {
        "written": lambda uri: setting.store.write(uri, SMALL) == setting.store.head(uri),
        "absent": lambda uri: setting.store.put_if_absent(uri, SMALL),
        "replaced": lambda uri: setting.store.replace_if_match(uri, SMALL, etag) == setting.store.head(uri),
    }
    for name, call in calls.items():
        setting.spoil("PUT", fault)
        assert call(setting.uri(name)) is True, name
        assert setting.stored(name) == SMALL
    assert setting.proxy.faults == {fault.kind: 3}


@pytest.mark.parametrize("fault", ["lost", "throttle", "cut"])
def test_lost_race_stays_lost_whatever_happens_to_the_answer(setting, fault):
    etag = setting.store.write(setting.uri("x"), b"mine").etag
    setting.put("x", b"theirs")
    setting.spoil("PUT", WRITE_FAULTS[fault])
    assert setting.store.put_if_absent(setting.uri("x"), b"mine again") is False
    setting.spoil("PUT", WRITE_FAULTS[fault])
    assert setting.store.replace_if_match(setting.uri("x"), b"mine again", etag) is None
    assert setting.stored("x") == b"theirs"
    assert setting.proxy.faults.total() == 2


def test_delete_that_meets_a_fault_removes_the_object(setting):
    method = {"obstore": "POST", "s3fs": "DELETE"}[setting.engine]
    for fault in (Fault(kind="throttle"), Fault(kind="lose_answer")):
        uri = setting.put("x", SMALL)
        setting.proxy.rule = None
        left = [fault]
        setting.proxy.rule = lambda r, d, left=left: left.pop() if r.method == method and left else None
        setting.store.delete(uri)
        assert setting.server.keys(setting.folder) == []
    assert setting.proxy.faults.total() == 2


@pytest.mark.parametrize("name", ["throttle", "delay", "cut", "lost"])
@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_streamed_object_that_meets_a_fault_arrives_whole(setting, method, name):
    # The first POST begins the upload, the second ends it.
    fault = WRITE_FAULTS[name]
    setting.spoil(method, None, fault)
    assert _stream(setting, "big") == setting.store.head(setting.uri("big"))
    assert setting.stored("big") == CONTENT
    assert setting.proxy.faults == {fault.kind: 1}
    assert setting.server.open_uploads(setting.folder) == []


def test_part_damaged_on_its_way_up_is_never_stored(setting):
    setting.spoil("PUT", None, Fault(kind="corrupt_request", at=500))
    try:
        _stream(setting, "big")
    except TransientStorageError:
        assert setting.server.keys(setting.folder) == []
        _stream(setting, "big")
    assert setting.proxy.faults == {"corrupt_request": 1}
    assert setting.stored("big") == CONTENT
    assert setting.server.open_uploads(setting.folder) == []


def test_answer_to_the_end_of_an_upload_lost_and_the_upload_forgotten(setting):
    gone = Fault(kind="throttle", status=404, code="NoSuchUpload")
    setting.spoil("POST", None, Fault(kind="lose_answer"), gone)
    try:
        info = _stream(setting, "big")
    except TransientStorageError:
        assert setting.engine == "obstore", "s3fs knows the etags of its parts and can tell"
        info = _stream(setting, "big")
    assert info == setting.store.head(setting.uri("big"))
    assert setting.stored("big") == CONTENT


def test_upload_that_another_run_gave_up_may_be_written_again(setting):
    gone = Fault(kind="throttle", status=404, code="NoSuchUpload")
    setting.spoil("PUT", None, gone, gone, gone, gone)
    with pytest.raises(TransientStorageError, match=r"unfinished upload of .*big is gone"):
        _stream(setting, "big")
    assert setting.server.keys(setting.folder) == []


def test_throttling_without_end_is_an_error_that_may_pass(setting, monkeypatch):
    _short_retries(monkeypatch)
    uri = setting.put("x", SMALL)
    store = open_store(uri, setting.engine)
    setting.spoil_all(Fault(kind="throttle"))
    calls = {
        "read": lambda: store.read(uri),
        "write": lambda: store.write(uri, b"x"),
        "put_if_absent": lambda: store.put_if_absent(uri, b"x"),
        "replace_if_match": lambda: store.replace_if_match(uri, b"x", '"0"'),
        "abort_uploads": lambda: store.abort_uploads(uri),
    }
    for name, call in calls.items():
        with pytest.raises(TransientStorageError, match=r"SlowDown|ServiceUnavailable"):
            call()
        assert setting.proxy.faults["throttle"] > 1, name


@pytest.mark.parametrize(
    "fault", [Fault(kind="delay", seconds=HOURS), Fault(kind="slow_response", seconds=0.2)]
)
def test_server_that_takes_hours_is_given_up(setting, monkeypatch, fault):
    _short_retries(monkeypatch)
    monkeypatch.setattr(s3_settings, "READ_TIMEOUT_S", 0.5)
    monkeypatch.setattr(s3_settings, "REQUEST_TIMEOUT_S", 1)
    uri = setting.put("x", SMALL)
    store = open_store(uri, setting.engine)
    info = store.head(uri)
    # Only now: on a busy machine the first answer may take longer.
    monkeypatch.setattr(s3_settings, "REQUEST_LIMIT_S", 2)
    setting.spoil_all(fault)
    for call in (lambda: store.read(uri), lambda: store.read_ranges(info, [(0, 5000)])):
        with pytest.raises(TransientStorageError, match="could not be reached"):
            call()


def test_server_that_takes_hours_for_its_first_answer_is_given_up(setting, monkeypatch):
    monkeypatch.setattr(s3_settings, "CONTACT_TIMEOUT_S", 0.3)
    monkeypatch.setattr(s3_settings, "CONTACT_LIMIT_S", 1.0)
    setting.spoil_all(Fault(kind="delay", seconds=HOURS))
    store = open_store(setting.uri("x"), setting.engine)
    with pytest.raises(TransientStorageError, match="could not be reached"):
        store.read(setting.uri("x"))


@pytest.mark.parametrize(
    ("status", "code"), [(507, "InsufficientStorage"), (507, "XMinioStorageFull"), (403, "QuotaExceeded")]
)
def test_full_store_says_so_and_what_to_do(setting, monkeypatch, status, code):
    _short_retries(monkeypatch)
    store = open_store(setting.uri("x"), setting.engine)
    store.list(setting.uri("x"))
    setting.spoil_all(Fault(kind="throttle", status=status, code=code))
    for call in (
        lambda: store.write(setting.uri("x"), SMALL),
        lambda: store.put_if_absent(setting.uri("x"), SMALL),
    ):
        with pytest.raises(NoSpaceError, match="free space or raise the quota of the bucket 'models'"):
            call()


def test_writer_that_meets_a_full_store_leaves_nothing(setting, monkeypatch):
    _short_retries(monkeypatch)
    store = open_store(setting.uri("x"), setting.engine)
    full = Fault(kind="throttle", status=507, code="InsufficientStorage")
    setting.proxy.rule = lambda r, d: full if r.method == "PUT" else None
    with pytest.raises(NoSpaceError), store.open_writer(setting.uri("big")) as writer:
        writer.write(CONTENT)
    setting.proxy.quiet()
    assert setting.server.keys(setting.folder) == []
    assert setting.server.open_uploads(setting.folder) == []


def test_connections_refused_for_a_while_are_ridden_out(setting):
    uri = setting.put("x", SMALL)
    thread = setting.proxy.refuse_for(0.5)
    assert setting.store.read(uri) == SMALL
    thread.join()
    thread = setting.proxy.refuse_for(0.5)
    setting.store.write(setting.uri("y"), SMALL)
    thread.join()
    assert setting.stored("y") == SMALL


def test_server_killed_and_restarted_during_an_upload_and_a_download(setting, tmp_path, monkeypatch):
    # A restart takes seconds: the budget of attempts must last as long.
    monkeypatch.setattr(s3_settings, "FIRST_BACKOFF_S", 1.0)
    monkeypatch.setattr(s3_settings, "MAX_BACKOFF_S", 3.0)
    with running_s3_server(tmp_path) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        uri = server.uri("restart/big")
        store = open_store(uri, setting.engine)

        def restarted(call):
            server.kill()
            thread = threading.Thread(target=server.start)
            thread.start()
            try:
                return call()
            finally:
                thread.join()

        with store.open_writer(uri) as writer:
            writer.write(CONTENT[: PART + 5])
            restarted(lambda: writer.write(CONTENT[PART + 5 :]))
        assert server.get("restart/big") == CONTENT
        (view,) = restarted(lambda: store.read_ranges(writer.info, [(0, len(CONTENT))]))
        assert bytes(view) == CONTENT
        assert server.open_uploads("restart") == []


def _uploading_child(setting, name):
    """A process that has begun to stream an object and waits."""
    uri = setting.uri(name)
    code = (
        "import sys\n"
        "from quantlib.storage import open_store, obstore_engine, s3fs_writer\n"
        f"obstore_engine.PART_BYTES = s3fs_writer.PART_BYTES = {PART}\n"
        f"with open_store({uri!r}, {setting.engine!r}).open_writer({uri!r}) as writer:\n"
        f"    writer.write(b'x' * {3 * PART})\n"
        "    print('written', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"written\n"
    return child


def test_upload_of_a_killed_process_is_found_and_given_up(setting):
    neighbour = f"{setting.folder}/out-2/shard"
    kept = setting.server.client.create_multipart_upload(Bucket=setting.server.bucket, Key=neighbour)
    child = _uploading_child(setting, "out/shard")
    deadline = time.monotonic() + 30
    while not setting.server.open_uploads(f"{setting.folder}/out/") and time.monotonic() < deadline:
        time.sleep(0.02)
    child.kill()
    child.communicate(timeout=30)
    assert setting.server.open_uploads(f"{setting.folder}/out/") == [f"{setting.folder}/out/shard"]
    assert setting.store.abort_uploads(setting.uri("out")) == 1
    assert setting.store.abort_uploads(setting.uri("out")) == 0
    assert setting.server.open_uploads(setting.folder) == [neighbour]
    setting.server.client.abort_multipart_upload(
        Bucket=setting.server.bucket, Key=neighbour, UploadId=kept["UploadId"]
    )


def test_uploads_of_several_pages_are_all_given_up(setting, monkeypatch):
    monkeypatch.setattr(s3fs_engine, "UPLOADS_PER_PAGE", 2)
    for name in ("a", "b", "b", "deep/c", "d"):
        key = f"{setting.folder}/{name}"
        setting.server.client.create_multipart_upload(Bucket=setting.server.bucket, Key=key)
    assert setting.store.abort_uploads(setting.server.uri(setting.folder)) == 5
    assert setting.server.open_uploads(setting.folder) == []
    assert sum("uploads" in request.query for request in setting.proxy.requests) == 3


def test_abort_uploads_that_meets_faults_gives_up_all(setting):
    for name in ("a", "b"):
        key = f"{setting.folder}/{name}"
        setting.server.client.create_multipart_upload(Bucket=setting.server.bucket, Key=key)
    setting.spoil("GET", Fault(kind="cut_response", at=60))
    setting.store.abort_uploads(setting.server.uri(setting.folder))
    assert setting.server.open_uploads(setting.folder) == []
    assert setting.proxy.faults == {"cut_response": 1}


def test_each_byte_leaves_the_server_once_when_nothing_goes_wrong(setting):
    uri = setting.put("x", CONTENT)
    info = setting.store.head(uri)
    setting.store.read_ranges(info, [(0, 1000), (5_000_000, len(CONTENT))])
    key = f"{setting.server.bucket}/{setting.folder}/x"
    assert setting.proxy.times_read(key, 0, 1000) == (1, 1)
    assert setting.proxy.times_read(key, 1000, 5_000_000) == (0, 0)
    assert setting.proxy.times_read(key, 5_000_000, len(CONTENT)) == (1, 1)
