"""The autoregressive prior: taming's function and layout, its loss, its corruption, and what it refuses."""

import json
import math
from typing import get_args

import peers
import pytest
import torch
import torch.nn.functional as F
from measuring import SkippedError

from regvq_fast.priors import class_ids as module
from regvq_fast.priors.autoregressive import TokenTransformer, sample_autoregressive
from regvq_fast.priors.autoregressive.model import Arch

SEED = torch.tensor(3)
CODES, CLASSES, WIDTH, DEPTH, HEADS = 12, 5, 16, 2, 2
CONDITION, TOKENS = 4, 6  # lengths
ARCHS = get_args(Arch)


def make_model(**options):
    torch.manual_seed(0)
    arguments = {"token_shape": (2, 3), "condition_shape": (1, 4), "width": WIDTH, "depth": DEPTH, "heads": HEADS}
    return TokenTransformer(CODES, CLASSES, **(arguments | options))


def randomized(model):
    """Weights so large that each of them matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def make_batch(images=3):
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(CODES, (images, 2, 3), generator=generator)
    return tokens, torch.randint(CLASSES + 1, (images, 1, 4), generator=generator)


@pytest.fixture(params=ARCHS)
def model(request):
    return randomized(make_model(arch=request.param).double()).eval()


# --- taming's function and layout ------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("arch", ARCHS)
def test_fresh_weights(arch):
    model = make_model(width=64, heads=4, arch=arch)
    matrices = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.ndim == 2}
    if arch == "llama":
        assert not matrices.pop("head.weight").any()
        for name in ("tok_emb.weight", "cond_emb.weight"):  # around a vector of its own
            shared, count = matrices[name].mean(0), len(matrices[name])
            assert 0.014 < float(shared.std()) < 0.03  # 0.008 at most, if they started around 0
            matrices[name] = (matrices[name] - shared) * math.sqrt(count / (count - 1))
    assert max(abs(float(matrix.std()) - 0.02) for matrix in matrices.values()) < 0.002
    assert float(model.loss(*make_batch()).detach()) == pytest.approx(math.log(CODES), abs=0.2)  # a uniform guess


# --- loss ------------------------------------------------------------------------------------------------------------


def gradients(model, value):
    return torch.autograd.grad(value, list(model.parameters()), materialize_grads=True)


def test_positions_of_a_token_and_of_the_map_begin_alike():
    model = TokenTransformer(CODES, CLASSES, token_shape=(3, 4), width=64, depth=1, heads=1)
    positions = model.pos_emb[0].detach()
    of_map, of_tokens = positions[:12], positions[11:-1]  # token 0 is predicted where the last of the map is read
    # Dot products, which attention begins with, are largest at the same position of the other grid.
    assert (of_tokens[1:-1] @ of_map.T).argmax(1).tolist() == [*range(1, 11)]
    assert positions[:-1].square().mean().sqrt().item() == pytest.approx(0.02, rel=0.1)


def test_loss_is_the_mean_cross_entropy(model):
    tokens, condition = make_batch()
    inputs = (tokens + 1) % CODES
    logits = model(inputs, condition)
    expected = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    torch.testing.assert_close(model.loss(tokens, condition, inputs=inputs).double(), expected, rtol=1e-6, atol=0)
    assert model.bfloat16().loss(tokens, condition).dtype == torch.float32


def test_chunks_and_checkpoints_change_nothing(model, monkeypatch):
    batch = make_batch()
    expected = model.loss(*batch)
    expected_gradients = gradients(model, expected)
    monkeypatch.setattr(module, "_LOSS_ELEMENTS", 5 * CODES)  # 18 rows: chunks of 5, 5, 5 and 3
    model.checkpoint_activations()
    value = model.loss(*batch)
    torch.testing.assert_close(value, expected)
    for ours, theirs in zip(gradients(model, value), expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)  # the logits of the loss are fp32


def test_checkpoints_run_each_block_again(model):
    calls = []
    for block in model.blocks:
        block.ln1.register_forward_hook(lambda *_: calls.append(1))
    model.checkpoint_activations()
    model.loss(*make_batch()).backward()
    assert len(calls) == 2 * DEPTH
    model.checkpoint_activations(False)
    model.loss(*make_batch()).backward()
    assert len(calls) == 3 * DEPTH


def test_chunks_and_checkpoints_are_one_graph(model, monkeypatch):
    batch = make_batch()
    expected = gradients(model, model.loss(*batch))
    monkeypatch.setattr(module, "_LOSS_ELEMENTS", 10 * CODES)
    model.checkpoint_activations()
    compiled = torch.compile(TokenTransformer.loss, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(gradients(model, compiled(model, *batch)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("arch", ARCHS)
def test_dropout_is_for_training_only(arch):
    model = randomized(make_model(dropout=0.3, arch=arch))
    assert not torch.equal(model.loss(*make_batch()), model.loss(*make_batch()))
    model.eval()
    assert torch.equal(model.loss(*make_batch()), model.loss(*make_batch()))


@pytest.mark.parametrize("arch", ARCHS)
def test_it_learns_eight_sequences_by_heart(arch):
    model = make_model(width=32, heads=2, token_shape=(4, 4), arch=arch)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(CODES, (8, 4, 4), generator=generator)
    condition = torch.arange(8)[:, None] // torch.tensor([4, 2, 1, 1]) % 2  # the eight numbers in binary
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(150):
        loss = model.loss(tokens, condition)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.02
    assert torch.equal(sample_autoregressive(model, condition, seed=0, temperature=0.0), tokens)


@pytest.mark.parametrize("arch", ARCHS)
def test_compiled_gradients_are_the_eager_ones(arch):
    """In bf16: that is where compiled backward passes have been wrong on a CPU."""
    model, batch = randomized(make_model(width=32, depth=1, arch=arch)), make_batch(32)

    def loss(tokens, condition):
        with torch.autocast("cpu", torch.bfloat16):
            return model.loss(tokens, condition)

    exact = gradients(model.double(), model.loss(*batch))
    model.float()
    compiled = gradients(model, torch.compile(loss, fullgraph=True)(*batch))
    eager = gradients(model, loss(*batch))
    for ours, theirs, truth in zip(compiled, eager, exact, strict=True):
        error, budget = ((gradient.double() - truth).norm() for gradient in (ours, theirs))
        assert error <= 1.5 * budget + 1e-5 * truth.norm()


# --- decoding --------------------------------------------------------------------------------------------------------


def test_logits_depend_on_the_tokens_before_and_on_the_whole_condition(model):
    tokens, condition = (ids.flatten(1)[:1] for ids in make_batch())
    logits = model(tokens, condition)
    for i in range(TOKENS):
        others = tokens.clone()
        others[:, i] = (tokens[:, i] + 1) % CODES
        changed = (model(others, condition) != logits).any(2).flatten()
        assert changed.tolist() == [position > i for position in range(TOKENS)]
    for k in range(CONDITION):
        others = condition.clone()
        others[:, k] = (condition[:, k] + 1) % CLASSES
        assert (model(tokens, others) != logits).any(2).all()


@pytest.mark.parametrize("static", [False, True])
def test_decoding_step_by_step_gives_the_same_logits(model, static):
    tokens, condition = make_batch()
    expected, flat = model(tokens, condition), tokens.flatten(1)
    logits, cache = model.prefill(condition)
    torch.testing.assert_close(logits, expected[:, 0])
    addresses = [tensor.data_ptr() for tensor in cache.keys + cache.values]
    for i in range(TOKENS - 1):
        logits = model.decode(flat[:, i], torch.tensor(i), cache, reached=None if static else i + 1)
        torch.testing.assert_close(logits, expected[:, i + 1])
    assert addresses == [tensor.data_ptr() for tensor in cache.keys + cache.values]


# --- corruption ------------------------------------------------------------------------------------------------------


def test_corruption_has_the_frequencies_asked_for(model):
    images = 3000
    tokens = torch.full((images, 2, 3), 7)
    condition = torch.arange(images)[:, None].expand(-1, 4) % CLASSES
    seen, dropped = model.corrupt(tokens, condition, seed=SEED, first_image=0, keep=0.4, condition_dropout=0.1)
    changed = seen[seen != 7]
    # A replacement may be the token itself: the share that changes is 0.6 * 11/12. Five standard deviations.
    share = 0.6 * (CODES - 1) / CODES
    assert abs(len(changed) / seen.numel() - share) < 5 * math.sqrt(share * (1 - share) / seen.numel())
    counts = changed.bincount(minlength=CODES)[torch.arange(CODES) != 7].double()
    expected = len(changed) / (CODES - 1)
    assert float(((counts - expected) ** 2 / expected).sum()) < 35.6  # 10 degrees of freedom: 99.99 %
    null = (dropped == CLASSES).all(1)
    assert torch.equal(dropped[~null], condition[~null])
    assert abs(float(null.double().mean()) - 0.1) < 5 * math.sqrt(0.09 / images)


def test_corruption_does_not_depend_on_the_split_of_a_batch(model):
    tokens, condition = make_batch(8)
    settings = {"seed": SEED, "keep": 0.5, "condition_dropout": 0.5}
    whole = model.corrupt(tokens, condition, first_image=100, **settings)
    parts = [model.corrupt(tokens[i : i + 4], condition[i : i + 4], first_image=100 + i, **settings) for i in (0, 4)]
    for ours, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(ours, torch.cat(pieces))
    again = model.corrupt(tokens, condition, first_image=torch.tensor(108), **settings)
    assert not torch.equal(again[0], whole[0])


def test_corruption_at_its_ends(model):
    tokens, condition = make_batch()
    nothing = model.corrupt(tokens, condition, seed=SEED, first_image=0)
    assert torch.equal(nothing[0], tokens.flatten(1))
    assert torch.equal(nothing[1], condition.flatten(1))
    everything = model.corrupt(tokens, condition, seed=SEED, first_image=0, keep=0.0, condition_dropout=1.0)
    assert (everything[0] != tokens.flatten(1)).double().mean() > 0.5
    assert (everything[1] == CLASSES).all()


# --- weights ---------------------------------------------------------------------------------------------------------


def test_saved_and_read_it_is_the_same(model, tmp_path):
    model.float().save_pretrained(tmp_path / "prior")
    again = TokenTransformer.from_pretrained(tmp_path / "prior")
    assert not again.training
    assert again.architecture() == model.architecture()
    assert torch.equal(again(*make_batch()), model(*make_batch()))


def test_folders_of_other_models_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path / "prior")
    config = tmp_path / "prior" / "config.json"
    (tmp_path / "prior" / "manifest.json").unlink()
    description = json.loads(config.read_text())

    def rewrite(**changes):
        architecture = {name: v for name, v in (description["architecture"] | changes).items() if v is not None}
        config.write_text(json.dumps(description | {"architecture": architecture}))

    rewrite(type=None)
    with pytest.raises(ValueError, match=r"VQGAN.* TokenTransformer"):
        TokenTransformer.from_pretrained(tmp_path / "prior")
    rewrite(feathers=2)
    with pytest.raises(ValueError, match=r"prior .*feathers"):
        TokenTransformer.from_pretrained(tmp_path / "prior")
    rewrite(depth=1)
    with pytest.raises(ValueError, match=r"TokenTransformer:\n  unexpected: blocks\.1"):
        TokenTransformer.from_pretrained(tmp_path / "prior")


# --- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 18, "heads": 4}, "width 18 .*4 heads"),
        ({"depth": 0}, r"depth .*\b0$"),
        ({"dropout": 1.0}, r"dropout .*\b1\.0$"),
        ({"token_shape": (16,)}, r"token_shape .*\(16,\)$"),
        ({"condition_shape": (0, 4)}, r"condition_shape .*\(0, 4\)$"),
        ({"arch": "gpt"}, "arch .*'gpt'$"),
        ({"arch": "llama", "width": 12}, "width .*width 12 .*2 heads$"),
    ],
)
def test_wrong_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_model(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, c: (t[:, :1], c), r"tokens .*\(B, 2, 3\) or \(B, 6\).*\(3, 1, 3\)$"),
        (lambda t, c: (t, c.flatten(1)[:, :3]), r"condition .*\(B, 1, 4\) or \(B, 4\).*\(3, 3\)$"),
        (lambda t, c: (t, c[:2]), "tokens .*condition .*3, 2$"),
        (lambda t, c: (t + 12, c), r"tokens .*\[0, 12\).* 1\d to 2\d"),
        (lambda t, c: (t, c - 1), r"condition .*\[0, 6\).* -1 to"),
    ],
)
def test_wrong_batches_are_refused(model, change, message):
    with pytest.raises(ValueError, match=message):
        model(*change(*make_batch()))


def test_wrong_types_and_probabilities_are_refused(model):
    tokens, condition = make_batch()
    with pytest.raises(TypeError, match=r"tokens .*torch\.int32"):
        model(tokens.int(), condition)
    with pytest.raises(TypeError, match=r"condition .*torch\.float32"):
        model.prefill(condition.float())
    with pytest.raises(ValueError, match=r"2, 3$"):
        model.loss(tokens, condition[:2], inputs=tokens[:2])
    with pytest.raises(ValueError, match=r"keep .*\b1\.5$"):
        model.corrupt(tokens, condition, seed=SEED, first_image=0, keep=1.5)
