"""Carries out a draw: a job under faults, struck by blows, started again, and judged by its bytes.

Every start must end with the undisturbed bytes or with the one error that the policy of its faults names, and
a start without faults must complete whatever the ones before left.
"""

import hashlib
import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.chaos_draws import BLOCKS, Blow, StorageDraw, WorkerDraw, fault_of, in_words
from tests.support.chaos_starts import KILLED, Ended, Running, Starter, completed, quantized
from tests.support.fault_proxy import Fault, FaultProxy, Request, fault_proxy
from tests.support.s3_server import S3Server
from tests.support.tiny_jobs import shard_digests, tiny_options, tiny_source

# Embedding and head are larger than a part, so that their shards are multipart uploads.
_SHAPE: dict[str, Any] = {"num_hidden_layers": BLOCKS, "vocab_size": 44_000}
_PREFIX = "chaos"
# Propagation -> file name -> sha256 of an undisturbed job.
Digests = dict[str, dict[str, str]]
_STORAGE_ERRORS = {"TransientStorageError"}
_REPLACED_ERRORS = {"CheckpointError", "PlanMismatchError"}


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a draw came to.

    Attributes:
        faults: Requests that were spoiled, by kind.
        blows: Blows that struck, by kind.
        mended: What starts that completed found and put right, by kind.
        ends: How each start ended: ``undisturbed bytes``, ``killed`` or the class of its error.
        messages: Of the errors.
    """

    faults: Counter[str] = field(default_factory=Counter)
    blows: Counter[str] = field(default_factory=Counter)
    mended: Counter[str] = field(default_factory=Counter)
    ends: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    @property
    def restarts(self) -> int:
        """How many starts came before the one that completed."""
        return len(self.ends) - 1

    def failed(self, error: str, message: str) -> None:
        """A start ended with an error it may end with."""
        self.ends.append(error)
        self.messages.append(message)

    def note(self, history: Mapping[str, Any]) -> None:
        """Count what the history of a start that completed tells."""
        self.mended += Counter(
            {
                "uploads aborted": history["aborted_uploads"],
                "finished units reused": len(history["reused_units"]),
                "damaged units done again": len(history["redone_units"]),
                "starts from a checkpoint": history["from_checkpoint"] is not None,
                "checkpoints passed over": len(history["unusable_checkpoints"]),
                "stages tried again": sum(history["retries"].values()),
                "crews started anew": len(history["renewals"]),
            }
        )

    @property
    def summary(self) -> str:
        """The way the job went, start by start."""
        return ", then ".join(self.ends)


@contextmanager
def telling(draw: StorageDraw | WorkerDraw) -> Iterator[None]:
    """Adds the draw in words to whatever is raised, so that it can be repeated."""
    try:
        yield
    except BaseException as error:
        error.add_note(in_words(draw))
        raise


def make_sources(root: Path) -> None:
    """The checkpoint and the texts of all draws."""
    tiny_source(root / "deep", **_SHAPE)
    tiny_options(root)


def calm_digests(starter: Starter, root: Path) -> Digests:
    """Propagation -> digests of the shards of an undisturbed job on local files."""
    found = {}
    for propagation in ("original", "quantized"):
        output = root / f"calm-{propagation}"
        values = job_values(root, str(root / "deep"), str(output), root, propagation=propagation)
        ended = starter.call(quantized, values)
        assert ended.status == 0, ended.message
        found[propagation] = shard_digests(output)
    return found


def job_values(root: Path, source: str, output: str, texts: Path | str, **more: Any) -> dict[str, Any]:
    """A request as plain values; the texts lie below ``texts``."""
    options = tiny_options(root)
    names = ("group_size", "sequences", "sequence_length", "evaluation_sequences", "threads_per_worker")
    return {
        **{name: getattr(options, name) for name in (*names, "device", "runner")},
        "source": source,
        "output": output,
        "calibration": f"{texts}/calibration.jsonl",
        "evaluation": f"{texts}/evaluation.jsonl",
        **more,
    }


class StorageChaos:
    """The server with the sources on it, and what the undisturbed bytes are.

    Args:
        server: May be killed and restarted.
        root: Folder of `make_sources`.
    """

    def __init__(self, server: S3Server, starter: Starter, root: Path, calm: Digests) -> None:
        self.server, self.starter, self.root, self.calm = server, starter, root, calm
        self._uploads = 0
        server.put_folder(root / "deep", f"{_PREFIX}/deep")
        for name in ("calibration.jsonl", "evaluation.jsonl"):
            server.put(f"{_PREFIX}/{name}", (root / name).read_bytes())

    def run(self, draw: StorageDraw) -> Outcome:
        """Carry a draw out.

        Raises:
            AssertionError: A start ended otherwise than it may.
        """
        self._uploads += 1
        folder = f"{_PREFIX}/draw-{draw.seed}-{self._uploads}"
        with telling(draw), fault_proxy(self.server.endpoint, seed=draw.seed) as proxy:
            return _Job(self, draw, proxy, folder).run()


class _Job:
    """One draw on its way."""

    def __init__(self, chaos: StorageChaos, draw: StorageDraw, proxy: FaultProxy, folder: str) -> None:
        self.chaos, self.draw, self.proxy, self.folder = chaos, draw, proxy, folder
        self.server = chaos.server
        self.outcome = Outcome()
        self.output = self.server.uri(f"{folder}/output")
        self._replaced: tuple[str, bytes] | None = None
        self._source = f"{_PREFIX}/deep"
        if any(blow.kind == "replace" for blow in draw.blows):
            self._source = f"{folder}/source"
            self.server.put_folder(chaos.root / "deep", self._source)

    def run(self) -> Outcome:
        """Disturbed starts until one completes, then a quiet one, then what is left is looked at."""
        is_done = False
        for number in range(self.draw.disturbed_starts):
            for blow in self._blows(number):
                if blow.kind.startswith("damage"):
                    self._damage(blow)
            ended = self._disturbed(number)
            is_done = ended.status == 0
            self._judge(ended)
            if is_done:
                self.outcome.note(ended.value["history"])
                break
            self._refused_while_replaced()
        self._put_back()
        self.proxy.quiet()
        ended = self._begin(completed, patience_s=20.0).ended()
        assert (ended.status, ended.value and ended.value["findings"]) == (0, ()), ended
        if not is_done:
            self.outcome.note(ended.value["history"])
            self.outcome.ends.append("undisturbed bytes")
        self._look(was_finished=ended.value["did_nothing"])
        self.outcome.faults = Counter(self.proxy.faults)
        return self.outcome

    def _blows(self, number: int) -> list[Blow]:
        return [blow for blow in self.draw.blows if blow.start == number]

    def _begin(self, function: Callable[..., Any], patience_s: float) -> Running:
        more = {name: getattr(self.draw, name) for name in ("propagation", "checkpoint_every")}
        values = job_values(
            self.chaos.root,
            self.server.uri(self._source),
            self.output,
            self.server.uri(_PREFIX),
            storage_engine=self.draw.engine,
            **more,
        )
        environment = self.server.environment | {"AWS_ENDPOINT_URL": self.proxy.endpoint}
        return self.chaos.starter.begin(function, values, environment=environment, patience_s=patience_s)

    def _disturbed(self, number: int) -> Ended:
        """One start among faults and blows."""
        rule = _Rule(self.draw, self.proxy, self._is_planned())
        self.proxy.rule = rule
        running = self._begin(quantized, self.draw.patience_s)
        threads: list[threading.Thread] = []
        for blow in self._blows(number):
            if not blow.kind.startswith("damage"):
                rule.add(blow, lambda blow=blow: self._strike(blow, running, threads))
        try:
            return running.ended()
        finally:
            self.proxy.quiet()
            rule.end()
            for thread in threads:
                thread.join()

    def _strike(self, blow: Blow, running: Running, threads: list[threading.Thread]) -> None:
        self.outcome.blows[blow.kind] += 1
        match blow.kind:
            case "kill":
                running.kill()
            case "restart":
                thread = threading.Thread(target=self._restart)
                thread.start()
                threads.append(thread)
            case "refuse":
                threads.append(self.proxy.refuse_for(blow.seconds))
            case "replace":
                self._replace(blow)

    def _restart(self) -> None:
        self.server.kill()
        self.server.start()

    def _replace(self, blow: Blow) -> None:
        """Other bytes in place of a shard of the source: one bit differs."""
        key = _some([k for k in self.server.keys(f"{self._source}/") if k.endswith(".safetensors")], blow)
        content = self.server.get(key)
        self._replaced = (key, content)
        self.server.put(key, content[:-1] + bytes([content[-1] ^ 1]))

    def _put_back(self) -> None:
        if self._replaced is not None:
            self.server.put(*self._replaced)
            self._replaced = None

    def _refused_while_replaced(self) -> None:
        """A planned job is not begun again on another source."""
        if self._replaced is None:
            return
        ended = self._begin(quantized, patience_s=20.0).ended()
        assert (ended.status, ended.error) == (2, "PlanMismatchError"), ended
        assert "replaced" in ended.message
        self.outcome.failed(ended.error, ended.message)
        self._put_back()

    def _damage(self, blow: Blow) -> None:
        """Flip a bit of a stored object, or remove it."""
        place = "output" if blow.kind == "damage shard" else "output.quantmill/activations"
        keys = [k for k in self.server.keys(f"{self.folder}/{place}/") if k.endswith(".safetensors")]
        if not keys:
            return
        self.outcome.blows[blow.kind] += 1
        key = _some(keys, blow)
        if blow.chance < 0.3:
            self.server.client.delete_object(Bucket=self.server.bucket, Key=key)
            return
        content = bytearray(self.server.get(key))
        content[int(blow.chance * len(content))] ^= 1
        self.server.put(key, bytes(content))

    def _is_planned(self) -> bool:
        return bool(self.server.keys(f"{self.folder}/output.quantmill/tokens/"))

    def _judge(self, ended: Ended) -> None:
        """A disturbed start may end whole, killed, or with an error that its faults explain."""
        if ended.status == 0:
            self.outcome.ends.append("undisturbed bytes")
            self._assert_undisturbed()
            return
        if ended.status == KILLED:
            assert self.outcome.blows["kill"], ended
            self.outcome.ends.append("killed")
            return
        allowed = set(_STORAGE_ERRORS)
        if "corrupt_response" in self.draw.rates:
            allowed.add("ChecksumError")
        if self._replaced is not None:
            allowed |= _REPLACED_ERRORS
        assert ended.error in allowed, f"{ended.error}: {ended.message}"
        self.outcome.failed(ended.error, ended.message)

    def _assert_undisturbed(self) -> None:
        keys = [k for k in self.server.keys(f"{self.folder}/output/") if k.endswith(".safetensors")]
        digests = {Path(k).name: hashlib.sha256(self.server.get(k)).hexdigest() for k in keys}
        assert digests == self.chaos.calm[self.draw.propagation]
        assert self.server.keys(f"{self.folder}/output/config.json")

    def _look(self, *, was_finished: bool) -> None:
        """What lies on the server at the end.

        Args:
            was_finished: The last start found nothing to do, and ``clean`` came after it.
        """
        self._assert_undisturbed()
        work = f"{self.folder}/output.quantmill/"
        if was_finished:
            assert self.server.keys(work) == []
        else:
            assert json.loads(self.server.get(f"{work}lease.json"))["released"] is True
            assert self.server.keys(f"{work}activations/") == []
        assert self.server.open_uploads(f"{self.folder}/") == []


class _Rule:
    """What the proxy asks: faults by the draw's rates, and blows when their moment has come."""

    def __init__(self, draw: StorageDraw, proxy: FaultProxy, is_planned: bool) -> None:
        self._draw, self._is_planned = draw, is_planned
        self._lock = threading.Lock()
        self._first = len(proxy.requests)
        self._blows: list[tuple[Blow, Callable[[], None]]] = []
        self._planned_at: int | None = None

    def add(self, blow: Blow, strike: Callable[[], None]) -> None:
        with self._lock:
            self._blows.append((blow, strike))

    def end(self) -> None:
        """No further blow; returns when none is being struck."""
        with self._lock:
            self._blows.clear()

    def __call__(self, request: Request, chosen: random.Random) -> Fault | None:
        with self._lock:
            # Rows are stored after the plan.
            if self._planned_at is None and request.method == "PUT" and "/tokens/" in request.path:
                self._planned_at, self._is_planned = request.number, True
            for entry in [entry for entry in self._blows if self._is_due(entry[0], request.number)]:
                self._blows.remove(entry)
                entry[1]()
        return fault_of(self._draw, request, chosen, is_planned=self._is_planned)

    def _is_due(self, blow: Blow, number: int) -> bool:
        begun = self._planned_at if blow.kind == "replace" else self._first
        return begun is not None and number >= begun + blow.at


def _some(keys: list[str], blow: Blow) -> str:
    return keys[int(blow.chance * len(keys))]
