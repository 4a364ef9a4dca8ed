"""Models on the Hugging Face Hub: download and publishing.

A model's name is ORGANIZATION/NAME, or ORGANIZATION/NAME@REVISION with a branch, tag or commit. Its repository holds a
folder of weights (`regvq_fast.models.pretrained`); that of a prior also holds its tokenizer in `tokenizer/`. Downloads
are kept in the hub's cache, which also works offline.
"""

import os
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from regvq_fast.invocation import install
from regvq_fast.models.pretrained import CONFIG, MANIFEST, TOKENIZER, WEIGHTS
from regvq_fast.version import __version__

CARD = "README.md"
PICTURES = "pictures"
"""Folder of images in a run and on the hub."""

HUB = "the Hugging Face Hub"
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
_PART = r"[A-Za-z0-9](?:[\w.-]*\w)?"
_NAME = re.compile(rf"(?!.*(?:--|\.\.))({_PART}/{_PART})(?:@(.+))?", re.ASCII)
_LOADED = [folder + name for folder in ("", f"{TOKENIZER}/") for name in (CONFIG, WEIGHTS, MANIFEST)]


class HubName(NamedTuple):
    """A name on the hub."""

    repo: str
    """ORGANIZATION/NAME."""
    revision: str | None
    """Branch, tag or commit; None: the main branch."""

    @property
    def title(self) -> str:
        """NAME alone."""
        return self.repo.partition("/")[2]

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def hub_name(source: str | os.PathLike[str]) -> HubName | None:
    """Return the name of a source on the hub; None if it is an existing path or not a valid name."""
    match = _NAME.fullmatch(os.fspath(source))
    return None if match is None or Path(source).exists() else HubName(match[1], match[2])


def local_folder(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Return the local folder of a model, downloading it if its source is a name on the hub.

    Args:
        source: a folder, which takes precedence, or ORGANIZATION/NAME or ORGANIZATION/NAME@REVISION on the hub.
        revision: branch, tag or commit on the hub.

    Raises:
        FileNotFoundError: no such folder, repository or revision; or it is not in the cache, and there is no network or
            no huggingface_hub.
        NotADirectoryError: the source is a file.
        PermissionError: the hub refuses access.
        OSError: the download failed, or the repository has no model of this library.
        ValueError: a revision given for a folder, or given twice.
    """
    folder, name = Path(source), hub_name(source)
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file: give its folder, {folder.parent}")
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"{folder} is a folder here, which has no revision {revision!r}: leave the revision out")
        return folder
    if name is None:
        raise FileNotFoundError(f"no such folder: {source}; nor is this a name on {HUB}, which is ORGANIZATION/NAME")
    if revision is not None:
        if name.revision is not None:
            raise ValueError(f"{name} names a revision, and revision={revision!r} another one: give one of the two")
        name = HubName(name.repo, revision)
    return _download(name)


def _download(name: HubName) -> Path:
    hub = import_hub(f"no such folder: {name}; to look for it on {HUB}", FileNotFoundError)
    try:
        folder = hub.snapshot_download(
            name.repo,
            revision=name.revision,
            allow_patterns=_LOADED,
            library_name="regvq_fast",
            library_version=__version__,
        )
    except Exception as error:  # of the hub's classes, or of whatever HTTP library its version uses
        raise _explained(error, name) from None
    lacking = [file for file in (CONFIG, WEIGHTS) if not (Path(folder) / file).is_file()]
    if lacking:
        raise FileNotFoundError(
            f"{name} on {HUB} has no {' and no '.join(lacking)}: it is not a model of regvq_fast; check the name"
        )
    return Path(folder)


def publish(
    files: Mapping[str, bytes], to: str, *, revision: str | None = None, private: bool = False, message: str
) -> str:
    """Commit files to a repository on the hub in one commit, creating the repository if needed.

    Files of an earlier model that are not among these (its tokenizer, evaluation or images) are deleted; others stay.

    Args:
        files: contents by name; "/" separates folders.
        to: ORGANIZATION/NAME.
        revision: branch, created from the main branch if needed. None: the main branch.
        private: create a private repository; an existing public one is refused.
        message: commit message.

    Returns:
        The address of the commit.

    Raises:
        ValueError: an invalid name; a public repository with ``private``; or huggingface_hub is not installed.
        OSError: the hub can't be reached or refuses the commit.
    """
    name = check_name(to)
    hub = import_hub(f"to publish on {HUB}")
    api = hub.HfApi(library_name="regvq_fast", library_version=__version__)
    try:
        api.create_repo(name.repo, exist_ok=True, **({"private": True} if private else {}))
        if private and not api.model_info(name.repo).private:
            raise ValueError(f"{name} exists on {HUB} and is public: make it private there, or leave out private")
        if revision is not None:
            api.create_branch(name.repo, branch=revision, exist_ok=True)
        there = [file.rfilename for file in api.model_info(name.repo, revision=revision).siblings or ()]
        commit = api.create_commit(
            name.repo,
            [
                *(hub.CommitOperationAdd(path, content) for path, content in files.items()),
                *(hub.CommitOperationDelete(path) for path in there if path not in files and _is_ours(path)),
            ],
            commit_message=message,
            revision=revision,
        )
    except ValueError:  # of this function, or of the hub about the card's metadata
        raise
    except Exception as error:
        raise _explained(error, HubName(name.repo, revision), "publish") from None
    return str(commit.commit_url)


def check_name(to: str) -> HubName:
    """Return the name of a repository to publish to; ValueError if it is invalid or has a revision."""
    match = _NAME.fullmatch(to)
    if match is None or match[2] is not None:
        raise ValueError(f"{to!r} is no name of a repository on {HUB}: give ORGANIZATION/NAME")
    return HubName(match[1], None)


def _is_ours(path: str) -> bool:
    """Return whether a file in a repository belongs to a published model."""
    return path in {*_LOADED, "evaluation.json"} or (path.startswith(f"{PICTURES}/") and path.endswith(".png"))


def import_hub(purpose: str, error: type[Exception] = ValueError) -> Any:
    """Import huggingface_hub; if it is missing, raise an error with the purpose and the command to install it."""
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise error(f"{purpose}, install huggingface_hub: {install('hub')}") from None
    return huggingface_hub


def _explained(error: Exception, name: HubName, doing: str = "read") -> OSError:
    """Return an error of the hub as an OSError in one sentence."""
    from huggingface_hub import utils as classes

    cause = error
    while isinstance(cause, classes.LocalEntryNotFoundError) and isinstance(cause.__cause__, Exception):
        cause = cause.__cause__  # why the hub was not reached, so that only the cache was left
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(cause, classes.RevisionNotFoundError):
        return FileNotFoundError(
            f"{name.repo} on {HUB} has no revision {name.revision!r}: give one of its branches, tags or commits"
        )
    if isinstance(cause, classes.GatedRepoError):
        return PermissionError(f"{name.repo} on {HUB} is gated: ask for access on its page there, then {LOG_IN}")
    if doing == "read" and (isinstance(cause, classes.RepositoryNotFoundError) or status in (401, 404)):
        return FileNotFoundError(
            f"{name.repo} is neither a folder here nor a repository on {HUB} that you may read: check the spelling; "
            f"if it is private, {LOG_IN}"
        )
    if status in (401, 403, 404):
        return PermissionError(
            f"{HUB} doesn't let you {doing} {name} (HTTP {status}): {LOG_IN}, with a token that allows it"
        )
    if status is not None:
        return OSError(f"{HUB} can't {doing} {name} now (HTTP {status}): try again later")
    offline = isinstance(cause, classes.OfflineModeIsEnabled)
    if isinstance(error, classes.LocalEntryNotFoundError):
        return FileNotFoundError(
            f"{name} is neither a folder here nor complete in the cache of {HUB}, and "
            f"{'HF_HUB_OFFLINE is set' if offline else 'the hub cannot be reached'}: check the path, or load it once "
            "with a network"
        )
    reason = "HF_HUB_OFFLINE is set" if offline else textwrap.shorten(str(cause), 160) or "no reason given"
    return OSError(f"can't {doing} {name} on {HUB}: {reason} ({type(cause).__name__})")
