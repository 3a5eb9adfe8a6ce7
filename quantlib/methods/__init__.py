"""Methods that choose codes, by the name people type. A new one is a file beside these and a line here."""

from quantlib.methods import gptq, rtn
from quantlib.methods.contracts import Method

METHODS: dict[str, Method] = {"gptq": gptq.quantize_linears, "rtn": rtn.quantize_linears}
