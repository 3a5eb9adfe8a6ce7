"""What every piece of a job costs on one GPU, and how many bytes it moves: the formulae, nothing else.

T tokens, C columns of an input group, R rows of its linears. A forward is 2 flops a weight and token and
2 * length * width a token for causal attention; the lower half of X^T X is C**2 a token; a Cholesky
factorization C**3 / 3; a solve, and each pass of descent, R * C**2. Corrected targets take a forward more, a
whole product of two inputs, and five factorizations' worth instead of one.

Left out: norms, softmax and rotary embeddings, adding sums of cells in int64, the search for scales, packing,
calls, starting processes. A real run takes longer.
"""

from dataclasses import dataclass

from quantlib.simulation.hardware import Rates
from quantlib.simulation.shapes import BlockShape, GroupShape, ModelShape

# Of a weight and of an activation: bf16.
WIDE_BYTES = 2
# Of a weight's code on its way from whoever solved a row tile to whoever packs.
CODE_BYTES = 1
# Of an entry of a sum as it travels: half of a symmetric matrix in int64, and where targets are corrected all
# of a product of two streams too.
_SUM_BYTES, _CROSS_BYTES = 4, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is to be done to a model.

    Attributes:
        sequences: Calibration sequences; 0 when no linear calibrates.
        evaluation_sequences: Held-out sequences; 0 without evaluation.
        sequence_length: Tokens of each.
        sequences_per_cell: Sequences in a cell.
        propagation: ``original`` or ``quantized``.
        correct_targets: Whether a second stream runs beside the quantized one.
        descent_passes: Passes of coordinate descent after a solve.
        checkpoint_every: Blocks between checkpoints of the activations; 0 for none; None as the product does.
    """

    sequences: int
    evaluation_sequences: int = 0
    sequence_length: int = 2048
    sequences_per_cell: int = 8
    propagation: str = "original"
    correct_targets: bool = False
    descent_passes: int = 0
    checkpoint_every: int | None = None

    def cells(self, sequences: int) -> list[int]:
        """Tokens of every cell of so many sequences; the last may hold fewer."""
        starts = range(0, sequences, self.sequences_per_cell)
        counts = [min(self.sequences_per_cell, sequences - start) for start in starts]
        return [count * self.sequence_length for count in counts]


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Costs of a job's pieces.

    Attributes:
        shape: The model.
        workload: What is to be done.
        rates: Of one GPU.
    """

    shape: ModelShape
    workload: Workload
    rates: Rates

    def forward_s(self, block: BlockShape, tokens: int) -> float:
        """Moving one stream through a block."""
        attention = self.workload.sequence_length * block.attention_width
        return 2 * tokens * (block.passed_weights + attention) / self.rates.matrix_flops

    def capture_s(self, block: BlockShape, tokens: int) -> float:
        """Moving a calibration cell through a block, with statistics."""
        products = 3 if self.workload.correct_targets else 1
        flops = sum(tokens * group.token_share * group.columns**2 for group in block.groups) * products
        forwards = 2 if self.workload.correct_targets else 1
        return forwards * self.forward_s(block, tokens) + flops / self.rates.matrix_flops

    def prepare_s(self, group: GroupShape) -> float:
        """What comes before a worker's first row tile of an input group: its factor."""
        factors = 5 if self.workload.correct_targets else 1
        return factors * group.columns**3 / 3 / self.rates.factor_flops

    def tile_s(self, group: GroupShape, rows: int) -> float:
        """Solve of a row tile."""
        passes = 1 + self.workload.descent_passes
        arithmetic = rows * group.columns**2 / self.rates.solve_flops
        return passes * (arithmetic + group.columns * self.rates.column_s)

    def tiles_s(self, group: GroupShape) -> float:
        """Solve of all row tiles of an input group."""
        return sum(self.tile_s(group, rows) for rows in group.tiles)

    def score_s(self, tokens: int) -> float:
        """Logits of both streams of an evaluation cell."""
        return 2 * 2 * tokens * self.shape.hidden * self.shape.vocabulary / self.rates.solve_flops

    def copy_s(self, size_bytes: float) -> float:
        """Between GPU and host."""
        return size_bytes / self.rates.host_bytes_per_s

    def sum_bytes(self, group: GroupShape) -> int:
        """Sums of an input group: one worker's, a node's, or what all come to."""
        per_entry = _SUM_BYTES + (_CROSS_BYTES if self.workload.correct_targets else 0)
        return per_entry * group.columns**2

    def stream_bytes(self, tokens: int) -> int:
        """Activations of one stream."""
        return tokens * self.shape.hidden * WIDE_BYTES

    def cell_bytes(self, tokens: int, *, is_evaluation: bool) -> int:
        """Activations of a cell: all its streams."""
        streams = 2 if is_evaluation or self.workload.correct_targets else 1
        return streams * self.stream_bytes(tokens)
