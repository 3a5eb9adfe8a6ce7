"""What a job's options mean on the nodes there are: what a worker takes, how many there are, what is refused.

Pure decisions on ``ray.nodes()``, made before any actor is started.
"""

from collections.abc import Sequence
from dataclasses import replace

from quantlib.errors import RecipeError
from quantlib.job.node_terms import labels_from, resources_from
from quantlib.job.options import JobOptions
from workers.placement import Need, Node, capacity, describe_models, equal_share, gpu_models, hosts

# Without GPUs: few threads a worker waste little time waiting for each other (two workers of one thread took
# four fifths of the time of one worker of two threads, wall and CPU), but each worker holds a block.
_DEFAULT_CPU_WORKERS = 4


def demand(options: JobOptions, nodes: Sequence[Node]) -> tuple[Need, int]:
    """What each worker takes, and how many of them a job asks for.

    Raises:
        RecipeError: No node will do and nobody said for how many to wait, or this machine is too small.
    """
    need = Need(
        resources=resources_from(options.worker_resources),
        labels=labels_from(options.worker_labels, options.gpu_model),
    )
    need = replace(need, gpus=_gpus_each(options, nodes, need))
    _refuse_nowhere(options, nodes, need)
    count = options.workers or max(1, offered(options, nodes, need))
    cpus = options.threads_per_worker or equal_share(nodes, need, count, options.placement)
    need = replace(need, cpus=cpus)
    if _is_local(options):
        _refuse_too_many(options, nodes, need, count)
    return need, count


def offered(options: JobOptions, nodes: Sequence[Node], need: Need) -> int:
    """How many workers a job takes of a cluster with these nodes, unless it is told."""
    if need.gpus:
        return capacity(nodes, replace(need, cpus=0), options.placement)
    need = replace(need, cpus=options.threads_per_worker or 1)
    return min(_DEFAULT_CPU_WORKERS, capacity(nodes, need, options.placement))


def _is_local(options: JobOptions) -> bool:
    return options.ray_address is None


def _gpus_each(options: JobOptions, nodes: Sequence[Node], need: Need) -> int:
    if options.device == "cpu":
        return 0
    is_asked_for = options.device == "cuda" or options.gpu_model is not None
    return 1 if is_asked_for or hosts(nodes, replace(need, gpus=1)) else 0


def _refuse_nowhere(options: JobOptions, nodes: Sequence[Node], need: Need) -> None:
    """Of a cluster that may grow, nodes can be waited for once it is said for how many workers."""
    is_particular = bool(need.gpus or need.resources or need.labels)
    if not is_particular or (options.workers is not None and not _is_local(options)):
        return
    need = need if need.gpus else replace(need, cpus=1)
    if hosts(nodes, need):
        return
    place, waits = "the cluster", ", or say with workers how many to wait for"
    if _is_local(options):
        place, waits = "this machine", ""
    raise _refused(
        f"each worker needs {need}, which {place} does not offer; its GPUs are"
        f" {describe_models(gpu_models(nodes))}; change device, gpu_model, worker_resources or"
        f" worker_labels{waits}",
        "device",
    )


def _refuse_too_many(options: JobOptions, nodes: Sequence[Node], need: Need, count: int) -> None:
    room = capacity(nodes, need, options.placement)
    if room < count:
        how = f" ({options.placement})" if options.placement else ""
        raise _refused(
            f"{count} workers were asked for{how}, each needs {need}, and this machine offers room for"
            f" {room}; ask for fewer workers or threads_per_worker",
            "workers",
        )


def _refused(message: str, option: str) -> RecipeError:
    error = RecipeError(message, option=option)
    error.before_work = True
    return error
