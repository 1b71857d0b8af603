"""Write the embedded models of a finished training into assets/.

    for file in OUT/*.tar; do tar -xf $file -C runs/emoji; done
    cat OUT/unet.tar.* | tar -x -C runs/emoji
    python -m train.emoji.assemble --work_dir runs/emoji

all.sh packs networks alone. This script adds the autoencoder to every model and the text encoder to
those that read captions. Models whose network is missing stay as they are.
"""

import shutil
from pathlib import Path

from diffusers import DiTTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

from train.common import argument_parser
from train.emoji import denoiser, flow, sit

MODELS = {
    "emoji": (UNet2DConditionModel, "unet", denoiser.write_pipeline),
    "emoji-flow": (SD3Transformer2DModel, "transformer", flow.write_pipeline),
    "emoji-sit": (DiTTransformer2DModel, "transformer", sit.write_pipeline),
}


def main() -> None:
    """Write every model, LoRA and judge that the training left."""
    parser = argument_parser(__doc__)
    parser.add_argument("--work_dir", type=Path, required=True, help="of the training")
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    args = parser.parse_args()
    for part in ("text_encoder", "tokenizer"):
        if not (args.work_dir / part).exists():
            shutil.copytree(args.assets / "emoji" / part, args.work_dir / part)
    for name, (kind, network_folder, write_pipeline) in MODELS.items():
        folder = args.work_dir / name / network_folder
        if folder.exists():
            network = kind.from_pretrained(folder)
            shutil.rmtree(args.assets / name, ignore_errors=True)
            write_pipeline(network, args.work_dir, args.assets / name)
            print(f"{args.assets / name}: {size(args.assets / name):.1f} MiB")
    for lora in sorted((args.work_dir / "loras").glob("*")):
        shutil.copytree(lora, args.assets / "loras" / lora.name, dirs_exist_ok=True)
    for judge in args.work_dir.glob("classifier*.safetensors"):
        shutil.copy(judge, Path(__file__).with_name(judge.name))
    print(f"{args.assets}: {size(args.assets):.1f} MiB")


def size(folder: Path) -> float:
    """Return the size of a folder's files in MiB."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


if __name__ == "__main__":
    main()
