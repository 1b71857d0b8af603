"""Cross-attention of a UNet to a word of the prompt, recorded during sampling (figure 20)."""

import contextlib
import math
from collections.abc import Iterator

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch.nn.functional import interpolate

from noiserefine.analysis.recipe import Maker, Recipe, Sample
from noiserefine.denoiser import canvas
from noiserefine.noise import image_size

PUNCTUATION = ",.;:!?()\"'“”‘’„«»…"


def hindrance(pipe: DiffusionPipeline) -> str:
    """Return why the attention of a pipeline cannot be recorded, or ""."""
    if not isinstance(getattr(pipe, "unet", None), UNet2DConditionModel):
        return (
            "This view records the cross-attention of Stable Diffusion's UNets. This model is a "
            f"{type(pipe).__name__}, whose attention has another form."
        )
    if getattr(pipe.tokenizer, "padding_side", None) != "right":
        return (
            "This view knows the places of a prompt's words among CLIP's tokens. This model is a "
            f"{type(pipe).__name__}, whose tokenizer is another."
        )
    return ""


def plain_words(prompt: str) -> list[str]:
    """Return the prompt's words in lower case, without punctuation around them."""
    return [word.strip(PUNCTUATION).lower() or word for word in prompt.split()]


def first_word(prompt: str) -> str:
    """Return the prompt's first word that is no article."""
    words = plain_words(prompt)
    return next((word for word in words if word not in ("a", "an", "the")), words[0])


def word_tokens(pipe: DiffusionPipeline, prompt: str, word: str) -> list[int]:
    """Return the token positions of a word's first occurrence in the prompt.

    Raises ValueError for a word that the prompt does not hold.
    """
    words, plain, wanted = prompt.split(), plain_words(prompt), " ".join(plain_words(word))
    if wanted not in plain:
        raise ValueError(
            f"The prompt holds no word {word!r}; choose one of {', '.join(dict.fromkeys(plain))}."
        )
    i = plain.index(wanted)
    before, after = (len(pipe.tokenizer(" ".join(words[:end])).input_ids) - 1 for end in (i, i + 1))
    return list(range(before, after))


@contextlib.contextmanager
def watch_attention(
    unet: UNet2DConditionModel, tokens: list[int], height: int, width: int
) -> Iterator[list[torch.Tensor]]:
    """Append the attention to the tokens, (height, width), to the yielded list at every forward.

    The maps are means over cross-attention layers, heads and tokens, at the latents' size, for
    the last image of the batch: under guidance the one with the prompt.
    """
    maps, layers = [], []

    def watch_layer(attn, args, kwargs):
        hidden, context = args[0][-1:], kwargs["encoder_hidden_states"][-1:]
        query, key = (
            attn.head_to_batch_dim(projected)
            for projected in (attn.to_q(hidden), attn.to_k(context))
        )
        share = attn.get_attention_scores(query, key)[..., tokens].mean((0, 2))
        # Each level of the UNet halves the sides, rounding up.
        factor = 2 ** round(math.log2(height * width / len(share)) / 2)
        shape = (math.ceil(height / factor), math.ceil(width / factor))
        layers.append(
            interpolate(share.float().view(1, 1, *shape), size=(height, width), mode="bilinear")[
                0, 0
            ].cpu()
        )

    def finish(*_):
        maps.append(torch.stack(layers).mean(0))
        layers.clear()

    handles = [
        layer.register_forward_pre_hook(watch_layer, with_kwargs=True)
        for name, layer in unet.named_modules()
        if name.endswith("attn2")
    ]
    handles.append(unet.register_forward_hook(finish))
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled blocks call no hooks
            yield maps
    finally:
        for handle in handles:
            handle.remove()


def attention(make: Maker, recipe: Recipe, word: str) -> tuple[torch.Tensor, Sample]:
    """Sample the recipe; return the attention to a word in every forward, and the sample.

    The maps are (forwards, h, w) at the latents' size; the refining pass is not among them.
    Raises ValueError for a word that is not in the prompt.
    """
    make.check(recipe)
    tokens = word_tokens(make.pipe, recipe.prompt, word)
    _, height, width = canvas(make.pipe, *image_size(make.pipe, recipe.height, recipe.width)).shape
    with watch_attention(make.pipe.unet, tokens, height, width) as maps:
        sample = make.sample(recipe, make.draw(recipe))
    return torch.stack(maps), sample
