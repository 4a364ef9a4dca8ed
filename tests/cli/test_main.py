"""The command `regvq`: its list, how commands are spelled for users, and what it needs."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.runs import TRAIN

from regvq_fast.cli import main as command_line
from regvq_fast.cli.main import COMMANDS, main
from regvq_fast.invocation import SCRIPTS, as_typed, command, install, launched
from regvq_fast.priors.registry import PRIORS
from regvq_fast.version import __version__

ROOT = Path(__file__).resolve().parents[2]
PYTHON = [sys.executable, "-X", "importtime", "-c"]


def start(monkeypatch: pytest.MonkeyPatch, *words: str, program: str = "/bin/regvq") -> None:
    monkeypatch.setattr(sys, "argv", [program, *words])
    main()


@pytest.mark.parametrize(
    ("program", "typed", "of_several"),
    [
        ("/usr/bin/regvq", "regvq train vq", "-m regvq_fast train vq"),
        ("/site-packages/regvq_fast/__main__.py", "python -m regvq_fast train vq", "-m regvq_fast train vq"),
        ("train/ar.py", "python train/vq.py", "train/vq.py"),
        ("../train/vq.py", "python ../train/vq.py", "../train/vq.py"),
        ("ipykernel_launcher.py", "regvq train vq", "-m regvq_fast train vq"),
    ],
)
def test_commands_are_spelled_as_the_process_was_started(
    monkeypatch: pytest.MonkeyPatch, program: str, typed: str, of_several: str
) -> None:
    monkeypatch.setattr(sys, "argv", [program])
    assert command("train vq") == typed
    assert launched("train vq", 4) == f"torchrun --nproc-per-node 4 {of_several}"
    text = "run `regvq train vq --steps 3` or torchrun --nproc-per-node 4 -m regvq_fast train vq; regvq_fast trains"
    assert as_typed(text) == text.replace("regvq train vq", typed).replace("-m regvq_fast train vq;", f"{of_several};")


def test_extras_are_installed_from_where_the_package_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert install("fid") == 'pip install -e ".[fid]"'
    monkeypatch.setattr("regvq_fast.invocation.__file__", str(tmp_path / "site-packages" / "regvq_fast" / "x.py"))
    assert install("fid") == 'pip install "regvq-fast[fid]"'


def test_every_command_has_its_script_module_and_place_in_the_list(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {f"train/{path.name}" for path in (ROOT / "train").glob("*.py")} == {f"train/{s}" for s in SCRIPTS.values()}
    assert set(SCRIPTS) <= set(COMMANDS)
    assert {name for name in COMMANDS if name.startswith("train ")} == {"train vq", *(f"train {p}" for p in PRIORS)}
    with pytest.raises(SystemExit, match="0"):
        start(monkeypatch, "--help")
    listed = capsys.readouterr().out
    assert [name for name in COMMANDS if f"\n  {name} " not in listed] == []
    assert max(map(len, listed.splitlines())) <= 80
    with pytest.raises(SystemExit, match="0"):
        start(monkeypatch, "train", "--help")
    assert "train diffusion" in (of_train := capsys.readouterr().out)
    assert "evaluate" not in of_train
    start(monkeypatch, "--version")
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [("sampel", "regvq sample"), ("train vqgan", "regvq train vq"), ("xyzzy", "--help"), ("--gone", "--gone")],
)
def test_unknown_commands_are_one_sentence(monkeypatch: pytest.MonkeyPatch, words: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        start(monkeypatch, *words.split())


def test_the_help_stays_without_docstrings() -> None:
    """Check the parser's own help, which --steps before --help asks for; the stored page needs no docstrings."""
    flags = [str(TRAIN / "vq.py"), "--steps", "3", "--help"]
    pages = [
        subprocess.run([sys.executable, *options, *flags], capture_output=True, text=True, check=True).stdout
        for options in ([], ["-OO"])
    ]
    assert "Train an image tokenizer" in pages[0]
    assert pages[0] == pages[1]


def test_without_words_it_lists_and_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        start(monkeypatch)
    assert "train vq" in capsys.readouterr().out


def test_a_command_says_which_extra_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'tyro'", name="tyro")

    monkeypatch.setattr(command_line, "import_module", missing)
    with pytest.raises(SystemExit, match=r"tyro.*\[train\]"):
        start(monkeypatch, "sample")


def test_a_package_without_a_temporary_folder_is_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> None:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(command_line, "import_module", fails)
    with pytest.raises(SystemExit, match=r"^error: .*sample.*No usable temporary directory"):
        start(monkeypatch, "sample")


def test_ctrl_c_ends_an_import_that_takes_its_exception_for_a_failure() -> None:
    """As those of compiled modules do."""
    code = """
import signal
from regvq_fast.cli import main
def fails(name):
    try:
        signal.raise_signal(signal.SIGINT)
    except BaseException:
        raise ImportError("initialization failed")
signal.signal(signal.SIGINT, signal.default_int_handler)
main.import_module = fails
main.run("sample", [])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "")


def test_the_list_imports_neither_torch_nor_numpy() -> None:
    code = "import sys; sys.argv = ['regvq', '--help']; from regvq_fast.cli.main import main; main()"
    found = subprocess.run([*PYTHON, code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "train vq" in found.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in found.stderr.splitlines()}
    assert "regvq_fast.cli.main" in imported
    assert not imported & {"torch", "numpy", "tyro"}


def test_the_core_needs_torch_and_numpy_alone() -> None:
    """With every package of the extra `train` out of reach."""
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"tyro", "rich", "safetensors", "PIL", "matplotlib", "skimage", "torchmetrics",
                                      "tensorboard", "scipy"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
import torch, regvq_fast
from regvq_fast.ops import assign_codes, vector_quantize, weighted_info_nce
from regvq_fast.integrations import accelerate
quantizer = regvq_fast.RegularizedQuantizer(16, 8)
out = quantizer(torch.randn(2, 8, 4, 4))
(out.quantized.sum() + out.loss).backward()
regvq_fast.ProbabilisticContrastiveLoss
try:
    import regvq_fast.models
except ModuleNotFoundError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "[train]" in found.stdout, found.stdout
