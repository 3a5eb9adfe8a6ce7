"""What a process takes, seen from inside, beside what the kernel tells of it from outside."""

import json
import subprocess
import sys
from pathlib import Path

from quantlib.memory_watch import machine_memory_bytes

_SCRIPT = """
import json, mmap, resource, time
from quantlib.memory_watch import memory_bytes, peak_memory_bytes, watch_memory

watch_memory()
before = memory_bytes()
shared = mmap.mmap(-1, 200 << 20)
shared.write(b"x" * (200 << 20))
beside_shared = memory_bytes()
held = bytearray(b"x" * (300 << 20))
time.sleep(0.3)
holding = memory_bytes()
del held
time.sleep(0.2)
print(json.dumps([before, beside_shared, holding, memory_bytes(), peak_memory_bytes()]))
"""


def test_memory_of_a_process_leaves_out_what_it_shares_and_remembers_its_peak():
    ran = subprocess.run([sys.executable, "-c", _SCRIPT], check=True, capture_output=True, text=True)
    before, beside_shared, holding, after, peak = json.loads(ran.stdout)
    slack, held = 20 << 20, 300 << 20
    assert beside_shared - before < slack
    assert abs(holding - before - held) < slack
    assert after - before < slack
    assert abs(peak - holding) < slack


def test_machine_has_no_more_memory_than_the_kernel_says():
    total = next(
        line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal")
    )
    found = machine_memory_bytes()
    assert found is not None
    assert 0 < found <= int(total.split()[1]) * 1024
