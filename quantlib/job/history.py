"""What became of earlier work, and what went wrong on the way: the part of the report that a resume fills."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True, kw_only=True)
class History:
    """Everything about a start that is not as in one undisturbed run.

    Attributes:
        reused_units: Finished by an earlier start and found intact.
        redone_units: Recorded by an earlier start -> what was wrong with the shard.
        replayed_blocks: Blocks through which streams were run again though their unit was finished.
        from_checkpoint: Block before which a checkpoint let this start, or its last renewal, begin.
        checkpoints: Blocks before which this start kept the activations.
        unusable_checkpoints: What was wrong with checkpoints that were passed over.
        retries: Stage -> how often it was tried again.
        renewals: Why it went on with other workers, how many there were then, and whether those that lived
            kept what they had.
        joined_workers: How many came while the job ran.
        refused_workers: What was wrong with others that came.
        aborted_uploads: Unfinished uploads of runs and workers that died.
        moved_cells: How often a worker that had nothing to do took over a cell of a busy one.
        exchanges: By which way the sums of the observers met -> of how many slices of blocks: ``direct`` at
            whoever solves, ``shared memory`` of one node, or between nodes ``gloo``, ``nccl`` or ``object
            store``.
        exchange_fallbacks: Why it was the object store, each time that was decided.
    """

    reused_units: list[str] = field(default_factory=list)
    redone_units: dict[str, str] = field(default_factory=dict)
    replayed_blocks: list[int] = field(default_factory=list)
    from_checkpoint: int | None = None
    checkpoints: list[int] = field(default_factory=list)
    unusable_checkpoints: list[str] = field(default_factory=list)
    retries: dict[str, int] = field(default_factory=dict)
    renewals: list[dict[str, Any]] = field(default_factory=list)
    joined_workers: int = 0
    refused_workers: list[str] = field(default_factory=list)
    aborted_uploads: int = 0
    moved_cells: int = 0
    exchanges: dict[str, int] = field(default_factory=dict)
    exchange_fallbacks: list[str] = field(default_factory=list)
