"""The page, as a Hugging Face Space or `python app.py` starts it; `noiserefine` starts the same."""

from noiserefine.page.launch import demo, main

__all__ = ["demo"]

if __name__ == "__main__":
    main()
