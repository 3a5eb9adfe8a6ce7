"""What the loop over blocks logs: a few lines a block, for whoever watches a run or asks what went wrong."""

import logging
from collections.abc import Sequence

from quantlib.job.block_figures import block_figures, block_words, fallback_words
from quantlib.job.memory import MemoryPlan
from quantlib.job.stages import FinishedBlock

_LOG = logging.getLogger(__name__)


def log_block(finished: FinishedBlock, num_blocks: int, num_outputs: int) -> None:
    """A block was gone through."""
    found = block_figures(finished.row)
    name = f"block {found.index + 1}/{num_blocks}"
    whose = "" if num_outputs == 1 else f" of {finished.output}"
    _LOG.info("%s%s: finished, %s", name, whose, block_words(found) or "no figures")
    if found.fallbacks:
        _LOG.warning("%s%s: fallbacks, %s", name, whose, fallback_words(found.fallbacks))


def log_plan(num_blocks: int, num_outputs: int, num_workers: int, memory: MemoryPlan) -> None:
    """What is about to be done, and how memory is cut."""
    _LOG.info("blocks: %d, outputs: %d, workers: %d", num_blocks, num_outputs, num_workers)
    slices = max((len(passes) for passes in memory.slices), default=1)
    if slices > 1:
        _LOG.info("to fit in memory, a block is summed and solved in up to %d slices", slices)
    if not memory.pipelines:
        _LOG.info("to fit in memory, a block is written before the next one is begun")


def log_found(reused: Sequence[str], redone: dict[str, str]) -> None:
    """What an earlier start left of an output."""
    _LOG.info("%d units are finished from an earlier start and intact", len(reused))
    for unit, reason in redone.items():
        _LOG.warning("%s is done again: %s", unit, reason)


def log_newcomers(num_came: int, problems: Sequence[str]) -> None:
    """Workers that came while the job runs."""
    if num_came:
        _LOG.info("%d workers joined", num_came)
    for problem in problems:
        _LOG.warning("a worker that came was of no use: %s", problem)


def log_loss(because: str, num_workers: int, *, keeps_others: bool) -> None:
    """Workers were lost and the job goes on."""
    how = "going on with the workers left" if keeps_others else "workers were started anew"
    _LOG.warning("%s (%d of them): %s", how, num_workers, because)


def log_excluded(name: str, rows: Sequence[int]) -> None:
    """Calibration rows are left out from a block on."""
    _LOG.warning("%s: calibration rows left out for non-finite activations: %s", name, list(rows))


def log_retry(name: str) -> None:
    """A stage is called again."""
    _LOG.warning("%s: tried again", name)
