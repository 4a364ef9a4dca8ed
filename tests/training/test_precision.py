import pytest
import torch

from regvq_fast.config import OptimizerConfig
from regvq_fast.quantizers import RegularizedQuantizer
from regvq_fast.training.optimization import average_weights, build_optimizer, learning_rate
from regvq_fast.training.precision import choose_precision

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
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype or torch.float32


@pytest.mark.parametrize(("capability", "dtype"), [((7, 0), torch.float16), ((8, 0), torch.bfloat16)])
def test_a_gpu_without_bf16_takes_fp16(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "the GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    precision = choose_precision(True, GPU)
    assert precision.dtype == dtype
    assert "the GPU" in precision.reason


def test_learning_rate_warms_up_and_then_follows_a_cosine() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=4, final_lr_fraction=0.1)
    rates = [learning_rate(config, step, 104) for step in range(105)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[54] == pytest.approx(0.55)
    assert rates[104] == pytest.approx(0.1)
    assert learning_rate(OptimizerConfig(lr=1.0, warmup_steps=0), 0, 10) == 1.0


def test_weight_decay_spares_biases_normalisation_and_codes() -> None:
    module = torch.nn.ModuleDict(
        {"q": RegularizedQuantizer(8, 4, logits="linear"), "c": torch.nn.Conv2d(4, 4, 3), "n": torch.nn.GroupNorm(2, 4)}
    )
    optimizer = build_optimizer(module, OptimizerConfig(weight_decay=0.5))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    assert decayed == {id(module["c"].weight), id(module["q"].proj.weight)}


def test_averaged_weights_follow_their_decay() -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(module.weight, 1.0)
    average = average_weights(module, 0.75)
    assert average is not None
    average.update_parameters(module)
    torch.nn.init.constant_(module.weight, 5.0)
    average.update_parameters(module)
    assert average.module.weight.item() == pytest.approx(0.75 * 1 + 0.25 * 5)
    assert average_weights(module, 0.0) is None
