"""What a GGUF file means to transformers: config.json, tokenizer files, and the names of its tensors.

transformers reads GGUF as a whole local file. It is given one here that has the header alone and holes where
the data would be, so that its own rules decide while no tensor is read; names are mapped with a model
without weights, and a tensor's processor is asked on an array without memory.
"""

import json
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from quantlib.checkpoint.gguf_files import experts
from quantlib.checkpoint.gguf_files.header import GgufHeader, GgufTensor, bare_header
from quantlib.errors import CheckpointError
from quantlib.model.families import model_class, open_config
from quantlib.model.meta_model import build_meta_model

# By general.file_type: what most tensors are stored as. All else are codes, whose levels are rounded to bf16.
_DTYPES = {0: "float32", 1: "float16"}
_NO_TYPE = -1
_BIASES = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
_TRACES = ("_name_or_path", "_model_name_or_path", "transformers_version", "quantization_config")
# What transformers writes of how it was asked.
_TOKENIZER_TRACES = ("is_local", "local_files_only", "name_or_path")
_FILE_NAME = "model.gguf"
# Whether text is to get a space before it, which transformers passes over: to it all pieces want one.
_FIRST_SPACE = "tokenizer.ggml.add_space_prefix"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a tensor of the file goes.

    Attributes:
        names: Of the parameter; of experts that are stored as one, of each.
        shape: Of each.
        process: Makes it from the fp32 array that is stored; None where that is it.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    process: Callable[[np.ndarray], np.ndarray] | None


def config_of(headers: tuple[GgufHeader, ...]) -> dict[str, Any]:
    """The values of a config.json.

    Raises:
        CheckpointError: The architecture is none that transformers reads from GGUF, or its values are not
            valid.
    """
    values = headers[0].values
    with _local_file(*bare_header(headers, keep_vocabulary=False)) as path:
        try:
            found = load_gguf_checkpoint(str(path), return_tensors=False)["config"]
            # Of some architectures transformers does not take over the header's.
            found.setdefault("vocab_size", values.get("tokenizer.ggml.tokens"))
            architecture = values.get("general.architecture")
            for name, key in experts.SIZES.items():
                if f"{architecture}.{key}" in values:
                    found.setdefault(name, values[f"{architecture}.{key}"])
            found["dtype"] = _DTYPES.get(values.get("general.file_type", _NO_TYPE), "bfloat16")
            config = CONFIG_MAPPING[found["model_type"]].from_dict(found)
        # The readers of transformers raise whatever a missing or strange value leads to.
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"transformers makes no configuration of a GGUF file of architecture"
                f" {values.get('general.architecture')!r}: {error}; convert it to safetensors"
            ) from error
    written = json.loads(config.to_json_string())
    config_json = {name: value for name, value in written.items() if name not in _TRACES}
    return {"architectures": [model_class(open_config(config_json)).__name__], **config_json}


def with_biases(config: Mapping[str, Any], tensors: Collection[str]) -> dict[str, Any]:
    """The values of a config.json, with what the header of a llama leaves to its tensors: its biases."""
    if config["model_type"] != "llama":
        return dict(config)
    found = {key: name in tensors for key, name in _BIASES.items()}
    return {**config, **{key: True for key, is_there in found.items() if is_there}}


def places_of(
    tensors: Iterable[GgufTensor], header: GgufHeader, config: Mapping[str, Any]
) -> dict[str, Place]:
    """Name of a tensor in the file -> its place in the model.

    Args:
        tensors: All that must have one.
        header: Of the first part.
        config: The values of config.json.

    Raises:
        CheckpointError: transformers has no place for a tensor.
    """
    opened = open_config(config)
    model = build_meta_model(opened, model_class(opened))
    architecture = str(header.values.get("general.architecture"))
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=dict(config))
    try:
        names = get_gguf_hf_weights_map(model, processor)
    except NotImplementedError as error:
        raise CheckpointError(
            f"the names of a GGUF file of architecture {architecture!r} are not known ({error});"
            " convert it to safetensors"
        ) from error
    parameters = model.state_dict()
    places = {}
    for tensor in tensors:
        # Fused experts are parameters without ".weight".
        name = names.get(tensor.name) or names.get(tensor.name.removesuffix(".weight"))
        if name is None or name not in parameters:
            raise CheckpointError(
                f"the GGUF file holds {tensor.name}, for which transformers has no place in a"
                f" {config['model_type']} model; convert it to safetensors",
                tensor=tensor.name,
            )
        if tensor.name.endswith(experts.ENDING):
            each = experts.expert_names(model, name, tensor.name, tensor.shape)
            places[tensor.name] = Place(names=each, shape=tensor.shape[1:], process=None)
            continue
        places[tensor.name] = _place(processor, tensor.name, tensor.shape, name, parameters[name].shape)
    return places


def _place(
    processor: TensorProcessor, stored: str, shape: tuple[int, ...], name: str, wanted: tuple[int, ...]
) -> Place:
    def process(values: np.ndarray) -> np.ndarray:
        return processor.process(values, stored).weights

    # As large as the tensor and without memory.
    probe = np.broadcast_to(np.float32(1), shape)
    made = process(probe)
    if made.shape != tuple(wanted):
        raise CheckpointError(
            f"{stored} is {list(shape)} in the GGUF file and would be {list(made.shape)} as {name}, which is"
            f" {list(wanted)}; the file is damaged or of another model",
            tensor=stored,
        )
    return Place(names=(name,), shape=made.shape, process=None if made is probe else process)


class TokenizerFiles(Mapping[str, bytes]):
    """File name -> content of the tokenizer of a GGUF file, made when first asked for: it takes seconds.

    Args:
        headers: Of the parts of the model.
        uri: Of the file, for messages.
    """

    def __init__(self, headers: tuple[GgufHeader, ...], uri: str) -> None:
        self._headers, self._uri = headers, uri
        self._files: dict[str, bytes] | None = None

    def _made(self) -> dict[str, bytes]:
        if self._files is None:
            values = self._headers[0].values
            has_tokens, has_space = "tokenizer.ggml.tokens" in values, values.get(_FIRST_SPACE, True)
            header = bare_header(self._headers, keep_vocabulary=True)
            self._files = _tokenizer_files(*header, self._uri, bool(has_space)) if has_tokens else {}
        return self._files

    def __getitem__(self, name: str) -> bytes:
        return self._made()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made())

    def __len__(self) -> int:
        return len(self._made())


# A job opens its source several times in a process.
@lru_cache(maxsize=1)
def _tokenizer_files(header: bytes, size_bytes: int, uri: str, has_first_space: bool) -> dict[str, bytes]:
    with _local_file(header, size_bytes) as path:
        target = path.parent / "tokenizer"
        try:
            AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(target)
        # The tokenizers library raises bare Exception for a vocabulary it cannot make sense of.
        except Exception as error:
            raise CheckpointError(f"the tokenizer in {uri} cannot be converted: {error}", uri=uri) from error
        if not has_first_space:
            _leave_out_first_space_(target / "tokenizer.json")
        return {file.name: _without_traces(file) for file in sorted(target.iterdir())}


def _leave_out_first_space_(file: Path) -> None:
    values = json.loads(file.read_text(encoding="utf-8"))
    marking, decoder = values.get("pre_tokenizer") or {}, values.get("decoder") or {}
    if marking.get("type") == "Metaspace":
        marking["prepend_scheme"] = "never"
        decoder["decoders"] = [step for step in decoder.get("decoders", ()) if step.get("type") != "Strip"]
        file.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")


def _without_traces(file: Path) -> bytes:
    if file.name != "tokenizer_config.json":
        return file.read_bytes()
    values = json.loads(file.read_text(encoding="utf-8"))
    kept = {name: value for name, value in values.items() if name not in _TOKENIZER_TRACES}
    return (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()


@contextmanager
def _local_file(header: bytes, size_bytes: int) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="quantmill-gguf-") as folder:
        path = Path(folder) / _FILE_NAME
        with path.open("wb") as file:
            file.write(header)
            # The rest is a hole, which takes no space.
            file.truncate(size_bytes)
        yield path
