"""Many seeded draws of faults, kills and damage, and a table of what came of them.

    python tests/endtoend/chaos.py [--draws 40] [--seed 0]

Draw number k has the seed SEED + k; with ``--draws 1 --seed N`` a single draw is repeated. Exits with 1 when
a start ended otherwise than with the undisturbed bytes or the error its policy names.
"""

import argparse
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
_tell = partial(print, flush=True)


def main() -> int:
    """Carry the draws out; gives the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=40, help="how many (40)")
    parser.add_argument("--seed", type=int, default=0, help="of the first draw (0)")
    parsed = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        return _run(range(parsed.seed, parsed.seed + parsed.draws), folder, stack)


def _run(seeds: range, folder: Path, stack: ExitStack) -> int:
    # Here, because every start of a job imports this file anew.
    from tests.support.chaos import calm_digests, make_sources
    from tests.support.chaos_draws import WorkerDraw, draw_of, in_words
    from tests.support.chaos_starts import Starter

    root, starter = folder / "root", Starter()
    root.mkdir()
    make_sources(root)
    calm = calm_digests(starter, root)
    draws = [draw_of(seed) for seed in seeds]
    chaos: dict[bool, Any] = {}
    outcomes, failed = [], []
    for draw in draws:
        by_workers = isinstance(draw, WorkerDraw)
        if by_workers not in chaos:
            make = _worker_chaos if by_workers else _storage_chaos
            chaos[by_workers] = make(stack, folder, starter, calm)
        began = time.monotonic()
        try:
            outcome = chaos[by_workers].run(draw)
        except Exception:  # noqa: BLE001 - told, and the draws after it are carried out too.
            traceback.print_exc()
            failed.append(draw.seed)
            _tell(f"FAILED  {in_words(draw)}")
            continue
        outcomes.append(outcome)
        _tell(f"{time.monotonic() - began:6.1f} s  {in_words(draw)}\n          {outcome.summary}")
        for message in outcome.messages:
            _tell(f"          {message}")
    _print_table(outcomes, failed)
    return 1 if failed else 0


def _storage_chaos(stack: ExitStack, folder: Path, starter: Any, calm: dict[str, dict[str, str]]) -> Any:
    from tests.support.chaos import StorageChaos
    from tests.support.s3_server import running_s3_server

    server = stack.enter_context(running_s3_server(folder / "s3"))
    return StorageChaos(server, starter, folder / "root", calm)


def _worker_chaos(stack: ExitStack, folder: Path, starter: Any, calm: dict[str, dict[str, str]]) -> Any:
    from tests.support.chaos_workers import WorkerChaos, two_workers
    from tests.support.ray_nodes import ray_nodes

    stack.enter_context(ray_nodes(1))
    pool = stack.enter_context(two_workers(folder / "root"))
    return WorkerChaos(folder / "root", calm, pool)


def _print_table(outcomes: list[Any], failed: list[int]) -> None:
    starts = sum(outcome.restarts + 1 for outcome in outcomes)
    num_draws = len(outcomes) + len(failed)
    _tell(f"\n{num_draws} draws, {starts} starts, {len(failed)} draws failed {failed or ''}")
    for title, name in (("requests spoiled", "faults"), ("blows", "blows"), ("found and mended", "mended")):
        _print_counts(title, sum((getattr(outcome, name) for outcome in outcomes), Counter()))
    _print_counts("ends of starts", Counter(end for outcome in outcomes for end in outcome.ends))
    ways = Counter(
        "undisturbed bytes at the first start"
        if not outcome.restarts
        else f"undisturbed bytes after {outcome.restarts} restart(s)"
        for outcome in outcomes
    )
    _print_counts("draws", ways)


def _print_counts(title: str, counts: Counter[str]) -> None:
    _tell(f"{title}: {counts.total()}")
    for name, count in sorted(counts.items()):
        _tell(f"  {count:6d}  {name}")


if __name__ == "__main__":
    sys.exit(main())
