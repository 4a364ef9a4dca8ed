"""The demo page: a tab to reconstruct an image, and a tab for each prior, by its kind of condition."""

import base64
import html
import logging
import random
from collections.abc import Callable, Sequence
from functools import partial, wraps
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
from PIL import Image
from torch import Tensor

from regvq_fast.data.image_dataset import ImageDataset
from regvq_fast.demo.decoding import Decoder
from regvq_fast.demo.uploads import FORMATS, MAX_BYTES
from regvq_fast.demo.workbench import MAX_CAPTION, MAX_IMAGES, Painter, Reconstruction, Reconstructor, Request
from regvq_fast.priors.conditions import Condition
from regvq_fast.version import __version__

logger = logging.getLogger("regvq_fast")

QUEUE = 32
"""Largest number of waiting requests; further ones are refused."""
_HERE = Path(__file__).parent
_STARTS = 6  # number of example maps
_SHORT = 60  # largest number of characters of an example caption
_MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}

Result = TypeVar("Result")


def build_page(reconstructor: Reconstructor, painters: Sequence[Painter], examples: ImageDataset) -> gr.Blocks:
    """Build the page, with a tab for the tokenizer and one for each prior.

    Args:
        reconstructor: of the tokenizer.
        painters: of the priors.
        examples: images of the tokenizer's size.

    Returns:
        The page, with theme, styles and head as its attributes ``demo_theme``, ``demo_css`` and ``demo_head``.
    """
    with gr.Blocks(title="Reg-VQ demo", analytics_enabled=False) as page:
        size, (h, w) = reconstructor.size, reconstructor.token_shape
        _html(
            '<div class="rv-head"><h1>Regularized vector quantization</h1>'
            f"<p>Images of {size} x {size} pixels as {h} x {w} tokens of {reconstructor.num_codes} codes. "
            f"regvq_fast {__version__}</p></div>"
        )
        with gr.Tabs():
            with gr.Tab("Reconstruct"):
                _reconstruct_tab(reconstructor, examples)
            for painter in painters:
                with gr.Tab(_TITLES[painter.condition]):
                    _TABS[painter.condition](painter)
    page.queue(max_size=QUEUE, default_concurrency_limit=1)
    theme = gr.themes.Default(
        primary_hue="teal", font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")
    )
    page.demo_theme = theme.set(body_text_color_subdued="*neutral_500", block_info_text_color="*neutral_500")
    page.demo_css = (_HERE / "page.css").read_text(encoding="utf-8")
    page.demo_head = '<meta name="robots" content="noindex">'
    return page


def _reconstruct_tab(reconstructor: Reconstructor, examples: ImageDataset) -> None:
    decoder = Decoder()

    def uploaded(file: Path | None) -> str:
        if file is None:
            raise ValueError("There is no image: drop one.")
        square = decoder.read_square(file, reconstructor.size)
        side = min(square.width, square.height)
        whole = f"The image has {square.width} x {square.height} pixels"
        cut = "" if square.width == square.height else f"; its central square of {side} x {side} was cut out"
        note = f"{whole}{cut}, and resized to {reconstructor.size} x {reconstructor.size}."
        return _shown(reconstructor.reconstruct(square.pixels), reconstructor, note)

    def example(number: int) -> str:
        pixels = examples[number % len(examples)]["image"]
        return _shown(reconstructor.reconstruct(pixels), reconstructor, f"An example of the {examples.title}.")

    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            upload: Any = gr.Image(
                label="Image", sources=["upload", "clipboard"], height=300, elem_id="upload", buttons=[]
            )
            # Pass the file unopened: the component's own code opens any format. (A subclass would write a .pyi file.)
            upload.preprocess = _path_of
            another = gr.Button("Show an example", elem_id="example")
            _html(
                f'<p class="rv-note">{", ".join(FORMATS)}, at most {MAX_BYTES // 2**20} MiB. Of an image that is not '
                "square, the central square counts.</p>"
            )
        with gr.Column(scale=2, min_width=320):
            result = _html(example(0), elem_id="reconstruction")
    upload.upload(_in_words(uploaded), upload, result, api_name="reconstruct", **_MODEL)
    another.click(_in_words(lambda: example(random.randrange(1000))), None, result, api_name="example", **_MODEL)


def _map_tab(painter: Painter) -> None:
    several = [ids for ids in painter.examples(4 * _STARTS) if len(ids.unique()) > 1]
    starts = [bytes(ids.flatten().tolist()).hex() for ids in several[:_STARTS]]

    def board() -> Any:
        return _html(
            [*starts, "00" * painter.map_side**2][0],
            html_template='<div class="rv-painter"></div>',
            js_on_load=(_HERE / "painter.js").read_text(encoding="utf-8"),
            side=painter.map_side,
            classes=list(zip(painter.class_names, painter.colors(), strict=True)),
            starts=starts,
            elem_id="painter",
        )

    _prior_tab(painter, "map", "Paint a map, or start from an example. Then sample images of it.", board)


def _caption_tab(painter: Painter) -> None:
    examples = [caption for caption in painter.examples(20) if len(caption) <= _SHORT][:5]

    def text() -> Any:
        first = [*examples, ""][0]
        box = gr.Textbox(first, label="Caption", lines=2, max_length=MAX_CAPTION, elem_id="caption", submit_btn=False)
        if examples:
            gr.Examples([[example] for example in examples], [box], label="Captions of the validation split")
        return box

    _prior_tab(painter, "caption", "Type a caption, then sample images of it.", text)


def _label_tab(painter: Painter) -> None:
    def choice() -> Any:
        names = list(painter.sampler.prior.label_names)
        return gr.Dropdown(names, value=names[0], label=f"One of {len(names)} labels", elem_id="label")

    _prior_tab(painter, "label", "Choose a label, then sample images of it.", choice)


def _unconditional_tab(painter: Painter) -> None:
    _prior_tab(painter, "any", "This prior has no condition: sample images of what it has learned.", None)


def _prior_tab(painter: Painter, name: str, hint: str, make_condition: Callable[[], Any] | None) -> None:
    """Lay out a prior's tab: condition and button beside images and settings."""

    def sample(*values: Any, progress: gr.Progress = gr.Progress()) -> str:  # noqa: B008
        given, settings = (values[0], values[1:]) if make_condition else (None, values)
        request = Request.of(**dict(zip(controls, settings, strict=True)))
        condition = painter.read(given)
        images = painter.sample(condition, request, partial(_advance, progress))
        text = condition if isinstance(condition, str) else ""
        return _unknown(painter.unknown_words(text)) + _sampled(images, request, text)

    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            condition = make_condition() if make_condition else None
            button = gr.Button("Sample images", variant="primary", elem_id=f"sample-{name}")
        with gr.Column(scale=1, min_width=300):
            result = _html(_empty(hint), elem_id=f"{name}-images")
            with gr.Accordion("Settings", open=True):
                controls = _controls(painter)
    inputs = [*([] if condition is None else [condition]), *controls.values()]
    for component in inputs:
        component.preprocess = _as_it_came
    for event in (button.click, *([condition.submit] if isinstance(condition, gr.Textbox) else [])):
        event(_in_words(sample), inputs, result, api_name=name, **_MODEL)


def _controls(painter: Painter) -> dict[str, Any]:
    """Return the components of the prior's settings by name."""
    names = painter.sampler.entry.sampler.settings_type.names()
    controls: dict[str, Any] = {}
    with gr.Row():
        controls["count"] = gr.Slider(1, MAX_IMAGES, 4, step=1, label="Images", min_width=120)
        info = "Equal seeds, equal images"
        controls["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=120, info=info)
    info = "0: always the likeliest code"
    controls["temperature"] = gr.Slider(0, 2, 1, step=0.05, label="Temperature", info=info)
    if painter.condition != "none":
        info = "1: none" if painter.guided else "This prior was trained without a null condition: none"
        controls["guidance"] = gr.Slider(0, 6, 1, step=0.25, label="Guidance", info=info, interactive=painter.guided)
    if "top_p" in names:
        info = "Choose among the likeliest codes only"
        controls["top_p"] = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info=info)
    if "steps" in names:
        most = painter.sampler.token_sampler.most_steps
        value = painter.sampler.token_sampler.describe()["steps"]
        controls["steps"] = gr.Slider(1, most, value, step=1, label="Steps", info="Fewer are faster")
    return controls


_TABS: dict[Condition, Callable[[Painter], None]] = {
    "segmentation": _map_tab,
    "caption": _caption_tab,
    "label": _label_tab,
    "none": _unconditional_tab,
}
_TITLES: dict[Condition, str] = {
    "segmentation": "Paint a map",
    "caption": "Type a caption",
    "label": "Choose a label",
    "none": "Sample",
}


def _html(value: str, **settings: Any) -> gr.HTML:
    """Return a component of HTML without the framework's typography."""
    return gr.HTML(value, apply_default_css=False, **settings)


def _as_it_came(value: Any) -> Any:
    """Return a value unchanged, instead of the component's own check with its error messages."""
    return value


def _path_of(payload: Any) -> Path | None:
    """Return the path of an uploaded file."""
    return Path(payload.path) if payload is not None and payload.path else None


def _in_words(work: Callable[..., Result]) -> Callable[..., Result]:
    """Wrap a handler so that its errors appear on the page as sentences; unexpected errors are logged."""

    @wraps(work)
    def wrapped(*args: Any, **kwargs: Any) -> Result:
        try:
            return work(*args, **kwargs)
        except ValueError as error:
            sentence = str(error)
        except Exception:
            logger.exception("a request to the demo failed")
            sentence = "Something failed on the server; its console has the details."
        raise gr.Error(html.escape(sentence, quote=False), print_exception=False)

    return wrapped


def _advance(progress: gr.Progress, done: int, total: int) -> None:
    progress(done / total, desc=f"Step {done} of {total}")


# ------------------------------------------------------------------------------------------------------------- as HTML


def _shown(shown: Reconstruction, reconstructor: Reconstructor, note: str) -> str:
    h, w = reconstructor.token_shape
    figures = [
        _figure(shown.image, "Image", "image.png"),
        _figure(shown.reconstruction, "Reconstruction", "reconstruction.png"),
        _figure(shown.token_map, "Tokens: similar codes, similar colours", "tokens.png"),
    ]
    numbers = {
        "PSNR": "exact" if shown.psnr == float("inf") else f"{shown.psnr:.1f} dB",
        "tokens": f"{h} x {w}",
        "codes used": f"{shown.used} of {reconstructor.num_codes}",
    }
    listed = "".join(f"<div><b>{html.escape(value)}</b><span>{name}</span></div>" for name, value in numbers.items())
    codes = "".join(
        f'<figure title="code {code.code}"><img alt="code {code.code}" src="{_png(code.patch)}">'
        f"<b>{code.code}</b><br>{code.positions} &times;</figure>"
        for code in shown.codes
    )
    most = "" if shown.used == len(shown.codes) else f"{len(shown.codes)} most frequent "
    return (
        f'<p class="rv-note">{html.escape(note)}</p><div class="rv-figures rv-three">{"".join(figures)}</div>'
        f'<div class="rv-facts">{listed}</div>'
        f'<p class="rv-note">The {most}codes of the image, decoded, with index and count:</p>'
        f'<div class="rv-codes">{codes}</div>'
    )


def _sampled(images: Tensor, request: Request, caption: str = "") -> str:
    figures = "".join(
        _figure(image, f"{k + 1}", f"sample-seed{request.seed}-{k}.png") for k, image in enumerate(images)
    )
    heading = f'<p class="rv-note"><b>{html.escape(caption)}</b></p>' if caption else ""
    return f'{heading}<div class="rv-figures">{figures}</div>'


def _unknown(words: Sequence[str]) -> str:
    if not words:
        return ""
    named = ", ".join(f"<b>{html.escape(word)}</b>" for word in words)
    mean = "this word means" if len(words) == 1 else "these words mean"
    return f'<p class="rv-warning">Not in any training caption: {named}. The prior can\'t know what {mean}.</p>'


def _empty(text: str) -> str:
    return f'<div class="rv-empty">{html.escape(text)}</div>'


def _figure(image: Tensor, caption: str, name: str) -> str:
    source = _png(image)
    return (
        f'<figure><a href="{source}" download="{name}" title="Save {name}"><img alt="{html.escape(caption)}" '
        f'src="{source}"></a><figcaption>{html.escape(caption)}</figcaption></figure>'
    )


def _png(image: Tensor) -> str:
    """Return an image (3, H, W) uint8 as a data URL."""
    file = BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
