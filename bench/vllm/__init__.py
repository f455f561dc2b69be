"""`make certify-vllm`: does vLLM's CPU build serve what `mvl checkpoint export` writes?

An environment of its own (`.venv-vllm`, about 3.5 GB), a 23 M model with the smallest encoder vLLM
can build, exported in every format, and the same greedy answers asked of both. Not part of the
test suite or of CI. About four minutes on two cores once the environment is there.
"""
