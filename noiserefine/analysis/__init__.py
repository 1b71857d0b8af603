"""The study of images: recipes, comparisons, trajectories, attention, frequencies, plots."""
