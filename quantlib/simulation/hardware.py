"""Clusters as data: kinds of GPU with the figures they come with, what a person may write, what is assumed.

Peaks are those of NVIDIA's data sheets for the SXM parts, dense (H100, H200, A100, HGX B200; collected with
references at https://glennklockwood.com/garden/processors). The shares of them that kernels reach are
assumptions, chosen so that an H100 does 500 TFLOP/s in bf16 products, 25 in a Cholesky factorization and 40
in fp32 products.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quantlib.errors import RecipeError

_TERA, _GIGA = 1e12, 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuKind:
    """What a data sheet says.

    Attributes:
        name: As people write it.
        matrix_flops: Peak of dense bf16 products with fp32 sums, a second.
        vector_flops: Peak of fp32, a second.
        host_bytes_per_s: Of the link to the host, one way.
        memory_bytes: Of the GPU.
    """

    name: str
    matrix_flops: float
    vector_flops: float
    host_bytes_per_s: float
    memory_bytes: float


def _kind(name: str, bf16: float, fp32: float, host: float, memory: float) -> GpuKind:
    return GpuKind(
        name=name,
        matrix_flops=bf16 * _TERA,
        vector_flops=fp32 * _TERA,
        host_bytes_per_s=host * _GIGA,
        memory_bytes=memory * _GIGA,
    )


# TFLOP/s, TFLOP/s, GB/s (PCIe 4 and 5, 16 lanes), GB. NVIDIA gives 180 GB for a B200 in an HGX board.
GPU_KINDS: Mapping[str, GpuKind] = {
    kind.name: kind
    for kind in (
        _kind("A100", 312.0, 19.5, 32.0, 80.0),
        _kind("H100", 989.4, 66.9, 64.0, 80.0),
        _kind("H200", 989.4, 66.9, 64.0, 141.0),
        _kind("B200", 2250.0, 80.0, 64.0, 180.0),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What one GPU is assumed to do, a second.

    Attributes:
        matrix_flops: bf16 products of a forward and of the statistics.
        factor_flops: fp32 Cholesky factorization.
        solve_flops: fp32 products of a solve, and of the head.
        column_s: Seconds of the loop for each column solved, beside the products.
        host_bytes_per_s: Copies between GPU and host.
    """

    matrix_flops: float
    factor_flops: float
    solve_flops: float
    column_s: float
    host_bytes_per_s: float


_MATRIX_SHARE = 500 / 989.4
_FACTOR_SHARE = 25 / 66.9
_SOLVE_SHARE = 40 / 66.9
_HOST_SHARE = 50 / 64
_COLUMN_S = 2e-6


def assumed_rates(kind: GpuKind) -> Rates:
    """The shares of a GPU's peaks that are assumed; the same of every kind."""
    return Rates(
        matrix_flops=kind.matrix_flops * _MATRIX_SHARE,
        factor_flops=kind.vector_flops * _FACTOR_SHARE,
        solve_flops=kind.vector_flops * _SOLVE_SHARE,
        column_s=_COLUMN_S,
        host_bytes_per_s=kind.host_bytes_per_s * _HOST_SHARE,
    )


def measured_rates(path: str, assumed: Rates) -> Rates:
    """Rates of which some were measured.

    Args:
        path: A JSON file: names of `Rates` and their values.
        assumed: What the others are.

    Raises:
        RecipeError: No such file, no object in it, an unknown name, or a value that is no number above 0.
    """
    known = [field.name for field in dataclasses.fields(Rates)]
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"rates {path} cannot be read: {error.strerror}", option="rates") from error
    except ValueError as error:
        raise RecipeError(f"rates {path} is not valid JSON: {error}", option="rates") from error
    wrong = [
        name
        for name, value in (values.items() if isinstance(values, dict) else [("", values)])
        if name not in known or not isinstance(value, int | float) or not value > 0
    ]
    if wrong:
        raise RecipeError(
            f"rates {path} must hold numbers above 0 by the names {', '.join(known)}; found {wrong[0]!r}",
            option="rates",
        )
    return dataclasses.replace(assumed, **values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Nodes of equal GPUs.

    Attributes:
        num_nodes: Nodes.
        gpus_per_node: GPUs of each; every one is a worker.
        kind: Of the GPUs.
        rates: What each of them does.
        network_bytes_per_s: Of a node, each way at once.
        storage_bytes_per_s: Of a node, reads and writes together.
    """

    num_nodes: int
    gpus_per_node: int
    kind: GpuKind
    rates: Rates
    network_bytes_per_s: float
    storage_bytes_per_s: float

    @property
    def num_workers(self) -> int:
        """All GPUs."""
        return self.num_nodes * self.gpus_per_node

    def node_of(self, worker: int) -> int:
        """Where a worker is."""
        return worker // self.gpus_per_node


GPUS_PER_NODE = 8
DEFAULT_NETWORK, DEFAULT_STORAGE = "100Gbps", "2GB/s"
_CLUSTER = re.compile(r"(?:(?P<nodes>\d+)x)?(?:(?P<gpus>\d+)x)?(?P<kind>[A-Za-z]\w*)")
_RATE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[A-Za-z/]+)")
_UNITS = {"Mbps": 1e6 / 8, "Gbps": 1e9 / 8, "Tbps": 1e12 / 8, "MB/s": 1e6, "GB/s": 1e9, "TB/s": 1e12}


def parse_cluster(text: str, *, network: str, storage: str, rates: str | None = None) -> Cluster:
    """A cluster as a person writes it.

    Args:
        text: ``8xH100`` (GPUs; more than 8 fill nodes of 8) or ``4x8xH100`` (nodes, GPUs of each).
        network: Rate of a node, such as ``100Gbps``.
        storage: Rate of a node, such as ``2GB/s``.
        rates: File of measured rates, see `measured_rates`.

    Raises:
        RecipeError: Not of that form; an unknown GPU; no GPU; GPUs that do not fill nodes of 8; a wrong rate.

    >>> found = parse_cluster("64xH100", network="100Gbps", storage="2GB/s")
    >>> found.num_nodes, found.gpus_per_node, found.network_bytes_per_s
    (8, 8, 12500000000.0)
    """
    found = _CLUSTER.fullmatch(text)
    if found is None:
        raise _wrong_cluster(f"found {text!r}")
    kind = GPU_KINDS.get(found["kind"].upper())
    if kind is None:
        raise _wrong_cluster(f"of the GPUs {', '.join(GPU_KINDS)}, found {found['kind']!r}")
    nodes, gpus = _counts(found["nodes"], found["gpus"])
    assumed = assumed_rates(kind)
    return Cluster(
        num_nodes=nodes,
        gpus_per_node=gpus,
        kind=kind,
        rates=assumed if rates is None else measured_rates(rates, assumed),
        network_bytes_per_s=parse_rate("network", network),
        storage_bytes_per_s=parse_rate("storage", storage),
    )


def parse_rate(option: str, text: str) -> float:
    """Bytes a second.

    Args:
        option: What the rate is of, for the message.

    Raises:
        RecipeError: No number above 0, or no unit of a rate.

    >>> parse_rate("storage", "500MB/s")
    500000000.0
    """
    found = _RATE.fullmatch(text.strip())
    factor = _UNITS.get(found["unit"]) if found else None
    rate = float(found["number"]) * factor if found and factor else 0.0
    if not rate > 0:
        raise RecipeError(
            f"{option} must be a rate above 0 in one of {', '.join(_UNITS)}, such as 100Gbps or 2GB/s;"
            f" found {text!r}",
            option=option,
        )
    return rate


def _counts(first: str | None, second: str | None) -> tuple[int, int]:
    """Nodes, and GPUs of each."""
    if second is not None:
        nodes, gpus = int(first or 1), int(second)
    else:
        total = int(first or 1)
        nodes, gpus = (1, total) if total <= GPUS_PER_NODE else (total // GPUS_PER_NODE, GPUS_PER_NODE)
        if nodes * gpus != total:
            raise _wrong_cluster(
                f"found {total} GPUs, which do not fill nodes of {GPUS_PER_NODE}: name the nodes"
            )
    if nodes < 1 or gpus < 1:
        raise _wrong_cluster(f"found {nodes} nodes of {gpus} GPUs")
    return nodes, gpus


def _wrong_cluster(found: str) -> RecipeError:
    return RecipeError(
        f"cluster must be GPUs, such as 8xH100, or nodes and GPUs of each, such as 4x8xH100; {found}",
        option="cluster",
    )
