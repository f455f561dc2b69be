"""Public vision-language sets to sources the loader reads; `run.convert` is the way in."""
