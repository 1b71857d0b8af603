"""What the embedded backbone reads: captions of the pictures and a tokenizer that keeps their words whole.

python -m train.emoji.captions      writes the prompt lists assets/prompts/emoji*.txt
"""

import json
import random
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from train.emoji.render import BACKGROUNDS, article, held_out_pairs, objects, prompt

MAX_TOKENS = 32
COLOUR_SYNONYMS = {"gray": ("grey",), "purple": ("violet",), "teal": ("turquoise",)}
WITH_BACKGROUND = ("{an_object} on {a_colour} background",) * 4 + (
    "{object} on {a_colour} background",
    "{object} on {colour}",
    "{an_object} on {colour}",
    "{object}, {colour} background",
    "a picture of {an_object} on {a_colour} background",
    "{an_object} in front of {a_colour} background",
)
WITHOUT_BACKGROUND = ("{an_object}", "{object}", "a picture of {an_object}")


def caption(
    object_index: int, background_index: int, rng: random.Random
) -> tuple[str, tuple[int, int]]:
    """One of the ways to describe a picture, and the object and background that it names (beyond the last one: none).

    A tenth of the captions is empty, for classifier-free guidance; a sixth does not name the background;
    a tenth holds a word of random letters, so that an unknown word has learnt to mean nothing.
    """
    if rng.random() < 0.1:
        return "", (len(objects()), len(BACKGROUNDS))
    thing = objects()[object_index]
    name = rng.choice((thing.name, *thing.synonyms)) if rng.random() < 0.3 else thing.name
    colour = list(BACKGROUNDS)[background_index]
    colour = rng.choice((colour, *COLOUR_SYNONYMS.get(colour, ())))
    bare = rng.random() < 1 / 6
    template = rng.choice(WITHOUT_BACKGROUND if bare else WITH_BACKGROUND)
    words = template.format(
        object=name, an_object=article(name), colour=colour, a_colour=article(colour)
    ).split(" ")
    if rng.random() < 0.1:
        unknown = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 7)))
        words.insert(rng.randint(0, len(words)), unknown)
    return " ".join(words), (object_index, len(BACKGROUNDS) if bare else background_index)


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose merges make one token of every word that a caption can hold.

    Other words fall into pieces, down to single bytes, as they do in CLIP.
    """
    texts = [
        *WITH_BACKGROUND,
        *WITHOUT_BACKGROUND,
        *BACKGROUNDS,
        *(s for more in COLOUR_SYNONYMS.values() for s in more),
    ]
    texts += [text for thing in objects() for text in (thing.name, *thing.synonyms)] + [
        "a an the photo image emoji drawing"
    ]
    words = sorted(
        {
            word
            for text in texts
            for word in text.replace("{", " ").replace("}", " ").replace(",", " ").split()
        }
    )
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bpe.train_from_iterator(
        [" ".join(words)] * 2,
        trainers.BpeTrainer(
            vocab_size=10**6, min_frequency=2, end_of_word_suffix="</w>", show_progress=False
        ),
    )
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = [
        *alphabet,
        *(letter + "</w>" for letter in alphabet),
        *("".join(merge) for merge in merges),
    ]
    vocabulary = {
        symbol: i
        for i, symbol in enumerate(dict.fromkeys([*symbols, "<|startoftext|>", "<|endoftext|>"]))
    }
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def caption_tokens(tokenizer: CLIPTokenizer, variants: int, seed: int = 0) -> torch.Tensor:
    """Return tokens of captions of every picture: (objects, backgrounds, variants, MAX_TOKENS)."""
    rng = random.Random(seed)
    shape = (len(objects()), len(BACKGROUNDS), variants)
    captions = [caption(*pair, rng)[0] for pair in np.ndindex(shape[:2]) for _ in range(variants)]
    tokens = tokenizer(
        captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    return tokens.view(*shape, MAX_TOKENS)


def main() -> None:
    """Writes the prompt lists: of the pairs that training saw, with and without background, and of the held-out ones."""
    folder = Path("assets/prompts")
    folder.mkdir(parents=True, exist_ok=True)
    held_out = held_out_pairs()
    for name, pairs in (("emoji", ~held_out), ("emoji_heldout", held_out)):
        prompts = [prompt(i, j) for i, j in zip(*pairs.nonzero())]
        prompts += [article(thing.name) for thing in objects()] if name == "emoji" else []
        (folder / f"{name}.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    names = [thing.name for thing in objects()]  # the classes of the SiT
    (folder / "emoji_objects.txt").write_text("\n".join(names) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
