"""Pipelines in diffusers' layout, in a folder or on the hub, checked before they are read."""

import contextlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING, _get_task_class
from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError
from torch import nn

from noiserefine.checkpoint import HUB_ERRORS
from noiserefine.denoiser import check_class
from noiserefine.models.catalogue import Backbone, backbone_of
from noiserefine.models.devices import default_dtype
from noiserefine.models.downloads import bar_class
from noiserefine.models.sit import SiTPipeline
from noiserefine.models.sources import SAFETENSORS, exists, hub_files, sentence

OURS = {"SiTPipeline": SiTPipeline}  # pipelines that diffusers does not have
# <folder>/diffusion_pytorch_model[-00001-of-00002][.fp16].safetensors, in either order
WEIGHTS = re.compile(r"[\w-]+?(?:-\d{5}-of-\d{5})?(?:\.(\w+))?(?:-\d{5}-of-\d{5})?\.safetensors")
OBJECTS = ("model_index.json", "config.json", "scheduler_config.json")
NEEDED = ("unet", "transformer", "prior", "vae", "scheduler", "text_encoder", "tokenizer")
NO_LENGTH = 10**6  # tokens; transformers gives a tokenizer without a limit 10**30


def load_folder(
    source: str, device: torch.device, dtype: torch.dtype | None, backbone: Backbone | None
) -> DiffusionPipeline:
    """Load a folder's or hub repository's text-to-image pipeline on the CPU; run none of its code.

    device: where it will compute, for the family's best dtype where that is None.
    Raises FileNotFoundError where it cannot be reached, and ValueError where it is no such
    pipeline.
    """
    kind, index, variant = examine(source, device, dtype, backbone)
    dtype = dtype or default_dtype(device, kind.__name__)
    folder = fetch(source, index, variant)
    try:
        components = _absent(index, kind) | _text_encoders(folder, index, dtype, variant)
        if backbone and backbone.vae:
            components["vae"] = AutoencoderKL.from_pretrained(
                backbone.vae, dtype=dtype, use_safetensors=True
            )
        pipe = kind.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, **variant, **components
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise ValueError(f"The model in {source} needs a package: {sentence(error)}") from error
    except Exception as error:  # what a stranger's configuration makes diffusers raise
        raise _damaged(source, error) from error
    _check_complete(source, pipe)
    _limit_tokenizers(pipe)
    pipe = _with_size(source, pipe)
    pipe.register_to_config(_name_or_path=source)  # not the cache's folder
    return pipe


def fetch(source: str, index: dict, variant: dict[str, str]) -> Path:
    """Return the local folder of a folder or hub id, downloaded where it is not there.

    index, variant: what `examine` says of it.  Raises what load_folder raises.
    """
    with _hub_errors(source):
        folder = Path(source if exists(source) else _download(source, index, variant))
        check_files(folder)
    return folder


def _download(source: str, index: dict, variant: dict[str, str]) -> str:
    """Return the local folder of a hub id, downloaded."""
    if bar := bar_class():  # diffusers takes none; what it finds missing afterwards is small
        files = _needed(hub_files(source), index, variant.get("variant"))
        snapshot_download(source, allow_patterns=files, tqdm_class=bar)
    removed = {name: None for name, entry in index.items() if entry == [None, None]}
    folder = DiffusionPipeline.download(source, use_safetensors=True, **variant, **removed)
    _check_json(Path(folder))
    return folder


def _needed(files: list[str], index: dict, variant: str | None) -> list[str]:
    """Return the files of a repository that are read: weights of one variant, and small ones."""
    needed, parts = ["model_index.json"], _parts(index)
    for file in map(PurePosixPath, files):
        weights = WEIGHTS.fullmatch(file.name)
        reads = weights[1] == variant if weights else file.suffix in (".json", ".txt", ".model")
        if len(file.parts) == 2 and file.parent.name in parts and reads:  # noqa: PLR2004
            needed.append(str(file))
    return needed


def _parts(index: dict) -> set[str]:
    """Return the names of the components that are there: one that was removed is [null, null]."""
    return {name for name, entry in index.items() if isinstance(entry, list) and any(entry)}


def _absent(index: dict, kind: type[DiffusionPipeline]) -> dict[str, None]:
    """Return None for the components that the class requires and the model lacks, as SD3's T5."""
    required = inspect.signature(kind.__init__).parameters.values()
    return {
        part.name: None
        for part in required
        if part.name != "self"
        and part.default is part.empty
        and index.get(part.name, [None, None]) == [None, None]
    }


def examine(
    source: str, device: torch.device, dtype: torch.dtype | None, backbone: Backbone | None
) -> tuple[type[DiffusionPipeline], dict, dict[str, str]]:
    """Return what the small files of a folder or hub id say: class, index and variant.

    That is the pipeline's class, the contents of model_index.json, and {"variant": name} or {} for
    the files of its weights.  Raises what load_folder raises.
    """
    with _hub_errors(source):
        if exists(source):
            _check_json(Path(source))
        index = DiffusionPipeline.load_config(source)
        kind = pipeline_class(source, index)
        check_class(kind)
        if backbone and backbone.sha256:
            check_weights(source, backbone)
            return kind, index, {}
        _check_parts(source, index, kind)
        half = (dtype or default_dtype(device, kind.__name__)) != torch.float32
        return kind, index, _variant(source, index, prefer=half and not exists(source))


@contextlib.contextmanager
def _hub_errors(source: str) -> Iterator[None]:
    """Turn what the hub and damaged files raise into sentences."""
    try:
        yield
    except (*HUB_ERRORS, SafetensorError) as error:
        raise _unreachable(source, error) from error


def _unreachable(source: str, error: Exception) -> Exception:
    if exists(source):
        return _damaged(source, error)
    backbone = backbone_of(source)
    if backbone and backbone.made_by:
        return FileNotFoundError(
            f"{backbone.title} can't be loaded: it is made by a command. Run {backbone.made_by}"
        )
    return FileNotFoundError(
        f"The model {source} can't be loaded: it is no folder or file here, and the hub doesn't "
        "serve it to this machine (offline, a wrong id, or a model that asks for a login). The "
        "embedded model needs no download."
    )


def _damaged(source: str, error: Exception) -> ValueError:
    return ValueError(f"The model in {source} is incomplete or damaged: {sentence(error)}")


def pipeline_class(source: str, index: dict) -> type[DiffusionPipeline]:
    """Return the text-to-image pipeline class that model_index.json names.

    A pipeline for another task is replaced by its text-to-image counterpart, if diffusers has one.
    Raises ValueError for a class that is code of the repository, which is never run.
    """
    if not isinstance(index, dict) or not index.get("_class_name"):
        raise ValueError(f"{source} is incomplete: its model_index.json names no pipeline class.")
    name = index["_class_name"]
    name = name[-1] if isinstance(name, list) else name  # [file of code, class]
    if name in OURS:
        return OURS[name]
    kind = getattr(diffusers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, DiffusionPipeline)):
        raise ValueError(
            f"{source} is a {name}, a pipeline that diffusers {diffusers.__version__} does not "
            "have: its code lies in the repository, and is not run. Models whose pipeline is part "
            "of diffusers work."
        )
    return _get_task_class(AUTO_TEXT2IMAGE_PIPELINES_MAPPING, name, False) or kind


def _variant(source: str, index: dict, prefer: bool) -> dict[str, str]:
    """Return {"variant": name} where weights have no plain file, or half precision is wanted.

    prefer: take half-precision files beside plain ones, to download half as much.  Other variants,
    such as non_ema, are other weights and never preferred.
    Raises ValueError for a network whose weights are pickles only.
    """
    parts = _parts(index)
    root = Path(source)
    files = [
        PurePosixPath(name)
        for name in (
            [path.relative_to(root).as_posix() for path in root.glob("*/*")]
            if exists(source)
            else hub_files(source)
        )
    ]
    variants: dict[str, set[str]] = {}
    for file in files:
        found = WEIGHTS.fullmatch(file.name)
        if found and file.parent.name in parts:
            variants.setdefault(file.parent.name, set()).add(found[1] or "")
    pickles = {file.parent.name for file in files if file.suffix == ".bin"}
    if only := sorted((pickles & parts) - variants.keys()):
        raise ValueError(
            f"{source} has its {only[0]} as a pickle (.bin) only, which can run code when it is "
            f"opened, and was not. Models with {SAFETENSORS} files work."
        )
    lacking = [names for names in variants.values() if "" not in names]
    wanted = lacking or [names for names in variants.values() if prefer]
    for name in ("fp16", "bf16", *sorted(set().union(*lacking))):
        if any(name in names for names in wanted) and all(name in names for names in lacking):
            return {"variant": name}
    return {}


def _check_json(folder: Path) -> None:
    """Raise ValueError for a folder without model_index.json and for JSON that is none."""
    if not (folder / "model_index.json").is_file():
        above = folder.parent / "model_index.json"
        hint = f" The pipeline is the folder above, {folder.parent}." if above.is_file() else ""
        raise ValueError(
            f"{folder} is not a diffusers pipeline: it holds no model_index.json.{hint}"
        )
    for path in (*folder.glob("*.json"), *folder.glob("*/*.json")):
        data = path.read_bytes()
        if data.startswith(b"\xef\xbb\xbf"):
            raise ValueError(f"{path} begins with a byte-order mark: save it as UTF-8 without one.")
        if path.name in OBJECTS or path.name.endswith(".index.json"):
            try:
                sound = isinstance(json.loads(data), dict)
            except (ValueError, RecursionError):
                sound = False
            if not sound:
                raise ValueError(
                    f"The model in {folder} is incomplete or damaged: {path.relative_to(folder)} "
                    "is no JSON object."
                )


def check_files(folder: Path) -> None:
    """Raise ValueError for files that send the loader to pickles or out of the folder."""
    for index in folder.glob("**/*.safetensors*.index.json"):
        shards = json.loads(index.read_text(encoding="utf-8")).get("weight_map")
        if not isinstance(shards, dict):
            raise ValueError(f"{index} is damaged: it has no weight_map of names to files.")
        for shard in set(map(str, shards.values())):
            if Path(shard).name != shard or not shard.endswith(SAFETENSORS):
                raise ValueError(
                    f"{index} names {shard}, which is no safetensors file beside it: the model was "
                    "not loaded."
                )
    for config in folder.glob("*/config.json"):
        if "transformers_weights" in json.loads(config.read_text(encoding="utf-8")):
            raise ValueError(f"{config} names weight files of its own: the model was not loaded.")


def _check_parts(source: str, index: dict, kind: type[DiffusionPipeline]) -> None:
    """Raise ValueError for a pipeline that lacks a part which it cannot do without."""
    parts, _ = kind._get_signature_keys(kind)
    for name in NEEDED:
        entry = index.get(name)
        if name in parts and not (isinstance(entry, list) and entry and entry[0]):
            raise ValueError(
                f"The model in {source} is incomplete: its model_index.json gives no {name}."
            )


def _text_encoders(
    folder: Path, index: dict, dtype: torch.dtype, variant: dict[str, str]
) -> dict[str, nn.Module]:
    """Load the text encoders; transformers would fill in missing weights at random.

    Raises ValueError for such a file.
    """
    encoders = {}
    for name, entry in index.items():
        if not name.startswith("text_encoder") or entry[0] != "transformers":
            continue
        files = (folder / name).glob(f"*.{variant.get('variant')}*")
        encoders[name], info = getattr(transformers, entry[1]).from_pretrained(
            folder / name,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **(variant if any(files) else {}),
        )
        if info["missing_keys"]:
            raise ValueError(f"{name} lacks its weights {min(info['missing_keys'])}")
    return encoders


def _check_complete(source: str, pipe: DiffusionPipeline) -> None:
    """Raise ValueError for a network whose file lacks weights, which diffusers leaves empty."""
    for name, part in pipe.components.items():
        parameters = part.named_parameters() if isinstance(part, nn.Module) else ()
        for weight in (key for key, value in parameters if value.is_meta):
            raise ValueError(
                f"The model in {source} is incomplete or damaged: {name} lacks its weights "
                f"{weight}."
            )


def _limit_tokenizers(pipe: DiffusionPipeline) -> None:
    """Set a tokenizer's missing limit, which some scripts leave out, from its text encoder."""
    for name, tokenizer in pipe.components.items():
        if not name.startswith("tokenizer") or tokenizer is None:
            continue
        encoder = getattr(pipe, name.replace("tokenizer", "text_encoder"), None)
        limit = getattr(getattr(encoder, "config", None), "max_position_embeddings", None)
        if limit and getattr(tokenizer, "model_max_length", 0) > NO_LENGTH:
            tokenizer.model_max_length = limit


def _with_size(source: str, pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Return the pipeline with its autoencoder's native size where its UNet gives none.

    Raises ValueError where neither does.
    """
    unet = getattr(pipe, "unet", None)
    if unet is None or unet.config.get("sample_size") is not None:
        return pipe
    size = pipe.vae.config.get("sample_size")
    if not isinstance(size, int):
        raise ValueError(
            f"The model in {source} is incomplete: its unet/config.json gives no sample_size."
        )
    unet.register_to_config(sample_size=size // pipe.vae_scale_factor)
    _, options = pipe._get_signature_keys(type(pipe))
    settings = {name: pipe.config[name] for name in options if name in pipe.config}
    return type(pipe)(**pipe.components, **settings)  # which reads the size


def check_weights(source: str, backbone: Backbone) -> None:
    """Raise ValueError where the hub would serve other files than the original ones.

    Offline only what is cached can load, which was checked when it was downloaded.
    """
    try:
        info = HfApi().model_info(source, files_metadata=True)
    except HUB_ERRORS:
        return
    served = {file.rfilename: file.lfs.sha256 for file in info.siblings or [] if file.lfs}
    for name, expected in backbone.sha256.items():
        if served.get(name) != expected:
            raise ValueError(
                f"{source} serves {name} with SHA-256 {served.get(name)}, not the original's "
                f"{expected}: it is not the model that its name says, and was not downloaded."
            )
