"""How the embedded models, their judge and their pictures were made."""
