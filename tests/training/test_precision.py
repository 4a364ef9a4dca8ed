from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from regvq_fast.cli.cache_tokens import CacheConfig, cache_tokens
from regvq_fast.cli.evaluate import EvaluateConfig, evaluate
from regvq_fast.cli.sample import SampleConfig, generate
from regvq_fast.paper import PaperConfig, reproduce
from regvq_fast.paper.report import Report
from regvq_fast.precision import choose_device, choose_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_without_amp_everything_is_fp32() -> None:
    precision = choose_precision(False, CPU)
    with precision.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert "--amp" in precision.reason


@pytest.mark.parametrize(("has_bf16", "dtype"), [(True, torch.bfloat16), (False, None)])
def test_a_cpu_computes_in_bf16_only_where_it_has_the_instructions(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool, dtype: torch.dtype | None
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    precision = choose_precision(True, CPU)
    assert precision.dtype == dtype
    assert not precision.scaler().is_enabled()
    with precision.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (dtype or torch.float32)


@pytest.mark.parametrize(("capability", "dtype"), [((7, 0), torch.float16), ((8, 0), torch.bfloat16)])
def test_a_gpu_without_bf16_takes_fp16(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "the GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    precision = choose_precision(True, GPU)
    assert precision.dtype == dtype
    assert "the GPU" in precision.reason


@pytest.fixture
def two_v100s(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A machine that has them; the devices that have been made current."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    return current


@pytest.mark.parametrize("local_rank", [None, 1])
def test_the_device_chosen_is_the_current_one(
    monkeypatch: pytest.MonkeyPatch, two_v100s: list[torch.device], local_rank: int | None
) -> None:
    """Otherwise kernels, workspaces and random states are those of device 0."""
    if local_rank is not None:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
            monkeypatch.setenv(name, str(local_rank))
    device = choose_device("cuda:1" if local_rank is None else "cuda")
    assert two_v100s == [device] == [torch.device("cuda:1")]


@pytest.mark.parametrize("built", [["sm_75", "sm_80", "sm_90a", "compute_120"], ["sm_50", "sm_70", "sm_90"], []])
def test_a_gpu_older_than_the_build_of_pytorch_is_refused(
    monkeypatch: pytest.MonkeyPatch, two_v100s: list[torch.device], built: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    if "sm_75" not in built:
        assert choose_device("cuda:0") == torch.device("cuda:0")
        return
    with pytest.raises(ValueError, match=r"Tesla V100 .*sm_70\b.*sm_75\b.*whl/cu126$"):
        choose_device("cuda:0")
    assert not two_v100s


@pytest.mark.parametrize(
    "work",
    [
        lambda out: evaluate(EvaluateConfig(run=out, out=out, device="cuda")),
        lambda out: generate(SampleConfig(run=out, out=out, device="cuda")),
        lambda out: cache_tokens(CacheConfig(tokenizer=out, out=out, device="cuda")),
        lambda out: reproduce(PaperConfig("table1", out=out, device="cuda", report_only=True)),
    ],
    ids=["evaluate", "sample", "cache_tokens", "paper"],
)
def test_what_draws_and_what_measures_set_a_gpu_alike(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, work: Callable[[Path], object]
) -> None:
    """FID[G] is of the images that train/sample.py saves only where both compute with TF32, or neither."""

    def configure(device: torch.device, deterministic: bool) -> None:
        raise RuntimeError(f"{device} {deterministic}")  # before a GPU is asked for anything

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("regvq_fast.precision.configure_backends", configure)
    monkeypatch.setattr(Report, "measured", lambda self: {"row": {}})
    monkeypatch.setattr(Report, "write_table", lambda self: None)
    with pytest.raises(RuntimeError, match="cuda True"):
        work(tmp_path)
