"""Every error Quantmill raises on purpose, as one small tree.

A message says what was wanted, what was found and what to do. The facts it is about travel as fields
(``error.facts``) and survive pickling (Ray and Prefect move errors between processes); what is done about
each kind is `quantlib.job.failures`. ``before_work`` is set by the conversion when the error ended a run
before anything was written: the command then exits with 2 instead of 1.
"""


class QuantError(Exception):
    """Base of all errors of this project.

    Args:
        message: What was wanted, what was found, what to do.
        **facts: Ids the message is about (tensor, shard, uri, block, option, ...), JSON values.
    """

    def __init__(self, message: str, **facts: object) -> None:
        super().__init__(message)
        self.message = message
        self.facts = facts
        self.before_work = False

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.facts, self.before_work))


def _rebuild(kind: type[QuantError], message: str, facts: dict[str, object], before_work: bool) -> QuantError:
    error = kind(message, **facts)
    error.before_work = before_work
    return error


class RecipeError(QuantError):
    """An option, recipe key or combination of them is wrong."""


class UnsupportedModelError(QuantError):
    """The model's architecture lacks a property the tool relies on."""


class CheckpointError(QuantError):
    """A checkpoint is missing, damaged or inconsistent."""


class CorpusError(QuantError):
    """Calibration or evaluation text cannot be used."""


class StorageError(QuantError):
    """The object store refused or lost a request for good."""


class ObjectNotFoundError(StorageError):
    """The named object or bucket does not exist."""


class TransientStorageError(StorageError):
    """The object store failed in a way that may pass."""


class NoSpaceError(StorageError):
    """The store is full, or its quota is used up; with space the same command goes on."""


class ChecksumError(StorageError):
    """Stored bytes are not those whose digest was recorded."""


class NumericsError(QuantError):
    """A computation met values it must not hide (NaN, infinity, an overflowing sum)."""


class PlanMismatchError(QuantError):
    """The output or work prefix belongs to another plan."""


class GateError(QuantError):
    """A converted model breaks a limit that it must keep to be published; it is staged."""


class HookError(QuantError):
    """The command that has to agree before a model is published failed, or took too long; it is staged."""


class LeaseError(QuantError):
    """Another run holds the output, or has taken it over."""


class PackingError(QuantError):
    """A quantized weight does not fit the requested file format."""


class WorkerError(QuantError):
    """Workers could not be had: no cluster, no place, no start."""


class WorkerLostError(WorkerError):
    """A worker that was at work is gone, or does not answer, or a value it kept is gone.

    Not retryable by calling the stage again: activations are gone with the worker. The job rebuilds them.
    """


class DeviceError(QuantError):
    """A device gives wrong results for what is known, or cannot do what every job needs."""
