# An image for ranks on GPUs: NVIDIA's PyTorch image with causal-conv1d, mamba-ssm, megatron-core and
# this project. Never built where this repository is tested, which has neither a GPU nor a container
# runtime: take it as a recipe. `mvl doctor` inside says what it has, `make gpu-check` measures it.
#
#   docker build --build-arg BASE=nvcr.io/nvidia/pytorch:YY.MM-py3 -t megatron_vl .
#   enroot import -o megatron_vl.sqsh dockerd://megatron_vl:latest      # for sites with pyxis
#   apptainer build megatron_vl.sif docker-daemon://megatron_vl:latest  # for sites with apptainer
#
# BASE brings CUDA, torch, Transformer Engine, apex and flash-attention, built for each other; nothing
# below replaces them. Take the month whose torch is the one that setup.py names (its release notes
# say); with another one the last step still builds, and the test suite is what tells the difference.
ARG BASE
FROM ${BASE}

ENV MAX_JOBS=8 \
    PIP_NO_CACHE_DIR=1

# Kernels of the Mamba layers, compiled against the torch that is here, for every GPU that its nvcc
# knows and they list (neither reads TORCH_CUDA_ARCH_LIST). Versions may be pinned:
# --build-arg MAMBA_SSM=mamba-ssm==2.2.5
ARG CAUSAL_CONV1D=causal-conv1d
ARG MAMBA_SSM=mamba-ssm
RUN CAUSAL_CONV1D_FORCE_BUILD=TRUE pip install --no-build-isolation --no-deps "${CAUSAL_CONV1D}" \
    && MAMBA_FORCE_BUILD=TRUE pip install --no-build-isolation --no-deps "${MAMBA_SSM}"

# The project, then what it asks for except torch, at the versions its tests passed with. The base's
# own constraints come on top (PIP_CONSTRAINT): where the two disagree pip says so and stops.
WORKDIR /opt/megatron_vl
COPY setup.py pyproject.toml constraints.txt README.md ./
COPY megatron_vl megatron_vl
COPY checkpoint_tools checkpoint_tools
COPY launch launch
COPY slurm slurm
COPY stages stages
RUN pip install --no-build-isolation --no-deps --editable . \
    && python -c 'from importlib.metadata import requires; \
print("\n".join(r for r in requires("megatron-vl") if "extra ==" not in r and not r.startswith("torch")))' \
        > /tmp/requirements.txt \
    && grep -E '^(megatron-|omegaconf|safetensors|tokenizers|transformers|simplejpeg|av)' constraints.txt \
        > /tmp/constraints.txt \
    && pip install --constraint /tmp/constraints.txt --requirement /tmp/requirements.txt

# What must be importable together, and the one command that needs no GPU.
RUN python -c "import causal_conv1d, mamba_ssm, megatron.core, transformer_engine.pytorch" \
    && mvl plan stages/nano_12b_v2_vl

# Jobs run the snapshot of the code in their run folder; this copy serves `mvl` itself.
CMD ["mvl", "doctor", "--quick"]
