"""Hooks as processes of this machine: started without a shell, ended with all that they started."""

import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import IO, Any

from quantlib.errors import HookError, RecipeError
from quantlib.job.hook import MODEL, OUTPUT, REPORT, command_of, deployment_in, words_of
from quantlib.job.local_model import LocalPlaces, local_places
from quantlib.job.staged_output import StagedOutput

# What a hook wrote last is told, up to this much.
OUTPUT_END_BYTES = 4096
# Between asking a hook to end and ending it.
_GRACE_S = 3.0
_CLEARED_S = 10.0


class CommandHooks:
    """Runs hooks here, one at a time; a `quantlib.job.publishing.Hooks`.

    Args:
        named: Commands that the operator wrote down, by name.
    """

    def __init__(self, named: Mapping[str, str] | None = None) -> None:
        self._named = dict(named or {})
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._is_stopped = False
        self._idle = threading.Event()
        self._idle.set()

    def refuse_unknown(self, hook: str) -> None:
        """See `quantlib.job.publishing.Hooks.refuse_unknown`."""
        command = command_of(hook, self._named)
        if deployment_in(command) is not None:
            raise RecipeError(
                f"hook {command} is a run on a Prefect server, and this command uses none; start the"
                " conversion through Prefect (runner ray), or name a command",
                option="hook",
            )
        words_of(command)

    def run(self, hook: str, timeout_s: int, staged: StagedOutput) -> dict[str, Any]:
        """See `quantlib.job.publishing.Hooks.run`."""
        command = command_of(hook, self._named)
        self._idle.clear()
        try:
            laid_out = {"has_model": MODEL in command, "refuse_if_stopped": self._refuse_if_stopped}
            with (
                local_places(staged, **laid_out) as places,
                tempfile.TemporaryFile() as written,
            ):
                started = time.monotonic()
                code = self._exit_code(_filled(command, places, staged.output), timeout_s, written)
                self._refuse_if_stopped()
                return {
                    "hook": hook,
                    "exit_code": code,
                    "seconds": time.monotonic() - started,
                    "output_end": _end_of(written),
                }
        finally:
            self._idle.set()

    def stop(self) -> None:
        """See `quantlib.job.publishing.Hooks.stop`; what was laid out for it is removed when this returns."""
        with self._lock:
            self._is_stopped = True
            process = self._process
        if process is not None:
            _end(process)
        self._idle.wait(_CLEARED_S)

    def _exit_code(self, words: list[str], timeout_s: int, written: IO[bytes]) -> int | None:
        process = self._begin(words, written)
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # It may have left something running that reads what is removed now.
            _end(process)
            self._process = None

    def _begin(self, words: list[str], written: IO[bytes]) -> subprocess.Popen[bytes]:
        with self._lock:
            self._refuse_if_stopped()
            try:
                # A session, and so a process group, of its own: it is ended as a whole, and Ctrl-C in the
                # terminal reaches this process only.
                self._process = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=written,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise HookError(
                    f"the hook {words[0]} cannot be started: {error.strerror}; the output stays staged",
                    reason=f"its hook cannot be started: {error.strerror}",
                ) from error
            return self._process

    def _refuse_if_stopped(self) -> None:
        if self._is_stopped:
            reason = "its hook was stopped with the run"
            raise HookError(f"{reason}; the output stays staged", reason=reason)


def _filled(command: str, places: LocalPlaces, output: str) -> list[str]:
    given = {MODEL: str(places.model), OUTPUT: output, REPORT: str(places.report)}
    words = words_of(command)
    for placeholder, value in given.items():
        words = [word.replace(placeholder, value) for word in words]
    return words


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a group, and all others of the group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _end_of(written: IO[bytes]) -> str:
    written.seek(0, os.SEEK_END)
    written.seek(max(0, written.tell() - OUTPUT_END_BYTES))
    return written.read().decode(errors="replace")
