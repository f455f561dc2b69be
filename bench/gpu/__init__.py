"""What a GPU is asked: `make gpu-check`. See `__main__.py`."""
