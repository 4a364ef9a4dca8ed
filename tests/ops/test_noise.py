"""Philox words against Random123's known answers; the noise as a function of (seed, row, code) alone; its law."""

import math
import shutil

import pytest
import torch
from torch import Tensor

from regvq_fast import native
from regvq_fast.ops import noise
from regvq_fast.ops.noise import gumbel_from_words, gumbel_noise, philox4x32, row_words

WORD = 1 << 32


def seed_of(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int64)


def as_signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


# kat_vectors of Random123: counter, key, result of philox4x32 with 10 rounds.
KNOWN_ANSWERS = {
    "zeros": (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    "ones": (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_philox_gives_the_known_answers_of_random123(name):
    counter, key, result = KNOWN_ANSWERS[name]
    words = philox4x32(*(torch.tensor([c]) for c in counter), seed_of(as_signed(key[1] << 32 | key[0])))
    assert tuple(int(word) for word in words) == result


def philox_by_hand(counter: list[int], key: list[int]) -> list[int]:
    """Salmon et al., in Python's own integers."""
    c, (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 // WORD ^ c[1] ^ k0, p1 % WORD, p0 // WORD ^ c[3] ^ k1, p0 % WORD]
        k0, k1 = (k0 + 0x9E3779B9) % WORD, (k1 + 0xBB67AE85) % WORD
    return c


@pytest.mark.parametrize("seed", [0, -1, 17, 2**63 - 1, -(2**63), 0x0123456789ABCDEF, -0x0123456789ABCDEF])
def test_every_word_of_the_noise_comes_from_its_documented_counter(seed):
    rows, num_codes = [0, 5, WORD - 1, WORD, 3 * WORD + 2, 2**62 + 9], 11
    noise = gumbel_noise(seed_of(seed), torch.tensor(rows), num_codes)
    key = [seed % WORD, (seed >> 32) % WORD]
    for m, row in enumerate(rows):
        words = [w for block in range(3) for w in philox_by_hand([block, row >> 32, row % WORD, 0], key)]
        assert torch.equal(noise[m], gumbel_from_words(torch.tensor(words[:num_codes])))


def test_philox_leaves_its_arguments_alone():
    words = [torch.arange(3), torch.arange(3) + 5, torch.arange(3) + 7, torch.arange(3)]
    copies = [word.clone() for word in words]
    philox4x32(*words, seed_of(1))
    assert all(torch.equal(word, copy) for word, copy in zip(words, copies, strict=True))


def test_noise_does_not_depend_on_split_order_offset_or_number_of_codes():
    seed, rows = seed_of(3), torch.arange(257)
    whole = gumbel_noise(seed, rows, 103)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        start, stop = sorted(torch.randint(0, 258, (2,), generator=generator).tolist())
        num_codes = int(torch.randint(1, 104, (), generator=generator))
        part = gumbel_noise(seed, torch.arange(stop - start) + start, num_codes)
        assert torch.equal(part, whole[start:stop, :num_codes])
    order = torch.randperm(257, generator=generator)
    assert torch.equal(gumbel_noise(seed, order, 103), whole[order])
    assert torch.equal(gumbel_noise(seed, rows[:4], 5), gumbel_noise(seed, rows[:4], 9)[:, :5])


def test_rows_and_seeds_that_share_their_low_words_have_other_noise():
    rows = torch.tensor([1, 1 + WORD, 1 + 2 * WORD])
    noise = gumbel_noise(seed_of(1), rows, 64)
    other = gumbel_noise(seed_of(1 + WORD), rows, 64)
    for a, b in ((noise[0], noise[1]), (noise[1], noise[2]), (noise[0], other[0])):
        assert (a == b).float().mean() < 0.05


def test_row_words_come_from_counters_that_no_noise_uses():
    seed, rows = 0x0123456789ABCDEF, torch.tensor([[0, 7], [WORD - 1, 5 * WORD + 3]])
    key = [seed % WORD, seed >> 32]
    for stream in (1, 2):
        words = row_words(seed_of(seed), rows, stream)
        assert words.shape == rows.shape
        expected = [philox_by_hand([0, row >> 32, row % WORD, stream], key)[0] for row in rows.flatten().tolist()]
        assert words.flatten().tolist() == expected


def test_no_rows_give_no_noise():
    assert gumbel_noise(seed_of(0), torch.arange(0), 5).shape == (0, 5)


def test_the_outermost_words_give_the_hand_computed_noise():
    # Word 0: v = 2^-33, so g = 33 log 2. The last word: v = 1 - 2^-24, so E = 24 log 2 and g = -log(24 log 2).
    noise = gumbel_from_words(torch.tensor([0, WORD - 1]))
    assert noise.dtype == torch.float32
    torch.testing.assert_close(noise, torch.tensor([33 * math.log(2), -math.log(24 * math.log(2))]), rtol=2e-7, atol=0)
    torch.testing.assert_close(noise, torch.tensor([22.873857, -2.811541]), rtol=1e-6, atol=0)


def test_the_upper_tail_is_resolved_to_the_last_word():
    words = torch.arange(100_000)
    noise = gumbel_from_words(words).double()
    assert (noise.diff() < 0).sum() >= 95_000  # a larger word gives less noise, wherever fp32 distinguishes the two
    assert (noise.diff() <= 0).all()
    truth = -torch.log(-torch.log1p(-(words.double() + 0.5) / WORD))
    assert ((noise - truth).abs() <= 4e-7 * truth.abs()).all()


def test_noise_is_finite_and_within_its_documented_range_over_all_words():
    words = torch.cat([torch.arange(0, WORD, 99_991), WORD - 1 - torch.arange(5000)])
    noise = gumbel_from_words(words)
    assert noise.isfinite().all()
    assert noise.min() >= -2.82
    assert noise.max() <= 22.88


@pytest.fixture(scope="module")
def sample() -> Tensor:
    return gumbel_noise(seed_of(2023), torch.arange(1000), 1000).double()


def test_moments_are_those_of_the_gumbel_law(sample):
    count = sample.numel()
    euler, variance = 0.5772156649015329, math.pi**2 / 6
    assert abs(sample.mean() - euler) < 4 * math.sqrt(variance / count)
    # The fourth central moment of the Gumbel law is 27/5 of the squared variance.
    assert abs(sample.var() - variance) < 4 * variance * math.sqrt((27 / 5 - 1) / count)


def test_the_distribution_function_is_that_of_the_gumbel_law(sample):
    uniform = torch.exp(-torch.exp(-sample)).flatten()
    count = uniform.numel()
    grid = torch.arange(1, count + 1, dtype=torch.float64) / count
    # Kolmogorov-Smirnov: P(sqrt(n) * distance > 1.95) is 0.1 %.
    assert (uniform.sort().values - grid).abs().max() * math.sqrt(count) < 1.95
    cells = torch.histc(uniform.float(), bins=256, min=0, max=1).double()
    chi_square = ((cells - count / 256).square() / (count / 256)).sum()
    assert chi_square < 255 + 4 * math.sqrt(2 * 255)


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 5, 8])
def test_neighbouring_codes_and_rows_are_uncorrelated(sample, distance):
    standard = (sample - sample.mean()) / sample.std()
    for a, b in (
        (standard[:, :-distance], standard[:, distance:]),
        (standard[:-distance], standard[distance:]),
    ):
        assert abs((a * b).mean()) < 4 / math.sqrt(a.numel())


def test_each_of_the_four_words_of_a_call_is_used_and_fair(sample):
    for word in range(4):
        part = sample[:, word::4]
        assert abs(part.mean() - 0.5772156649) < 4 * math.sqrt(math.pi**2 / 6 / part.numel())
    assert sample.flatten().unique().numel() > 0.95 * sample.numel()


def test_the_global_generator_is_left_untouched():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    gumbel_noise(seed_of(1), torch.arange(4), 10)
    assert torch.equal(torch.get_rng_state(), state)


# -------------------------------------------------------------------------------------------------------- in C


@pytest.fixture
def without_a_compiler(monkeypatch):
    """Call it to have noise from PyTorch alone."""
    return lambda: monkeypatch.setattr(noise, "rows_library", lambda like: None)


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
@pytest.mark.parametrize("num_codes", [1, 3, 255, 256, 257, 1000])
def test_noise_in_c_is_that_of_pytorch_to_the_bit(num_codes, without_a_compiler, monkeypatch):
    assert native.library(native._ROWS) is not None
    monkeypatch.setattr(native, "_PART_ELEMENTS", 1)  # several threads, however small
    rows = torch.tensor([5, 0, 2**32 - 1, 2**40 + 3, -1, 77])[::2]  # not contiguous
    seeds = [seed_of(value) for value in (0, -5, 2**62 + 12345)]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        in_c = [gumbel_noise(seed, rows, num_codes) for seed in seeds]
    finally:
        torch.set_num_threads(before)
    without_a_compiler()
    for seed, found in zip(seeds, in_c, strict=True):
        assert torch.equal(found, gumbel_noise(seed, rows, num_codes))


def test_without_a_compiler_there_is_no_library(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert native.library.__wrapped__(native._ROWS) is None
    assert not list(tmp_path.rglob("*"))


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_a_compiler_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    broken = tmp_path / "broken.c"
    broken.write_text("this is not C")
    assert native.library.__wrapped__(broken) is None
    assert not list(tmp_path.rglob("*.so"))
