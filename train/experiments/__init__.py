"""The experiments of the paper, and the comparisons with the refiner."""
