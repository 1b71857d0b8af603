"""The embedded models' training: pictures, text encoders, the repeated token, the loop."""

import time
from pathlib import Path

import numpy as np
import torch
from diffusers import SD3Transformer2DModel
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from train.emoji.captions import build_tokenizer
from train.emoji.examples import read_text_encoder
from train.emoji.fit import Settings, fit
from train.emoji.flow import NO_T5, RepeatedToken
from train.emoji.render import GRID, SIZE, SIZES, objects, pictures, sized, sprite


def test_objects_lie_on_the_grid_and_inside_the_frame():
    """The object keeps its distance from the frame and has one of the sizes."""
    frames = sized(sprite(objects()[0].emoji))
    assert frames.shape == (len(SIZES), SIZE, SIZE, 4)
    made = pictures(frames, np.full(8, 11), np.random.default_rng(0), torch.device("cpu"))
    assert made.dtype == np.uint8 and made.shape == (8, SIZE, SIZE, 3)
    for picture in made:
        painted = np.abs(picture.astype(int) - picture[0, 0]).sum(2) > 150
        rows, columns = np.flatnonzero(painted.any(1)), np.flatnonzero(painted.any(0))
        assert rows[0] >= GRID and columns[0] >= GRID
        assert rows[-1] < SIZE - 1 and columns[-1] < SIZE - 1
        longest = max(np.ptp(rows), np.ptp(columns)) + 1
        assert SIZES[0] - 4 <= longest <= SIZES[-1] + 4


def test_text_encoder_is_that_of_transformers_and_its_projection_the_identity():
    tokens = torch.tensor([[1279, 5, 7, 1280, 1280, 1280]])
    folder = Path(__file__).parent.parent / "assets/emoji/text_encoder"
    with torch.inference_mode():
        expected = CLIPTextModel.from_pretrained(folder).eval()(tokens)
        read = read_text_encoder(CLIPTextModel, folder).eval()(tokens)
        projected = read_text_encoder(CLIPTextModelWithProjection, folder).eval()
        embeds = projected(tokens).text_embeds
    torch.testing.assert_close(read.last_hidden_state, expected.last_hidden_state)
    torch.testing.assert_close(embeds, expected.pooler_output)


def test_a_tokenizer_built_anew_has_the_same_token_ids():
    """A text encoder's training that is started again must read the captions as before."""
    first, second = build_tokenizer(), build_tokenizer()
    assert first.get_vocab() == second.get_vocab()


def test_repeated_token_stands_for_all_of_the_missing_t5():
    """One token of zeros that counts NO_T5 times has the effect of NO_T5 tokens."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=24,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    ).eval()
    x, text, pooled = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 24), torch.randn(2, 24)
    t = torch.tensor([300.0, 800.0])

    def output(zeros: int) -> torch.Tensor:
        context = torch.cat([text, torch.zeros(2, zeros, 24)], 1)
        with torch.inference_mode():
            return transformer(x, context, pooled, t).sample

    expected, without = output(NO_T5), output(1)
    transformer.set_attn_processor(RepeatedToken())
    torch.testing.assert_close(output(1), expected)
    assert (without - expected).abs().max() > 1e-3


def test_training_goes_on_where_it_stopped_and_ends_by_the_clock(tmp_path):
    def train(name: str, steps: int, stop: int | None = None, until: float | None = None):
        torch.manual_seed(0)
        model, calls = nn.Linear(3, 1), []

        def loss(generator: torch.Generator) -> torch.Tensor:
            calls.append(0)
            if len(calls) == stop:
                raise KeyboardInterrupt
            x = torch.randn(8, 3, generator=generator)
            return (model(x) - x.sum(1, keepdim=True)).square().mean()

        try:
            settings = Settings(lr=0.1, steps=steps, save_every=2, until=until)
            fit(model, loss, tmp_path / name, settings)
        except KeyboardInterrupt:
            return None, len(calls)
        return model.weight.detach(), len(calls)

    whole, _ = train("whole.pt", 12)
    assert train("parts.pt", 12, stop=8)[0] is None
    resumed, calls = train("parts.pt", 12)
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
    assert calls == 6
    began = time.time()
    _, calls = train("clock.pt", 1, until=began + 0.5)
    assert calls > 1 and time.time() - began < 5
