"""One prompt and one seed, three ways to an image."""

from collections.abc import Iterator

from noiserefine.analysis.recipe import Maker, Recipe, Sample


def columns(recipe: Recipe, guided: bool = True, refined: bool = True) -> dict[str, Recipe]:
    """The recipes of the three arms, which share one x_T:

    gaussian   unguided, N forwards
    guided     classifier-free guidance, 2N forwards; left out for models without guidance
    refined    unguided from the refined noise, N + 1 forwards; left out where there is no refiner

    N is the steps for first-order samplers.
    """
    return (
        {"gaussian": recipe.gaussian}
        | ({"guided": recipe.guided} if guided else {})
        | ({"refined": recipe.refined} if refined else {})
    )


def compare(make: Maker, recipe: Recipe, guided: bool = True) -> Iterator[tuple[str, Sample]]:
    """An iterator over the arms by name, which are made as it is advanced: guided at the recipe's guidance scale, refined at its strength.

    Raises ValueError for bad input at once.
    """
    recipes = columns(recipe, guided, make.refiner is not None)
    for column in recipes.values():
        make.check(column)
    return ((name, make(column)) for name, column in recipes.items())
