"""Decisions on what Ray tells of its nodes: who can host workers, how many, and which GPUs they would have.

The nodes are entries of ``ray.nodes()`` of Ray 2.60.0 from a cluster of three nodes on one machine, two of
them started with GPUs that only Ray believed in, cut to what is read.
"""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray._private.label_utils import validate_label_selector

from quantlib.errors import RecipeError
from quantlib.job.node_terms import GPU_MODEL_LABEL, labels_from
from quantlib.job.options import JobOptions, options_from
from workers.demand import demand, offered
from workers.placement import (
    Need,
    capacity,
    equal_share,
    gpu_models,
    hosts,
    the_one_gpu_model,
    without_other_models,
)

A100 = {
    "NodeID": "17809239ad03dae554640853bbeb9a81c300aa933cf4b166aba4df6e",
    "Alive": True,
    "Resources": {
        "accelerator_type:A100": 1.0,
        "object_store_memory": 83886080.0,
        "node:192.0.2.2": 1.0,
        "memory": 12491153408.0,
        "CPU": 2.0,
        "GPU": 2.0,
    },
    "Labels": {
        "pool": "b",
        "ray.io/node-id": "17809239ad03dae554640853bbeb9a81c300aa933cf4b166aba4df6e",
        "ray.io/accelerator-type": "A100",
    },
}
H100 = {
    "NodeID": "f61ded01e04eb7d114b368298a6f5f03add49cb0a7f5645b783870cc",
    "Alive": True,
    "Resources": {
        "object_store_memory": 83886080.0,
        "quant": 1.0,
        "node:192.0.2.2": 1.0,
        "memory": 12891197440.0,
        "accelerator_type:H100": 1.0,
        "CPU": 2.0,
        "GPU": 1.0,
    },
    "Labels": {
        "pool": "a",
        "ray.io/node-id": "f61ded01e04eb7d114b368298a6f5f03add49cb0a7f5645b783870cc",
        "ray.io/accelerator-type": "H100",
    },
}
HEAD = {
    "NodeID": "a52fbe89f746b5e9faa2e50f69553d81d108bedffd06ae1198ecc8fd",
    "Alive": True,
    "Resources": {
        "CPU": 2.0,
        "memory": 11875930112.0,
        "object_store_memory": 83886080.0,
        "node:__internal_head__": 1.0,
        "node:192.0.2.2": 1.0,
    },
    "Labels": {"ray.io/node-id": "a52fbe89f746b5e9faa2e50f69553d81d108bedffd06ae1198ecc8fd"},
}
NODES = [A100, H100, HEAD]


def _options(**changes) -> JobOptions:
    given = {"source": "m", "output": "q", "method": "rtn", "ray_address": "10.0.0.1:6379"}
    return options_from({**given, **changes})


def _gone(node: dict) -> dict:
    return {**node, "Alive": False, "Resources": {}}


@pytest.mark.parametrize(
    ("need", "strategy", "room"),
    [
        (Need(cpus=1), None, 6),
        (Need(cpus=2), None, 3),
        (Need(cpus=3), None, 0),
        (Need(cpus=1), "spread", 6),
        (Need(cpus=1), "strict-pack", 2),
        (Need(cpus=1), "strict-spread", 3),
        (Need(cpus=1, gpus=1), None, 3),
        (Need(cpus=2, gpus=1), None, 2),
        (Need(cpus=1, labels={"pool": "a"}), None, 2),
        (Need(cpus=1, labels={"pool": "!a"}), None, 4),
        (Need(cpus=1, resources={"quant": 0.5}), None, 2),
        # In binary 0.1 goes nine times into 1.
        (Need(resources={"quant": 0.1}), None, 10),
    ],
)
def test_capacity_counts_what_fits_on_each_node(need, strategy, room):
    assert capacity(NODES, need, strategy) == room


def test_dead_nodes_hold_nobody():
    nodes = [_gone(H100), A100]
    assert hosts(nodes, Need(cpus=1)) == [A100]
    assert gpu_models(nodes) == {"A100": 1}


def test_share_of_cores_counts_only_nodes_that_can_host():
    big_head = {**HEAD, "Resources": {"CPU": 64.0}}
    on_gpus = Need(gpus=1)
    assert equal_share([H100, big_head], on_gpus, 1) == 2
    # Five cores for three workers would be one each; two each still leave a place for all.
    odd = [{**HEAD, "Resources": {"CPU": cores}} for cores in (4.0, 2.0)]
    assert equal_share(odd, Need(), 3) == 2
    # Half of eight cores is four, which one of these nodes has and the other not.
    uneven = [{**HEAD, "Resources": {"CPU": cores}} for cores in (5.0, 3.0)]
    assert equal_share(uneven, Need(), 2) == 3
    assert equal_share(uneven, Need(), 2, "strict-pack") == 2


def test_one_model_of_gpu_is_found():
    assert the_one_gpu_model([H100, HEAD, _gone(A100)]) == "H100"
    unlabelled = {**A100, "Labels": {}}
    assert the_one_gpu_model([unlabelled]) is None
    assert the_one_gpu_model([H100, unlabelled]) == "H100"


def test_several_models_of_gpu_are_refused_with_their_nodes():
    with pytest.raises(RecipeError, match=r"A100 \(1 node\) and H100 \(2 nodes\); choose one") as caught:
        the_one_gpu_model([A100, H100, H100])
    assert caught.value.before_work
    assert caught.value.facts["models"] == {"A100": 1, "H100": 2}


def test_need_keeps_away_from_models_that_the_job_does_not_run_on():
    need = Need(gpus=1, labels={"pool": "!c"})
    assert without_other_models(need, [H100, HEAD], "H100") == need
    kept = without_other_models(need, NODES, "H100")
    assert kept.labels == {"pool": "!c", GPU_MODEL_LABEL: "!in(A100)"}
    assert hosts(NODES, kept) == [H100]
    # A node that is not there yet, of a group whose labels nobody declared.
    assert hosts([{**H100, "Labels": {}}], kept)
    asked_for = Need(gpus=1, labels=labels_from(None, "H100"))
    assert without_other_models(asked_for, NODES, "H100") == asked_for


@pytest.mark.parametrize(
    ("changes", "cpus", "gpus", "count"),
    [
        ({}, 1, 1, 3),
        ({"device": "cpu"}, 1, 0, 4),
        ({"device": "cpu", "workers": 2}, 2, 0, 2),
        ({"gpu_model": "H100"}, 2, 1, 1),
        ({"worker_labels": "pool=b"}, 1, 1, 2),
        ({"worker_resources": "quant=0.5", "device": "cpu"}, 1, 0, 2),
        ({"placement": "strict-spread"}, 2, 1, 2),
        # What no node has yet is waited for, once it is said for how many workers.
        ({"gpu_model": "L4", "workers": 8, "threads_per_worker": 4}, 4, 1, 8),
        ({"worker_labels": "pool=c", "workers": 8}, 1, 0, 8),
    ],
)
def test_demand_follows_the_options_and_the_nodes(changes, cpus, gpus, count):
    need, found = demand(_options(**changes), NODES)
    assert (need.cpus, need.gpus, found) == (cpus, gpus, count)


def test_a_cluster_that_has_nothing_yet_is_waited_for():
    need, count = demand(_options(), [])
    assert (need, count) == (Need(cpus=1), 1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"gpu_model": "L4"},
            r"1 GPU on one node with ray.io/accelerator-type=L4, which the cluster does not",
        ),
        ({"gpu_model": "L4"}, r"its GPUs are A100 \(1 node\) and H100 \(1 node\)"),
        ({"gpu_model": "L4"}, r"or say with workers how many to wait for"),
        ({"worker_labels": "pool=c"}, r"1 CPU on one node with pool=c, which the cluster does not offer"),
        ({"worker_resources": "quant=2"}, r"1 CPU and 2 quant on one node, which the cluster"),
        ({"worker_labels": "pool=c", "workers": 3, "ray_address": None}, "which this machine does not offer"),
        (
            {"workers": 7, "device": "cpu", "ray_address": None},
            "this machine offers room for 6; ask for fewer",
        ),
        ({"placement": "strict-spread", "workers": 4, "device": "cpu", "ray_address": None}, "room for 3"),
    ],
)
def test_demand_that_no_node_meets_is_refused_before_work(changes, said):
    with pytest.raises(RecipeError, match=said) as caught:
        demand(_options(**changes), NODES)
    assert caught.value.before_work


def test_gpu_that_nobody_has_is_refused():
    with pytest.raises(RecipeError, match=r"needs 1 GPU .*its GPUs are no known model of GPU"):
        demand(_options(device="cuda"), [HEAD])


def test_offer_grows_with_the_nodes_that_will_do():
    options = _options(gpu_model="H100")
    need, _ = demand(options, NODES)
    assert offered(options, [*NODES, A100, HEAD], need) == 1
    assert offered(options, [*NODES, H100], need) == 2
    assert offered(options, [A100], dataclasses.replace(need, labels={})) == 2


_WORDS = st.text(st.sampled_from("aZ09-_."), min_size=1, max_size=4)
_SELECTORS = st.builds("{}{}".format, st.sampled_from(("", "!")), _WORDS) | st.builds(
    "{}in({})".format, st.sampled_from(("", "!")), st.lists(_WORDS, max_size=3).map(", ".join)
)
_KEYS = _WORDS | st.builds("{}/{}".format, _WORDS, _WORDS)


@given(_KEYS, _SELECTORS)
def test_ray_takes_every_label_that_we_take(key, selector):
    try:
        labels = labels_from(f"{key}={selector}")
    except RecipeError:
        return
    assert validate_label_selector(labels) is None
