"""Names of fused tensors of which a quantized checkpoint holds the linears instead, each by itself.

Which those are follows from what the model of ``config.json`` lacks, and from where in the checkpoint there
are linears that it does not have.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from transformers import PreTrainedModel

from quantlib.model.families import model_class, open_config
from quantlib.model.meta_model import build_meta_model
from quantlib.model.stored_names import StoredNames, find_stored_names, parameters_made

# The weight of a linear of one expert, ``<experts>.7.up_proj.weight``; what follows a name's last number.
_OF_EXPERT = re.compile(r"(.+)\.\d+\.\w+\.weight")
_IN_BLOCK = re.compile(r"(?:.*\.\d+\.)?(.+)")


def rejoined_names(config: Mapping[str, Any], tensor_names: Collection[str]) -> tuple[str, ...]:
    """Names that a skeleton can be loaded from: those given, and of every fused tensor that was split.

    The fused tensors are those of transformers' model, in its layout: what was split may have been stored
    in another one, under another name.

    Args:
        config: The values of ``config.json``.
        tensor_names: Names of what is stored, with ``<linear>.weight`` for a linear that is stored packed.

    Raises:
        UnsupportedModelError: The model is of an unknown family.
        CheckpointError: ``config.json`` is invalid.

    Cost: that of a model on the meta device, and of matching all names with its parameters.
    """
    opened = open_config(config)
    model = build_meta_model(opened, model_class(opened))
    stored = find_stored_names(model, tensor_names)
    lacking = model.state_dict().keys() - _filled(stored)
    used = {*stored.renamed.values(), *(n for found in stored.conversions.values() for n in found.stored)}
    places = dict.fromkeys(
        found[1] for name in tensor_names if name not in used and (found := _OF_EXPERT.fullmatch(name))
    )
    endings = dict.fromkeys(ending for name in sorted(lacking) for ending in _endings(name))
    candidates = [f"{place}.{ending}" for place in places for ending in endings]
    return (*tensor_names, *_known(model, candidates, lacking))


def _filled(stored: StoredNames) -> set[str]:
    """Parameters that stored tensors are for."""
    made = (name for conversion in stored.conversions.values() for name in parameters_made(conversion))
    return {*stored.renamed, *made}


def _endings(name: str) -> Iterator[str]:
    """How a name ends, inside its block: where the module of the experts stands in it is not known."""
    found = _IN_BLOCK.fullmatch(name)
    parts = found[1].split(".") if found else []
    for start in range(len(parts)):
        yield ".".join(parts[start:])


def _known(model: PreTrainedModel, candidates: Collection[str], lacking: Collection[str]) -> list[str]:
    """The candidates that transformers would load, as they are, as one of the parameters that are lacking."""
    stored = find_stored_names(model, candidates)
    found = {**stored.renamed}
    for parameter, conversion in stored.conversions.items():
        if conversion.leaves_fitting:
            found[parameter] = conversion.stored[0]
    return [name for parameter, name in found.items() if parameter in lacking]
