"""The diffusion prior's network: VQ-Diffusion-B's sizes, its layers, the null condition, its folders, its refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regvq_fast.priors.diffusion.loss import diffusion_terms
from regvq_fast.priors.diffusion.model import VQDiffusion
from regvq_fast.priors.diffusion.text import WordEncoder

TINY: dict[str, Any] = {"token_shape": (2, 3), "num_steps": 10, "width": 16, "depth": 2, "heads": 2}
SEED = torch.tensor(3)


def tiny(**arguments: Any) -> VQDiffusion:
    torch.manual_seed(0)
    return VQDiffusion(5, **{"text_shape": (4, 6), **TINY, **arguments})


def tiny_encoder() -> WordEncoder:
    return WordEncoder(width=6, depth=1, heads=2, max_words=4, buckets=16)


def inputs(batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, t and text features."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(6, (batch, 6), generator=generator)
    return tokens, torch.arange(1, batch + 1), torch.randn(batch, 4, 6, generator=generator)


# --- the network -----------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_vq_diffusion_b() -> None:
    with torch.device("meta"):
        model = VQDiffusion()
    assert len(model.blocks) == 19
    assert model.null_text is not None
    assert tuple(model.null_text.shape) == (77, 512)
    block = {name: tuple(value.shape) for name, value in model.blocks[0].state_dict().items() if "bias" not in name}
    assert block == {
        "ln1.emb.weight": (100, 1024),
        "ln1.linear.weight": (2048, 1024),
        "attn.qkv.weight": (3072, 1024),
        "attn.proj.weight": (1024, 1024),
        "ln_text.emb.weight": (100, 1024),
        "ln_text.linear.weight": (2048, 1024),
        "text_attn.query.weight": (1024, 1024),
        "text_attn.kv.weight": (2048, 512),
        "text_attn.proj.weight": (1024, 1024),
        "ln2.weight": (1024,),
        "mlp.0.weight": (4096, 1024),
        "mlp.2.weight": (1024, 4096),
    }
    # Parameters by hand: a block's AdaLNs, self-attention, cross-attention, LayerNorm, MLP; embeddings; the head.
    c, n = 1024, 1024
    adaptive = 2 * (100 * c + 2 * c * c + 2 * c)
    attention = (4 * c * c + 4 * c) + (2 * c * c + 2 * c + 2 * 512 * c + 2 * c)
    per_block = adaptive + attention + 2 * c + (8 * c * c + 5 * c)
    whole = 19 * per_block + (n + 1 + 16 + 16) * c + 2 * c + (c * n + n) + 77 * 512
    assert sum(parameter.numel() for parameter in model.parameters()) == whole


def plain_forward(model: VQDiffusion, tokens: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """The network in plain operations, a head at a time, from the equations."""
    p = model.state_dict()
    height, width = model.token_shape

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def normalized(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    def adaptive(name: str, x: Tensor) -> Tensor:
        embedded = p[f"{name}.emb.weight"][t - 1]
        change = linear(f"{name}.linear", embedded * torch.sigmoid(embedded))[:, None]
        scale, shift = change[..., : x.shape[-1]], change[..., x.shape[-1] :]
        return normalized(x) * (1 + scale) + shift

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = []
        for q, k, v in zip(query.chunk(2, -1), key.chunk(2, -1), value.chunk(2, -1), strict=True):
            heads.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v)
        return torch.cat(heads, -1)

    places = torch.arange(height * width)
    x = p["tok_emb.weight"][tokens] + p["row_emb.weight"][places // width] + p["column_emb.weight"][places % width]
    for i in range(len(model.blocks)):
        name = f"blocks.{i}"
        x = x + linear(
            f"{name}.attn.proj", attend(*linear(f"{name}.attn.qkv", adaptive(f"{name}.ln1", x)).chunk(3, -1))
        )
        query = linear(f"{name}.text_attn.query", adaptive(f"{name}.ln_text", x))
        x = x + linear(f"{name}.text_attn.proj", attend(query, *linear(f"{name}.text_attn.kv", text).chunk(2, -1)))
        inner = linear(f"{name}.mlp.0", normalized(x) * p[f"{name}.ln2.weight"] + p[f"{name}.ln2.bias"])
        x = x + linear(f"{name}.mlp.2", inner * torch.sigmoid(1.702 * inner))
    return linear("head", normalized(x) * p["ln_f.weight"] + p["ln_f.bias"])


def test_logits_are_those_of_the_equations() -> None:
    model = tiny().double()
    with torch.no_grad():
        for parameter in model.parameters():  # weights at which every layer matters
            parameter.normal_(std=0.4)
        tokens, t, text = inputs()
        logits = model(tokens, t, text.double())
        torch.testing.assert_close(logits, plain_forward(model, tokens, t, text.double()), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(model(tokens.view(3, 2, 3), t, text.double()), logits)


def test_checkpointed_activations_leave_gradients_as_they_are() -> None:
    model = tiny()
    tokens, t, text = inputs()
    gradients = []
    for enabled in (False, True):
        model.checkpoint_activations(enabled)
        assert [block.checkpointing for block in model.blocks] == [enabled] * 2
        loss = model(tokens, t, text).square().sum()
        gradients.append(torch.autograd.grad(loss, [model.tok_emb.weight, model.blocks[0].text_attn.kv.weight]))
    for kept, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, kept)


@pytest.mark.slow
def test_compiled_training_step_has_the_eager_gradients_under_autocast() -> None:
    model = tiny(depth=1)
    noisy, t, text = inputs()
    tokens = noisy.clamp(max=4)

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(noisy, t, text, model.keep_text(3, 0.5, seed=SEED))
        terms = diffusion_terms(model.transition, logits, tokens, noisy, t)
        return terms.loss(t, torch.full((3,), 0.1), model.num_steps, auxiliary_weight=0.5)

    values = [loss(), torch.compile(loss, fullgraph=True)()]
    torch.testing.assert_close(values[1], values[0], rtol=1e-2, atol=0)
    parameters = dict(model.named_parameters())
    eager, compiled = (torch.autograd.grad(value, list(parameters.values())) for value in values)
    for name, ours, expected in zip(parameters, compiled, eager, strict=True):
        error = (ours - expected).norm() / expected.norm().clamp(min=1e-6)
        assert error < 0.05, name  # fused code skips some of bf16's roundings


# --- text ------------------------------------------------------------------------------------------------------------


def test_text_takes_the_models_type() -> None:
    tokens, t, text = inputs()
    for dtype in (torch.bfloat16, torch.float64):
        model = tiny().to(dtype)
        assert model(tokens, t, text, torch.tensor([[True], [False], [True]])).dtype == dtype


def test_masked_text_is_the_null_condition() -> None:
    model = tiny()
    tokens, t, text = inputs()
    null = model(tokens, t)
    assert not torch.allclose(model(tokens, t, text), null)
    for mask in (torch.zeros(3, 4, dtype=torch.bool), torch.zeros(3, 1, dtype=torch.bool)):
        torch.testing.assert_close(model(tokens, t, text, mask), null)
    some = torch.tensor([[True], [False], [True]])
    logits = model(tokens, t, text, some)
    torch.testing.assert_close(logits[1], null[1])
    torch.testing.assert_close(logits[::2], model(tokens, t, text)[::2])
    places = torch.tensor([True, False, True, True]).expand(3, 4)
    condition = model.condition(3, text, places)
    torch.testing.assert_close(condition[:, 1], model.null_text[1].expand(3, -1))
    torch.testing.assert_close(condition[:, 2:], text[:, 2:])


def test_ids_go_through_the_text_encoder_and_its_mask_through_the_null_condition() -> None:
    model = tiny(text_encoder=tiny_encoder())
    tokens, t, _ = inputs(2)
    ids = model.tokenize_text(["a cat", "the moon on grass"])
    features, mask = model.text_encoder(ids)
    assert mask.sum(1).tolist() == [2, 4]
    torch.testing.assert_close(model(tokens, t, ids), model(tokens, t, features, mask))
    keep = torch.tensor([[True], [False]])
    torch.testing.assert_close(model(tokens, t, ids, keep), model(tokens, t, features, mask & keep))
    model(tokens, t, ids).sum().backward()
    assert model.text_encoder.embedding.weight.grad.abs().sum() > 0


def test_without_a_null_condition_padding_is_the_encoders() -> None:
    model = tiny(text_encoder=tiny_encoder(), null_condition=False)
    ids = model.tokenize_text(["a cat"])
    torch.testing.assert_close(model.condition(1, ids), model.text_encoder(ids).features)


def test_dropped_captions_are_a_function_of_the_image() -> None:
    model = tiny()
    kept = model.keep_text(4000, 0.1, seed=SEED)
    assert 0.08 < 1 - kept.float().mean() < 0.12
    torch.testing.assert_close(model.keep_text(1000, 0.1, seed=SEED, first_image=3000), kept[3000:])
    assert model.keep_text(4, 0.0, seed=SEED) is None
    assert not model.keep_text(4, 1.0, seed=SEED).any()


# --- folders ---------------------------------------------------------------------------------------------------------


def test_saved_models_come_back_with_their_learned_encoder(tmp_path: Path) -> None:
    model = tiny(text_encoder=tiny_encoder()).eval()
    model.save_pretrained(tmp_path / "prior")
    loaded = VQDiffusion.from_pretrained(tmp_path / "prior")
    tokens, t, _ = inputs(1)
    captions = ["a cat"]
    expected = model(tokens, t, model.tokenize_text(captions))
    torch.testing.assert_close(loaded(tokens, t, loaded.tokenize_text(captions)), expected, rtol=0, atol=0)
    assert loaded.architecture() == model.architecture()
    assert not loaded.training


def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "prior")
    (tmp_path / "prior" / "manifest.json").unlink()
    config = tmp_path / "prior" / "config.json"
    content = json.loads(config.read_text())
    for change, message in [
        ({"type": "TokenTransformer"}, "TokenTransformer.* VQDiffusion"),
        ({"depth": 1}, "fit .*VQDiffusion"),
        ({"colour": "red"}, "fit this version"),
        ({"text_encoder": {"type": "Oracle"}}, "'Oracle'"),
    ]:
        config.write_text(json.dumps({"architecture": content["architecture"] | change}))
        with pytest.raises(ValueError, match=message):
            VQDiffusion.from_pretrained(tmp_path / "prior")


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 15}, "width 15 .*2 heads"),
        ({"depth": 0}, r"depth .*\b0$"),
        ({"num_steps": 1}, r"num_steps .*\b1$"),
        ({"dropout": 1.0}, r"dropout .*\b1\.0$"),
        ({"token_shape": (0, 4)}, r"token_shape .*\(0, 4\)$"),
        ({"text_shape": (0, 4)}, r"text_shape .*\(0, 4\)$"),
    ],
)
def test_impossible_sizes_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)


def test_wrong_inputs_are_refused() -> None:
    model, without = tiny(), tiny(null_condition=False)
    tokens, t, text = inputs()
    without(tokens, t, text)
    for call, message in [
        (lambda: model(tokens, t[:2], text), r"\bt .*\(3,\).*\(2,\)$"),
        (lambda: model(tokens, t, text[:2]), r"text .*\(3, 4, 6\).*\(2, 4, 6\)$"),
        (lambda: model(tokens, t, text, torch.ones(3, 2, dtype=torch.bool)), r"text_mask .*\(3, 2\)$"),
        (lambda: model(tokens[:, 1:], t, text), r"tokens .*\(3, 5\)$"),
        (lambda: model(tokens, t, tokens), r"torch\.int64 .*text_encoder"),
        (lambda: model.tokenize_text(["a cat"]), "captions .*text_encoder"),
        (lambda: without(tokens, t), "null condition"),
        (lambda: without(tokens, t, text, torch.ones(3, 1, dtype=torch.bool)), "no null condition"),
        (lambda: without.keep_text(3, 0.1, seed=SEED), "null condition"),
        (lambda: model.keep_text(3, 1.5, seed=SEED), r"\[0, 1\].*\b1\.5$"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match=r"tokens .*torch\.int32"):
        model(tokens.int(), t, text)


def test_gelu2() -> None:
    x = torch.linspace(-4, 4, 9, dtype=torch.float64)
    mlp = tiny().blocks[0].mlp[1]
    torch.testing.assert_close(mlp(x), x / (1 + torch.exp(-1.702 * x)))
    assert (mlp(x) - F.gelu(x)).abs().max() < 0.03
