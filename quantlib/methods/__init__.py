"""Methods that choose codes, by the name people type. A new one is a file beside these and a line here."""

from functools import partial

from quantlib.cholesky import Cholesky, library_cholesky_
from quantlib.methods import gptq, rtn
from quantlib.methods.whole_solve import Method


def methods_with(cholesky_: Cholesky) -> dict[str, Method]:
    """Name -> method, on a device where factors are made in this way."""
    return {
        "gptq": Method(partial(gptq.prepare, cholesky_=cholesky_), gptq.solve_batch),
        "rtn": Method(rtn.prepare),
    }


METHODS = methods_with(library_cholesky_)
