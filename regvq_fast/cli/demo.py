"""The command ``regvq demo``: a web page on a tokenizer and its priors."""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from regvq_fast.config import run_command
from regvq_fast.config.runtime import DeviceConfig
from regvq_fast.config.sections import OptionalPath
from regvq_fast.console import say
from regvq_fast.data.datasets import build_dataset
from regvq_fast.demo.serving import listen, serve
from regvq_fast.demo.workbench import Painter, Reconstructor
from regvq_fast.invocation import install
from regvq_fast.models.pretrained import TOKENIZER, tokenizer_folder
from regvq_fast.models.vqgan import VQGAN
from regvq_fast.models.weights import weights_hash
from regvq_fast.precision import Precision, choose_precision, inference_device
from regvq_fast.scenes.embedded import embedded_model
from regvq_fast.settings import Section

USAGE = """Open a web page to use a tokenizer and its priors: reconstruct an image, paint a map, type a caption.

    regvq demo                     # models of the embedded scenes
    regvq demo --run runs/vq       # a run, and priors of its tokens beside it
    regvq demo --run runs/vq --prior-runs runs/ar runs/diffusion
    regvq demo --prior-runs runs/diffusion --port 8080

The page is at http://127.0.0.1:7860 until Ctrl-C, for this machine only. It loads nothing from the internet.
"""


@dataclass(frozen=True, kw_only=True)
class PageConfig(Section):
    """Models and address of the page."""

    run: OptionalPath = None
    """Tokenizer: run or folder. Default: the first prior's, else the embedded one."""
    prior_runs: tuple[Path, ...] = ()
    """Priors: runs or folders. Default: priors of this tokenizer beside --run."""
    host: str = "127.0.0.1"
    """Listening address. Other addresses expose the page to the network, without a password."""
    port: int = 7860
    """Listening port; 0: any free one."""


# With several bases, the fields of the last one come first in the help.
@dataclass(frozen=True, kw_only=True)
class DemoConfig(DeviceConfig, PageConfig):
    """A run of ``regvq demo``."""


def open_demo(config: DemoConfig) -> None:
    """Load the models and serve the page until the process is interrupted.

    Raises:
        ValueError, OSError: settings or models can't be used; one sentence, and no port is open.
    """
    if find_spec("gradio") is None:
        raise ValueError(f"regvq demo needs gradio: {install('demo')}")
    config.check()
    if not 0 <= config.port < 2**16:
        raise ValueError(f"--port must lie in 0..65535 (0: any free one), got {config.port}")
    console = Console()
    precision = choose_precision(config.amp, inference_device(config.device))
    folder, priors = _folders(config)
    tokenizer = VQGAN.from_pretrained(folder).to(precision.device)
    reconstructor = Reconstructor(tokenizer, precision)
    painters = [Painter(prior, precision) for prior in priors]
    if config.run is not None and not priors:
        painters = _beside(config.run, tokenizer, precision)
    say(console, "tokenizer", str(folder))
    for painter in painters:
        say(console, painter.sampler.entry.sampler.title, str(painter.run))
    examples = build_dataset(None, split="val", image_size=reconstructor.size)
    opened = listen(config.host, config.port)
    host, port = opened.getsockname()[:2]
    local = ipaddress.ip_address(host).is_loopback

    def make_page() -> object:
        from regvq_fast.demo.page import build_page

        return build_page(reconstructor, painters, examples)

    def ready() -> None:
        if not local:
            say(console, "warning", f"anyone who can reach {host}, port {port}, can use this page: it has no password")
        say(console, "demo", f"http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C stops it)")

    serve(make_page, opened, local, ready)


def _folders(config: DemoConfig) -> tuple[Path, list[Path]]:
    """Return the folders of the tokenizer and of the priors, as far as flags determine them."""
    if config.run is not None:
        return config.run, list(config.prior_runs)
    if not config.prior_runs:
        return embedded_model("tokenizer"), [embedded_model("ar"), embedded_model("diffusion")]
    return tokenizer_folder(config.prior_runs[0]), list(config.prior_runs)


def _beside(run: Path, tokenizer: VQGAN, precision: Precision) -> list[Painter]:
    """Load the newest prior for each kind of condition, among the folders beside a run whose tokenizer is the run's."""
    expected = weights_hash(tokenizer)
    found: dict[str, Painter] = {}
    folders = [folder for folder in run.resolve().parent.iterdir() if (folder / TOKENIZER).is_dir()]
    for folder in sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            if weights_hash(VQGAN.from_pretrained(folder / TOKENIZER)) == expected:
                painter = Painter(folder, precision)
                found.setdefault(painter.condition, painter)
        except (ValueError, OSError):  # the run has just begun, or is of another version
            continue
    return list(found.values())


def main(args: Sequence[str]) -> None:
    """Run ``regvq demo``."""
    run_command("demo", DemoConfig, open_demo, USAGE, args)
