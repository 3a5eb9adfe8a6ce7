"""The table of scheme names."""

import pytest

from quantlib.errors import RecipeError
from quantlib.packing.bits import PACKED_BITS
from quantlib.schemes import FLOAT_NAMES, INTEGER_NAMES, has_own_groups, scheme_from_name


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("is_symmetric", [True, False])
def test_scheme_from_name_gives_bits_and_symmetry(bits, is_symmetric):
    scheme = scheme_from_name(f"W{bits}A16" + ("" if is_symmetric else "_ASYM"), 64)
    assert (scheme.bits, scheme.is_symmetric, scheme.group_size) == (bits, is_symmetric, 64)
    assert scheme.num_codes == 2**bits
    assert scheme.middle_code == 2**bits / 2


def test_scheme_names_are_those_that_formats_can_pack():
    schemes = {scheme_from_name(name, 128) for name in INTEGER_NAMES}
    assert len(schemes) == len(INTEGER_NAMES) == 2 * len(PACKED_BITS)
    assert {scheme.bits for scheme in schemes} == set(PACKED_BITS)


def test_group_size_is_a_choice_for_integers_only():
    assert scheme_from_name("W4A16").group_size == 128
    for name in FLOAT_NAMES:
        own = scheme_from_name(name)
        assert has_own_groups(name) and scheme_from_name(name, own.group_size) == own
        with pytest.raises(RecipeError, match=f"scheme {name} has a group size of its own, .* found 64"):
            scheme_from_name(name, 64)


@pytest.mark.parametrize("name", ["W7A16", "W4A8", "w4a16", ""])
def test_scheme_from_unknown_name_lists_the_known_ones(name):
    with pytest.raises(
        RecipeError, match="use one of W2A16, W3A16, W4A16, W5A16, W6A16, W8A16, W2A16_ASYM"
    ) as raised:
        scheme_from_name(name, 64)
    assert raised.value.facts["scheme"] == name
