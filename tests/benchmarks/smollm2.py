"""What the demo's job costs on this machine, stage by stage, beside what its matrix products alone must cost.

    python tests/benchmarks/smollm2.py OUTPUT [options of quantmill quantize]

CPU seconds are those of every process the command started. Machines differ by a factor of six in what a
product costs, so the run is set against the rate of fp32 products measured here, before and after it:
``floor`` is what the products of the run would take at that rate and nothing else.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from cpu_seconds import measure

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO = REPOSITORY / ".demo"
# 2 flops a weight and token; half a gram matrix: one flop an entry and token; of attention's two products
# (9 heads of 64) the causal half: one flop a pair of positions and column each.
_LINEARS = 30 * (576 * (576 + 192 + 192 + 576) + 3 * 576 * 1536)
_SQUARES = 30 * (3 * 576**2 + 1536**2)
_ATTENTION = 30 * 2 * 512 * 9 * 64
_HEAD = 49152 * 576
_CALIBRATION, _EVALUATION = 64 * 512, 32 * 512
FLOPS = (2 * _LINEARS + _ATTENTION) * (_CALIBRATION + 2 * _EVALUATION)
FLOPS += _SQUARES * _CALIBRATION + 4 * _HEAD * _EVALUATION


def flops_per_cpu_second() -> float:
    """Rate of an fp32 product of the job's most common shape, one thread, a second of trying."""
    torch.set_num_threads(1)
    x_NC, weight_RC = torch.randn(4096, 576), torch.randn(1536, 576)
    started, products = time.process_time(), 0
    while time.process_time() - started < 1.0:
        torch.mm(x_NC, weight_RC.T)
        products += 1
    return 2 * 4096 * 576 * 1536 * products / (time.process_time() - started)


def main() -> int:
    """Run the job and print its cost."""
    output = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="quantmill-") + "/output"
    command = [str(Path(sys.executable).with_name("quantmill")), "quantize"]
    command += [str(DEMO / "source" / "SmolLM2-135M-Instruct"), output, "--group-size", "64"]
    command += ["--sequences", "64", "--sequence-length", "512", "--evaluation-sequences", "32"]
    command += ["--calibration", str(DEMO / "text" / "calibration.jsonl")]
    command += ["--evaluation", str(DEMO / "text" / "evaluation.jsonl"), *sys.argv[2:]]
    before = flops_per_cpu_second()
    cost = measure(command, grace_s=5.0)
    rate = (before + flops_per_cpu_second()) / 2
    if cost.status:
        return cost.status
    report = json.loads((Path(output) / "quantmill_report.json").read_text())
    stages = {name: spent["cpu_seconds"] for name, spent in report["stages"].items()}
    print(f"\nfp32 products here: {rate / 1e9:.0f} GFLOP a CPU second; floor {FLOPS / rate:.0f} CPU seconds")
    print(f"CPU seconds {cost.cpu_seconds:.0f}, {cost.cpu_seconds / (FLOPS / rate):.2f} x the floor")
    for name, seconds in sorted(stages.items(), key=lambda item: -item[1]):
        print(f"  {name:<10} {seconds:7.1f}")
    print(f"  {'start, orchestration':<20} {cost.cpu_seconds - sum(stages.values()):.1f}")
    for name, seconds in list(cost.by_name.items())[:6]:
        print(f"  process {name:<20} {seconds:7.1f}")
    print(f"wall {cost.wall_seconds:.0f} s, largest process {cost.peak_rss_bytes / 2**30:.2f} GiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
