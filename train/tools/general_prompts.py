"""Write the prompts that ship with the trainer: varied scenes from templates, no data needed.

    python train/tools/general_prompts.py --output_dir assets/prompts

general.txt holds prompts to train on, general_heldout.txt others, of the same templates, to
validate with. They are written for this project; every part is drawn at random with a fixed seed.
"""

import random
from pathlib import Path

from train.common import argument_parser, run_script

ANIMALS = """a red fox; a tabby cat; a golden retriever; a snowy owl; an octopus; a sea turtle;
a hummingbird; a draft horse; a herd of elephants; a chameleon; a family of penguins; a honeybee;
a grey wolf; a peacock; a jellyfish; two otters; a highland cow; a toucan; a bengal tiger;
a border collie; a tree frog; a swan; a hedgehog; an arctic hare; a koi carp; a barn swallow;
a mountain goat; a monarch butterfly; a black panther; a flock of flamingos; a giraffe; a squirrel;
a humpback whale; a parrot; a piglet; a camel; a stag beetle; a sleeping lion; a dragonfly;
three ducklings"""
PEOPLE = """an old fisherman; a young violinist; a woman with curly hair; a street vendor;
a ballet dancer; a mechanic; a mountaineer; twin sisters; a smiling chef; a girl in a yellow
raincoat; a man with a white beard; a nurse; a surfer; a potter at work; a farmer; a chess player;
a boy flying a kite; a bride; a carpenter; an astronaut; a watchmaker; a jazz trumpeter;
a grandmother knitting; a skateboarder; a scientist in a lab coat; a cyclist; a shepherd;
a firefighter; a student reading; a drummer; a beekeeper; a couple dancing; a monk; a tailor;
a pilot; a painter at her easel; a lifeguard; a gardener; a fencer; a child with a red balloon"""
OBJECTS = """a steam locomotive; a vintage typewriter; a blue bicycle; a grandfather clock;
a sailing ship; a hot-air balloon; an acoustic guitar; a stack of old books; a vintage car;
a porcelain teapot; a wooden rowing boat; a telescope; a pair of leather boots; a glass chess set;
a copper kettle; a motorcycle; a lighthouse lamp; a red telephone box; a carousel horse;
a fire truck; a paper lantern; a biplane; a ceramic vase with tulips; a globe; a film camera;
a suitcase covered in stickers; a tractor; a music box; a rocking chair; a cello; an hourglass;
a robot made of scrap metal; a tram; a spinning wheel; a violin on a velvet cloth; a compass;
a gramophone; a chandelier; a toy train; an open umbrella"""
FOOD = """a bowl of ramen; a stack of pancakes with syrup; a wedding cake; sushi on a slate;
a loaf of sourdough; a fruit tart; a cup of cappuccino; a cheese board; a basket of strawberries;
a slice of pizza; a jar of honey; roasted vegetables; an ice cream cone; a plate of dumplings;
a glass of orange juice; chocolate truffles; a pot of paella; a bowl of lemons; fresh croissants;
a burger with fries; a pomegranate cut in half; a steaming soup; macarons; a bunch of grapes"""
PLACES = """in a pine forest; on a rocky beach; in a narrow cobbled street; on a frozen lake;
in a sunlit kitchen; at a night market; on a rooftop above the city; in a lavender field;
in an abandoned factory; beside a waterfall; in a library with tall shelves; on a desert dune;
in a greenhouse full of ferns; on a snowy mountain pass; in a busy train station; under a stone
bridge; in a Japanese garden; on a wooden pier; in a wheat field; in a cluttered workshop;
at the edge of a volcano; in a bamboo grove; on a quiet canal; in front of a white wall;
in a flower shop; on a country road; in a marble hall; near a campfire; in a foggy harbour;
on a windowsill; in an orchard; under a starry sky; in a subway car; on a mossy log; in a ballroom;
by a swimming pool; in a vineyard; in a cave; at a crossroads; in the rain forest"""
VIEWS = """a fishing village on a cliff; a castle above a river; a terraced rice field;
a canyon with layers of red rock; a medieval market square; a glass skyscraper; a tiny cottage with
a thatched roof; a coral reef; an icy fjord; a gothic cathedral; a windmill by a canal;
a futuristic city; an oasis with palm trees; a suspension bridge; a baroque palace; a meadow of
poppies; an alpine lake; a lighthouse in a storm; a temple in the jungle; a suburban street;
a spiral staircase; a Victorian railway station; a harbour with sailing boats; an amphitheatre;
a birch forest; a salt flat; a floating market; a treehouse village; a snowy monastery;
a reading room; a row of colourful houses; a Roman aqueduct; an observatory on a hill;
a greenhouse café; a quarry pond; a savanna with acacia trees"""
LIGHTS = """at sunrise; at golden hour; at dusk; under a full moon; in heavy rain; on an overcast
day; in thick fog; lit by candles; with neon lights; in soft window light; in harsh noon sun;
with falling snow; after a thunderstorm; under the northern lights; in autumn; in spring;
with long shadows; backlit; in the blue hour; with drifting mist"""
PHOTOGRAPHS = """a photo of {}; a close-up photo of {}; a wide-angle photo of {};
a black and white photograph of {}; a 35 mm film photo of {}; a macro photo of {};
an aerial photo of {}; a portrait photo of {}, shallow depth of field; a polaroid of {};
a long exposure photo of {}; {}, national geographic photo; {}, cinematic still"""
PICTURES = """an oil painting of {}; a watercolour of {}; a pencil sketch of {}; a woodcut of {};
a flat vector illustration of {}; a children's book illustration of {}; an anime drawing of {};
a low poly render of {}; a clay model of {}; a stained glass window showing {}; a pixel art scene of
{}; a linocut print of {}; an art nouveau poster of {}; an impressionist painting of {};
a comic panel with {}; a paper cut-out of {}; a digital painting of {}; a charcoal drawing of {};
a ukiyo-e print of {}; a 3d render of {}, studio light; an embroidery of {};
a chalk drawing of {}"""
COLOURS = """crimson; turquoise; ochre; emerald green; pastel pink; navy blue; ivory; copper;
violet; lemon yellow; teal; charcoal grey"""
SHARE_WITH_PLACE, SHARE_WITH_LIGHT, SHARE_WITH_COLOURS = 0.75, 0.45, 0.15
MEDIA_SHARES = (0.45, 0.40, 0.15)  # photographs, pictures, no medium


def _parts(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.split(";")]


def scene(rng: random.Random) -> str:
    """Return a random prompt: a subject, mostly a place and a light, mostly in a medium."""

    def pick(text: str) -> str:
        return rng.choice(_parts(text))

    subject = pick(rng.choice([ANIMALS, PEOPLE, OBJECTS, FOOD, VIEWS]))
    if subject not in _parts(VIEWS) and rng.random() < SHARE_WITH_PLACE:
        subject += f" {pick(PLACES)}"
    if rng.random() < SHARE_WITH_LIGHT:
        subject += f" {pick(LIGHTS)}"
    if rng.random() < SHARE_WITH_COLOURS:
        subject += f", {' and '.join(rng.sample(_parts(COLOURS), 2))} tones"
    (media,) = rng.choices([PHOTOGRAPHS, PICTURES, "{}"], MEDIA_SHARES)
    return pick(media).format(subject)


def main(arguments: list[str] | None = None) -> None:
    """Write both files."""
    parser = argument_parser(__doc__)
    parser.add_argument("--count", type=int, default=2000, help="prompts to train on")
    parser.add_argument("--held_out", type=int, default=100, help="prompts to validate with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args(arguments)
    rng, prompts = random.Random(args.seed), dict[str, None]()
    while len(prompts) < args.count + args.held_out:
        prompts[scene(rng)] = None  # a dict keeps their order, each once
    lines = list(prompts)
    for name, chosen in (
        ("general.txt", lines[: args.count]),
        ("general_heldout.txt", lines[args.count :]),
    ):
        path = args.output_dir / name
        path.write_text("\n".join(chosen) + "\n", encoding="utf-8")
        print(f"{len(chosen)} prompts in {path}")


if __name__ == "__main__":
    run_script(main)
