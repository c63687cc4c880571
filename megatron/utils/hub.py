"""Models on the Hugging Face hub: what an `hf://` address means, fetching files from there and uploading.

Files come into the cache that all programs of Hugging Face share, and what their client takes from the environment
holds here too: `HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`. It must not know what the files are for.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron.utils.errors import ConfigError, MegatronError, ResourceError
from megatron.utils.logging import get_logger
from megatron.utils.units import format_bytes

Rest = Callable[[Mapping[str, int], Path], Sequence[str]]

_SCHEME = "hf:/"  # with one slash only, as pathlib leaves it of hf://
_PART = r"[A-Za-z0-9](?:[\w.-]{0,94}\w)?"
_NAME = re.compile(rf"{_PART}(?:/{_PART})?", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ANSWER_S = 30.0  # how long the hub may take to say what a repository holds
_BUSY = (408, 429, 500, 502, 503, 504)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)

_logger = get_logger(__name__)


@dataclass(frozen=True)
class Repository:
    """A model on the hub: `owner/name`, and which branch, tag or commit of it (None: the main branch)."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"hf://{self.name}" + ("" if self.revision is None else f"@{self.revision}")


def parse_address(path: str | Path) -> Repository | None:
    """The repository that `hf://owner/name` or `hf://owner/name@revision` means; None for what begins otherwise.

    Raises ConfigError for an address that means none.
    """
    text = str(path)
    if not text.startswith(_SCHEME):
        return None
    name, at, revision = text.removeprefix("hf:").strip("/").partition("@")
    if not _NAME.fullmatch(name) or ".." in name or "--" in name or (at and not revision):
        raise ConfigError(
            f"{text} is no model on the Hugging Face hub: write hf://owner/name or hf://owner/name@revision"
        )
    return Repository(name, revision or None)


def named(name: str) -> Repository:
    """The repository of a name, be it written with `hf://` or without. Raises ConfigError."""
    repository = parse_address(name if name.startswith(_SCHEME) else f"hf://{name}")
    assert repository is not None
    return repository


def with_revision(path: str | Path, revision: str | None) -> str:
    """The address with a revision that was named apart from it. Raises ConfigError where there is no place for it."""
    if revision is None:
        return str(path)
    repository = parse_address(path)
    if repository is None:
        raise ConfigError(f"--revision {revision} is for models on the Hugging Face hub, and {path} is a folder")
    if repository.revision not in (None, revision):
        raise ConfigError(f"{repository} and --revision {revision} are two revisions: name one")
    return str(Repository(repository.name, revision))


def spelling_hint(path: str | Path) -> str:
    """What to add to the message that nothing is at `path`, where it could be meant as the name of a model."""
    text = str(path)
    meant = text.count("/") == 1 and _NAME.fullmatch(text) and not Path(text).parent.exists()
    return f" To take the model of that name from the Hugging Face hub, write hf://{text}." if meant else ""


def fetch(
    repository: Repository,
    first: Sequence[str],
    rest: Rest = lambda sizes, folder: (),
    cache: str | None = None,
) -> Path:
    """The folder in the cache that holds those files of `first` that the repository has, and then those that `rest`
    names, given the sizes of all its files and the folder with the first ones. What is missing is downloaded.

    Where the hub cannot be asked, what is in the cache is taken, and `rest` is given its files. Since files come in the
    order given, one that is there tells that those before it are. Raises ConfigError, ResourceError, and what `rest`
    raises.
    """
    with _explained(repository):
        try:
            sizes = _list_files(repository)
        except Exception as error:  # of the client, and of whichever library for HTTP its version uses
            if _is_answer(error):
                raise
            folder = _cached_folder(repository, first, cache)
            _logger.info("%s: the hub cannot be asked (%s), so what is in the cache is taken", repository, _said(error))
            files = (path for path in folder.rglob("*") if path.is_file())
            rest({str(path.relative_to(folder)): path.stat().st_size for path in files}, folder)
            return folder
        wanted = [name for name in first if name in sizes]
        if not wanted:
            raise ConfigError(f"{repository} holds none of {', '.join(first)}: it is no model that is read here")
        # The first download with the revision as it was named leaves in the cache what it means now.
        folder = _download(repository, wanted[0], cache).parent
        at_commit = Repository(repository.name, folder.name)
        for name in wanted[1:]:
            _download(at_commit, name, cache)
        missing = [name for name in rest(sizes, folder) if not (folder / name).exists()]
        _check_space(repository, folder, sum(sizes.get(name, 0) for name in missing))
        for number, name in enumerate(missing, 1):
            size = format_bytes(sizes.get(name, 0))
            _logger.info("%s: file %d of %d, %s (%s)", repository, number, len(missing), name, size)
            _download(at_commit, name, cache)
    return folder


def known_sha256(file: Path) -> str | None:
    """The SHA-256 that a file should have, after which the cache names large ones; None for files from elsewhere."""
    blob = Path(os.readlink(file)) if file.is_symlink() else None
    return blob.name if blob is not None and blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name) else None


def check_may_upload(repository: Repository, token: str | None = None) -> None:
    """Raise ConfigError where there is no token, or none that may write: before hours of work, not after."""
    from huggingface_hub import HfApi

    with _explained(repository):
        about = HfApi(token=token).whoami()
        role = about.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise ConfigError(
                f"{repository} cannot be uploaded to with a token that may only read: set HF_TOKEN to another"
            )


def upload(
    folder: Path,
    repository: Repository,
    names: Sequence[str],
    *,
    replaces: Sequence[str] = (),
    token: str | None = None,
    private: bool | None = None,
) -> str:
    """Upload files of a folder in one commit and return the repository's address in the web.

    A repository (or branch) that is not there is made; `private` says which kind, None as its owner's settings have it.
    Files that match `replaces` and are not among `names` are removed from it, so that no parts of another model stay.
    Raises ConfigError.
    """
    from huggingface_hub import HfApi

    with _explained(repository):
        api = HfApi(token=token)
        address = api.create_repo(repository.name, private=private, exist_ok=True)
        if repository.revision is not None:
            api.create_branch(repository.name, branch=repository.revision, exist_ok=True)
        api.upload_folder(
            repo_id=repository.name,
            revision=repository.revision,
            folder_path=folder,
            allow_patterns=[glob.escape(name) for name in names],
            delete_patterns=list(replaces) or None,
        )
    return str(address)


def _list_files(repository: Repository) -> dict[str, int]:
    """The files of a repository with their bytes."""
    from huggingface_hub import HfApi

    found = HfApi().model_info(repository.name, revision=repository.revision, files_metadata=True, timeout=_ANSWER_S)
    files = ((file.rfilename, file.size or 0) for file in found.siblings or ())
    return {name: size for name, size in files if ".." not in name.split("/")}


def _is_answer(error: Exception) -> bool:
    """Whether the hub has said no, rather than nothing."""
    status = _status(error)
    return isinstance(error, ValueError) if status is None else status not in _BUSY


def _status(error: BaseException) -> int | None:
    """The code of the answer that led to an error, if there was one."""
    code: int | None = getattr(getattr(error, "response", None), "status_code", None)
    return code


def _cached_folder(repository: Repository, names: Sequence[str], cache: str | None) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            repository.name,
            revision=repository.revision,
            cache_dir=cache,
            local_files_only=True,
            allow_patterns=[glob.escape(name) for name in names],
        )
    )


def _download(repository: Repository, name: str, cache: str | None) -> Path:
    """Where a file is once it is in the cache; one at a time, so that Ctrl-C need not wait for threads."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repository.name, name, revision=repository.revision, cache_dir=cache))


def _check_space(repository: Repository, folder: Path, needed_bytes: int) -> None:
    usage = shutil.disk_usage(folder)
    if usage.total and usage.free < needed_bytes:
        raise ResourceError(
            f"{repository} needs {format_bytes(needed_bytes)} more, and {folder} has {format_bytes(usage.free)} left: "
            "make room there, or name a folder on a larger disk in HF_HOME"
        )


@contextmanager
def _explained(repository: Repository) -> Iterator[None]:
    """Turn what the hub's client raises into errors that name the cure."""
    try:
        yield
    except MegatronError:
        raise
    except Exception as error:  # it lets through those of its HTTP library and its threads
        raise _explain(repository, error) from error


def _explain(repository: Repository, error: Exception) -> MegatronError:
    from huggingface_hub import constants, errors

    causes = list(_causes(error))
    page = f"{constants.ENDPOINT}/{repository.name}"
    status = next((code for cause in causes if (code := _status(cause)) is not None), None)
    code = next((cause.errno for cause in causes if isinstance(cause, OSError) and cause.errno is not None), None)
    named_file = any(isinstance(cause, OSError) and cause.filename is not None for cause in causes)

    def met(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if met(errors.LocalTokenNotFoundError):
        cure = f"cannot be uploaded to without a token: set HF_TOKEN to one of {constants.ENDPOINT}/settings/tokens"
    elif met(errors.GatedRepoError):
        cure = f"is gated: accept its licence at {page}, and set HF_TOKEN to a token of the account that did"
    elif met(errors.RevisionNotFoundError):
        cure = f"has no branch, tag or commit {repository.revision or 'main'}: see {page}/tree/main for those it has"
    elif met(errors.RepositoryNotFoundError):
        cure = f"is not on {constants.ENDPOINT}: check the name, or set HF_TOKEN to a token that may read it if private"
    elif status in (401, 403):
        cure = f"may not be accessed with this token ({_said(error)}): set HF_TOKEN to one that may, see {page}"
    elif code in _FULL or any("os error 28" in str(cause) for cause in causes):
        return ResourceError(
            f"{repository}: no space is left in {constants.HF_HUB_CACHE}: make room there, or name a folder on a "
            "larger disk in HF_HOME"
        )
    elif code in _REFUSED and named_file:
        cure = f"cannot be kept in the cache ({_said(error)}): name a folder of your own in HF_HOME"
    elif constants.HF_HUB_OFFLINE:
        cure = (
            f"is not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to ask the hub: run "
            f"`hf download {repository.name}` on a machine with a network first, or unset HF_HUB_OFFLINE"
        )
    else:
        cure = (
            f"failed at {constants.ENDPOINT} ({_said(causes[-1])}): check the network, HTTPS_PROXY and "
            "HF_ENDPOINT. Files that are through are kept, and the same command goes on with the others"
        )
    return ConfigError(f"{repository} {cure}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _said(error: BaseException) -> str:
    """What an error says, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
