"""Units that are finished: whether they still are what their record says, and their tensors read back."""

import dataclasses

import torch

from quantlib.checkpoint.verify import object_sha256
from quantlib.checkpoint.writer import ShardForm
from quantlib.errors import ObjectNotFoundError
from quantlib.job.manifest import DoneRecord
from quantlib.job.plan import Plan, UnitPlan
from quantlib.storage import Store, join_uri


def check_unit(store: Store, plan: Plan, unit: UnitPlan, record: DoneRecord) -> tuple[DoneRecord | None, str]:
    """Compare a shard with its record, byte for byte by its sha256.

    Returns:
        The record with the etag the shard has now (a copied bucket has others), or None and what is wrong.

    Cost: reads the shard once.
    """
    try:
        info = store.head(join_uri(plan.output, unit.shard))
    except ObjectNotFoundError:
        return None, "the shard is missing"
    if info.size_bytes != record.size_bytes:
        return None, f"the shard has {info.size_bytes} bytes instead of {record.size_bytes}"
    if object_sha256(store, info) != record.sha256:
        return None, "the shard's sha256 is not that of the record"
    return dataclasses.replace(record, etag=info.etag), ""


def read_unit(store: Store, plan: Plan, unit: UnitPlan, form: ShardForm) -> dict[str, torch.Tensor]:
    """The packed tensors of a unit that is finished, from its shard in the output.

    Args:
        form: Of the shard.
    """
    info = store.head(join_uri(plan.output, unit.shard))
    offsets = form.layout(unit.tensors).offsets
    specs = [spec for spec in unit.tensors if spec.name not in unit.copied]
    views = store.read_ranges(info, [offsets[spec.name] for spec in specs])
    return {spec.name: form.restored(spec, view) for spec, view in zip(specs, views, strict=True)}
