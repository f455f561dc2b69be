"""Greedy answers of vLLM to the questions of one sitting; runs in `.venv-vllm`.

python ask.py SITTING.json ANSWERS.json

Each question is asked alone, its text made by the chat template that lies in the served folder;
then all together; then, videos apart (a chat would sample a file's frames by rules of its own), as
a chat, the way a client of the server asks. What the encoder was shown is kept too: the pixels its
own preprocessing made.
"""

import json
import os
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
# Only the resizing of pictures is ever compiled, which would ask for a C++ compiler.
os.environ["TORCH_COMPILE_DISABLE"] = "1"


def main(file_asked: str, file_told: str) -> None:
    import patches

    with open(file_asked) as file:
        sitting = json.load(file)
    shown = patches.watch_encoder()
    wide = sitting["dtype"] == "float32"
    if wide:
        patches.meet_in_one_type()
    if sitting["quantized"]:
        patches.emulate_quantized()
    engine = _engine(sitting, wide)
    template = engine.get_tokenizer()
    prompts = [_prompt(question, template) for question in sitting["questions"]]
    answers = {}
    for question, prompt in zip(sitting["questions"], prompts, strict=True):
        shown.clear()
        (output,) = engine.generate([prompt], _params(sitting), use_tqdm=False)
        said = _told(output)
        said["pixels"] = _keep(shown, f"{file_told}.{len(answers)}.npy")
        answers[question["name"]] = said
    together = engine.generate(prompts, _params(sitting), use_tqdm=False)
    for answer, beside in zip(answers.values(), together, strict=True):
        answer["again"] = {"together": _told(beside)}
    for question in sitting["questions"]:
        if not question["frames"]:
            answers[question["name"]]["again"]["chat"] = _chat(engine, question, _params(sitting))
    with open(file_told, "w") as file:
        json.dump(answers, file)


def _engine(sitting, wide):
    import torch

    from vllm import LLM

    def in_one_type(config):
        # Also called with an empty one, to ask for the model's type.
        for section in (config, getattr(config, "text_config", config)):
            section.dtype = torch.float32
        return config

    return LLM(
        model=sitting["release"],
        trust_remote_code=True,
        dtype=sitting["dtype"],
        hf_overrides=in_one_type if wide else {},
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=len(sitting["questions"]),
        limit_mm_per_prompt={"image": 2, "video": 1},
        # So that every question goes through preprocessing and encoder.
        mm_processor_cache_gb=0,
        video_pruning_rate=sitting["evs_rate"],
        # Its CPU scan does not give the states between chunks that prefix caching asks for.
        enable_prefix_caching=False,
    )


def _prompt(question, template):
    import numpy as np
    from PIL import Image

    text = template.apply_chat_template(
        question["messages"],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=question["reasoning"],
    )
    data = {}
    if question["images"]:
        data["image"] = [Image.open(path).convert("RGB") for path in question["images"]]
    if question["frames"]:
        frames = np.load(question["frames"], allow_pickle=False)
        data["video"] = [(frames, question["video"])]
    return {"prompt": text, "multi_modal_data": data}


def _chat(engine, question, params):
    from PIL import Image

    def part(shown):
        if shown["type"] != "image":
            return shown
        return {"type": "image_pil", "image_pil": Image.open(shown["image"]).convert("RGB")}

    messages = [
        {**said, "content": said["content"] if isinstance(said["content"], str) else [
            part(shown) for shown in said["content"]
        ]}
        for said in question["messages"]
    ]  # fmt: skip
    thinking = {"enable_thinking": question["reasoning"]}
    (output,) = engine.chat(messages, params, use_tqdm=False, chat_template_kwargs=thinking)
    return _told(output)


def _params(sitting):
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0.0, max_tokens=sitting["new_tokens"], logprobs=1, ignore_eos=True
    )


def _told(output):
    said = output.outputs[0]
    return {
        "prompt": list(output.prompt_token_ids),
        "tokens": list(said.token_ids),
        "logprobs": [
            step[token].logprob for step, token in zip(said.logprobs, said.token_ids, strict=True)
        ],
    }


def _keep(shown, path):
    """Write the pixels of one question, all tiles in order; the file's name, or none."""
    import numpy as np
    import torch

    if not shown:
        return ""
    np.save(path, torch.cat(shown).numpy())
    return path


if __name__ == "__main__":
    main(*sys.argv[1:])
