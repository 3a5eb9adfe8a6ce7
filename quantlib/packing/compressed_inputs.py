"""``input_activations`` of compressed-tensors: inputs that engines round as they run, with scales found then.

Left out: scales that are stored (static), inputs of a whole tensor, asymmetric ones.

Source: compressed-tensors 0.20.0, quantization/{quant_args,quant_scheme}.py; the values are its presets'.
"""

from collections.abc import Mapping
from typing import Any

from quantlib.errors import PackingError
from quantlib.packing.compressed_floats import weights_values
from quantlib.schemes import (
    ROUNDED_INPUTS_NAMES,
    WHOLE_ROW,
    ActivationScheme,
    WeightScheme,
    scheme_from_name,
)

_KNOWN = tuple(found for name in ROUNDED_INPUTS_NAMES if (found := scheme_from_name(name).inputs) is not None)
# What tells them apart, and what each is where it is not there.
_DECISIVE = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": None,
    "group_size": None,
    "dynamic": False,
    "scale_dtype": None,
}


def inputs_values(scheme: ActivationScheme | None) -> dict[str, object] | None:
    """``input_activations`` of a group of config_groups."""
    if scheme is None:
        return None
    alike = WeightScheme(
        bits=scheme.bits,
        is_symmetric=True,
        group_size=scheme.group_size,
        number=scheme.number,
        scales=scheme.scales,
    )
    strategy = "token" if scheme.group_size == WHOLE_ROW else "group"
    return weights_values(alike) | {"strategy": strategy, "dynamic": True}


def inputs_from_values(values: Any, name: str) -> ActivationScheme | None:
    """What a group's ``input_activations`` mean; None where inputs stay as they are.

    Raises:
        PackingError: They mean something else than what is known here; ``inputs`` says what.
    """
    if not values:
        return None
    if not isinstance(values, Mapping):
        raise PackingError(f"input_activations of {name} are {values!r}; wanted an object", linear=name)
    found = {key: values.get(key, default) for key, default in _DECISIVE.items()}
    for scheme in _KNOWN:
        expected = inputs_values(scheme) or {}
        if found == {key: expected.get(key, default) for key, default in _DECISIVE.items()}:
            return scheme
    words = ", ".join(f"{key} {value}" for key, value in found.items() if value is not None)
    raise PackingError(
        f"input_activations of {name} are {words}; read are {', '.join(map(str, _KNOWN))}, all dynamic",
        linear=name,
        inputs=words,
    )
