"""The web page.

From the button to the image:

1. `layout` builds the components, `wiring` connects them. Generate runs JavaScript that settles the
   seed and sets the hidden number `go`; its change calls the handler of the view "compare".
2. `handlers.handler_of` reads the inputs into `Settings` and iterates `handlers.run_view`, the
   function that ZeroGPU gives a card.
3. `jobs.work` checks the settings, gets the models from `noiserefine.models.pool`, and runs the
   view on the worker thread, `stream`.
4. The view, a function of `views`, makes its images with `noiserefine.analysis.recipe.Maker`, which
   draws the noise, refines it and calls the pipeline. It reports `events`.
5. `screen.Screen.show` turns each event into values of the page's components, and writes the PNGs
   (`record`) that `restoring` can read back.

`settings` are the inputs of the page, the API, a link and a PNG; `texts` and `vocabulary` hold
words; `opening` is what is shown before anything was made; `blind` counts the votes;
`share_card` is what messengers show of a link.
"""

import os

# huggingface_hub reads this when it is imported, which the page's modules do after this one. Xet,
# its other way to download, cannot be stopped; HF_HUB_DISABLE_XET=0 in the environment brings it
# back.
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
