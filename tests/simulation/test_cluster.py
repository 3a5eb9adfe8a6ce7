"""What a person may write of a cluster."""

import json

import pytest

from quantlib.errors import RecipeError
from quantlib.simulation.hardware import parse_cluster, parse_rate
from quantlib.simulation.prediction import parse_price

RATES = {"network": "100Gbps", "storage": "2GB/s"}


@pytest.mark.parametrize(
    ("text", "nodes", "gpus", "kind"),
    [
        ("H100", 1, 1, "H100"),
        ("4xA100", 1, 4, "A100"),
        ("8xh200", 1, 8, "H200"),
        ("64xB200", 8, 8, "B200"),
        ("4x8xH100", 4, 8, "H100"),
        ("3x5xH100", 3, 5, "H100"),
        ("1x16xH100", 1, 16, "H100"),
    ],
)
def test_cluster_is_nodes_of_gpus(text, nodes, gpus, kind):
    cluster = parse_cluster(text, **RATES)
    assert (cluster.num_nodes, cluster.gpus_per_node, cluster.kind.name) == (nodes, gpus, kind)
    assert cluster.node_of(cluster.num_workers - 1) == nodes - 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "cluster must be GPUs, such as 8xH100"),
        ("8", "found '8'"),
        ("8xH101", "of the GPUs A100, H100, H200, B200, found 'H101'"),
        ("0xH100", "found 1 nodes of 0 GPUs"),
        ("0x8xH100", "found 0 nodes of 8 GPUs"),
        ("12xH100", "12 GPUs, which do not fill nodes of 8"),
        ("2x4x8xH100", "found '2x4x8xH100'"),
        ("-8xH100", "found '-8xH100'"),
    ],
)
def test_wrong_cluster_says_what_is_wanted_and_found(text, said):
    with pytest.raises(RecipeError, match=said):
        parse_cluster(text, **RATES)


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [("100Gbps", 12.5e9), ("3.2 Tbps", 400e9), ("800Mbps", 100e6), ("2GB/s", 2e9), ("1.5TB/s", 1.5e12)],
)
def test_rate_is_bytes_a_second(text, bytes_per_s):
    assert parse_rate("network", text) == pytest.approx(bytes_per_s)


@pytest.mark.parametrize("text", ["", "100", "Gbps", "0GB/s", "-1GB/s", "2gb/s", "2GB", "nanGB/s"])
def test_wrong_rate_is_refused(text):
    with pytest.raises(RecipeError, match="storage must be a rate above 0 in one of Mbps, Gbps"):
        parse_rate("storage", text)


@pytest.mark.parametrize("text", ["", "free", "0", "-2", "nan", "inf"])
def test_wrong_price_is_refused(text):
    with pytest.raises(RecipeError, match="price must be what a GPU-hour costs"):
        parse_price(text)


def test_measured_rates_take_the_place_of_assumed_ones(tmp_path):
    file = tmp_path / "rates.json"
    file.write_text(json.dumps({"column_s": 1e-4}))
    rates = parse_cluster("8xH100", **RATES, rates=str(file)).rates
    assert (rates.column_s, rates.matrix_flops) == (1e-4, pytest.approx(500e12))


@pytest.mark.parametrize("text", ['{"columns": 1}', '{"column_s": 0}', '{"column_s": "fast"}', "[1]", "{"])
def test_wrong_rates_are_refused(text, tmp_path):
    file = tmp_path / "rates.json"
    file.write_text(text)
    with pytest.raises(RecipeError, match="rates .* (must hold numbers above 0|is not valid JSON)"):
        parse_cluster("8xH100", **RATES, rates=str(file))


def test_rates_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        parse_cluster("8xH100", **RATES, rates=str(tmp_path / "none.json"))
