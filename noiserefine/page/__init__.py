"""The web page: its views, settings, streaming and the records in its files."""
