"""Upload of the trained model to the Hugging Face hub: checked at the start, done at the end."""

import datetime
import shlex
from pathlib import Path

from huggingface_hub import HfApi, constants, errors
from huggingface_hub.utils import validate_repo_id

from opd.distributed import broadcast_object, others_wait, rank
from opd.log import one_line, redact, say, warn_once

UPLOAD_TIMEOUT = datetime.timedelta(days=1)


def check_push(name: str) -> None:
    """ValueError on every rank if the model cannot be uploaded to the repository `name` at the end.

    Rank 0 asks the hub who its token is. Nothing is made there yet. Collective.
    """
    if not name:
        return
    reason = broadcast_object(_why_not(name) if rank() == 0 else None)
    if reason:
        raise ValueError(f"--push_to_hub {name}: {reason}")


def _why_not(name: str) -> str | None:
    org, _, model = name.partition("/")
    try:
        validate_repo_id(name)
    except errors.HFValidationError:
        model = ""
    if not org or not model:
        return "expected ORG/NAME, or USER/NAME, as the hub writes it"
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set; unset it, or leave the flag out"
    try:
        user = HfApi().whoami()
    except errors.LocalTokenNotFoundError:
        return "no token; set HF_TOKEN to one that may write, or run `hf auth login`"
    except errors.HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            return "the hub does not know the token; set HF_TOKEN to one that may write"
        return f"the hub cannot be asked: {redact(one_line(error))}"
    except Exception as error:  # whatever its network library raises
        return f"the hub cannot be asked: {redact(one_line(error))}"
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        return "the token may read only; set HF_TOKEN to one that may write"
    roles = {o["name"]: o.get("roleInOrg") for o in user.get("orgs", ())} | {user["name"]: "admin"}
    if org not in roles:
        return f"the token of {user['name']} belongs to {', '.join(roles)}; choose one of them"
    if roles[org] == "read":
        return f"{user['name']} may only read in {org}; ask its admin for the right to write"
    return None


def push_model(model_dir: Path, name: str) -> None:
    """Uploads the export to the repository `name`, which is made, private, if there is none.

    A failure is a warning with the command that does it by hand: the run has done its work.
    Collective: other ranks wait for rank 0.
    """
    with others_wait("upload", UPLOAD_TIMEOUT):
        if rank() == 0:
            say(f"uploading {model_dir} to {name}")
            try:
                _upload(model_dir, name)
            except Exception as error:  # of the network, the hub, or the libraries between
                command = shlex.join(["hf", "upload", name, str(model_dir), "--private"])
                warn_once(
                    f"--push_to_hub {name}: the upload failed: {redact(one_line(error))}; "
                    f"{model_dir} is whole; upload it with: {command}"
                )
            else:
                say(f"uploaded: {constants.ENDPOINT}/{name}")


def _upload(model_dir: Path, name: str) -> None:
    api = HfApi()
    api.create_repo(name, private=True, exist_ok=True)
    api.upload_folder(repo_id=name, folder_path=model_dir, commit_message="Distilled on-policy")
