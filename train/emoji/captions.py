"""Caption the pictures, and build a tokenizer that keeps the captions' words whole.

    python -m train.emoji.captions

The script writes the prompt lists assets/prompts/emoji*.txt.
"""

import json
import random
import re
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from train.common import argument_parser
from train.emoji.render import BACKGROUNDS, article, held_out_pairs, objects, prompt

MAX_TOKENS = 32
# Shares of the captions
EMPTY = 0.1  # for classifier-free guidance
SYNONYM = 0.3  # name the object by one of its names, at random
BARE = 1 / 6  # do not name the background
UNKNOWN_WORD = 0.1  # hold a word of random letters

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
    """Return a random description of a picture, and the object and background that it names.

    An index one beyond the last means that the caption names none. Some captions hold a word of
    random letters, so that the text encoder learns to ignore words that it does not know.
    """
    if rng.random() < EMPTY:
        return "", (len(objects()), len(BACKGROUNDS))
    thing = objects()[object_index]
    name = rng.choice((thing.name, *thing.synonyms)) if rng.random() < SYNONYM else thing.name
    colour = list(BACKGROUNDS)[background_index]
    colour = rng.choice((colour, *COLOUR_SYNONYMS.get(colour, ())))
    bare = rng.random() < BARE
    template = rng.choice(WITHOUT_BACKGROUND if bare else WITH_BACKGROUND)
    words = template.format(
        object=name, an_object=article(name), colour=colour, a_colour=article(colour)
    ).split(" ")
    if rng.random() < UNKNOWN_WORD:
        unknown = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 7)))
        words.insert(rng.randint(0, len(words)), unknown)
    return " ".join(words), (object_index, len(BACKGROUNDS) if bare else background_index)


def build_tokenizer() -> CLIPTokenizer:
    """Build a CLIP tokenizer whose merges make one token of every word that a caption can hold.

    Other words fall into pieces, down to single bytes, as they do in CLIP.
    """
    texts = [
        *WITH_BACKGROUND,
        *WITHOUT_BACKGROUND,
        *BACKGROUNDS,
        *(synonym for synonyms in COLOUR_SYNONYMS.values() for synonym in synonyms),
        *(name for thing in objects() for name in (thing.name, *thing.synonyms)),
        "a an the photo image emoji drawing",
    ]
    words = sorted(set(re.sub("[{},]", " ", " ".join(texts)).split()))

    # Each merge of two symbols is learnt from the words, whole words last. Of equally frequent
    # merges the symbols' numbers decide, which are random for ends of words unless given.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    endings = [letter + "</w>" for letter in alphabet]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=10**6,
        min_frequency=2,
        special_tokens=endings,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator([" ".join(words)] * 2, trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    symbols = [
        *alphabet,
        *endings,
        *("".join(merge) for merge in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocabulary = {symbol: i for i, symbol in enumerate(dict.fromkeys(symbols))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def caption_tokens(tokenizer: CLIPTokenizer, variants: int, seed: int = 0) -> torch.Tensor:
    """Return tokens of captions of every picture: (objects, backgrounds, variants, MAX_TOKENS)."""
    rng = random.Random(seed)
    shape = (len(objects()), len(BACKGROUNDS), variants)
    pairs = np.ndindex(shape[0], shape[1])
    captions = [caption(i, j, rng)[0] for i, j in pairs for _ in range(variants)]
    tokens = tokenizer(
        captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    return tokens.view(*shape, MAX_TOKENS)


def main() -> None:
    """Write the prompts of the pairs in training, those of the held-out pairs, and the classes."""
    argument_parser(__doc__).parse_args()
    folder = Path("assets/prompts")
    folder.mkdir(parents=True, exist_ok=True)
    held_out = held_out_pairs()
    for name, pairs in (("emoji", ~held_out), ("emoji_heldout", held_out)):
        prompts = [prompt(i, j) for i, j in np.argwhere(pairs)]
        prompts += [article(thing.name) for thing in objects()] if name == "emoji" else []
        (folder / f"{name}.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    names = [thing.name for thing in objects()]  # the classes of the SiT
    (folder / "emoji_objects.txt").write_text("\n".join(names) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
