"""Training and measuring refiners."""
