"""Noisy latents on a pipeline's noise schedule, and the x0 and noise that predictions mean."""

import torch
from diffusers import DiffusionPipeline

from noiserefine.samplers import make_scheduler


class Trajectories:
    """Noisy latents x_t = signal x0 + deviation noise, for epsilon and v prediction."""

    def __init__(self, pipe: DiffusionPipeline):
        scheduler = make_scheduler("DDIM", pipe)
        self.alphas = scheduler.alphas_cumprod.to(pipe.device)
        self.predicts_v = scheduler.config.prediction_type == "v_prediction"
        self.last = scheduler.config.num_train_timesteps - 1

    def signal_and_noise(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factors of x0 and of noise in x_t, (B, 1, 1, 1); t = -1 is x0 itself."""
        alpha = torch.where(t < 0, 1.0, self.alphas[t.clamp(min=0)])[:, None, None, None]
        return alpha.sqrt(), (1 - alpha).sqrt()

    def at(self, t: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Return x_t, (B, C, h, w)."""
        signal, deviation = self.signal_and_noise(t)
        return signal * x0 + deviation * noise

    def truth(self, t: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Return what the network should predict at t."""
        signal, deviation = self.signal_and_noise(t)
        return signal * noise - deviation * x0 if self.predicts_v else noise

    def x0_and_noise(
        self, t: torch.Tensor, x: torch.Tensor, prediction: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x0 and the noise that a prediction at x_t amounts to (equation 2)."""
        signal, deviation = self.signal_and_noise(t)
        if self.predicts_v:
            return signal * x - deviation * prediction, deviation * x + signal * prediction
        return (x - deviation * prediction) / signal, prediction
