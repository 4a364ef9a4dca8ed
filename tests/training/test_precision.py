import pytest
import torch

from regvq_fast.precision import choose_precision

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
