"""The formats of LoRA files, each brought to one form: layer by layer, W + up @ down.

Names come from kohya's and LyCORIS's trainers (lora_unet_down_blocks_0_..., or the original UNet's
input_blocks), from peft (base_model.model.) and from old diffusers (attn1.processor.to_q_lora).
The kinds beside plain LoRA are Tucker-decomposed convolutions, LoHa (W + w1 * w2 elementwise), LoKr
(W + w1 ⊗ w2), full differences, and DoRA (m (W + up @ down) / |W + up @ down|, arXiv 2402.09353).
"""

import math
import re
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import nn

Parts = dict[str, torch.Tensor]  # of one layer in a file, by the last part of their names

KOHYA = re.compile(r"lora_(unet|te\d?)_")
# Spellings of the same thing, each replaced by ours, one after the other.
SPELLINGS = [
    (r"(^|\.)_orig_mod\.", r"\1"),  # torch.compile
    (r"^(base_model\.model\.)+", ""),  # peft
    (r"\.processor\.to_([qkv])_lora\.", r".to_\1."),  # diffusers' attention processors
    (r"\.processor\.to_out_lora\.", ".to_out.0."),
    (r"\.to_([qkv])_lora\.", r".\1_proj."),  # diffusers' text encoders
    (r"\.to_out_lora\.", ".out_proj."),
    (r"\.(?:lora(?:_linear_layer)?\.|lora_)?(down|up)(?:\.\w+)?\.weight$", r".lora_\1.weight"),
    (r"\.lora_A(?:\.\w+)?\.weight$", ".lora_down.weight"),
    (r"\.lora_B(?:\.\w+)?\.weight$", ".lora_up.weight"),
    (r"\.lora_B(?:\.\w+)?\.bias$", ".diff_b"),
    (r"\.lora_magnitude_vector(?:\.\w+)*$", ".magnitude"),
]
PART = re.compile(
    r"(.+)\.(lora_(?:down|up|mid)\.weight|alpha|dora_scale|magnitude|hada_(?:w[12]_[ab]|t[12])"
    r"|lokr_(?:w[12](?:_[ab])?|t2)|diff|diff_b)"
)
SMALL_LAYER = 256  # outputs; the last layer of every denoiser, which refiners cancel, has fewer
EMBEDDING = re.compile(r"bundle_emb\.([^.]+)\.")
# What cannot become W + up @ down, by a piece of its tensors' names.
REFUSED = {
    "w_norm": "trains normalisation layers, which a LoRA cannot hold",
    "boft_": "is a BOFT, which rotates weights instead of adding to them",
    "oft_": "is an OFT, which rotates weights instead of adding to them",  # a part of "boft_"
    ".a1.weight": "is a GLoRA, which multiplies weights instead of adding to them",
    "on_input": "is an (IA)³, which scales activations instead of adding to weights",
    "vera_lambda": "is a VeRA, whose matrices are drawn from a seed",
    "lora_embedding": "trains a text encoder's embeddings, which pipelines share",
    "lora_controlnet": "is a ControlNet's LoRA, which needs a control picture",
    "emb_params": "is a textual inversion, a word for a prompt and no LoRA",
    "string_to_param": "is a textual inversion, a word for a prompt and no LoRA",
    "model.diffusion_model.": "is a whole model: name it as the backbone",
    "first_stage_model.": "is a whole model: name it as the backbone",
}


@dataclass
class Change:
    """What a LoRA adds to one layer: up @ down to its weight, bias to its bias.

    down (rank, inputs, ...), up (outputs, rank, ...); magnitude (outputs,) of a DoRA's rows.
    """

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None


def layers_of(state: dict[str, torch.Tensor]) -> tuple[dict[str, Parts], list[str]]:
    """Return a file's tensors by layer, and the words of its bundled embeddings.

    Raises ValueError for a kind that cannot become a LoRA, and if it is no LoRA at all; the message
    completes "The LoRA NAME ...".
    """
    layers: dict[str, Parts] = {}
    words, unknown = [], []
    for name, tensor in state.items():
        if found := EMBEDDING.match(name):
            words.append(found[1])
            continue
        spelled = _spelled(name)
        found = PART.fullmatch(spelled)
        if found and not (found[2] == "diff" and tensor.ndim == 1):
            layers.setdefault(found[1], {})[found[2].removesuffix(".weight")] = tensor
        else:
            unknown.append(spelled + (".w_norm" if found else ""))
    for piece, reason in REFUSED.items():
        if any(piece in name for name in unknown):
            raise ValueError(reason)
    if unknown or not layers:
        raise ValueError(
            f"is no LoRA that is known here: it holds {min(unknown, default='nothing')}"
        )
    return layers, sorted(set(words))


def _spelled(name: str) -> str:
    for spelling, ours in SPELLINGS:
        name = re.sub(spelling, ours, name)
    return name


def set_alphas(layers: dict[str, Parts], configs: dict[str, dict]) -> None:
    """Write the alphas that a file lacks, from peft's configurations by network, "" for all.

    peft adds alpha / r up @ down, or with rank-stabilised scaling alpha / sqrt(r).
    """
    for name, parts in layers.items():
        config = configs.get(name.partition(".")[0], configs.get("", {}))
        if "alpha" in parts or "lora_down" not in parts or "lora_alpha" not in config:
            continue
        rank, patterns = parts["lora_down"].shape[0], config.get("alpha_pattern") or {}
        matching = (key for key in patterns if re.fullmatch(rf"(.*\.)?({key})", name))
        alpha = float(patterns.get(next(matching, None), config["lora_alpha"]))
        parts["alpha"] = torch.tensor(alpha * (math.sqrt(rank) if config.get("use_rslora") else 1))


def placed(
    pipe: DiffusionPipeline, networks: dict[str, nn.Module], layers: dict[str, Parts]
) -> dict[tuple[str, str], Parts]:
    """Return the layers that the pipeline has, by the names of the network and of its module."""
    modules = {name: dict(network.named_modules()) for name, network in networks.items()}
    found = {}
    for layer, path in _diffusers_names(pipe, list(layers)).items():
        first, _, rest = path.partition(".")
        places = [(first, rest)] if first in networks else [(name, path) for name in networks]
        # Newer CLIP text encoders lack the level `text_model`, which files still name.
        places += [(name, module.removeprefix("text_model.")) for name, module in places]
        places += [(name, f"text_model.{module}") for name, module in places]
        for name, module in places:
            if isinstance(modules[name].get(module), nn.Linear | nn.Conv2d):
                found[name, module] = layers[layer]
                break
    return found


def _diffusers_names(pipe: DiffusionPipeline, layers: list[str]) -> dict[str, str]:
    """Return the layers' names in diffusers, as diffusers itself converts them."""
    kohya = [layer for layer in layers if KOHYA.match(layer)]
    names = {layer: layer for layer in layers}
    if not kohya:
        return names
    mark = {layer: torch.empty(1, 1) for layer in kohya}
    file = {f"{layer}.lora_up.weight": torch.empty(1, 1) for layer in kohya}
    file |= {f"{layer}.lora_down.weight": tensor for layer, tensor in mark.items()}
    options = {"unet_config": pipe.unet.config} if hasattr(pipe, "text_encoder_2") else {}
    converted = pipe.lora_state_dict(file, **options)[0]
    theirs = {id(tensor): name for name, tensor in converted.items()}
    for layer in kohya:
        name = theirs.get(id(mark[layer]), layer)
        names[layer] = _spelled(name).removesuffix(".lora_down.weight")
    return names


def change(parts: Parts, weight: torch.Tensor, dtype: torch.dtype) -> Change:
    """Return what the parts do to a layer with this weight, which computes in dtype.

    The tensors are in float32 on the CPU.
    Raises ValueError if they do not fit or are not whole; its message completes "The LoRA NAME
    ...".
    """
    parts = {name: tensor.detach().float().cpu() for name, tensor in parts.items()}
    shape = weight.shape
    try:
        down, up = _factors(parts, shape)
        fits = down.shape[1:] == shape[1:] and up.shape[:2] == (shape[0], len(down))
    except KeyError as error:
        raise ValueError(f"lacks the tensor {error.args[0]} of a layer") from error
    except RuntimeError:  # matrices that cannot be multiplied, or another number of weights
        fits = False
    if not fits:
        raise ValueError(
            f"was made for layers of other sizes than this model's {list(shape)}: it belongs to "
            "another model"
        )
    if not (down.to(dtype).isfinite().all() and up.to(dtype).isfinite().all()):
        raise ValueError(f"holds numbers that are beyond {dtype}'s range, which this model runs in")
    if len(weight) <= SMALL_LAYER:
        old = weight.detach().float().cpu().flatten(1)
        if (old + up.flatten(1) @ down.flatten(1)).norm() < old.norm() / 2:
            raise ValueError("cancels the model's output layer, as a refiner does: name it as one")
    return Change(down, up, parts.get("diff_b"), _magnitude(parts, shape))


def _factors(parts: Parts, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    """Return down and up of a layer of any kind."""
    kinds = {name.partition("_")[0] for name in parts}
    if "lora" in kinds:
        return _pair(parts, shape)
    if "hada" in kinds:
        return _loha(parts, shape)
    if "lokr" in kinds:
        return _as_pair(_lokr(parts).reshape(shape))
    if "diff" in parts:
        return _as_pair(parts["diff"].reshape(shape))
    if "diff_b" not in parts:
        raise ValueError("holds layers with a scale and no weights")
    ones = [1] * (len(shape) - 2)
    return torch.zeros(1, *shape[1:]), torch.zeros(shape[0], 1, *ones)  # a bias alone


def _scale(parts: Parts, rank: int) -> float:
    return parts["alpha"].item() / rank if "alpha" in parts else 1.0


def _pair(parts: Parts, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    down, up = parts["lora_down"], parts["lora_up"]
    up = up * _scale(parts, len(down))
    if "lora_mid" in parts:  # Tucker: a convolution between two of size 1
        down = torch.einsum("rs...,si->ri...", parts["lora_mid"], down.flatten(1))
    if len(shape) == 2:  # noqa: PLR2004 - some files hold linear layers as convolutions of size 1
        down, up = down.flatten(1), up.flatten(1)
    elif down.ndim == 2:  # noqa: PLR2004 - and the reverse
        down, up = down[..., None, None], up[..., None, None]
    return down, up


def _as_pair(delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Write a full difference exactly as up @ down, one of which is the identity."""
    rows, columns = delta.flatten(1).shape
    ones = [1] * (delta.ndim - 2)
    if rows <= columns:
        return delta, torch.eye(rows).view(rows, rows, *ones)
    return torch.eye(columns).view(columns, *delta.shape[1:]), delta.reshape(rows, columns, *ones)


def _loha(parts: Parts, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    """Write (a1 b1) * (a2 b2), elementwise, as up @ down, of rank r1 r2 if that is not full."""
    ranks = [parts[f"hada_w{i}_b"].shape[0] for i in (1, 2)]
    scale, full = _scale(parts, ranks[0]), min(shape[0], math.prod(shape[1:]))
    a1, b1, a2, b2 = (parts[f"hada_w{i}_{side}"] for i in (1, 2) for side in "ab")
    if "hada_t1" in parts:  # Tucker: a is (r, outputs), b (r, inputs), t (r, r, height, width)
        first, second = (
            torch.einsum("ij...,jq,ip->pq...", parts[f"hada_t{i}"], b, a)
            for i, a, b in ((1, a1, b1), (2, a2, b2))
        )
        return _as_pair((scale * first * second).reshape(shape))
    if math.prod(ranks) >= full:
        return _as_pair((scale * (a1 @ b1) * (a2 @ b2)).reshape(shape))
    # Row by row and column by column products of the factors: the Khatri-Rao identity.
    up = scale * (a1[:, :, None] * a2[:, None]).flatten(1)
    down = (b1[:, None] * b2[None]).flatten(0, 1)
    return down.reshape(-1, *shape[1:]), up.reshape(*up.shape, *[1] * (len(shape) - 2))


def _lokr(parts: Parts) -> torch.Tensor:
    """Return the Kronecker product of w1 and w2, (outputs, inputs * height * width)."""
    rank = None  # of the last factor that is a product; alpha counts only beside one
    factors = []
    for i in (1, 2):
        if f"lokr_w{i}" in parts:
            factors.append(parts[f"lokr_w{i}"].flatten(1))
            continue
        a, b = parts[f"lokr_w{i}_a"], parts[f"lokr_w{i}_b"]
        rank = len(b)
        if i == 2 and "lokr_t2" in parts:  # noqa: PLR2004
            factor = torch.einsum("ij...,ip,jq->pq...", parts["lokr_t2"], a, b)
        else:
            factor = a @ b.flatten(1)
        factors.append(factor.flatten(1))
    return torch.kron(*factors) * (1.0 if rank is None else _scale(parts, rank))


def _magnitude(parts: Parts, shape: torch.Size) -> torch.Tensor | None:
    """Return a DoRA's norms of rows, (outputs,), as peft or LyCORIS holds them."""
    if "magnitude" not in parts and "dora_scale" not in parts:
        return None
    if "lora_up" not in parts or "diff_b" in parts:
        raise ValueError("is a DoRA of an unknown kind: its layers are no plain pairs of matrices")
    magnitude = parts["magnitude"] if "magnitude" in parts else parts["dora_scale"]
    if "dora_scale" in parts and len(magnitude) != shape[0] or magnitude.numel() != shape[0]:
        raise ValueError("is a DoRA with one magnitude per input; those with one per output work")
    return magnitude.flatten()
