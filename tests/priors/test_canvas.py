"""Images that are larger than a prior's grid."""

from typing import Any

import pytest
import torch
from torch import Tensor

from regvq_fast.priors.canvas import plan, sample_canvas
from regvq_fast.priors.conditions import no_conditions


@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (2, 6)])
@pytest.mark.parametrize(
    "directions",
    [(), ("right",), ("left", "left"), ("right", "down"), ("up", "left", "down", "right", "right"), ("down", "right")],
)
def test_windows_cover_the_canvas_and_overlap_what_is_there(shape: tuple[int, int], directions: Any) -> None:
    (h, w), planned = shape, plan(shape, directions)
    times = {name: directions.count(name) for name in ("left", "right", "up", "down")}
    assert planned.width == w + w // 2 * (times["left"] + times["right"])
    assert planned.height == h + h // 2 * (times["up"] + times["down"])
    assert planned.windows[0] == (h // 2 * times["up"], w // 2 * times["left"])
    known = torch.zeros(planned.height, planned.width, dtype=torch.bool)
    for number, (top, left) in enumerate(planned.windows):
        window = known[top : top + h, left : left + w]
        assert window.shape == shape
        if number:
            assert window.any(), "nothing is sampled without its neighbours"
            assert not window.all(), "no window is sampled for nothing"
        window[:] = True
    assert known.all()


def test_a_side_of_one_token_cannot_be_extended() -> None:
    with pytest.raises(ValueError, match=r"1 x 4 .*down"):
        plan((1, 4), ("down",))


class Recorder:
    """A sampler that writes its number of the image wherever nothing is kept."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.prior = torch.nn.Linear(1, 1)
        self.shape, self.calls = shape, []  # type: ignore[var-annotated]

    def sample(self, conditions: Any, first_image: int, *, keep: tuple[Tensor, Tensor], progress: Any) -> Tensor:
        tokens, kept = keep
        self.calls.append((first_image, int(kept[0].sum()), conditions))
        progress(1, 1)
        return torch.where(kept, tokens, torch.full_like(tokens, first_image))


def test_known_tokens_stay_and_each_window_has_noise_of_its_own() -> None:
    sampler, planned, steps = Recorder((4, 4)), plan((4, 4), ("right", "left")), []
    edited = torch.arange(16).view(1, 4, 4).repeat(2, 1, 1), torch.ones(2, 4, 4, dtype=torch.bool)
    tokens = sample_canvas(
        sampler,  # type: ignore[arg-type]
        planned,
        lambda window: no_conditions(2),
        first_image=100,
        num_images=10,
        keep=edited,
        progress=lambda *step: steps.append(step),
    )
    assert tokens.shape == (2, 4, 8)
    assert torch.equal(tokens[:, :, 2:6], edited[0])
    assert (tokens[:, :, 6:] == 110).all(), "the first image of the second window"
    assert (tokens[:, :, :2] == 120).all()
    assert [call[:2] for call in sampler.calls] == [(100, 16), (110, 8), (120, 8)]
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_a_map_is_of_the_whole_canvas() -> None:
    planned = plan((2, 2), ("right", "down"))
    maps = torch.arange(9, dtype=torch.uint8).view(1, 3, 3)
    sampler = Recorder((2, 2))
    sample_canvas(sampler, planned, lambda window: planned.part(maps, "segmentation", window), 0, 1)  # type: ignore[arg-type]
    corners = [call[2].flatten().tolist() for call in sampler.calls]
    assert corners == [[0, 1, 3, 4], [1, 2, 4, 5], [3, 4, 6, 7], [4, 5, 7, 8]]
    assert planned.part(["a"], "caption", planned.windows[3]) == ["a"]
