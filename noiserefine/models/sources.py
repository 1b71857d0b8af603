"""What people type to name a model or a LoRA: a path, a hub id or a web address."""

import re
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download

from noiserefine.checkpoint import HUB_ERRORS
from noiserefine.models.downloads import bar_class

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
SAFETENSORS = ".safetensors"
QUOTES = "\"'“”‘’`"
HUB_ADDRESS = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([^/?#]+/[^/?#]+)([^?#]*)(?:[?#].*)?"
)
HUB_FILE = re.compile(r"/(?:blob|resolve|tree)/([^/]+)/?(.*)")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def read_name(typed: str) -> str:
    """Return the path or hub id that a typed name means.

    Quotes and `file://` are removed, `~` is the home folder, and an address on huggingface.co
    becomes owner/name or, of one file, owner/name/path/of/file.  Raises ValueError for an address
    elsewhere, for a pickle, and for another program's syntax.
    """
    name = typed.strip().strip(QUOTES).strip().removeprefix("file://")
    if re.fullmatch(r"<\w+:.*>", name):
        raise ValueError(f"{name} is the syntax of another program: name the LoRA's file itself.")
    if found := HUB_ADDRESS.fullmatch(name):
        name = found[1] + _path_in_repository(found[2])
    elif re.match(r"\w+://", name):
        raise ValueError(
            f"{name} is a web address. Addresses on huggingface.co work; from elsewhere, download "
            "the .safetensors file and name its path."
        )
    if name.lower().endswith(PICKLES) and not (exists(name) and Path(name).is_dir()):
        raise ValueError(
            f"{name} is a pickle, which can run code when it is opened, and was not. Take the "
            "model's .safetensors file, or convert this one on a machine that may run it."
        )
    if name.startswith("~"):
        name = str(Path(name).expanduser())
    if Path(name).name == "model_index.json":
        name = str(Path(name).parent)
    return name if name == "/" else name.rstrip("/")


def _path_in_repository(rest: str) -> str:
    """Return "/path" for what follows owner/name in an address, "" for the repository."""
    if not rest.strip("/"):
        return ""
    found = HUB_FILE.fullmatch(rest)
    if not found:
        raise ValueError(f"“{rest}” is no page of a model: name the address of the repository.")
    if found[1] != "main":
        raise ValueError(f"The address names the revision {found[1]}; only main is read.")
    return f"/{found[2].rstrip('/')}" if found[2] else ""


def sentence(error: BaseException) -> str:
    """Return an exception's text, all its lines, as the end of a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.rstrip(":.") + "."


def is_safetensors(name: str) -> bool:
    """Return whether the name ends as a safetensors file's."""
    return name.lower().endswith(SAFETENSORS)


def exists(name: str) -> bool:
    """Return whether there is such a file or folder, also for a name that none can have."""
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False


def local_file(name: str) -> Path:
    """Return the path of a file named by its path or, on the hub, owner/name/path/of/file.

    Raises FileNotFoundError where there is none.
    """
    if exists(name):
        return Path(name)
    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    if not file or not HUB_ID.fullmatch(f"{owner}/{repository}"):
        raise FileNotFoundError(f"There is no file {name[:200]}.")
    try:
        return Path(hf_hub_download(f"{owner}/{repository}", file, tqdm_class=bar_class()))
    except HUB_ERRORS as error:
        raise FileNotFoundError(
            f"There is no file {name}, and the hub does not serve it to this machine: offline, a "
            "wrong name, or a repository that asks for a login."
        ) from error


def hub_files(repository: str) -> list[str]:
    """Return the names of a hub repository's files, the cached ones without a network.

    Raises one of HUB_ERRORS where neither is there.
    """
    try:
        return HfApi().list_repo_files(repository)
    except HUB_ERRORS:
        folder = Path(snapshot_download(repository, local_files_only=True))
        return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
