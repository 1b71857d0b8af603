"""Fine-tune the embedded model on pictures of another style and write the LoRA.

    python -m train.emoji.style --pictures runs/clay/pictures --output_dir assets/loras/emoji-clay

Pictures come from render.py with --style; the embedded model's own autoencoder encodes them.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict

from train.common import argument_parser
from train.emoji.autoencoder import encode, read_pictures
from train.emoji.denoiser import denoising_loss
from train.emoji.examples import Captions, Examples
from train.emoji.fit import Settings, add_options, fit

LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
LAYERS += ["conv", "conv1", "conv2", "conv_shortcut", "conv_in", "conv_out"]


def main(arguments: list[str] | None = None) -> None:
    """Train the LoRA and write it."""
    parser = argument_parser(__doc__)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True, help="where the LoRA is written")
    parser.add_argument("--backbone", type=Path, default=Path("assets/emoji"))
    parser.add_argument("--rank", type=int, default=16)
    add_options(parser, steps=600, lr=1e-3, batch_size=32)
    args = parser.parse_args(arguments)
    pipe = StableDiffusionPipeline.from_pretrained(args.backbone, dtype=torch.float32)
    pipe.to(args.device)
    latents = encode(pipe.vae, read_pictures(args.pictures / "train_pictures.npy", args.device))
    classes = torch.from_numpy(np.load(args.pictures / "train_classes.npy"))
    examples = Examples(latents, classes, args.device)
    torch.manual_seed(0)
    config = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=LAYERS)
    pipe.unet.requires_grad_(False)
    pipe.unet.add_adapter(config, "style")
    cast_training_params(pipe.unet)
    captions = Captions(args.backbone, args.device)
    loss = denoising_loss(pipe.unet, pipe.scheduler, captions, args.batch_size)
    settings = Settings(lr=args.lr, steps=args.steps, until=args.until)
    fit(pipe.unet, partial(loss, examples), args.pictures / "style.pt", settings)
    lora = get_peft_model_state_dict(pipe.unet, adapter_name="style")
    about = config.to_dict() | {"target_modules": LAYERS}  # a set there, in an order of its own
    args.output_dir.mkdir(parents=True, exist_ok=True)
    pipe.save_lora_weights(
        args.output_dir,
        unet_lora_layers={name: tensor.half().cpu() for name, tensor in lora.items()},
        unet_lora_adapter_metadata=about,
    )


if __name__ == "__main__":
    main()
