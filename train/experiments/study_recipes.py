"""The training recipes of a study: a base, and those with another value of one factor."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from noiserefine.refiner import check_strength
from train.options import TARGET_OPTIONS, Options, check


class Factor(NamedTuple):
    """What is varied: its title in plot and table, and its values in the order they are tried."""

    title: str
    values: tuple


# "num_targets" takes equal steps, so that few targets are seen often; "size" takes equal epochs, as
# --hours does. Teachers' scales are multiples of the base recipe's.
FACTORS = {
    "num_targets": Factor("targets, at equal steps", (64, 128, 256, 512, 1024, 2048, 4096)),
    "epochs": Factor("epochs", (0.25, 0.5, 1.0, 4.0)),
    "rank": Factor("rank", (4, 8, 16, 64, 128)),
    "lr": Factor("learning rate", (3e-4, 3e-3)),
    "steps": Factor("N, steps in the loss", (2, 3, 4, 10, 20)),
    "teacher": Factor("teacher", ("interval", "rescale", "apg")),
    "guidance_scale": Factor("teacher's scale by the base's", (1.5, 2.0, 3.0)),
    "layers": Factor("layers with a LoRA", ("attention", "outer")),
    "strength": Factor("strength", (0.5, 1.5, 2.0)),
    "target_steps": Factor("N', steps of the targets", (5, 20, 40)),
    "batch_size": Factor("batch size, at equal epochs", (16, 64, 128)),
    "seed": Factor("seed", (10_000_000, 20_000_000)),
    "size": Factor("targets, at equal epochs", (64, 256, 1024, 4096, 12_000)),
}
# Regular expressions of layers' names. The outer blocks are the first two and the last two, of six
# or seven.
ATTENTION = r"\battn"
LAYERS = {
    "emoji": r"^(conv_in|down_blocks\.[01]|up_blocks\.[12])\b",
    "emoji-flow": r"^(pos_embed|context_embedder|transformer_blocks\.[0145])\b",
    "emoji-sit": r"^(pos_embed|transformer_blocks\.[0156])\b",
}
BASE = "base"
# Recipes that agree on these options share targets.
SHARED = [name for name in TARGET_OPTIONS if name != "num_targets"]


@dataclass(frozen=True)
class Recipe:
    """The base recipe with another value of one factor."""

    factor: str
    value: Any
    options: Options  # of the training
    strength: float = 1.0  # of the refinement when measured

    @property
    def name(self) -> str:
        """The key of its figures."""
        return self.factor if self.value is None else f"{self.factor}={self.value}"

    @property
    def training(self) -> str:
        """The name of its training, which recipes of other strengths share."""
        return BASE if self.factor == "strength" else self.name


def recipes(base: Options, factors: dict[str, list]) -> list[Recipe]:
    """Return the base recipe and those with another value of each factor.

    Raise ValueError for values that cannot work.
    """
    varied = [
        Recipe(factor, value, base, value)
        if factor == "strength"
        else Recipe(factor, value, changed(base, factor, value))
        for factor, values in factors.items()
        for value in values
        if value != base_value(vars(base), factor)
    ]
    for recipe in varied:
        check(recipe.options)
        check_strength(recipe.strength)
    return [Recipe(BASE, None, base), *varied]


def changed(base: Options, factor: str, value: Any) -> Options:
    """Return the base recipe with another value of a factor.

    Raise ValueError for layers that have no names in the base's preset.
    """
    if factor == "num_targets":
        epochs = base.epochs * base.num_targets / value
        return replace(base, num_targets=value, epochs=epochs)
    if factor == "size":
        return replace(base, num_targets=value)
    if factor == "guidance_scale":
        return replace(base, guidance_scale=value * base.guidance_scale)
    if factor == "layers":
        layers = {"attention": ATTENTION, "outer": LAYERS.get(base.preset)}.get(value)
        if layers is None:
            raise ValueError(
                f"--factors layers is attention, or outer for the presets {', '.join(LAYERS)}; "
                f"got {value} for {base.preset}."
            )
        return replace(base, layers=layers)
    return replace(base, **{factor: value})


def base_value(base: dict[str, Any], factor: str) -> Any:
    """Return the value of a factor that the base recipe's options stand for."""
    special = {
        "size": base.get("num_targets"),
        "guidance_scale": 1.0,
        "strength": 1.0,
        "layers": base.get("layers") or "all",
    }
    return special.get(factor, base.get(factor))


def shares_targets(recipe: Recipe, base: Options) -> bool:
    """Return whether a recipe's targets are the first of the base's, or more of them."""
    return all(getattr(recipe.options, name) == getattr(base, name) for name in SHARED)
