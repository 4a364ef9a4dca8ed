"""The autoregressive prior: its loss, its corruption, decoding, weights, and what it refuses."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.token_transformers import (
    ARCHS,
    CLASSES,
    CODES,
    CONDITION,
    DEPTH,
    TOKENS,
    make_batch,
    make_model,
    randomized,
)

from regvq_fast.priors import class_ids as module
from regvq_fast.priors.autoregressive import TokenTransformer, sample_autoregressive

SEED = torch.tensor(3)


@pytest.fixture(params=ARCHS)
def model(request):
    return randomized(make_model(arch=request.param).double()).eval()


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
