"""Import, load and one forward with transformers, as people do it today. usage: transformers_forward.py FOLDER f32|bf16 TOKENS_FILE"""
import json
import sys
import time

start = time.perf_counter()
import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

torch.set_num_threads(2)
folder, dtype, tokens = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype={"f32": torch.float32, "bf16": torch.bfloat16}[dtype]).eval()
ids = torch.tensor([[int(word) for word in open(tokens).read().split()]])
loaded = time.perf_counter()
with torch.no_grad():
    logits = model(ids[:, :-1]).logits
    done = time.perf_counter()
    loss = torch.nn.functional.cross_entropy(logits.float()[0], ids[0, 1:])
    again = time.perf_counter()
    model(ids[:, :-1])
    forward = time.perf_counter() - again
print(json.dumps({"before_forward": loaded - start, "forward": min(done - loaded, forward), "second": forward, "loss": loss.item()}))
