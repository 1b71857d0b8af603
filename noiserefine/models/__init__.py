"""Models: the catalogue, how a name becomes a pipeline, users' LoRAs, what is in memory."""
