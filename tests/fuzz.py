"""Fuzz every reader of foreign files.

    PYTHONPATH=tests OMP_NUM_THREADS=1 python tests/fuzz.py --cases 20000 --seed 0
    PYTHONPATH=tests python tests/fuzz.py --reader "tar shards" --case 17     # one case, with its traceback

A case changes one valid file (:mod:`helpers.fuzz_mutations`) of a reader (:mod:`helpers.fuzz_readers`,
:mod:`helpers.fuzz_model_readers`), and reads it in a child process with bounded memory and time. It passes if the
values read are of their types and ranges, or if a ValueError or OSError names the file or its folder. A function of the
seed, the reader and the number of the case.
"""

import argparse
import logging
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch
from helpers.fuzz_model_readers import MODEL_READERS
from helpers.fuzz_mutations import mutate
from helpers.fuzz_readers import DATA_READERS, Reader

READERS = {**DATA_READERS, **MODEL_READERS}
MEMORY = 4 * 2**30
"""Bytes that a child may have beyond those it begins with."""
CPU_SECONDS, SECONDS = 10, 60
PASSED = ("read", "refused")


class Corpus:
    """Valid files of a reader in a folder of its own."""

    def __init__(self, reader: Reader, folder: Path) -> None:
        self.reader, self.folder = reader, folder
        folder.mkdir(parents=True)
        reader.make(folder)
        reader.read(folder)
        reader.after(folder)
        self.mutated = ""
        self.files = {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}

    def write(self) -> None:
        """Make all files anew, or only the one that was mutated, of readers that write nothing."""
        names = [self.mutated] if self.mutated and not self.reader.writes else list(self.files)
        if len(names) > 1:
            shutil.rmtree(self.folder)
        for name in names:
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.files[name])
            os.utime(path, (10**9, 10**9))  # an index of shards fits them


def run_case(corpus: Corpus, others: list[bytes], rng: random.Random, log: list[str]) -> tuple[str, str, str]:
    """Return mutation, outcome and a detail of one case."""
    corpus.write()
    suffixes = sorted({Path(name).suffix for name in corpus.files})
    suffix = rng.choice(suffixes)  # first, so that a list is mutated as often as all images together
    name = rng.choice([name for name in corpus.files if Path(name).suffix == suffix])
    mutation, data = mutate(name, corpus.files[name], others, rng)
    path = corpus.folder / name
    path.write_bytes(data)
    corpus.mutated = name
    os.utime(path, (10**9, 10**9))
    corpus.reader.after(corpus.folder)
    log.clear()
    try:
        corpus.reader.read(corpus.folder)
    except (ValueError, OSError) as error:
        message = str(error)
        if str(corpus.folder) not in message:
            return mutation, "no name", f"{name}: {type(error).__name__}: {message[:300]}"
        return mutation, "refused", message
    except AssertionError:
        return mutation, "wrong value", f"{name}: {traceback.format_exc(limit=-1)[-300:]}"
    except MemoryError:
        return mutation, "memory", f"{name}: {_where()}"
    except BaseException as error:
        return mutation, "crash", f"{name}: {type(error).__name__}: {str(error)[:200]} {_where()}"
    unnamed = [line for line in log if str(corpus.folder) not in line]
    return (mutation, "unnamed warning", unnamed[0][:300]) if unnamed else (mutation, "read", "")


def _where() -> str:
    frames = traceback.extract_tb(sys.exc_info()[2])
    own = [frame for frame in frames if "regvq_fast" in frame.filename]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(own[-3:]))


class _Collecting(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def child(corpus: Corpus, others: list[bytes], label: str, cases: range, write: int) -> None:
    """Run cases; one pickled result each goes to the pipe, so that the parent knows at which one this process ends."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    log: list[str] = []
    logger = logging.getLogger("regvq_fast")
    logger.handlers, logger.propagate = [_Collecting(log)], False
    for number in cases:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # the default action of both ends the process
        signal.alarm(SECONDS)
        started = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = run_case(corpus, others, random.Random(f"{label} {number}"), log)
        message = pickle.dumps((number, *result, time.monotonic() - started))
        os.write(write, len(message).to_bytes(4, "little") + message)


def fuzz(corpus: Corpus, others: list[bytes], label: str, count: int) -> list[tuple[int, str, str, str, float]]:
    """Return number, mutation, outcome, detail and seconds of each case."""
    results: list[tuple[int, str, str, str, float]] = []
    while (begin := len(results)) < count:
        read, write = os.pipe()
        if (process := os.fork()) == 0:
            os.close(read)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            child(corpus, others, label, range(begin, min(begin + 200, count)), write)
            os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            while size := pipe.read(4):
                results.append(pickle.loads(pipe.read(int.from_bytes(size, "little"))))
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if status:
            killed = signal.Signals(-status).name if status < 0 else f"status {status}"
            outcome = "hang" if killed in ("SIGPROF", "SIGALRM") else "crash"
            results.append((len(results), "?", outcome, killed, 0.0))
    return results


def main() -> None:
    """Print counts by reader and outcome; exit with 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000, help="of all readers together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", choices=READERS, nargs="+", default=list(READERS), help="only these")
    parser.add_argument("--case", type=int, help="only this one, with its traceback")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as top:
        os.environ["XDG_CACHE_HOME"] = f"{top}/cache"
        corpora = {name: Corpus(READERS[name], Path(top, f"{k:02d}")) for k, name in enumerate(READERS)}
        others = [data for corpus in corpora.values() for data in corpus.files.values() if len(data) < 10**6]
        names = args.reader
        if args.case is not None:
            corpus = corpora[names[0]]
            corpus.reader = corpus.reader._replace(read=_with_traceback(corpus.reader))
            print(run_case(corpus, others, random.Random(f"{args.seed} {names[0]} {args.case}"), []))
            return
        failed = False
        outcomes = (*PASSED, "no name", "unnamed warning", "wrong value", "memory", "crash", "hang")
        print(f"{'reader':18}" + "".join(f"{outcome:>17}" for outcome in outcomes) + f"{'slowest':>12}")
        for name in names:
            results = fuzz(corpora[name], others, f"{args.seed} {name}", -(-args.cases // len(names)))
            counts = Counter(result[2] for result in results)
            slowest = max(result[4] for result in results)
            columns = "".join(f"{counts[outcome]:17,}" for outcome in outcomes)
            print(f"{name:18}{columns}{slowest:10.2f} s", flush=True)
            shown: Counter[str] = Counter()
            for number, mutation, outcome, detail, _ in results:
                key = f"{outcome} {detail.rpartition(' ')[2]}"
                if outcome not in PASSED and shown[key] < 2:
                    failed, shown[key] = True, shown[key] + 1
                    print(f"    case {number} ({mutation}): {outcome}: {' '.join(detail.split())}", flush=True)
        sys.exit(failed)


def _with_traceback(reader: Reader):
    def read(folder: Path) -> None:
        try:
            reader.read(folder)
        except BaseException:
            traceback.print_exc()
            raise

    return read


if __name__ == "__main__":
    main()
