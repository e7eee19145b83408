"""Models of the Hugging Face Hub by name: ``hf-hub:user/model``, ``hf-hub:user/model@revision``.

Only huggingface_hub talks to the hub: the cache, tokens, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE``
are its own. What comes from there is data: JSON, YAML, safetensors. A pickle or a program in a
repository is not read; a detector's ``config.py`` is brought only where the user allows it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError, one_line
from .version import __version__

PREFIX = "hf-hub:"
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
SETTINGS, RESULTS = "config.yaml", "results.json"
PROGRAM = "config.py"
DATA = (CONFIG, WEIGHTS, CARD, SETTINGS, RESULTS)
"""The files of a repository that are read."""

_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", re.ASCII)


class HubError(UserError):
    """A model cannot be brought from the Hugging Face Hub, or published there."""


def is_hub_name(path: object) -> bool:
    """Whether a path is the name of a model on the hub: it begins with ``hf-hub:``."""
    return isinstance(path, str) and path.startswith(PREFIX)


def split_name(name: str) -> tuple[str, str | None]:
    """Repository and revision (a branch, tag or commit) of ``[hf-hub:]user/model[@revision]``.

    Raises:
        HubError: it is not such a name.
    """
    if not _NAME.fullmatch(name.removeprefix(PREFIX)):
        raise HubError(
            f"{name!r}: expected user/model or user/model@revision, of letters, digits, '-', '_' "
            "and '.'"
        )
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    return repository, revision or None


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """huggingface_hub's errors about a repository as :class:`HubError`, with the remedy."""
    from huggingface_hub import errors

    try:
        yield
    except (errors.RepositoryNotFoundError, errors.LocalTokenNotFoundError) as error:
        remedy = "accept its conditions on its page, and log in: hf auth login, or HF_TOKEN"
        if not isinstance(error, errors.GatedRepoError):
            remedy = "check the name; if it is private, log in: hf auth login, or HF_TOKEN"
        raise HubError(f"{name}: no such repository for this user; {remedy}") from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"{name}: the repository has no such revision; expected a branch, tag or commit of it"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        reason = one_line(error.__cause__ or error)
        raise HubError(
            f"{name}: the hub cannot be reached, and the cache does not have it ({reason}); check "
            "the network, HF_ENDPOINT and HF_HUB_OFFLINE, or give a folder of kw pull"
        ) from error
    except UserError:
        raise
    except ValueError as error:  # a name, or the card's head, is not as the hub has it
        raise HubError(f"{name}: {' '.join(str(error).split())[:400]}") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        remedy = "log in with a token that may write: hf auth login, or HF_TOKEN"
        if status not in (401, 403):
            remedy = "try again later"
        raise HubError(f"{name}: the hub refuses: {one_line(error)}; {remedy}") from error
    except Exception as error:
        if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "requests"):
            raise HubError(
                f"{name}: the hub cannot be reached ({one_line(error)}); check the network and "
                "HF_ENDPOINT"
            ) from error
        raise


def fetch(
    name: str, files: Sequence[str] = DATA, cache_dir: str | Path | None = None
) -> tuple[Path, dict[str, Any]]:
    """Bring a model's files into huggingface_hub's cache, all of one commit.

    Args:
        name: see :func:`split_name`.
        files: names of those that are wanted, if they are there. The folder may hold others, which
            other programs brought.
        cache_dir: another cache than ``HF_HUB_CACHE``.

    Returns:
        The folder, and what ``config.json`` says under ``kernelwarehouse``: empty for a model that
        :func:`kw.deploy.publish.write_folder` did not write.

    Raises:
        HubError: there is no such model, it cannot be reached and is not in the cache, or its
            weights are not those of its ``config.json``.
    """
    from huggingface_hub import snapshot_download

    repository, revision = split_name(name)
    with hub_errors(name):
        folder = Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=list(files),
                cache_dir=cache_dir,
                library_name="kernelwarehouse",
                library_version=__version__,
            )
        )
    ours: Any = {}
    if (folder / CONFIG).is_file():
        try:
            ours = json.loads((folder / CONFIG).read_text("utf-8")).get("kernelwarehouse", {})
        except (ValueError, AttributeError, RecursionError) as error:
            raise HubError(f"{name}: its {CONFIG} is damaged: {one_line(error)}") from error
    ours = ours if isinstance(ours, dict) else {}
    expected = ours.get("sha256")
    if expected is not None and (folder / WEIGHTS).is_file() and WEIGHTS in files:
        found = sha256(folder / WEIGHTS)
        if found != expected:
            raise HubError(
                f"{name}: {WEIGHTS} is not the file that {CONFIG} was written for (SHA-256 {found},"
                f" expected {expected}): it is damaged, or was replaced alone; remove {folder} to "
                "bring it anew, or take another revision"
            )
    return folder, ours


def weights_file(name: str, cache_dir: str | Path | None = None) -> Path:
    """A classifier's weights, in the cache; its ``config.yaml`` lies beside them.

    Raises:
        HubError: as for :func:`fetch`; it has no such file, or is a detector.
    """
    folder, ours = fetch(name, (CONFIG, WEIGHTS, SETTINGS), cache_dir)
    repository = split_name(name)[0]
    if ours.get("task") == "detection":
        raise HubError(
            f"{name}: a detector, whose {PROGRAM} is a program: bring it by kw pull {repository} "
            f"FOLDER --allow-code, read FOLDER/{PROGRAM}, then use FOLDER"
        )
    if not (folder / WEIGHTS).is_file():
        raise HubError(
            f"{name}: {repository} has no {WEIGHTS}; other formats, pickles among them, are not "
            "read from the hub"
        )
    return folder / WEIGHTS


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
