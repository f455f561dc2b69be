"""Greedy answers of vLLM to questions of one type and pruning rate; runs in `.venv-vllm`.

python ask.py RELEASE QUESTIONS.json ANSWERS.json
"""

import json
import os
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main(folder: str, file_asked: str, file_told: str) -> None:
    import numpy as np
    from PIL import Image

    from vllm import LLM, SamplingParams

    with open(file_asked) as file:
        questions = json.load(file)
    first = questions[0]
    engine = LLM(
        model=folder,
        trust_remote_code=True,
        dtype=first["dtype"],
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=1,
        limit_mm_per_prompt={"image": 2, "video": 1},
        video_pruning_rate=first["evs_rate"],
        # Its CPU scan does not give the states between chunks that prefix caching asks for.
        enable_prefix_caching=False,
    )
    answers = {}
    for question in questions:
        data = {}
        if question["images"]:
            data["image"] = [Image.open(path).convert("RGB") for path in question["images"]]
        if question["frames"]:
            frames = np.load(question["frames"], allow_pickle=False)
            data["video"] = [(frames, question["video"])]
        prompt = {"prompt": question["prompt"], "multi_modal_data": data}
        params = SamplingParams(
            temperature=0.0, max_tokens=question["new_tokens"], logprobs=1, ignore_eos=True
        )
        (output,) = engine.generate([prompt], params, use_tqdm=False)
        said = output.outputs[0]
        answers[question["name"]] = {
            "prompt": list(output.prompt_token_ids),
            "tokens": list(said.token_ids),
            "logprobs": [
                step[token].logprob
                for step, token in zip(said.logprobs, said.token_ids, strict=True)
            ],
        }
    with open(file_told, "w") as file:
        json.dump(answers, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
