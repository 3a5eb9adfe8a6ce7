"""Token rows as stored objects: what calibration and evaluation read is kept with the job."""

import io

import numpy as np
import torch

from quantlib.storage import Store


def store_rows(store: Store, uri: str, rows_BT: torch.Tensor) -> None:
    """Keep int32 [B, T] rows under a key that names their digest."""
    buffer = io.BytesIO()
    np.save(buffer, rows_BT.to(torch.int32).numpy(), allow_pickle=False)
    store.put_if_absent(uri, buffer.getvalue())


def read_rows(store: Store, uri: str) -> torch.Tensor:
    """The rows that `store_rows` kept, int32 [B, T]."""
    return torch.from_numpy(np.load(io.BytesIO(store.read(uri)), allow_pickle=False))
