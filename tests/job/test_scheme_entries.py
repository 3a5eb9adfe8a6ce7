"""Entries of a comparison: what is read from them, and what is refused in whose name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantlib.errors import RecipeError
from quantlib.job.scheme_entries import SchemeEntry, entry_from
from quantlib.schemes import FLOAT_NAMES, INTEGER_NAMES, scheme_from_name

BY_DEFAULT = {"method": "gptq", "group_size": 128}


@pytest.mark.parametrize(
    ("text", "method", "scheme", "group_size", "folder"),
    [
        ("W4A16", "gptq", "W4A16", 128, "gptq-W4A16-g128"),
        ("W3A16_ASYM@64", "gptq", "W3A16_ASYM", 64, "gptq-W3A16_ASYM-g64"),
        ("rtn:W8A16", "rtn", "W8A16", 128, "rtn-W8A16-g128"),
        ("gptq:W4A16@32", "gptq", "W4A16", 32, "gptq-W4A16-g32"),
        ("rtn:W2A16@-1", "rtn", "W2A16", -1, "rtn-W2A16-row"),
        ("FP8A16", "gptq", "FP8A16", -1, "gptq-FP8A16-row"),
        ("rtn:MXFP4A16@32", "rtn", "MXFP4A16", 32, "rtn-MXFP4A16-g32"),
    ],
)
def test_what_an_entry_leaves_out_is_the_jobs(text, method, scheme, group_size, folder):
    entry = entry_from(text, **BY_DEFAULT)
    assert (entry.method, entry.scheme, entry.group_size) == (method, scheme, group_size)
    assert entry.folder == folder


@given(
    method=st.sampled_from(["gptq", "rtn"]),
    scheme=st.sampled_from(INTEGER_NAMES),
    group_size=st.one_of(st.just(-1), st.integers(8, 1 << 20)),
)
def test_an_entry_is_read_as_it_is_written(method, scheme, group_size):
    entry = SchemeEntry(method=method, scheme=scheme, group_size=group_size)
    assert entry_from(str(entry), method="gptq", group_size=128) == entry


@pytest.mark.parametrize("name", FLOAT_NAMES)
def test_an_entry_of_floats_has_their_groups(name):
    entry = entry_from(name, **BY_DEFAULT)
    assert entry.group_size == scheme_from_name(name).group_size
    assert entry_from(str(entry), **BY_DEFAULT) == entry


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("awq:W4A16", "'awq:W4A16': method must be one of gptq, rtn, found 'awq'"),
        (":W4A16", "method must not be empty"),
        ("W7A16", "'W7A16': scheme must be one of W2A16, .*, found 'W7A16'"),
        ("MXFP4A16@64", "'MXFP4A16@64': scheme MXFP4A16 has a group size of its own, 32, found 64"),
        ("w4a16", "scheme must be one of"),
        ("", "scheme must not be empty"),
        ("rtn:@64", "scheme must not be empty"),
        ("W4A16@", "the group size of 'W4A16@' must be a whole number, found ''"),
        ("W4A16@all", "whole number, found 'all'"),
        ("W4A16@6_4", "whole number, found '6_4'"),
        ("W4A16@\u0666\u0664", "whole number"),
        ("W4A16@64.0", "whole number"),
        ("W4A16@4", "'W4A16@4': group_size must be at least 8 or -1 or 0, found 4"),
        ("W4A16@-2", "group_size must be at least 8 or -1 or 0, found -2"),
        ("gptq:rtn:W4A16", r"an entry is \[method:\]SCHEME\[@GROUP\], .* found 'gptq:rtn:W4A16'"),
        ("W4A16@32@64", "an entry is"),
        ("32@gptq:W4A16", "an entry is"),
    ],
)
def test_what_is_no_entry_is_refused_by_its_name(text, said):
    with pytest.raises(RecipeError, match=said) as refused:
        entry_from(text, **BY_DEFAULT)
    assert refused.value.facts["option"] == "schemes"


@given(text=st.text(alphabet="gptqrn:@W48A16_SYM-9", max_size=14))
def test_any_text_is_an_entry_or_refused(text):
    try:
        entry = entry_from(text, **BY_DEFAULT)
    except RecipeError:
        return
    assert entry_from(str(entry), **BY_DEFAULT) == entry
