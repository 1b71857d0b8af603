"""One prompt and one seed, three ways to an image."""

from collections.abc import Iterator

from noiserefine.analysis.recipe import Maker, Recipe, Sample


def arms(recipe: Recipe, guided: bool = True, refined: bool = True) -> dict[str, Recipe]:
    """Return the recipes of the three arms, which share one x_T, by name.

    gaussian   unguided, N forwards
    guided     classifier-free guidance, 2N forwards; left out for models without guidance
    refined    unguided from the refined noise, N + 1 forwards; left out where there is no refiner

    N is the number of steps for first-order samplers.
    """
    return (
        {"gaussian": recipe.gaussian}
        | ({"guided": recipe.guided} if guided else {})
        | ({"refined": recipe.refined} if refined else {})
    )


def compare(make: Maker, recipe: Recipe, guided: bool = True) -> Iterator[tuple[str, Sample]]:
    """Return an iterator over the arms by name, each made when the iterator reaches it.

    The guided arm takes the recipe's guidance scale, the refined one its strength.
    Raises ValueError for bad input at once.
    """
    recipes = arms(recipe, guided, make.refiner is not None)
    for arm_recipe in recipes.values():
        make.check(arm_recipe)
    return ((arm, make(arm_recipe)) for arm, arm_recipe in recipes.items())
