"""The optimizer's groups, the learning rate's way, averaged weights."""

from typing import Any

import pytest
import torch

from regvq_fast.config import OptimizerConfig
from regvq_fast.models import VQGAN, PatchDiscriminator
from regvq_fast.priors.autoregressive import TokenTransformer
from regvq_fast.priors.diffusion import VQDiffusion, WordEncoder
from regvq_fast.priors.maskgit import MaskGIT
from regvq_fast.quantizers import RegularizedQuantizer
from regvq_fast.training.optimization import AveragedWeights
from regvq_fast.training.optimizers import build_optimizers, learning_rate


def test_learning_rate_warms_up_and_then_follows_a_cosine() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=4, final_lr_fraction=0.1)
    rates = [learning_rate(config, step, 104) for step in range(105)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[54] == pytest.approx(0.55)
    assert rates[104] == pytest.approx(0.1)
    assert learning_rate(OptimizerConfig(lr=1.0, warmup_steps=0), 0, 10) == 1.0


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [  # at steps 0, 4, 29, 54, 79, 92 and 104 of 104, the first 4 of them warm-up
        ("cosine", [0.25, 1, 0.868198, 0.55, 0.231802, 0.131601, 0.1]),
        ("linear", [0.25, 1, 0.775, 0.55, 0.325, 0.208, 0.1]),
        ("wsd", [0.25, 1, 1, 1, 0.1 + 0.9 * 25 / 26, 0.1 + 0.9 * 12 / 26, 0.1]),
        ("constant", [0.25, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_schedules_of_the_learning_rate(schedule: str, rates: list[float]) -> None:
    settings: dict[str, Any] = {"schedule": schedule, "final_lr_fraction": 0.1, "decay_fraction": 0.25}
    config = OptimizerConfig(lr=2.0, warmup_steps=4, **settings)
    steps = (0, 4, 29, 54, 79, 92, 104)
    assert [learning_rate(config, step, 104) / 2 for step in steps] == pytest.approx(rates, abs=1e-6)
    assert config.decays == (schedule != "constant")
    assert learning_rate(config, 78, 104) >= learning_rate(config, 79, 104)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "wsd"}, r"--schedule wsd .*--final-lr-fraction 1"),
        ({"schedule": "linear", "final_lr_fraction": 1}, r"--schedule linear .*--final-lr-fraction"),
        ({"decay_fraction": 0.0}, r"--decay-fraction .*0\.0"),
    ],
)
def test_a_schedule_that_decays_to_nowhere_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**settings).check()
    OptimizerConfig(schedule="constant").check()


def test_weight_decay_spares_biases_normalisation_and_codes() -> None:
    module = torch.nn.ModuleDict(
        {"q": RegularizedQuantizer(8, 4, logits="linear"), "c": torch.nn.Conv2d(4, 4, 3), "n": torch.nn.GroupNorm(2, 4)}
    )
    (optimizer,) = build_optimizers(module, OptimizerConfig(weight_decay=0.5))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    assert decayed == {id(module["c"].weight), id(module["q"].proj.weight)}


def decayed_names(module: torch.nn.Module) -> list[str]:
    """In the order in which the optimizer has them."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    (optimizer,) = build_optimizers(module, OptimizerConfig(weight_decay=0.5))
    groups = optimizer.param_groups
    assert sum(len(group["params"]) for group in groups) == len(names)
    return [names[p] for group in groups if group["weight_decay"] > 0 for p in group["params"]]


def test_weight_decay_spares_all_that_is_an_embedding_in_the_priors() -> None:
    sizes: dict[str, Any] = {"token_shape": (2, 2), "width": 8, "depth": 1, "heads": 2}
    encoder = WordEncoder(width=8, depth=1, heads=2, max_words=3, buckets=8)
    text = {"text_encoder.embedding.weight", "text_encoder.positions", "null_text"}
    priors: list[tuple[torch.nn.Module, set[str]]] = [
        (TokenTransformer(4, 3, **sizes), {"tok_emb.weight", "cond_emb.weight", "pos_emb"}),
        (MaskGIT(4, 3, **sizes), {"tok_emb.weight", "cond_emb.weight", "pos_emb"}),
        (
            TokenTransformer(4, 3, arch="llama", **sizes),
            {"tok_emb.weight", "cond_emb.weight", "blocks.0.attn.qk_gain"},
        ),
        (
            VQDiffusion(4, text_encoder=encoder, num_steps=5, **sizes),
            {"tok_emb.weight", "row_emb.weight", "column_emb.weight", *text}
            | {"blocks.0.ln1.emb.weight", "blocks.0.ln_text.emb.weight"},  # of the step
        ),
    ]
    for prior, spared in priors:
        matrices = [name for name, parameter in prior.named_parameters() if parameter.ndim >= 2]
        assert spared < set(matrices)
        assert decayed_names(prior) == [name for name in matrices if name not in spared]


def test_weight_decay_of_a_tokenizer_takes_every_kernel_in_its_order() -> None:
    shape: dict[str, Any] = {"ch": 4, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (8,), "z_channels": 4}
    model = VQGAN(RegularizedQuantizer(8, 4, logits="linear"), image_size=16, **shape)
    for module in (model, PatchDiscriminator(filters=4, num_layers=1)):
        kernels = [name for name, parameter in module.named_parameters() if parameter.ndim >= 2]
        assert decayed_names(module) == [name for name in kernels if name != "quantize.embedding.weight"]


def test_averaged_weights_follow_their_decay() -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(module.weight, 1.0)
    average = AveragedWeights(module, 0.75)
    for expected in (0.75 * 1 + 0.25 * 5, 0.75 * (0.75 * 1 + 0.25 * 5) + 0.25 * 5):
        torch.nn.init.constant_(module.weight, 5.0)
        average.update(module)
        assert average.module.weight.item() == pytest.approx(expected)
    assert module.weight.item() == 5.0
    assert not average.module.weight.requires_grad
