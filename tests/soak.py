"""Disturb runs at random, resume them, and compare their ends with those of undisturbed ones, bit by bit.

    python tests/soak.py --minutes 30 --seed 1

Not a test of the suite: it takes as long as it is given, and prints counts of what was done. It trains the tokenizer
and both priors and fills a token cache, at tiny sizes, each with disturbances until it is through: SIGKILL, SIGTERM,
SIGINT, SIGHUP, TensorBoard's folder removed, a reader of the output that goes away, and
a second process in the folder.
"""

import argparse
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from helpers.runs import FAST, TINY, TRAIN, assert_same_run

PRIOR = "--preset scenes --steps 14 --batch-size 4 --width 16 --depth 1 --heads 2 --device cpu".split()
PRIOR += "--log-every 2 --checkpoint-every 2 --warmup-steps 2 --dropout 0.1 --ema 0.9".split()
JOBS = {
    "vq": ["vq.py", *TINY, *FAST, *"--steps 14 --checkpoint-every 2 --dropout 0.2 --ema 0.9 --disc-start 5".split()],
    "ar": ["ar.py", *PRIOR],
    "diffusion": ["diffusion.py", *PRIOR],
    "tokens": ["cache_tokens.py", *"--scenes 400 --views 2 --val-images 40 --shard-samples 64 --device cpu".split()],
}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
DISTURBANCES = [*(number.name for number in SIGNALS), "tensorboard", "reader", "second"]
TAKES_SECONDS = (1.0, 14.0)


def start(job: str, out: Path, base: Path, *flags: str) -> "subprocess.Popen[bytes]":
    script, *settings = JOBS[job]
    needs = {"ar": ["--cache", base / "tokens"], "diffusion": ["--cache", base / "tokens"]}
    needs["tokens"] = ["--tokenizer", base / "vq"]
    command = [sys.executable, TRAIN / script, *settings, *needs.get(job, []), "--out", out, *flags]
    if job != "tokens" and (out / "config.json").exists():
        command = [sys.executable, TRAIN / script, "--resume", "--out", out, *flags]
    return subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def disturb(kind: str, process: "subprocess.Popen[bytes]", job: str, out: Path, base: Path) -> None:
    """Do something to a running job; an AssertionError if a second process is not refused."""
    if kind in signal.Signals.__members__:
        process.send_signal(signal.Signals[kind])
    elif kind == "tensorboard":
        shutil.rmtree(out / "tensorboard", ignore_errors=True)
    elif kind == "reader" and process.stdout:
        process.stdout.close()
        process.stdout = None
    elif kind == "second" and any(out.glob(".*.lock")):
        second = start(job, out, base)
        said = second.communicate()[1].decode()
        ended = process.poll() is not None or not any(out.glob(".*.lock"))
        assert ended or (second.returncode == 1 and f"in use by process {process.pid}" in said), said


def run(job: str, out: Path, base: Path, counts: Counter[str], rng: random.Random) -> None:
    """Take a job to its end through random disturbances."""
    for attempt in itertools.count():
        process = start(job, out, base)
        kind = rng.choice(DISTURBANCES) if attempt < 6 else "none"
        end = time.monotonic() + rng.uniform(*TAKES_SECONDS)
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        if kind != "none" and process.poll() is None:
            counts[kind] += 1
            disturb(kind, process, job, out, base)
        said = process.communicate(timeout=600)[1].decode()
        if process.returncode == 0:
            return
        died = process.returncode in {-number for number in SIGNALS}
        saved = process.returncode in {128 + number for number in SIGNALS}
        assert died or saved, f"{job} ended with {process.returncode}: {said[-2000:]}"
        assert "Traceback" not in said or kind == "SIGINT", said[-2000:]


def same(job: str, a: Path, b: Path) -> None:
    if job != "tokens":
        assert_same_run(a, b)
        return
    names = sorted(path.name for path in a.iterdir())
    assert names == sorted(path.name for path in b.iterdir())
    assert all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rng, counts, done = random.Random(args.seed), Counter[str](), Counter[str]()
    end = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        for job in ("vq", "tokens", *(job for job in args.jobs if job in ("ar", "diffusion"))):
            said = start(job, base / job, base).communicate()[1]
            assert any((base / job / name).exists() for name in ("summary.json", "cache.json")), said.decode()[-2000:]
        print("undisturbed runs are done", flush=True)
        for job in itertools.cycle(args.jobs):
            if time.monotonic() > end:
                break
            out = base / "disturbed"
            shutil.rmtree(out, ignore_errors=True)
            run(job, out, base, counts, rng)
            same(job, base / job, out)
            done[job] += 1
            print(f"{dict(done)} same to the bit, after {dict(counts)}", flush=True)


if __name__ == "__main__":
    main()
