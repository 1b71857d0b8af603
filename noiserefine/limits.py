"""The ranges of settings, for the library's checks and the page's sliders alike."""

MAX_SEED = 2**32 - 1
MAX_STEPS = 150
MAX_GUIDANCE_SCALE = 20  # diffusers' g
MAX_STRENGTH = 2  # of the refinement; 1 is as trained
