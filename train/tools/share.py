"""Publish a refiner on the Hugging Face hub, with a model card.

    python train/tools/share.py runs/refiner-sd21 me/refiner-sd21

Log in first (`hf auth login`) or set HF_TOKEN. The trainer does the same at its end with
`--push_to_hub me/refiner-sd21`. Write only the card with --card_only.
"""

import json
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
from noiserefine.models.catalogue import BACKBONES
from train.common import argument_parser, markdown_table, run_script

CARD, SHEET = "README.md", "sheet.png"
LICENCES = {  # the catalogue's names -> the hub's
    "Apache-2.0": "apache-2.0",
    "MIT": "mit",
    "OpenRAIL": "creativeml-openrail-m",
    "OpenRAIL++": "openrail++",
}
BODY = """# Noise refiner for {base}

A refiner corrects the initial noise of a diffusion model in one forward, so that sampling
**without** guidance looks like sampling with it, at about half the time
([A Noise is Worth Diffusion Guidance](https://arxiv.org/abs/2412.03895)).

**This is no style LoRA.** Loaded as an ordinary LoRA, in any program, it destroys images: it
belongs to the refining forward alone. Use it with NoiseRefine:

```python
from diffusers import DiffusionPipeline
from noiserefine import Refiner, draw_noise

pipe = DiffusionPipeline.from_pretrained("{base}").to("cuda")
refiner = Refiner.from_pretrained("{repo_id}", pipe)
prompt = "a photo of a red fox in a pine forest"
latents = refiner(draw_noise(pipe, seed=0), prompt)
image = pipe(prompt, latents=latents, guidance_scale=1.0).images[0]
```
{sheet}
## Training

{training}

## Measured

{results}
"""


def model_card(folder: Path, repo_id: str) -> ModelCard:
    """Return the card of the refiner in a folder. Raise ValueError if it holds none."""
    config = read_config(resolve(folder))
    sheet = (
        f"\n![Unguided, guided and refined rows of held-out prompts]({SHEET})\n"
        if (folder / SHEET).is_file()
        else ""
    )
    data = ModelCardData(
        base_model=config.base_model,
        base_model_relation="adapter",
        library_name="noiserefine",
        pipeline_tag="text-to-image",
        license=_licence(config.base_model),
        tags=["noise-refiner", "diffusers", "lora", "guidance-distillation"],
    )
    body = BODY.format(
        base=config.base_model,
        repo_id=repo_id,
        sheet=sheet,
        training=_table(config.training),
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


def _licence(base_model: str) -> str:
    found = {backbone.source: backbone.licence for backbone in BACKBONES.values()}
    return LICENCES.get(found.get(base_model, ""), "other")


def _table(values: dict) -> str:
    rows = [[name, f"`{json.dumps(value)}`"] for name, value in values.items() if value is not None]
    return markdown_table(["option", "value"], rows)


def _measured(config: RefinerConfig) -> str:
    results = config.results
    if "validation_refined" not in results:
        return "Nothing was measured yet: run train/evaluate.py."
    n = config.training.get("num_validation", "a few")
    return (
        f"Mean squared distance of the latents to the guided ones, on {n} held-out prompts: "
        f"{results['validation_gaussian']:.4f} from Gaussian noise, "
        f"{results['validation_refined']:.4f} from refined noise. It says little of images: "
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
