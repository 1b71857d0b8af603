"""Publish a refiner on the Hugging Face hub, with a model card.

    python train/tools/share.py runs/refiner-sd21 me/refiner-sd21

Log in first (`hf auth login`) or set HF_TOKEN. The trainer does the same at its end with
`--push_to_hub me/refiner-sd21`. Write only the card with --card_only.
"""

import shutil
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData

from noiserefine.checkpoint import (
    CONFIG_NAME,
    HUB_ERRORS,
    SCALE_NAME,
    WEIGHTS_NAME,
    RefinerConfig,
    read_config,
    resolve,
)
from noiserefine.models.catalogue import BACKBONES, backbone_of
from train.common import ROOT, argument_parser, markdown_table, run_script

CARD, SHEET = "README.md", "sheet.png"
LICENCES = {  # the catalogue's names -> the hub's
    "Apache-2.0": "apache-2.0",
    "MIT": "mit",
    "OpenRAIL": "creativeml-openrail-m",
    "OpenRAIL++": "openrail++",
}
BODY = """# Noise refiner for {title}

A refiner corrects the initial noise of a diffusion model in one forward, so that sampling
**without** guidance looks like sampling with it, at about half the time
([A Noise is Worth Diffusion Guidance](https://arxiv.org/abs/2412.03895)).

**This is no style LoRA.** Loaded as an ordinary LoRA, in any program, it destroys images: it
belongs to the refining forward alone. Use it with NoiseRefine, from a copy of its repository
(`pip install -e .`):

```python
from noiserefine import Refiner, draw_noise
from noiserefine.guidance import sample
from noiserefine.models.loading import load_pipeline

pipe = load_pipeline("{base}")
refiner = Refiner.from_pretrained("{repo_id}", pipe)
prompt = "{prompt}"
latents = refiner(draw_noise(pipe, seed=0), prompt{scale})
image = sample(pipe, prompt=prompt, latents=latents).images[0]  # unguided
```

It fits fine-tunes of its base, too. NoiseRefine's page shows the same noise unguided, guided and
refined, side by side.
{sheet}
## Training

{training}

## Measured

{results}
"""


def model_card(folder: Path, repo_id: str) -> ModelCard:
    """Return the card of the refiner in a folder. Raise ValueError if it holds none."""
    config = read_config(resolve(folder))
    base, backbone = config.base_model, backbone_of(config.base_model)
    local = Path(base).exists()
    title = shown = Path(base).name if local else base  # nobody's folders
    if local and backbone:
        title = backbone.title
        shown = next(name for name, entry in BACKBONES.items() if entry is backbone)
    sheet = (
        f"\n![Unguided, guided and refined rows of held-out prompts]({SHEET})\n"
        if (folder / SHEET).is_file()
        else ""
    )
    data = ModelCardData(
        base_model=None if local else base,  # the hub takes ids of its own alone
        base_model_relation=None if local else "adapter",
        library_name="noiserefine",
        pipeline_tag="text-to-image",
        license=LICENCES.get(backbone.licence, "other") if backbone else "other",
        # Not "diffusers" and "lora": the hub would offer load_lora_weights, which destroys images.
        tags=["noise-refiner", "guidance-distillation"],
    )
    scales = config.guidance_scale_range
    scale = config.training.get("guidance_scale", scales and scales[0])
    body = BODY.format(
        title=title,
        base=shown,
        repo_id=repo_id,
        prompt=_example_prompt(config),
        scale=f", guidance_scale={scale:g}" if scales else "",
        sheet=sheet,
        training=_table({"rank": config.rank} | config.training),
        results=_measured(config),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


def write_card(folder: Path, repo_id: str) -> None:
    """Write the card and the last validation's sheet beside the refiner."""
    sheets = sorted((folder / "validation").glob("*.png"))
    if sheets:
        shutil.copy(sheets[-1], folder / SHEET)
    model_card(folder, repo_id).save(folder / CARD)


def push(folder: Path, repo_id: str, api: HfApi | None = None) -> str:
    """Upload the refiner and its card; return the repository's address.

    Raise ConnectionError, with what to do, if the hub does not take it.
    """
    api = api or HfApi()
    write_card(folder, repo_id)
    files = [CONFIG_NAME, WEIGHTS_NAME, SCALE_NAME, CARD, SHEET]
    try:
        api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=files)
    except HUB_ERRORS as error:
        raise ConnectionError(
            f"The hub did not take {repo_id} ({str(error).splitlines()[0]}): log in with `hf auth "
            f"login`, then run python train/tools/share.py {folder} {repo_id}. The refiner is safe "
            f"in {folder}."
        ) from error
    return f"https://huggingface.co/{repo_id}"


def _example_prompt(config: RefinerConfig) -> str:
    """Return the first prompt that it was trained with, of the files that are shipped."""
    prompts = ROOT / config.training.get("prompts", "")
    if prompts.is_file() and prompts.is_relative_to(ROOT / "assets"):
        return prompts.read_text(encoding="utf-8").splitlines()[0]
    return "a photo of a red fox in a pine forest"


def _table(values: dict) -> str:
    rows = [[name, f"`{value}`"] for name, value in values.items() if value is not None]
    return markdown_table(["option", "value"], rows)


def _measured(config: RefinerConfig) -> str:
    results = config.results
    if "validation_refined" not in results:
        return "Nothing was measured yet: run train/evaluate.py."
    n = config.training.get("num_validation", "a few")
    gaussian, refined = results["validation_gaussian"], results["validation_refined"]
    return (
        f"Mean squared distance of the latents to the guided ones, on {n} held-out prompts: "
        f"{gaussian:.4f} from Gaussian noise, {refined:.4f} from refined noise, "
        f"{100 * (1 - refined / gaussian):.0f} % of the way. It says little of images: "
        "train/evaluate.py measures those, with intervals."
    )


def main(arguments: list[str] | None = None) -> None:
    """Publish the refiner, or write its card."""
    parser = argument_parser(__doc__)
    parser.add_argument("folder", type=Path, help="--output_dir of the run")
    parser.add_argument("repo_id", help="name on the hub, for example me/refiner-sd21")
    parser.add_argument("--card_only", action="store_true", help="write README.md, upload nothing")
    args = parser.parse_args(arguments)
    if args.card_only:
        write_card(args.folder, args.repo_id)
        print(f"Wrote {args.folder / CARD}.")
    else:
        print(push(args.folder, args.repo_id))


if __name__ == "__main__":
    run_script(main)
