"""Methods that choose codes, by the name people type. A new one is a file beside these and a line here."""

from quantlib.methods import gptq, rtn
from quantlib.methods.whole_solve import Method

METHODS: dict[str, Method] = {
    "gptq": Method(gptq.prepare, gptq.solve_batch),
    "rtn": Method(rtn.prepare),
}
