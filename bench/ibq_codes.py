"""IBQ on a CPU beside its public form, and at the codes of its paper: seconds of a step, peak memory of the process.

    python bench/ibq_codes.py                            minutes of one core
    python bench/ibq_codes.py --json bench/results/cpu-ibq.json

A step is forward, backward and AdamW of the quantizer alone, on 1024 rows, with its entropy terms. At 16384 codes both
forms take turns in one process; each memory is that of a process of its own, PyTorch included. The last entry is
`regvq train vq`, a whole tokenizer with 262144 codes.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import measuring
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regvq_fast.quantizers import IBQQuantizer

ROWS, CHANNELS, FEW, MANY = 1024, 32, 16384, 262144
TURNS, STEPS = 9, 3
TRAIN = (
    f"-m regvq_fast train vq --quantizer ibq --num-codes {MANY} --batch-size 4 --steps {STEPS} --val-images 4 "
    "--workers 0 --device cpu --perceptual-weight 0 --contrastive none"
)


class Output(NamedTuple):
    quantized: Tensor
    loss: Tensor


class PublicIBQ(nn.Module):
    """`IndexPropagationQuantize` of SEED-Voken with its entropy terms, on rows (M, D): several M x N matrices."""

    def __init__(self, num_codes: int, code_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_codes, code_dim)

    def forward(self, rows: Tensor) -> Output:
        codebook = self.embedding.weight
        logits = rows @ codebook.t()
        soft = logits.softmax(1)
        hard = torch.zeros_like(soft).scatter_(1, soft.argmax(1, keepdim=True), 1.0)
        quantized, codes = (hard - soft.detach() + soft) @ codebook, hard @ codebook
        loss = F.mse_loss(quantized, rows) + F.mse_loss(codes.detach(), rows) + 0.25 * F.mse_loss(codes, rows.detach())
        p, log_p = (logits / 0.01).softmax(1), (logits / 0.01 + 1e-5).log_softmax(1)
        mean = p.mean(0)
        return Output(quantized, loss + 0.05 * ((mean * (mean + 1e-5).log()).sum() - (p * log_p).sum(1).mean()))


class Step:
    """A training step of a quantizer: loss and gradients, before AdamW moves the codes."""

    def __init__(self, form: type[nn.Module], num_codes: int) -> None:
        torch.manual_seed(0)
        self.quantizer = form(num_codes, CHANNELS)
        self.optimizer = torch.optim.AdamW(self.quantizer.parameters(), lr=1e-4)
        self.rows = torch.randn(ROWS, CHANNELS, requires_grad=True)
        self.target = torch.randn(ROWS, CHANNELS)

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        self.optimizer.zero_grad()
        self.rows.grad = None
        out = self.quantizer(self.rows)
        (out.loss + F.mse_loss(out.quantized, self.target)).backward()
        (codes,) = self.quantizer.parameters()
        self.optimizer.step()
        assert self.rows.grad is not None
        assert codes.grad is not None
        return out.loss.detach(), self.rows.grad, codes.grad

    def seconds(self) -> float:
        start = time.perf_counter()
        self()
        return time.perf_counter() - start


FORMS = {"regvq_fast": IBQQuantizer, "public form": PublicIBQ}


def turns() -> dict[str, float]:
    """Median seconds of a step at the few codes; a form that computes something else gets none."""
    steps = {name: Step(form, FEW) for name, form in FORMS.items()}
    for ours, theirs in zip(*(step() for step in steps.values()), strict=True):
        error = float((ours - theirs).norm() / theirs.norm())
        if not error < 1e-3:
            raise ValueError(f"the forms differ by {error:.1e} of their norm")
    seconds = [{name: step.seconds() for name, step in steps.items()} for _ in range(TURNS)]
    return {name: statistics.median(turn[name] for turn in seconds) for name in steps}


def alone(form: str, num_codes: int) -> dict[str, float]:
    step = Step(FORMS[form], num_codes)
    return {"seconds a step": statistics.median(step.seconds() for _ in range(STEPS))}


def child(*arguments: str) -> tuple[str, float, float]:
    """Output, GiB of resident memory at most, and seconds of a Python process with one thread."""
    start = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([sys.executable, *arguments], stdout=output, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args)
        output.seek(0)
        return output.read(), usage.ru_maxrss / 2**20, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, *arguments = options.child
        print(json.dumps(turns() if name == "turns" else alone(name, int(*arguments))))
        return
    found: dict[str, Any] = {"date": str(datetime.date.today()), **measuring.describe_machine("cpu")}
    found |= {"threads": 1, "M, D": [ROWS, CHANNELS], "turns": {}, "alone": []}
    seconds = json.loads(child(__file__, "--child", "turns")[0])
    ratio = seconds["public form"] / seconds["regvq_fast"]
    found["turns"] = {"N": FEW, "seconds a step": seconds, "times as fast": round(ratio, 2)}
    print(json.dumps(found["turns"]), flush=True)
    for form, num_codes in (("public form", FEW), ("regvq_fast", FEW), ("regvq_fast", MANY)):
        text, gib, _ = child(__file__, "--child", form, str(num_codes))
        found["alone"].append({"form": form, "N": num_codes, "peak GiB": round(gib, 2), **json.loads(text)})
        print(json.dumps(found["alone"][-1]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        _, gib, run = child(*TRAIN.split(), "--out", f"{folder}/run")
    found["training"] = {"N": MANY, "steps": STEPS, "peak GiB": round(gib, 2), "seconds": round(run, 1)}
    print(json.dumps(found["training"]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
