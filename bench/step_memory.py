"""What a training step takes in memory, and what each flag that saves some leaves of it.

    python bench/step_memory.py               the scenes' model with discriminator, 16 images of 128 pixels
    python bench/step_memory.py --json FILE   writes it too; docs/training.md has bench/results/cpu-step.json

On a CPU that is what one warm step adds to the resident memory of its process, of one thread; on a GPU the peak of what
the step allocates on top of weights and optimizer states. Each has a process of its own, in which nothing is left over.
"""

import argparse
import datetime
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import bench_step
import machine
import measuring
import records
import torch

from regvq_fast.config import VQGAN_PRESETS, override

MODEL = override(
    VQGAN_PRESETS["scenes"], batch_size=16, image_size=128, ch_mult=(1, 1, 2, 4), disc_start=0, compile=False
)
FLAGS: dict[str, dict[str, Any]] = {
    "": {},
    "--amp": {"amp": True},
    "--activation-checkpointing": {"activation_checkpointing": True},
    "--grad-accum-steps 2": {"accumulate": 2},
    "--activation-checkpointing --grad-accum-steps 2": {"activation_checkpointing": True, "accumulate": 2},
}


def measure(device: str, flags: dict[str, Any]) -> float:
    """MiB of a step with these flags."""
    torch.set_num_threads(1)
    config = override(MODEL, device=device, **({"amp": False} | flags))
    trainer = bench_step.make_trainer(config, bench_step.make_images(config))  # one step is done

    def step() -> tuple[torch.Tensor, ...]:
        trainer.step(1)
        return ()

    if device == "cpu":
        return measuring.resident_growth(step)
    return measuring.DeviceMeter().extra_mib(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=records.path_to_write, help="file to write")
    path = parser.parse_args().json
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = machine.describe_gpu() if device == "cuda" else machine.describe_cpu()
    found: dict[str, Any] = {"machine": where | machine.describe_software(), "date": str(datetime.date.today())}
    found["mib"] = {}
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=fresh, max_tasks_per_child=1) as processes:
        for name, flags in FLAGS.items():
            found["mib"][name] = round(processes.submit(measure, device, flags).result())
            print(f"{found['mib'][name]:6} MiB  {name}", flush=True)
    if path:
        records.save(path, found)


if __name__ == "__main__":
    main()
