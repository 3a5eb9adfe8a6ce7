"""Rows of token ids for calibration and evaluation.

Documents are tokenized one by one without special tokens, joined with a separator token and cut into rows of
equal length. Conversations are written out by the tokenizer's chat template first; the special tokens that it
writes are tokens, and no separator doubles them. The same documents, tokenizer and seed give the same rows
everywhere; `rows_digest` names them.

B sequences, T positions.
"""

import hashlib
import json
import random
import struct
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from quantlib.calibration.chat import Chat, ChatTemplate
from quantlib.calibration.documents import Document, read_documents
from quantlib.errors import CheckpointError, CorpusError
from quantlib.storage.contracts import Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from quantlib.checkpoint.index import Checkpoint

__all__ = ["load_tokenizer", "read_documents", "rows_digest", "separator_id", "token_rows"]

END_OF_TEXT = "<|endoftext|>"
# Together enough for the tokenizer's threads, and little enough that few documents too many are tokenized.
_DOCUMENTS_AT_ONCE = 64
_CHARACTERS_AT_ONCE = 1 << 18
_VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_FILES_THAT_NAME_CODE = ("config.json", "tokenizer_config.json")
_TOKENIZER_FILES = (
    *_VOCABULARY_FILES,
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def token_rows(
    documents: Iterable[Document],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    num_sequences: int,
    sequence_length: int,
    seed: int = 0,
) -> torch.Tensor:
    """Rows of token ids cut from documents.

    Args:
        documents: Texts or conversations. Only as many are read and tokenized as needed, unless they are
            shuffled.
        tokenizer: `separator_id` of it stands between documents, not before the first; not before a
            conversation either that begins with the begin token, or comes after a separator as it is.
        num_sequences: B, how many rows.
        sequence_length: T, tokens in a row.
        seed: 0 takes the documents as they come; another number shuffles them with ``random.Random(seed)``.

    Returns:
        int32 [B, T].

    Raises:
        CorpusError: Too little text; says how many tokens and rows there are. Or a conversation that cannot
            be written out.
    """
    if seed:
        documents = list(documents)
        random.Random(seed).shuffle(documents)
    wanted = num_sequences * sequence_length
    tokens: list[int] = []
    for token_ids in _tokenized(documents, tokenizer):
        tokens.extend(token_ids)
        if len(tokens) >= wanted:
            break
    _require_enough(len(tokens), num_sequences, sequence_length)
    return torch.tensor(tokens[:wanted], dtype=torch.int32).reshape(num_sequences, sequence_length)


def separator_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The token between documents: ``<|endoftext|>`` where the vocabulary has it, else eos, else bos.

    Raises:
        CorpusError: The tokenizer has none of them.
    """
    candidates = (
        tokenizer.get_vocab().get(END_OF_TEXT),
        tokenizer.eos_token_id,
        tokenizer.bos_token_id,
    )
    for token_id in candidates:
        if isinstance(token_id, int):
            return token_id
    raise CorpusError(
        f"the tokenizer has neither {END_OF_TEXT} nor an end or begin token to put between documents"
    )


def load_tokenizer(store: Store, checkpoint: "Checkpoint") -> "PreTrainedTokenizerBase":
    """The tokenizer that lies beside the shards of a checkpoint; none of the checkpoint's code is run.

    Raises:
        CheckpointError: There is none, or transformers cannot load it.
    """
    there = {*checkpoint.side_files, *checkpoint.made_files}
    if there.isdisjoint(_VOCABULARY_FILES):
        raise CheckpointError(
            f"{checkpoint.uri} holds no tokenizer ({', '.join(_VOCABULARY_FILES)}), but text is to be"
            " tokenized; put the tokenizer files of the model beside its shards",
            uri=checkpoint.uri,
        )
    files = {
        name: store.read(checkpoint.side_files[name].uri)
        for name in _TOKENIZER_FILES
        if name in checkpoint.side_files
    } | dict(checkpoint.made_files)
    # transformers picks the tokenizer's class by the model's type where the tokenizer does not name one.
    files["config.json"] = json.dumps(checkpoint.config).encode()
    return _tokenizer_from(files, checkpoint.uri)


def rows_digest(rows_BT: torch.Tensor) -> str:
    """sha256 in hex over B and T (little-endian int64), then the ids (little-endian int32, row by row)."""
    digest = hashlib.sha256(struct.pack("<qq", *rows_BT.shape))
    digest.update(rows_BT.to(torch.int32).contiguous().numpy().astype("<i4", copy=False).tobytes())
    return digest.hexdigest()


def _tokenized(documents: Iterable[Document], tokenizer: "PreTrainedTokenizerBase") -> Iterator[list[int]]:
    """Token ids of each document; from the second on, the separator comes first."""
    separator = separator_id(tokenizer)
    last: int | None = None
    is_first = True
    for batch in _batches(_written_out(documents, tokenizer)):
        texts = [text for text, _ in batch]
        encoded = tokenizer(texts, add_special_tokens=False, padding=False, truncation=False, verbose=False)
        for token_ids, (_, is_chat) in zip(encoded["input_ids"], batch, strict=True):
            is_parted = is_chat and (last == separator or token_ids[:1] == [tokenizer.bos_token_id])
            yield list(token_ids) if is_first or is_parted else [separator, *token_ids]
            is_first = False
            last = token_ids[-1] if token_ids else separator


def _written_out(
    documents: Iterable[Document], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[str, bool]]:
    """The text of each document, and whether it is a conversation."""
    template: ChatTemplate | None = None
    for document in documents:
        if isinstance(document, Chat):
            template = template or ChatTemplate(tokenizer)
            yield template.render(document), True
        else:
            yield document, False


def _batches(documents: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    batch: list[tuple[str, bool]] = []
    num_characters = 0
    for text, is_chat in documents:
        batch.append((text, is_chat))
        num_characters += len(text)
        if len(batch) == _DOCUMENTS_AT_ONCE or num_characters >= _CHARACTERS_AT_ONCE:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _require_enough(num_tokens: int, num_sequences: int, sequence_length: int) -> None:
    available = num_tokens // sequence_length
    if available >= num_sequences:
        return
    facts = {"tokens": num_tokens, "available": available, "wanted": num_sequences}
    if available == 0:
        raise CorpusError(
            f"the text has {num_tokens} tokens, which is less than one sequence of {sequence_length};"
            " use more text or shorter sequences",
            **facts,
        )
    raise CorpusError(
        f"{num_sequences} sequences of {sequence_length} are {num_sequences * sequence_length} tokens; the"
        f" text has {num_tokens}, enough for {available}:"
        f" ask for at most {available} sequences or use more text",
        **facts,
    )


def _tokenizer_from(files: dict[str, bytes], uri: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        with tempfile.TemporaryDirectory(prefix="quantmill-tokenizer-") as folder:
            for name, content in files.items():
                told = _without_code(content) if name in _FILES_THAT_NAME_CODE else content
                (Path(folder) / name).write_bytes(told)
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    # The tokenizers library raises bare Exception for a tokenizer.json it cannot make sense of.
    except Exception as error:
        raise CheckpointError(f"the tokenizer of {uri} cannot be loaded: {error}", uri=uri) from error


def _without_code(content: bytes) -> bytes:
    """A JSON file without its pointer to Python code, for which transformers would ask and fail."""
    values = json.loads(content)
    values.pop("auto_map", None)
    return json.dumps(values).encode()
