"""Custom resources and labels as text: what is taken, what is refused, which nodes match."""

import pytest

from quantlib.errors import RecipeError
from quantlib.job.node_terms import does_match, labels_from, resources_from


@pytest.mark.parametrize(
    ("text", "resources"),
    [
        (None, {}),
        ("quant=1", {"quant": 1.0}),
        (" quant = 2 , slots=0.25", {"quant": 2.0, "slots": 0.25}),
        ("a:b/c-1=0.0001", {"a:b/c-1": 0.0001}),
    ],
)
def test_resources_are_names_and_amounts(text, resources):
    assert resources_from(text) == resources


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("quant", "must be name=value"),
        ("quant=", "must be name=value"),
        ("=1", "must be name=value"),
        ("quant=1,", "must be name=value"),
        ("quant=1,quant=2", "each name once"),
        ("CPU=2", "custom resources only, found CPU"),
        ("memory=1", "custom resources only, found memory"),
        ("quant=0", "must give quant a whole number or a fraction below 1"),
        ("quant=1.5", "must give quant"),
        ("quant=0.00001", "must give quant"),
        ("quant=-1", "must give quant"),
        ("quant=nan", "must give quant"),
        ("quant=1e9", "must give quant"),
    ],
)
def test_resources_that_ray_cannot_share_out_are_refused(text, said):
    with pytest.raises(RecipeError, match=said) as caught:
        resources_from(text)
    assert caught.value.facts == {"option": "worker_resources"}


def test_labels_keep_their_selectors_and_commas_inside_parentheses():
    text = "region=eu, example.org/pool=!spot,zone=in(a,b, c),rack=!in(1)"
    assert labels_from(text) == {
        "region": "eu",
        "example.org/pool": "!spot",
        "zone": "in(a,b,c)",
        "rack": "!in(1)",
    }


@pytest.mark.parametrize(
    ("text", "model", "said"),
    [
        ("pool", None, "must be name=value"),
        ("pool=a=b", None, "no label of Ray's"),
        ("po ol=a", None, "no label of Ray's"),
        ("pool=-a", None, "no label of Ray's"),
        ("pool=in()", None, "no label of Ray's"),
        ("pool=in(a", None, "no label of Ray's"),
        ("pool=!!a", None, "no label of Ray's"),
        ("pool=" + "a" * 64, None, "no label of Ray's"),
        (None, "H100,H200", "must be one model as Ray names it"),
        (None, "!H100", "must be one model as Ray names it"),
        ("ray.io/accelerator-type=A100", "H100", "say the same"),
    ],
)
def test_labels_that_are_none_are_refused(text, model, said):
    with pytest.raises(RecipeError, match=said):
        labels_from(text, model)


@pytest.mark.parametrize(
    ("selector", "matching"),
    [("a", "a"), ("!a", "b-"), ("in(a)", "a"), ("in(a,b)", "ab"), ("!in(a,b)", "-"), ("!in(a)", "b-")],
)
def test_node_matches_as_ray_says(selector, matching):
    # "-" has no such label: only "not" is met by it.
    nodes = {"a": {"pool": "a"}, "b": {"pool": "b"}, "-": {"zone": "a"}}
    assert "".join(n for n, labels in nodes.items() if does_match(labels, {"pool": selector})) == matching


def test_node_must_match_all_labels():
    assert does_match({"pool": "a", "zone": "x"}, {"pool": "a", "zone": "!y"})
    assert not does_match({"pool": "a", "zone": "y"}, {"pool": "a", "zone": "!y"})
