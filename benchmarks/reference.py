"""transformers `generate` behind a pipe: one JSON line in, one out. Used by `spine.py`."""

from __future__ import annotations

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    """Serve standard input until it ends."""
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    eos = model.generation_config.eos_token_id
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        ids = torch.tensor(job["prompts"])
        began = time.perf_counter()
        with torch.inference_mode():
            whole = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=job["new"],
                do_sample=False,
                pad_token_id=eos,
            )
        seconds = time.perf_counter() - began
        # Only tokens up to a row's end count; the padding behind it is nobody's answer.
        new = whole[:, ids.shape[1] :].tolist()
        tokens = sum(row.index(eos) + 1 if eos in row else len(row) for row in new)
        print(json.dumps({"tokens": tokens, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
