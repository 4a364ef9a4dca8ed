"""Files of pre-trained weights: finding, downloading, reading and checking them.

`find_weights` returns a file: a path given by the user, else one in the torch hub cache, else a download. The caller
handles missing weights; see `regvq_fast.models.features.load_vgg_features`.
"""

import hashlib
import http.client
import os
import pickle
import queue
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import safetensors.torch
import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from torch import Tensor, nn

CONNECT_SECONDS = 5.0  # limit for name resolution, connection and first response together
STALL_SECONDS = 15.0  # longest pause within a download
MIN_BYTES_PER_SECOND = 16 * 1024  # a slower download over STALL_SECONDS counts as stalled

_KNOWN_PREFIXES = frozenset({"module", "first_stage_model", "transformer"})  # "_orig_mod" is removed anywhere


class RemoteWeights(NamedTuple):
    """A published file of weights."""

    url: str
    sha256_prefix: str  # leading hexadecimal digits

    @property
    def file_name(self) -> str:
        """Name of the file in the torch hub cache."""
        return self.url.rsplit("/", 1)[-1]


class FoundWeights(NamedTuple):
    """A local file of weights and its source."""

    path: Path
    source: str  # "path:...", "cache:..." or "download:..."


def find_weights(remote: RemoteWeights, path: Path | None = None, *, download: bool = True) -> FoundWeights:
    """Return a file of weights: the given `path`, else one in the torch hub cache, else a download into it.

    Args:
        remote: the published file.
        path: a file given by the user; then nothing else is tried.
        download: whether the network may be used.

    Raises:
        FileNotFoundError: `path` is not a file.
        OSError: no `path`, nothing in the cache, and no download; the message gives the reason.
    """
    if path is not None:
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"no such weights file: {path}")
        return FoundWeights(path, f"path:{path}")
    cached = Path(torch.hub.get_dir()) / "checkpoints" / remote.file_name
    if cached.is_file():
        return FoundWeights(cached, f"cache:{cached}")
    if not download:
        raise OSError(f"{remote.file_name} is not in {cached.parent}, and downloads are switched off")
    download_file(remote, cached)
    return FoundWeights(cached, f"download:{remote.url}")


class LoadedWeights(NamedTuple):
    """Number of loaded tensors and names left out; `str` gives a report."""

    taken: int
    """Number of tensors loaded."""
    left_out: tuple[str, ...] = ()
    """Names of tensors not loaded."""
    prefix: str = ""
    """Prefix stripped from the names, such as "module."."""

    def __str__(self) -> str:
        text = f"{self.taken} tensors loaded" + (f" from {self.prefix}*" if self.prefix else "")
        groups = Counter(name.partition(".")[0] + ".*" * ("." in name) for name in self.left_out)
        listed = ", ".join(f"{group} {count}" for group, count in groups.most_common(5))
        return text + (f", {len(self.left_out)} left out ({listed})" if listed else "")


class NamedWeights(NamedTuple):
    """A state dict with the names of a model."""

    state_dict: dict[str, Any]
    """Tensors by name, without the prefix."""
    prefix: str
    """Prefix stripped from each name, or ""."""
    outside: tuple[str, ...]
    """Names without the prefix, which are not in `state_dict`."""


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict from .safetensors, .pth, .pt or .ckpt onto the CPU; half-precision is cast to float32.

    The file may also have the state dict as "state_dict" or "model" of a dict, such as a checkpoint of Lightning. No
    code in it is run or imported: tensors and plain values are read, any other object becomes an empty dict.

    Raises:
        ValueError: another suffix, an unreadable or damaged file, or no state dict in it; the message names the path.
    """
    readers: dict[str, Callable[[Path], Any]] = {
        ".safetensors": safetensors.torch.load_file,
        ".pth": _torch_load,
        ".pt": _torch_load,
        ".ckpt": _torch_load,
    }
    if path.suffix not in readers:
        raise ValueError(f"weights file {path} must end in one of {', '.join(readers)}")
    try:
        if path.stat().st_size == 0:
            raise ValueError("it is empty")
        state = readers[path.suffix](path)
    except Exception as error:  # a damaged file can make the readers raise anything
        # PyTorch's own message advises reading unsafe objects anyway.
        unsafe = "it is damaged, or holds objects that can't be read safely"
        reason = unsafe if isinstance(error, pickle.UnpicklingError) else _first_line(error)
        cached = path.parent == Path(torch.hub.get_dir()) / "checkpoints"
        remedy = "; delete it, and it is downloaded again" if cached else ""
        raise ValueError(f"can't read weights file {path}: {reason}{remedy}") from error
    state = nested_state_dict(state)
    if not isinstance(state, dict) or not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in state.items()):
        raise ValueError(f"weights file {path} holds no state dict (names to tensors)")
    for name, tensor in state.items():  # a tensor with strides of 0 can claim any size
        if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"weights file {path} has {name} as {tuple(tensor.shape)}, but fewer values for it")
    half = (torch.float16, torch.bfloat16)
    return {name: tensor.float() if tensor.dtype in half else tensor for name, tensor in state.items()}


def nested_state_dict(content: Any) -> Any:
    """Return the dict under "state_dict" or "model" of a dict, else the argument."""
    if isinstance(content, Mapping):
        for name in ("state_dict", "model"):
            if isinstance(content.get(name), Mapping):
                return content[name]
    return content


def strip_prefix(given: Mapping[str, Any], expected: Collection[str], owner: str) -> NamedWeights:
    """Return a state dict with the names of a model, without a prefix that all of them have.

    Wrappers add such prefixes ("module.", "_orig_mod.", also combined), and so do models that contain this one
    ("first_stage_model."). "_orig_mod." is removed anywhere in a name.

    Args:
        given: names to anything.
        expected: names of the model.
        owner: the model, for errors.

    Raises:
        ValueError: no name fits, or several prefixes fit equally well.
    """
    given = {name.replace("_orig_mod.", ""): value for name, value in given.items()}
    counts: Counter[str] = Counter()
    for name in given:
        parts = name.split(".")
        for k in range(len(parts)):
            if ".".join(parts[k:]) in expected:
                counts["".join(f"{part}." for part in parts[:k])] += 1
    if not counts:
        such = f", such as {next(iter(given))!r}," if given else ""
        raise ValueError(f"none of the {len(given)} names{such} fits {owner}, which has {next(iter(expected))!r}")
    most = max(counts.values())
    # Known prefixes take precedence: taming's transformers contain two tokenizers.
    known = [p for p, n in counts.items() if 2 * n >= most and _KNOWN_PREFIXES.issuperset(p.split(".")[:-1])]
    found = known or [prefix for prefix, count in counts.items() if count == most]
    best = max(counts[prefix] for prefix in found)
    found = [prefix for prefix in found if counts[prefix] == best]
    if len(found) > 1:
        raise ValueError(f"names that fit {owner} begin with {' and with '.join(found)}: give those of one, without it")
    (prefix,) = found
    inside = {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}
    return NamedWeights(inside, prefix, tuple(name for name in given if not name.startswith(prefix)))


def check_state_dict(given: Mapping[str, Tensor], expected: Mapping[str, torch.Size], owner: str) -> None:
    """Check that `given` has exactly the `expected` names and shapes.

    Raises:
        ValueError: missing or unexpected names, or wrong shapes, all of them listed; `owner` is the model.
    """
    complaints = [f"missing: {name}" for name in expected if name not in given]
    complaints += [f"unexpected: {name}" for name in given if name not in expected]
    complaints += [
        f"wrong shape: {name} is {tuple(given[name].shape)}, should be {tuple(shape)}"
        for name, shape in expected.items()
        if name in given and given[name].shape != shape
    ]
    if complaints:
        raise ValueError("the weights do not fit " + "\n  ".join([f"{owner}:", *complaints]))


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_hash(module: nn.Module) -> str:
    """Return the SHA-256 of a module's weights: names, types, shapes and values, on any device."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def download_file(remote: RemoteWeights, target: Path) -> None:
    """Download a file with a progress bar on stderr; `target` appears complete and verified, or not at all.

    It never hangs: it fails after CONNECT_SECONDS without a response and after STALL_SECONDS without progress.

    Raises:
        OSError: no network, an HTTP error, a stall, an incomplete or wrong file, or no space for it.
    """
    with _open_url(remote.url) as response:
        total = int(response.headers.get("Content-Length") or 0) or None
        target.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder, since a rename is atomic only within a file system.
        handle, partial_name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        partial = Path(partial_name)
        try:
            with os.fdopen(handle, "wb") as file:
                digest = _copy(response, file, target.name, total)
            if not digest.startswith(remote.sha256_prefix):
                raise OSError(f"{remote.url} is incomplete or not the expected file (SHA-256 {digest[:8]}...)")
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


class _Inert:
    """Replacement of the classes and functions named in a file: a call with any arguments returns an empty dict.

    Checkpoints of Lightning contain callbacks and settings, which must not be imported or run. It is an OrderedDict
    because PyTorch's unpickler can set items and attributes of that.
    """

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


def _torch_load(path: Path) -> Any:
    """Read a file with PyTorch's restricted unpickler, with `_Inert` for all other classes and functions."""
    foreign: list[Any] = []
    if zipfile.is_zipfile(path):
        foreign = [(_Inert, name) for name in torch.serialization.get_unsafe_globals_in_checkpoint(path)]
    with torch.serialization.safe_globals(foreign):
        return torch.load(path, map_location="cpu", weights_only=True)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _open_url(url: str) -> http.client.HTTPResponse:
    """Open a URL within CONNECT_SECONDS.

    The timeout of urlopen limits neither name resolution nor the sum over a host's addresses, so it runs in a thread,
    which is abandoned if it takes longer.
    """
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def connect() -> None:
        try:
            answers.put(urllib.request.urlopen(url, timeout=STALL_SECONDS))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=connect, daemon=True).start()
    host = urllib.parse.urlsplit(url).hostname
    try:
        answer = answers.get(timeout=CONNECT_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"{host} did not answer within {CONNECT_SECONDS:g} s") from None
    if isinstance(answer, Exception):
        raise OSError(f"can't reach {url}: {answer}") from answer
    return answer


def _copy(response: http.client.HTTPResponse, file: IO[bytes], label: str, total: int | None) -> str:
    """Copy the body of `response` to `file`; return its SHA-256."""
    digest = hashlib.sha256()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    window_start, window_bytes = time.monotonic(), 0
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as progress:
        task = progress.add_task(f"downloading {label}", total=total)
        try:
            while chunk := response.read1(1 << 20):  # read1 returns after one receive, so a trickle is noticed
                file.write(chunk)
                digest.update(chunk)
                progress.advance(task, len(chunk))
                window_bytes += len(chunk)
                elapsed = time.monotonic() - window_start
                if elapsed > STALL_SECONDS:
                    if window_bytes < MIN_BYTES_PER_SECOND * elapsed:
                        raise TimeoutError(f"{window_bytes / elapsed:.0f} bytes a second")
                    window_start, window_bytes = time.monotonic(), 0
        except (TimeoutError, http.client.HTTPException) as error:
            raise OSError(f"the download of {label} stalled or broke off: {error}") from error
    return digest.hexdigest()
