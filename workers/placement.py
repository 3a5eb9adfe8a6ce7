"""Where workers may stand: pure decisions on what Ray tells of its nodes.

A node is an entry of ``ray.nodes()``: whether it is ``Alive``, its ``Resources`` and its ``Labels``. What is
counted is what a node has, not what is free on it: others come and go, and Ray alone knows when.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from quantlib.errors import RecipeError
from quantlib.job.node_terms import GPU_MODEL_LABEL, does_match

Node = Mapping[str, Any]

# Ray counts resources in these units.
_UNITS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What one worker takes of a node, and which nodes will do.

    Attributes:
        cpus: CPU cores.
        gpus: GPUs.
        resources: Custom resource -> amount.
        labels: Label key -> selector that the node must match.
    """

    cpus: int = 0
    gpus: int = 0
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def amounts(self) -> dict[str, float]:
        """Ray's name of a resource -> how much is taken of it."""
        amounts = {"CPU": float(self.cpus), "GPU": float(self.gpus), **self.resources}
        return {name: amount for name, amount in amounts.items() if amount}

    def __str__(self) -> str:
        taken = [f"{amount:g} {name}" for name, amount in self.amounts.items()]
        *first, last = taken or ["room"]
        words = f"{', '.join(first)} and {last}" if first else last
        labels = ", ".join(f"{key}={selector}" for key, selector in self.labels.items())
        return f"{words} on one node{f' with {labels}' if labels else ''}"


def hosts(nodes: Iterable[Node], need: Need) -> list[Node]:
    """The living nodes that have room for a worker, were they empty."""
    return [node for node in nodes if _places_on(node, need)]


def capacity(nodes: Iterable[Node], need: Need, strategy: str | None = None) -> int:
    """How many workers the living nodes can hold, were they empty.

    Args:
        strategy: ``strict-pack`` has all of them on one node, ``strict-spread`` each on another.

    >>> nodes = [{"Alive": True, "Resources": {"CPU": cores}, "Labels": {}} for cores in (4.0, 2.0, 1.0)]
    >>> [capacity(nodes, Need(cpus=2), strategy) for strategy in (None, "strict-pack", "strict-spread")]
    [3, 2, 2]
    """
    places = [_places_on(node, need) for node in nodes]
    if strategy == "strict-pack":
        return max(places, default=0)
    if strategy == "strict-spread":
        return sum(1 for count in places if count)
    return sum(places)


def equal_share(nodes: Sequence[Node], need: Need, count: int, strategy: str | None = None) -> int:
    """CPUs for each of so many workers: the most that leaves a place for all of them.

    Nodes that cannot host any do not count. Where there never is a place for all, the nodes' cores by their
    number.

    >>> nodes = [{"Alive": True, "Resources": {"CPU": 2.0}, "Labels": {}}] * 3
    >>> [equal_share(nodes, Need(), count) for count in (2, 3, 4, 9)]
    [2, 2, 1, 1]
    """
    cores = sum(node["Resources"]["CPU"] for node in hosts(nodes, replace(need, cpus=1)))
    most = max(1, int(cores) // count)
    shares = range(most, 0, -1)
    return next((n for n in shares if capacity(nodes, replace(need, cpus=n), strategy) >= count), most)


def gpu_models(nodes: Iterable[Node]) -> Counter[str]:
    """Model of GPU -> how many living nodes have it; nodes whose model Ray does not know are left out."""
    living = (node for node in nodes if node["Alive"] and node["Resources"].get("GPU"))
    return Counter(node["Labels"][GPU_MODEL_LABEL] for node in living if GPU_MODEL_LABEL in node["Labels"])


def the_one_gpu_model(nodes: Iterable[Node]) -> str | None:
    """The model of all these nodes' GPUs, None where Ray does not know it.

    Raises:
        RecipeError: There are several: which bytes come out would depend on who does what.
    """
    models = gpu_models(nodes)
    if len(models) <= 1:
        return next(iter(models), None)
    error = RecipeError(
        f"one model of GPU is wanted for a job, as results of different ones may differ in their last bits,"
        f" and the nodes that could host workers have {describe_models(models)}; choose one with gpu_model,"
        " leave nodes out with worker_labels, or accept the difference with mixed_gpus",
        option="gpu_model",
        models=dict(models),
    )
    error.before_work = True
    raise error


def without_other_models(need: Need, nodes: Iterable[Node], model: str) -> Need:
    """The same need, away from nodes that now have another model of GPU.

    Not said as "this model": a node that an autoscaler would start has the labels that are declared for its
    group, and models of GPU seldom are.
    """
    others = sorted(gpu_models(nodes).keys() - {model})
    if not others or need.labels.get(GPU_MODEL_LABEL) == model:
        return need
    return replace(need, labels={**need.labels, GPU_MODEL_LABEL: f"!in({','.join(others)})"})


def describe_models(models: Mapping[str, int]) -> str:
    """In words.

    >>> describe_models({"H100": 3, "A100": 1})
    'H100 (3 nodes) and A100 (1 node)'
    """
    words = [f"{model} ({count} node{'' if count == 1 else 's'})" for model, count in models.items()]
    return " and ".join(words) or "no known model of GPU"


def _places_on(node: Node, need: Need) -> int:
    if not node["Alive"] or not does_match(node["Labels"], need.labels):
        return 0
    has = node["Resources"]
    return min(
        (round(has.get(name, 0) * _UNITS) // round(amount * _UNITS) for name, amount in need.amounts.items()),
        default=0,
    )
