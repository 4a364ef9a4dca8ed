"""Disturb runs at random, resume them, and compare their ends with those of undisturbed ones, bit by bit.

    python tests/soak.py --minutes 30 --seed 1
    python tests/soak.py --seed 1 --only 17 38                # two jobs of that seed again

Not a test of the suite: it takes as long as it is given, and prints counts of what was done. It trains the tokenizer
and the priors, fills a token cache, samples, evaluates, packs an archive into shards and makes two rows of a table of
the paper, at tiny sizes, each with disturbances until it is through: SIGKILL, SIGTERM, SIGINT, SIGHUP, two seconds of
SIGSTOP, SIGKILL of a data worker, TensorBoard's folder or the whole run's removed, files that can't grow for two
seconds (as on a full disk), a reader of the output that goes away, a second process in the folder, and two processes in
place of one, one of which may be killed. Their sums have another order: there only the steps and the size of the losses
are compared.

What a job suffers, and after how many of its records or shards, is a function of the seed and the job's number.
"""

import argparse
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from helpers.archive_trees import ade20k
from helpers.runs import FAST, TINY, TRAIN, assert_same_run, checkpoints, records, torchrun
from PIL import Image

PRIOR = "--preset scenes --steps 14 --batch-size 4 --width 16 --depth 1 --heads 2 --device cpu".split()
PRIOR += "--log-every 2 --checkpoint-every 2 --warmup-steps 2 --dropout 0.1 --ema 0.9 --workers 1".split()
EVALUATE = "--fid-features random-vgg16 --perceptual-weights random --val-images 48 --batch-size 8".split()
EVERY_2 = "--steps 14 --checkpoint-every 2 --dropout 0.2 --ema 0.9 --disc-start 5 --workers 1".split()
TABLE = "table2 --rows vq-gan reg-vq --prior maskgit --fid-features random-vgg16 --jobs 2 --device cpu".split()
JOBS: dict[str, list[str]] = {
    "vq": ["vq.py", *TINY, *FAST, *EVERY_2],
    "tokens": ["cache_tokens.py", *"--scenes 400 --views 2 --val-images 40 --shard-samples 64".split()],
    "ar": ["ar.py", *PRIOR],
    "diffusion": ["diffusion.py", *PRIOR],
    "maskgit": ["maskgit.py", *PRIOR],
    "sample": ["sample.py", *"--num-images 24 --batch-size 2 --device cpu".split()],
    "evaluate": ["evaluate.py", *EVALUATE],
    "prepare": ["data.py", *"prepare --size 256 --shard-mib 1 --workers 1".split()],
    "paper": ["../tests/helpers/tiny_table.py", *TABLE],
}
"""A job may need what those before it leave."""
ALONE = ("sample", "prepare", "paper")
"""Jobs that torchrun does not start."""
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
DISTURBANCES = [number.name for number in SIGNALS]
DISTURBANCES += ["paused", "worker", "tensorboard", "vanished", "full", "reader", "second", "ranks", "rank"]
SECONDS = 2.0
"""Length of a pause, and of a full disk."""
PATIENCE_SECONDS = 600.0


def make_archive(folder: Path) -> None:
    """Write 300 images of noise, 320 x 256 pixels, and their maps in ADE20K's layout."""
    top = ade20k(folder)
    for k in range(300):
        image = Image.effect_noise((320, 256), 60)
        image.convert("RGB").save(top / "images" / "training" / f"ADE_train_{k + 1000:08d}.jpg")
        image.point(lambda value: value % 151).save(top / "annotations" / "training" / f"ADE_train_{k + 1000:08d}.png")


def start(job: str, out: Path, base: Path, ranks: bool = False) -> "subprocess.Popen[bytes]":
    script, *arguments = JOBS[job]
    if job == "tokens":
        arguments += ["--tokenizer", base / "vq", "--device", "cpu", "--workers", 1, "--out", out]
    elif job == "sample":
        arguments += ["--run", base / "ar", "--out", out]
    elif job == "evaluate":
        arguments += ["--prior-run", base / "maskgit", "--cache-dir", out / "cache", "--device", "cpu"]
        arguments += ["--workers", 1, "--out", out]
    elif job in ("prepare", "paper"):
        arguments += [*(["--root", base / "archive"] if job == "prepare" else []), "--out", out]
    elif (out / "config.json").exists():
        arguments = ["--resume", "--out", out]
    else:
        arguments += [*([] if job == "vq" else ["--cache", base / "tokens"]), "--out", out]
    command = torchrun(TRAIN / script, *arguments) if ranks else [sys.executable, TRAIN / script, *arguments]
    return subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def progress(job: str, out: Path) -> int:
    """Return the number of records, shards or files that a job has written."""
    if job == "tokens":
        return len(list(out.glob("*.safetensors")))
    if job == "prepare":
        return sum(len(list(folder.glob("*.tar"))) for folder in unfinished(out))
    if job == "paper":
        return sum(path.read_bytes().count(b"\n") for path in out.rglob("metrics.jsonl"))
    if job in ("evaluate", "sample"):
        return sum(path.is_file() for path in out.rglob("*"))
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def unfinished(out: Path) -> list[Path]:
    """Return the folders that a job fills beside its own before they take its place."""
    return [path for path in out.parent.glob(f".{out.name}.*") if path.is_dir()]


def children(process: "subprocess.Popen[bytes]") -> list[int]:
    """Return the numbers of the processes that one started: data workers, or the ranks of torchrun."""
    lists = Path(f"/proc/{process.pid}/task").glob("*/children")
    return sorted(int(number) for path in lists for number in path.read_text().split())


def disturb(kind: str, process: "subprocess.Popen[bytes]", job: str, out: Path, base: Path) -> bool:
    """Do something to a running job if it can be done; an AssertionError if a second process is not refused."""
    if kind in signal.Signals.__members__:
        process.send_signal(signal.Signals[kind])
    elif kind == "paused":
        process.send_signal(signal.SIGSTOP)
        time.sleep(SECONDS)
        process.send_signal(signal.SIGCONT)
    elif kind in ("worker", "rank") and (found := children(process)):
        os.kill(found[-1], signal.SIGKILL)
    elif kind in ("tensorboard", "vanished") and (folder := out / kind if kind == "tensorboard" else out).exists():
        shutil.rmtree(folder, ignore_errors=True)
    elif kind == "vanished" and job == "prepare" and (folders := unfinished(out)):
        shutil.rmtree(folders[0], ignore_errors=True)
    elif kind == "full":
        hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, hard))
        time.sleep(SECONDS)
        if process.poll() is None:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard, hard))
    elif kind == "reader" and process.stdout:
        process.stdout.close()
        process.stdout = None
    elif kind == "second" and any(out.rglob(".*.lock")):
        second = start(job, out, base)
        said = second.communicate(timeout=PATIENCE_SECONDS)[1].decode()
        ended = process.poll() is not None or not any(out.rglob(".*.lock"))
        refusals = (f"in use by process {process.pid}", *(["not an empty folder"] if job == "sample" else []))
        assert ended or (second.returncode == 1 and any(refusal in said for refusal in refusals)), said
    else:
        return kind == "ranks"
    return True


def run(job: str, out: Path, base: Path, counts: Counter[str], rng: random.Random) -> bool:
    """Take a job to its end through random disturbances; return whether one process took all steps."""
    alone, attempts = True, 0
    while True:
        kind, attempts = rng.choice(DISTURBANCES) if attempts < 6 else "none", attempts + 1
        ranks = kind in ("ranks", "rank") and out.exists() and job not in ALONE
        alone &= not ranks
        if job == "sample":  # into new folders only
            shutil.rmtree(out, ignore_errors=True)
        process = start(job, out, base, ranks)
        due = progress(job, out) + rng.choice((0, 1, 1, 2, 2, 3))  # 0: while it starts
        try:
            end = time.monotonic() + PATIENCE_SECONDS
            while process.poll() is None and progress(job, out) < due and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.5))
            able = kind != "none" and (ranks or kind not in ("ranks", "rank")) and process.poll() is None
            if able and disturb(kind, process, job, out, base):
                counts[kind] += 1
            said = process.communicate(timeout=PATIENCE_SECONDS)[1].decode()
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{job} did not end within {PATIENCE_SECONDS:.0f} seconds of {kind}") from None
        finally:
            process.kill()
        assert job != "prepare" or process.returncode < 0 or not unfinished(out), f"{job} left a folder after {kind}"
        for folder in unfinished(out):
            shutil.rmtree(folder)
        if process.returncode == 0 and out.exists():
            return alone
        # A run that lost its folder or could not write its files reports it and exits with 1.
        expected = {-number for number in SIGNALS} | {128 + number for number in SIGNALS} if not ranks else set()
        expected |= {1} if kind in ("vanished", "full", "worker", "rank") else set()
        expected |= {0} if kind == "vanished" else set()  # removed after its end
        # A second process that was faster, since a killed one had left its lock.
        expected |= {1} if kind == "second" and "in use by process" in said else set()
        assert process.returncode in expected, f"{job} ended with {process.returncode} after {kind}: {said[-3000:]}"
        assert kind != "worker" or job == "paper" or "data worker" in said, f"{job} after {kind}: {said[-3000:]}"
        # torchrun prints one of its own, and so does Python's server of processes.
        own = kind in ("SIGINT", "rank") or (job == "paper" and kind in ("SIGKILL", "worker"))
        assert "Traceback" not in said or own, f"{job} after {kind}: {said[-3000:]}"


def same(job: str, a: Path, b: Path, alone: bool) -> None:
    if job in ("tokens", "sample", "prepare"):
        names = sorted(path.name for path in a.iterdir())
        assert names == sorted(path.name for path in b.iterdir())
        assert all((a / name).read_bytes() == (b / name).read_bytes() for name in names)
    elif job == "evaluate":
        assert (a / "code_counts.json").read_text() == (b / "code_counts.json").read_text()
        first, second = (json.loads((folder / "evaluation.json").read_text()) for folder in (a, b))
        assert first.keys() == second.keys()
        for name, found in first.items():
            x, y = found["value"], second[name]["value"]
            assert x == y if alone else abs(x - y) <= 1e-3 * abs(x), (name, x, y)
    elif job == "paper":
        assert (a / "table2.csv").read_text() == (b / "table2.csv").read_text()
        for run in sorted(path.parent.relative_to(a) for path in a.rglob("metrics.jsonl")):
            assert_same_run(a / run, b / run)
    elif alone:
        assert_same_run(a, b)
    else:
        first, second = records(a), records(b)
        assert [row["step"] for row in first] == [row["step"] for row in second]
        losses = [[row[name] for row in rows for name in row if name.endswith("loss")] for rows in (first, second)]
        assert all(abs(x - y) <= 0.2 * abs(x) + 0.05 for x, y in zip(*losses, strict=True)), losses
        assert checkpoints(a)[-1] == checkpoints(b)[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", help="these jobs alone")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    counts, done = Counter[str](), Counter[str]()
    end = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        make_archive(base / "archive")
        for job in JOBS:
            process = start(job, base / job, base)
            said = process.communicate()[1]
            assert process.returncode == 0, said.decode()[-2000:]
        print("undisturbed runs are done", flush=True)
        for number in args.only or itertools.count():
            if time.monotonic() > end and not args.only:
                break
            job, out = args.jobs[number % len(args.jobs)], base / "disturbed"
            shutil.rmtree(out, ignore_errors=True)
            before = counts.copy()
            try:
                same(job, base / job, out, run(job, out, base, counts, random.Random(f"{args.seed} {number}")))
            except (AssertionError, OSError) as error:  # the second: a file is missing
                done[f"{job} failed"] += 1
                print(f"job {number}, {job}, after {dict(counts - before)}: {str(error)[-3000:]}", flush=True)
                continue
            done[job] += 1
            print(f"{number}: {dict(done)} same, after {dict(counts)}", flush=True)
    sys.exit(any(name.endswith("failed") for name in done))


if __name__ == "__main__":
    main()
