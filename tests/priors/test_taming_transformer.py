"""The autoregressive prior as taming's: its function, its layout, and checkpoints that are loaded or refused."""

import math

import peers
import pytest
import torch
from helpers.token_transformers import CLASSES, CODES, CONDITION, DEPTH, HEADS, TOKENS, WIDTH, make_batch, make_model
from measuring import SkippedError

from regvq_fast.priors.autoregressive import TokenTransformer


def taming_state():
    """Random weights by the names and shapes of taming's GPT, one embedding for condition and image."""
    shapes = {
        "tok_emb.weight": (CODES, WIDTH),
        "pos_emb": (1, CONDITION + TOKENS, WIDTH),
        "head.weight": (CODES, WIDTH),
    }
    layers = {"ln1": (WIDTH,), "ln2": (WIDTH,), "mlp.0": (4 * WIDTH, WIDTH), "mlp.2": (WIDTH, 4 * WIDTH)}
    layers |= {f"attn.{name}": (WIDTH, WIDTH) for name in ("query", "key", "value", "proj")}
    layers = {f"blocks.{i}.{name}": shape for i in range(DEPTH) for name, shape in layers.items()} | {"ln_f": (WIDTH,)}
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    generator = torch.Generator().manual_seed(4)
    state = {name: 0.4 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    mask = torch.ones(CONDITION + TOKENS, CONDITION + TOKENS).tril()[None, None]
    return state | {f"blocks.{i}.attn.mask": mask for i in range(DEPTH)}


def plain_logits(state, ids):
    """minGPT's equations on such weights: logits (B, T, N) of ids (B, T)."""

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, x):
        centered = x - x.mean(-1, keepdim=True)
        scaled = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    x = state["tok_emb.weight"][ids] + state["pos_emb"][:, : ids.shape[1]]
    later = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
    for i in range(DEPTH):
        block, h = f"blocks.{i}", norm(f"blocks.{i}.ln1", x)
        heads = []
        parts = (linear(f"{block}.attn.{name}", h).chunk(HEADS, -1) for name in ("query", "key", "value"))
        for q, k, v in zip(*parts, strict=True):
            scores = (q @ k.transpose(1, 2) / math.sqrt(WIDTH / HEADS)).masked_fill(later, -math.inf)
            heads.append(scores.softmax(-1) @ v)
        x = x + linear(f"{block}.attn.proj", torch.cat(heads, -1))
        h = linear(f"{block}.mlp.0", norm(f"{block}.ln2", x))
        x = x + linear(f"{block}.mlp.2", h * (1 + torch.erf(h / math.sqrt(2))) / 2)
    return norm("ln_f", x) @ state["head.weight"].T


def test_taming_weights_give_minGPTs_logits():
    state, model = taming_state(), make_model().eval()
    model.load_taming_state_dict(state)
    tokens, condition = make_batch()
    condition = condition.clamp(max=CLASSES - 1)
    ids = torch.cat([condition.flatten(1), tokens.flatten(1)[:, :-1]], 1)
    expected = plain_logits({name: tensor.double() for name, tensor in state.items()}, ids)[:, CONDITION - 1 :]
    assert expected.std() > 0.3
    torch.testing.assert_close(model(tokens, condition).double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.double()(tokens.flatten(1), condition.flatten(1)), expected, rtol=0, atol=1e-12)


def test_logits_are_those_of_tamings_own_network():
    try:
        mingpt = peers.taming()["mingpt"]
    except SkippedError as error:
        pytest.skip(str(error))
    theirs = mingpt.GPT(CODES, CONDITION + TOKENS, n_layer=DEPTH, n_head=HEADS, n_embd=WIDTH).eval()
    theirs.load_state_dict(taming_state())
    model = make_model().eval()
    model.load_taming_state_dict({"state_dict": {f"transformer.{n}": t for n, t in theirs.state_dict().items()}})
    tokens, condition = make_batch()
    condition = condition.clamp(max=CLASSES - 1)
    logits, _ = theirs(torch.cat([condition.flatten(1), tokens.flatten(1)], 1)[:, :-1])
    torch.testing.assert_close(model(tokens, condition), logits[:, CONDITION - 1 :], rtol=0, atol=1e-5)


def test_a_checkpoint_of_the_whole_model_loads_and_leaves_the_null_condition():
    model, state = make_model(), taming_state()
    null = model.cond_emb.weight[CLASSES].clone()
    whole = {f"transformer.{name}": tensor for name, tensor in state.items()}
    model.load_taming_state_dict({"state_dict": whole | {"first_stage_model.quant_conv.bias": torch.zeros(3)}})
    assert torch.equal(model.tok_emb.weight, state["tok_emb.weight"])
    assert torch.equal(model.cond_emb.weight, torch.cat([state["tok_emb.weight"][:CLASSES], null[None]]))
    fused = torch.cat([state[f"blocks.1.attn.{name}.bias"] for name in ("query", "key", "value")])
    assert torch.equal(model.blocks[1].attn.qkv.bias, fused)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "module.transformer."])
def test_a_prefix_of_a_wrapper_is_stripped(prefix):
    model, state = make_model(), taming_state()
    loaded = model.load_taming_state_dict({prefix + name: tensor for name, tensor in state.items()} | {"step": 1})
    assert torch.equal(model.tok_emb.weight, state["tok_emb.weight"])
    assert loaded.left_out == ("step",)
    with pytest.raises(ValueError, match=r"none of the 0 names fits this TokenTransformer"):
        model.load_taming_state_dict({})


def test_wrong_checkpoints_are_refused_as_a_whole():
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = taming_state()
    wrong = state | {"head.weight": torch.zeros(9, WIDTH), "extra": torch.zeros(1)}
    del wrong["blocks.0.attn.key.bias"]
    with pytest.raises(ValueError, match=r"fit .*TokenTransformer") as error:
        model.load_taming_state_dict(wrong)
    assert str(error.value).splitlines()[1:] == [
        "  missing: blocks.0.attn.key.bias",
        "  unexpected: extra",
        f"  wrong shape: head.weight is (9, {WIDTH}), should be ({CODES}, {WIDTH})",
    ]
    unmasked = state["blocks.0.attn.mask"].clone()
    unmasked[..., :4, :4] = 1
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.mask .*n_unmasked"):
        model.load_taming_state_dict(state | {"blocks.0.attn.mask": unmasked})
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    many_classes = TokenTransformer(
        CODES, 13, token_shape=(2, 3), condition_shape=(1, 4), width=WIDTH, depth=2, heads=2
    )
    with pytest.raises(ValueError, match=r"\b12 .*\b13 classes"):
        many_classes.load_taming_state_dict(state)
    with pytest.raises(ValueError, match=r'arch "llama".*arch="taming"'):
        make_model(arch="llama").load_taming_state_dict(state)


def test_the_defaults_are_tamings():
    with torch.device("meta"):
        model = TokenTransformer()
    sizes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert sizes["pos_emb"] == (1, 512, 1024)
    assert sizes["head.weight"] == (1024, 1024)
    assert sizes["cond_emb.weight"] == (152, 1024)
    blocks = sum(math.prod(shape) for name, shape in sizes.items() if name.startswith("blocks."))
    assert blocks == 24 * (12 * 1024**2 + 13 * 1024)
    with torch.device("meta"):
        llama = TokenTransformer(arch="llama")
    counts = [sum(parameter.numel() for parameter in network.parameters()) for network in (model, llama)]
    assert counts[1] == pytest.approx(counts[0], rel=0.01)
