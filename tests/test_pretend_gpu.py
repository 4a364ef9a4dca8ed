"""The stack with ``--device cuda`` where there is no GPU: on one of the host's memory (tests/pretend_gpu).

Ops are done by the CPU, kernels run in Triton's interpreter. What this finds are tensors on two devices, memory that is
read before it was written, and waits within a CUDA graph; what it can't find is whatever real kernels do.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.runs import FAST, TRAIN, records, run_script, without_clock
from PIL import Image

ROOT = Path(__file__).parents[1]
HERE = ROOT / "tests" / "pretend_gpu"
VQ = (
    "--steps 4 --batch-size 4 --image-size 16 --ch 8 --ch-mult 1 2 --z-channels 8 --code-dim 8 --num-codes 16 "
    "--val-images 6 --log-every 1 --warmup-steps 2 --workers 0"
).split()
PRIOR = "--steps 2 --batch-size 4 --width 16 --depth 1 --heads 2 --log-every 1 --device cuda".split()

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs Linux and g++"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU"),
    pytest.mark.skipif(
        torch.__version__.split(".")[:2] != ["2", "13"], reason="backend.cpp is written for the inside of PyTorch 2.13"
    ),
]


@pytest.fixture(scope="module")
def backend(tmp_path_factory) -> Path:
    """The pretend GPU, as a library to be preloaded."""
    library = tmp_path_factory.mktemp("pretend_gpu") / "backend.so"
    torch_folder = Path(torch.__file__).parent
    libraries = torch_folder / "lib"
    command = f"g++ -shared -fPIC -std=c++20 {HERE / 'backend.cpp'} -o {library} -I{torch_folder / 'include'}".split()
    links = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lc10", "-ltorch_cpu"]
    done = subprocess.run([*command, *links], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return library


@pytest.fixture
def on_gpu(backend):
    """``on_gpu([script, flag, ...], ...)``: run scripts in one process that has the GPU."""

    def run(*commands: list[object], capability: str = "9.0") -> str:
        environment = os.environ | {
            "LD_PRELOAD": str(backend),
            "TRITON_INTERPRET": "1",
            "PRETEND_CAPABILITY": capability,
            "PYTHONPATH": str(ROOT),
        }
        command = [
            sys.executable,
            str(HERE / "pretend_gpu.py"),
            json.dumps([list(map(str, each)) for each in commands]),
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


def test_training_on_a_gpu_is_that_on_a_cpu(on_gpu, tmp_path):
    """Step by step, with the discriminator and averaged weights: the kernels draw the noise that eager draws."""
    flags = [*VQ, *FAST, "--disc-start", 2, "--disc-layers", 1, "--ema", 0.9]
    run_script(*flags, "--device", "cpu", "--out", tmp_path / "cpu")
    on_gpu([TRAIN / "vq.py", *flags, "--device", "cuda", "--out", tmp_path / "gpu"])
    found, expected = (without_clock(records(tmp_path / name)) for name in ("gpu", "cpu"))
    for ours, theirs in zip(found, expected, strict=True):
        ours.pop("peak_memory_gib", None)
        numbers = {name: value for name, value in theirs.items() if not isinstance(value, str)}
        assert ours == theirs | {name: pytest.approx(value, rel=2e-3, abs=1e-5) for name, value in numbers.items()}


def test_fp16_with_loss_scaling_below_sm_80(on_gpu, tmp_path):
    """A V100's way: scores by cuBLAS in chunks, scaled losses."""
    flags = [*VQ, "--amp", "--device", "cuda"]
    runs = {
        "reg-vq": ["--contrastive", "pcl", "--contrastive-sampling", "sampled", "--contrastive-patches", 8],
        "vq-gan": FAST,
        "gumbel-vq": FAST,
        "vq-vae": FAST,
    }
    told = on_gpu(
        *(
            [TRAIN / "vq.py", *flags, *more, "--quantizer", quantizer, "--out", tmp_path / quantizer]
            for quantizer, more in runs.items()
        ),
        capability="7.0",
    )
    assert told.count("fp16 with loss scaling (Pretend GPU has no bf16)") == len(runs)
    for quantizer in runs:
        last = [row for row in records(tmp_path / quantizer) if "loss_scale" in row][-1]
        assert 0 < last["loss"] < 2, quantizer


@pytest.mark.slow
def test_from_tokenizer_to_samples(on_gpu, tmp_path):
    run, cache, cuda = tmp_path / "vq", tmp_path / "tokens", ["--device", "cuda"]
    measured = ["--fid-features", "random-vgg16", "--val-images", 4]
    commands: list[list[object]] = [
        [TRAIN / "vq.py", *VQ, *FAST, "--amp", "--grad-accum-steps", 2, *cuda, "--out", run],
        [TRAIN / "vq.py", "--resume", "--out", run, "--steps", 5],
        [TRAIN / "cache_tokens.py", "--tokenizer", run, "--out", cache, "--scenes", 4, "--val-images", 4, *cuda],
        [TRAIN / "evaluate.py", "--run", run, *measured, "--out", tmp_path / "evaluation", *cuda],
    ]
    for name, more in (("ar", []), ("diffusion", ["--diffusion-steps", 3]), ("maskgit", [])):
        out = tmp_path / name
        commands.append([TRAIN / f"{name}.py", "--cache", cache, *PRIOR, *more, "--amp", "--out", out])
        commands.append([TRAIN / "sample.py", "--run", out, "--out", out / "samples", "--num-images", 2, *cuda])
    on_gpu(*commands)
    for name in ("ar", "diffusion", "maskgit"):
        with Image.open(tmp_path / name / "samples" / "grid.png") as grid:
            assert min(grid.size) >= 16
    assert "psnr" in (tmp_path / "evaluation" / "evaluation.json").read_text()


def test_samples_do_not_depend_on_the_device(on_gpu):
    on_gpu([HERE / "same_samples.py"])


def test_published_statistics_meet_features_on_a_gpu(on_gpu):
    on_gpu([HERE / "published_statistics.py"])
