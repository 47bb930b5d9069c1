"""Finds models on the Hugging Face Hub by name, `hf:OWNER/NAME` or `hf:OWNER/NAME@REVISION`.

A model is downloaded once, to the Hub's own cache (HF_HOME), and is found there without a network
afterwards. HF_TOKEN gives access to private and gated models.
"""

import errno
import functools
import re
from pathlib import Path

from latent_delib.errors import NO_ANSWER_STATUS, Outage, UserError, reason, store_error

PREFIX = "hf:"
NAME = re.compile(rf"{PREFIX}([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]  # pickles are not downloaded


@functools.cache
def download(path: str) -> Path:
    """Returns the local folder of a model that is named on the Hub; another path unchanged.

    The Hub is asked once per name, so a process uses one revision.

    Raises:
      UserError: the name has another form; there is no such model; the Hub refuses; or the
        cache does not have the model, and HF_HUB_OFFLINE is set.
      OSError: the disk is full (Outage: the Hub does not answer, or a download broke off).
    """
    if not path.startswith(PREFIX):
        return Path(path)
    found = NAME.fullmatch(path)
    if found is None:
        raise UserError(f"{path}: expected hf:OWNER/NAME or hf:OWNER/NAME@REVISION")
    import huggingface_hub
    from huggingface_hub import errors

    model, revision = found.groups()
    try:
        folder = huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=FILES)
    except errors.GatedRepoError:
        raise UserError(
            f"{path}: needs permission; accept its terms on the Hub, then set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{path}: no such model on the Hub; a private one needs HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{path}: that model has no revision {revision!r}") from None
    except errors.HFValidationError as error:
        raise UserError(f"{path}: {reason(error)}") from None
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, ConnectionError) as error:
        raise _failure(path, error) from None
    except Exception as error:  # of the library's HTTP client, where a download breaks off
        raise store_error(error, path) or error from None
    return Path(folder)


def pinned(path: str) -> str:
    """Returns the name of a model with the commit that was downloaded, `hf:OWNER/NAME@COMMIT`."""
    model, _, _ = path.partition("@")
    return f"{model}@{download(path).name}"  # the client names the folder by the commit


def _failure(path: str, error: Exception) -> UserError | OSError:
    """Returns the error for a model that the Hub did not send."""
    from huggingface_hub import constants

    answer = getattr(error.__cause__ or error, "response", None)
    status = getattr(answer, "status_code", None)
    if status is None and constants.HF_HUB_OFFLINE:
        return UserError(
            f"{path}: not in the Hub's cache, and the client is offline (HF_HUB_OFFLINE)"
        )
    if status is None:
        return Outage(
            errno.ECONNABORTED, "not in the Hub's cache, and the Hub does not answer", path
        )
    if str(status) in NO_ANSWER_STATUS:
        return Outage(errno.ECONNABORTED, f"the Hub answers with status {status}", path)
    remedy = "; check HF_TOKEN" if status in (401, 403) else ""
    return UserError(f"{path}: the Hub answers with status {status}{remedy}")
