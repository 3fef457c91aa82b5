"""Other people's formats and models."""
