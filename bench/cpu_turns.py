"""``vector_quantize`` on a CPU beside plain PyTorch, eager and compiled: medians of runs that take turns.

    python bench/cpu_turns.py --json bench/results/cpu-vector-quantize.json     about five idle minutes

Forward plus backward with the "soft" codebook gradient on every side; plain PyTorch samples noise on stochastic rows
only. Each competitor's results are checked before it is timed.
"""

import argparse
import datetime
import json
from typing import Any

import gpu_cases
import machine
import op_runs
import records
import torch
from gpu_cases import Case

STEP = "forward+backward"
CASES = (
    Case(STEP, 4096, "float32", rows=4096, width=64),
    Case(STEP, 4096, "float32", rows=4096, width=64, latents="trained-like"),
    Case(STEP, 8192, "float32", rows=4096, width=64),
    Case(STEP, 1024, "float32", rows=4096, width=32),
    Case(STEP, 512, "float32", rows=512, width=64),
    Case(STEP, 2048, "bfloat16", rows=512, width=64),
)


def measure(case: Case) -> dict[str, Any]:
    """Milliseconds and MiB of ours, and how many times as fast and small it is as each of the others."""
    names = ("ours", "eager", "compiled")
    seconds, memory = op_runs.side_by_side(gpu_cases, case, names, repeats=9, warm_ups=1)
    return {
        "case": case.name,
        "latents": case.latents,
        "ours, ms": round(1e3 * seconds["ours"], 2),
        "times as fast as": {name: round(seconds[name] / seconds["ours"], 2) for name in ("eager", "compiled")},
        "MiB": {name: round(value, 1) for name, value in memory.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=records.path_to_write, help="file to write")
    path = parser.parse_args().json
    found: dict[str, Any] = {
        "date": str(datetime.date.today()),
        **machine.describe_cpu(),
        **machine.describe_software(),
    }
    found |= {"threads": torch.get_num_threads(), "turns": []}
    for case in CASES:
        found["turns"].append(measure(case))
        print(json.dumps(found["turns"][-1]), flush=True)
        if path:
            records.save(path, found)


if __name__ == "__main__":
    main()
